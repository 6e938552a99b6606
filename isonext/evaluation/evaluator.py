"""What a checkpoint's transfers are worth on held-out pictures: every figure of evaluate.py, with its uncertainty.

An `Evaluator` is built once of the training and the test pictures; it then measures any checkpoint and settings.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, permutations
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from isonext.data import images
from isonext.errors import UserError
from isonext.evaluation.intervals import Estimate, bootstrap, estimate, share, share_difference
from isonext.evaluation.metrics import (
    StyleClassifier,
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
from isonext.evaluation.perceptual import Perceptual
from isonext.flow.certificate import Certificate
from isonext.flow.solvers import LATTICE, LatticeState
from isonext.flow.transfer import TransferSettings, latents_of
from isonext.pipeline import Pipeline

LOSSLESS = 100.0  # dB: what equal pictures count for in a mean; JSON has no infinity
BATCH = 32
CLASSIFIED = 2**28  # colour values of the training pictures that the classifier learns from: 1 GB

Pictures = dict[str, dict[str, Tensor]]  # style -> name, see `load_styles` -> pixels (3, S, S)
Figure = Tensor | Estimate | float | int  # a tensor (N,) holds a value a picture


@dataclass
class Direction:
    """One source and target style under one setting."""

    source: str
    target: str
    names: list[str]  # of its N pictures
    values: dict[str, Figure]
    rows: list[list[Tensor]]  # (source, transfer[, true pair]) of every picture

    def by_picture(self, figure: str) -> Tensor:
        """(N,) the values of a figure that has one a picture."""
        values = self.values[figure]
        assert isinstance(values, Tensor), f"{figure} has no value a picture"
        return values

    @functools.cached_property
    def figures(self) -> dict[str, Estimate | float | int]:
        """What is reported: a value a picture as its mean with an interval."""
        return {name: estimate(value) if isinstance(value, Tensor) else value for name, value in self.values.items()}


@dataclass
class Evaluation:
    """One checkpoint under one setting."""

    name: str
    settings: TransferSettings
    paired: bool  # pictures of one name are one picture in every style
    directions: list[Direction] = field(default_factory=list)
    base: dict[str, Estimate | float] = field(default_factory=dict)  # figures of x0, over all styles

    def mean(self, figure: str) -> Estimate | float | None:
        """Over all directions; None where the figure was not measured.

        A picture is transferred to several styles, and those transfers are not independent: where there is a value a
        picture, the mean of each picture's own comes first, and the interval is over pictures.
        """
        values = [direction.values[figure] for direction in self.directions if figure in direction.values]
        if len(values) < len(self.directions):
            return None
        tensors = [value for value in values if isinstance(value, Tensor)]
        if len(tensors) < len(values):
            return sum(point(value) for value in values) / len(values)
        means = torch.tensor(list(self.by_picture(figure).values()), dtype=torch.float64)
        return share(means) if all(value.dtype == torch.bool for value in tensors) else bootstrap(means)

    def by_picture(self, figure: str) -> dict[Hashable, float]:
        """A figure that has a value a picture: the mean over the picture's transfers, by picture."""
        numbers: dict[Hashable, list[float]] = defaultdict(list)
        for direction in self.directions:
            for name, number in zip(direction.names, direction.by_picture(figure).tolist(), strict=True):
                numbers[name if self.paired else (direction.source, name)].append(number)
        return {picture: sum(values) / len(values) for picture, values in numbers.items()}

    def difference(self, other: "Evaluation", figure: str) -> Estimate:
        """This evaluation's figure less the other's, picture by picture: what is hard for both cancels."""
        mine, theirs = self.by_picture(figure), other.by_picture(figure)
        differences = torch.tensor([mine[picture] - theirs[picture] for picture in mine], dtype=torch.float64)
        of_shares = self.directions[0].by_picture(figure).dtype == torch.bool
        return share_difference(differences) if of_shares else bootstrap(differences)


def point(value: Figure | None) -> float:
    """A figure without its interval."""
    if value is None:
        raise ValueError("the figure was not measured")
    return value.mean if isinstance(value, Estimate) else float(value)


@dataclass
class _Transfers:
    """What became of the pictures of one style on the way to another."""

    latents: list[Tensor] = field(default_factory=list)  # (B, C, h, w) a batch
    cycles: list[Tensor] = field(default_factory=list)  # (B,) rms of a -> b -> a
    certificate: Certificate = field(default_factory=Certificate)  # of the way back


