"""What a checkpoint's transfers are worth on held-out pictures: every figure of evaluate.py, with its uncertainty.

A `Ruler` is made once from the training and the test pictures; it then measures any checkpoint and settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import images
from cli import UserError
from metrics import (
    Estimate,
    StyleClassifier,
    bootstrap,
    edge_f1,
    frechet_distance,
    kernel_estimate,
    lab_distance,
    latent_features,
    nearest_distance,
    probe_accuracy,
    psnr,
    retrieval,
    self_similarity_distance,
    sliced_wasserstein,
    ssim,
    train_style_classifier,
)
from pipeline import Pipeline
from solvers import LATTICE, LatticeState
from structure import Certificate
from transfers import TransferSettings, latents_of

LOSSLESS = 100.0  # dB: what equal pictures count for in a mean; JSON has no infinity
BATCH = 32

Pictures = dict[str, dict[str, Tensor]]  # style -> file name without suffix -> pixels (3, S, S)


@dataclass
class Direction:
    """One source and target style under one setting."""

    source: str
    target: str
    pictures: int
    figures: dict[str, Estimate | float | int]  # means over pictures carry an interval
    rows: list[list[Tensor]]  # (source, transfer[, true pair]) of every picture
    scores: Tensor  # (N,) SSIM to the source, by which a sheet picks best, median and worst


@dataclass
class Evaluation:
    """One checkpoint under one setting."""

    name: str
    settings: TransferSettings
    directions: list[Direction] = field(default_factory=list)
    base: dict[str, Estimate | float] = field(default_factory=dict)  # figures of x0, over all styles

    def mean(self, figure: str) -> float | None:
        """Over the directions; None where the figure was not measured."""
        values = [each.figures.get(figure) for each in self.directions]
        if any(value is None for value in values):
            return None
        return sum(value.mean if isinstance(value, Estimate) else value for value in values) / len(values)


def load_styles(
    root: Path,
    styles: Sequence[str],
    size: int,  # pixels, square
    limit: int | None = None,  # pictures a style
    names: dict[str, list[Path]] | None = None,  # those of each style; all there are if None
) -> Pictures:
    """One folder a style; every style must be there, bad pictures are skipped."""
    loaded: Pictures = {}
    for style in styles:
        loaded[style] = {}
        for name in (names[style] if names else images.find_pictures(root / style))[:limit]:
            try:
                picture = images.square(images.open_picture(root / style / name), size)
            except UserError as error:
                print(f"skipped: {error}")
                continue
            loaded[style][name.with_suffix("").as_posix()] = images.to_pixels(images.to_bytes(picture))
        if not loaded[style]:
            raise UserError(f"{root / style}: no pictures of style {style}; --data needs a folder for each style")
    return loaded


class Ruler:
    """Training and test pictures, a style classifier, and what the autoencoder alone loses."""

    def __init__(self, pipeline: Pipeline, train: Pictures, test: Pictures, pairs: bool) -> None:
        self.test, self.pairs, self.styles = test, pairs, pipeline.spec.styles
        self.train_latents = {style: _encode(pipeline, _stack(train[style])) for style in self.styles}
        self.test_latents = {style: _encode(pipeline, _stack(test[style])) for style in self.styles}
        # The classifier sees pictures that went through the codec, so that its blur does not pass for a style.
        size = (pipeline.spec.image_size,) * 2
        seen = [_decode(pipeline, self.train_latents[style], size) for style in self.styles]
        labels = [torch.full((len(part),), number) for number, part in enumerate(seen)]
        self.classifier: StyleClassifier = train_style_classifier(torch.cat(seen), torch.cat(labels), len(seen))
        self.seen = dict(zip(self.styles, seen, strict=True))
        rebuilt = {style: _decode(pipeline, self.test_latents[style], size) for style in self.styles}
        hits = [self.classifier.predict(rebuilt[style]) == number for number, style in enumerate(self.styles)]
        self.classifier_accuracy = bootstrap(torch.cat(hits))
        losses = [psnr(_stack(test[style]), rebuilt[style]).clamp_max(LOSSLESS) for style in self.styles]
        self.reconstruction_psnr = bootstrap(torch.cat(losses))

    def measure(
        self,
        pipeline: Pipeline,
        how: TransferSettings,
        name: str,
        directions: list[tuple[str, str]] | None = None,  # all ordered pairs if None
        quiet: bool | None = None,
    ) -> Evaluation:
        """Transfer the test pictures of every style to every other and measure."""
        result, structures = Evaluation(name, how), {}
        directions = directions or list(permutations(self.styles, 2))
        for source, target in tqdm(directions, desc=name or "evaluating", unit="direction", disable=quiet):
            direction, x0 = self._direction(pipeline, how, source, target)
            result.directions.append(direction)
            structures[source] = x0
        if len(structures) > 1 and all(x0 is not None and len(x0) >= 5 for x0 in structures.values()):
            result.base = base_figures(structures)
        return result

    def _direction(
        self, pipeline: Pipeline, how: TransferSettings, source: str, target: str
    ) -> tuple[Direction, Tensor | None]:
        """The figures of one direction, and the structures x0 (N, C, h, w) of its pictures (None for flowedit)."""
        names = [name for name in self.test[source] if not self.pairs or name in self.test[target]]
        if not names:
            raise UserError(f"--pairs: no file name of {source} is one of {target} as well")
        before = torch.stack([self.test[source][name] for name in names])
        truth = torch.stack([self.test[target][name] for name in names]) if self.pairs else None
        a, b = self.styles.index(source), self.styles.index(target)
        latents, x0, cycles, trips = [], [], [], Certificate()
        for part in before.split(BATCH):
            x1 = pipeline.encode(part)
            made = pipeline.transfer(x1, a, b, how)
            latents.append(made.latents.cpu())
            again = pipeline.transfer(made.latents, b, a, how).latents
            cycles.append((again - x1).square().flatten(1).mean(1).sqrt().cpu())
            if made.end is not None:
                x0.append(latents_of(made.start).cpu())
                trips.compare(LatticeState.at_picture(x1), pipeline.undo(made.end, a, b, how)[1])
        latents = torch.cat(latents)
        results = _decode(pipeline, latents, tuple(before.shape[-2:]))
        scores = ssim(results, before)
        figures = self._style(results, before, target) | self._structure(results, before, truth, scores)
        figures |= self._distribution(latents, target)
        figures["cycle"] = bootstrap(torch.cat(cycles))
        if trips.elements:
            figures |= {"round_trip_differing": trips.differing, "round_trip_elements": trips.elements}
            figures["round_trip_max"] = trips.largest * LATTICE  # in deviations of the latents
        columns = [before, results] + ([truth] if self.pairs else [])
        rows = [list(row) for row in zip(*columns, strict=True)]
        return Direction(source, target, len(names), figures, rows, scores), torch.cat(x0) if x0 else None

    def _style(self, results: Tensor, before: Tensor, target: str) -> dict[str, Estimate | float]:
        number, real = self.styles.index(target), _stack(self.test[target])
        return {
            "style_success": bootstrap(self.classifier.predict(results) == number),
            "style_success_before": bootstrap(self.classifier.predict(before) == number),
            "swd": sliced_wasserstein(results, real),
            "swd_before": sliced_wasserstein(before, real),
            "swd_floor": sliced_wasserstein(self.seen[target], real),  # training against held-out pictures
            "lab": lab_distance(results, real),
            "lab_before": lab_distance(before, real),
        }

    def _structure(
        self, results: Tensor, before: Tensor, truth: Tensor | None, scores: Tensor
    ) -> dict[str, Estimate | float]:
        figures = {
            "ssim_to_source": bootstrap(scores),
            "edge_f1_to_source": bootstrap(edge_f1(results, before)),
            "self_similarity_to_source": bootstrap(self_similarity_distance(results, before)),
        }
        if truth is None:
            return figures
        for when, pictures in (("", results), ("_before", before)):
            figures |= {
                f"ssim_to_pair{when}": bootstrap(ssim(pictures, truth)),
                f"edge_f1_to_pair{when}": bootstrap(edge_f1(pictures, truth)),
                f"self_similarity_to_pair{when}": bootstrap(self_similarity_distance(pictures, truth)),
                f"psnr_to_pair{when}": bootstrap(psnr(pictures, truth).clamp_max(LOSSLESS)),
                f"retrieval{when}": bootstrap(retrieval(pictures, truth)),
            }
        return figures

    def _distribution(self, latents: Tensor, target: str) -> dict[str, Estimate | float]:
        train, test = self.train_latents[target], self.test_latents[target]
        known, made, held = (latent_features(each) for each in (train, latents, test))
        figures = {
            "nearest": bootstrap(nearest_distance(latents, train)),
            "nearest_held_out": bootstrap(nearest_distance(test, train)),
        }
        if min(len(known), len(made), len(held)) < 2:  # one picture has no spread
            return figures
        return figures | {
            "fld": frechet_distance(made, known),
            "fld_floor": frechet_distance(held, known),
            "kld": kernel_estimate(made, known),
            "kld_floor": kernel_estimate(held, known),
        }


def base_figures(structures: dict[str, Tensor]) -> dict[str, Estimate | float]:
    """How far the structures x0 of all styles are from what they should be: noise that does not tell the style.

    `leakage` is the accuracy of a linear probe for the source style (chance is best) on x0 and its square, pooled to
    4 x 4; `low_band` the mean power below a quarter of the highest frequency over that of all (1 for white noise).
    """
    x0 = torch.cat(list(structures.values()))
    labels = torch.cat([torch.full((len(part),), number) for number, part in enumerate(structures.values())])
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.cat([x0, x0.square()], 1), 4).flatten(1)
    power = torch.fft.fft2(x0).abs().square().mean((0, 1))
    height, width = (torch.fft.fftfreq(side).abs() for side in x0.shape[2:])
    low = torch.maximum(height[:, None], width[None]) <= 0.125
    low[0, 0] = False  # the mean has a figure of its own
    everything = torch.ones_like(low)
    everything[0, 0] = False
    return {
        "leakage": bootstrap(probe_accuracy(pooled, labels)),
        "leakage_chance": max(len(part) for part in structures.values()) / len(x0),
        "mean": x0.mean().item(),
        "deviation": x0.std().item(),
        "low_band": (power[low].mean() / power[everything].mean()).item(),
    }


def _stack(pictures: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(pictures.values()))


def _encode(pipeline: Pipeline, pixels: Tensor) -> Tensor:
    return torch.cat([pipeline.encode(part).cpu() for part in pixels.split(BATCH)])


def _decode(pipeline: Pipeline, latents: Tensor, size: tuple[int, int]) -> Tensor:
    parts = [pipeline.decode(part.to(pipeline.device), *size).cpu() for part in latents.split(BATCH)]
    return torch.cat(parts).clamp(-1, 1)