def load_styles(
    root: Path,
    styles: Sequence[str],
    size: int,  # pixels, square
    limit: int | None = None,  # pictures a style
    names: dict[str, list[Path]] | None = None,  # those of each style; all there are if None
    skipped: list[str] | None = None,  # is told of bad pictures, which are printed too
) -> Pictures:
    """One folder a style; every style must be there, bad pictures are skipped.

    A picture is called after its file, without suffix; where two of one style differ in that alone, with it.
    """
    found = names or _find(root, styles)
    counts = [Counter(path.with_suffix("") for path in paths) for paths in found.values()]
    shared = {stem for tally in counts for stem, count in tally.items() if count > 1}
    pictures: Pictures = {style: {} for style in found}
    for style, paths in found.items():
        for path, pixels in _opened(root / style, size, limit, paths, skipped):
            stem = path.with_suffix("")
            pictures[style][(path if stem in shared else stem).as_posix()] = pixels
    return pictures


def encode_styles(
    pipeline: Pipeline,
    root: Path,
    names: dict[str, list[Path]] | None = None,
    skipped: list[str] | None = None,
) -> dict[str, Tensor]:
    """Style -> the standardised latents (N, C, h, w) of its pictures: as `load_styles`, but a batch at a time.

    Training pictures may be more than memory holds; their latents are some fifty times smaller.
    """
    latents, found = {}, names or _find(root, pipeline.spec.styles)
    for style, paths in found.items():
        parts, pictures = [], _opened(root / style, pipeline.spec.image_size, None, paths, skipped)
        while batch := [pixels for _, pixels in islice(pictures, BATCH)]:
            parts.append(pipeline.encode(torch.stack(batch)).cpu())
        latents[style] = torch.cat(parts)
    return latents


def _find(root: Path, styles: Sequence[str]) -> dict[str, list[Path]]:
    """Style -> the names of its pictures in its folder; says what was left out."""
    left_out = Counter[str]()
    found = {style: images.find_pictures(root / style, left_out) for style in styles}
    if left_out:
        print(f"{root}: {images.left_out_line(left_out)}")
    return found


def _opened(
    folder: Path, size: int, limit: int | None, names: list[Path], skipped: list[str] | None
) -> Iterator[tuple[Path, Tensor]]:
    """The pictures of a folder, each as its name in it and its pixels."""
    found = False
    for name in names[:limit]:
        try:
            pixels = images.to_bytes(images.open_square(folder / name, size))
        except UserError as error:
            print(f"skipped: {error}")
            if skipped is not None:
                skipped.append(str(error))
            continue
        found = True
        yield name, images.to_pixels(pixels)
    if not found:
        raise UserError(f"{folder}: no pictures of style {folder.name}; --data needs a folder for each style")


class Evaluator:
    """Training latents and test pictures, a style classifier, and what the autoencoder alone loses."""

    def __init__(
        self,
        pipeline: Pipeline,
        train: dict[str, Tensor],  # style -> standardised latents (N, C, h, w), see `encode_styles`
        test: Pictures,
        pairs: bool,
        perceptual: Perceptual | None = None,  # FID, KID and LPIPS, if wanted
    ) -> None:
        self.perceptual = perceptual
        self.train_latents, self.test, self.pairs, self.styles = train, test, pairs, pipeline.spec.styles
        for source, target in permutations(self.styles, 2):
            if pairs and not test[source].keys() & test[target].keys():
                raise UserError(f"--pairs: no file name of {source} is one of {target} as well")
        self.test_latents = {style: _encode(pipeline, _stack(test[style])) for style in self.styles}
        # The classifier sees pictures that went through the codec, so that its blur does not pass for a style.
        per_style = max(16, CLASSIFIED // (3 * pipeline.spec.image_size**2 * len(self.styles)))
        samples = {style: train[style][:: math.ceil(len(train[style]) / per_style)] for style in self.styles}
        self.train_pictures = {style: _decode(pipeline, latents) for style, latents in samples.items()}
        self.classifier = _classifier_of(self.train_pictures)
        rebuilt = {style: _decode(pipeline, self.test_latents[style]) for style in self.styles}
        correct = [self.classifier.predict(rebuilt[style]) == number for number, style in enumerate(self.styles)]
        pictures = self._picture_numbers(self.styles) if pairs else None
        self.classifier_accuracy = estimate(torch.cat(correct), pictures)
        fidelity = [psnr(_stack(test[style]), rebuilt[style]).clamp_max(LOSSLESS) for style in self.styles]
        self.reconstruction_psnr = estimate(torch.cat(fidelity), pictures)

    def measure(
        self,
        pipeline: Pipeline,
        settings: TransferSettings,
        name: str,
        directions: list[tuple[str, str]] | None = None,  # all ordered pairs if None
        quick: bool = False,  # no way back: neither the certificate nor the cycle, which are half of the work
        quiet: bool | None = None,
    ) -> Evaluation:
        """Transfer the test pictures of every style to every other and measure."""
        result, structures = Evaluation(name, settings, self.pairs), {}
        directions = directions or list(permutations(self.styles, 2))
        with tqdm(total=len(directions), desc=name or "evaluating", unit="direction", disable=quiet) as bar:
            for source in dict.fromkeys(source for source, _ in directions):
                targets = [target for start, target in directions if start == source]
                transfers, structures[source] = self._transfer(pipeline, settings, source, targets, quick, bar)
                for target, transferred in transfers.items():
                    results = _decode(pipeline, torch.cat(transferred.latents))
                    result.directions.append(self._direction(source, target, transferred, results))
        known = {style: x0 for style, x0 in structures.items() if x0 is not None and len(x0) >= 5}
        if 1 < len(known) == len(structures):
            result.base = base_figures(known, self._picture_numbers(list(structures)) if self.pairs else None)
        return result

    def _picture_numbers(self, styles: list[str]) -> Tensor:
        """(N,) for the test pictures of these styles, one after another: equal numbers are one picture."""
        names = [name for style in styles for name in self.test[style]]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return torch.tensor([numbers[name] for name in names])

    def _transfer(
        self, pipeline: Pipeline, settings: TransferSettings, source: str, targets: list[str], quick: bool, bar: tqdm
    ) -> tuple[dict[str, _Transfers], Tensor | None]:
        """All test pictures of a style to every target; their structures x0 (N, C, h, w), none of flowedit and map.

        A batch is inverted once for all targets.
        """
        a, transfers, structures = self.styles.index(source), {target: _Transfers() for target in targets}, []
        batches = self.test_latents[source].split(BATCH)
        for batch in batches:
            x1 = batch.to(pipeline.device)
            inverted = None if settings.method == "flowedit" else pipeline.invert(x1, a, settings)
            if inverted and settings.method != "map":  # whose structure is the picture
                structures.append(latents_of(inverted.state).cpu())
            for target, transferred in transfers.items():
                b = self.styles.index(target)
                there = (
                    pipeline.generate(inverted, a, b, settings) if inverted else pipeline.transfer(x1, a, b, settings)
                )
                transferred.latents.append(there.latents.cpu())
                bar.update(1 / len(batches))
                if quick:
                    continue
                back = pipeline.transfer(there.latents, b, a, settings).latents
                transferred.cycles.append((back - x1).square().flatten(1).mean(1).sqrt().cpu())
                if inverted:
                    undone = pipeline.undo(there, a, b, settings)[1]
                    transferred.certificate.compare(LatticeState.at_picture(x1), undone)
        return transfers, torch.cat(structures) if structures else None

    def _direction(self, source: str, target: str, transferred: _Transfers, results: Tensor) -> Direction:
        """Every figure of one direction; `results` (N, 3, S, S) are the transfers of all the source's pictures."""
        partners = self.test[target]
        chosen = [number for number, name in enumerate(self.test[source]) if not self.pairs or name in partners]
        names = [list(self.test[source])[number] for number in chosen]
        latents, results = torch.cat(transferred.latents)[chosen], results[chosen]
        before = torch.stack([self.test[source][name] for name in names])
        truth = torch.stack([partners[name] for name in names]) if self.pairs else None
        values: dict[str, Figure] = {**self._style(results, before, target)}
        values |= self._structure(results, before, truth)
        values |= self._distribution(latents, target)
        if self.perceptual:
            values |= self.perceptual.figures(results, before, _stack(self.test[target]))
        if transferred.cycles:
            values["cycle"] = torch.cat(transferred.cycles)[chosen]
        certificate = transferred.certificate
        if certificate.elements:
            values |= {"round_trip_differing": certificate.differing, "round_trip_elements": certificate.elements}
            values["round_trip_max"] = certificate.largest * LATTICE  # in deviations of the latents
        columns = [before, results] + ([truth] if self.pairs else [])
        return Direction(source, target, names, values, [list(row) for row in zip(*columns, strict=True)])

    def _style(self, results: Tensor, before: Tensor, target: str) -> dict[str, Figure]:
        number, real = self.styles.index(target), _stack(self.test[target])
        return {
            "style_success": self.classifier.predict(results) == number,
            "style_success_before": self.classifier.predict(before) == number,
            "swd": sliced_wasserstein(results, real),
            "swd_before": sliced_wasserstein(before, real),
            "swd_floor": sliced_wasserstein(self.train_pictures[target], real),  # training against held-out pictures
            "lab": lab_distance(results, real),
            "lab_before": lab_distance(before, real),
        }

    def _structure(self, results: Tensor, before: Tensor, truth: Tensor | None) -> dict[str, Figure]:
        values: dict[str, Figure] = {
            "ssim_to_source": ssim(results, before),
            "edge_f1_to_source": edge_f1(results, before),
            "self_similarity_to_source": self_similarity_distance(results, before),
        }
        if truth is None:
            return values
        for when, pictures in (("", results), ("_before", before)):
            values |= {
                f"ssim_to_pair{when}": ssim(pictures, truth),
                f"edge_f1_to_pair{when}": edge_f1(pictures, truth),
                f"self_similarity_to_pair{when}": self_similarity_distance(pictures, truth),
                f"psnr_to_pair{when}": psnr(pictures, truth).clamp_max(LOSSLESS),
                f"retrieval{when}": retrieval(pictures, truth),
            }
        return values

    def _distribution(self, latents: Tensor, target: str) -> dict[str, Figure]:
        train, test = self.train_latents[target], self.test_latents[target]
        of_train, of_results, of_test = (latent_features(part) for part in (train, latents, test))
        values: dict[str, Figure] = {
            "nearest": nearest_distance(latents, train),
            "nearest_held_out": nearest_distance(test, train),  # of the target's own pictures, not of the sources
        }
        if min(len(of_train), len(of_results), len(of_test)) < 2:  # one picture has no spread
            return values
        return values | {
            "fld": frechet_distance(of_results, of_train),
            "fld_floor": frechet_distance(of_test, of_train),
            "kld": kernel_estimate(of_results, of_train),
            "kld_floor": kernel_estimate(of_test, of_train),
        }


def base_figures(structures: dict[str, Tensor], pictures: Tensor | None = None) -> dict[str, Estimate | float]:
    """How far the structures x0 of all styles are from what they should be: noise that does not tell the style.

    `pictures` (N,) numbers them where some are of one picture in several styles.

    `leakage` is the accuracy of a linear probe for the source style (chance is best) on x0 and its square, pooled to
    4 x 4; `low_band` the mean power below a quarter of the highest frequency over that of all (1 for white noise).
    """
    x0 = torch.cat(list(structures.values()))
    labels = torch.cat([torch.full((len(part),), number) for number, part in enumerate(structures.values())])
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.cat([x0, x0.square()], 1), 4).flatten(1)
    power = torch.fft.fft2(x0).abs().square().mean((0, 1))
    height, width = (torch.fft.fftfreq(side).abs() for side in x0.shape[2:])
    low = torch.maximum(height[:, None], width[None]) <= 0.125
    varying = torch.ones_like(low)
    low[0, 0] = varying[0, 0] = False  # the mean has a figure of its own
    return {
        "leakage": estimate(probe_accuracy(pooled, labels, pictures), pictures),
        "leakage_chance": max(len(part) for part in structures.values()) / len(x0),
        "mean": x0.mean().item(),
        "deviation": x0.std().item(),
        "low_band": (power[low].mean() / power[varying].mean()).item(),
    }


def _stack(pictures: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(pictures.values()))


def _encode(pipeline: Pipeline, pixels: Tensor) -> Tensor:
    return torch.cat([pipeline.encode(part).cpu() for part in pixels.split(BATCH)])


def _decode(pipeline: Pipeline, latents: Tensor) -> Tensor:
    side = pipeline.spec.image_size
    parts = [pipeline.decode(part.to(pipeline.device), side, side).cpu() for part in latents.split(BATCH)]
    return torch.cat(parts).clamp(-1, 1)


def _classifier_of(pictures: dict[str, Tensor]) -> StyleClassifier:
    """Trained on pictures (N, 3, S, S) by style, the styles in id order."""
    labels = [torch.full((len(part),), number) for number, part in enumerate(pictures.values())]
    return train_style_classifier(torch.cat(list(pictures.values())), torch.cat(labels), len(pictures))
