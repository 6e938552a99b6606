"""What a training run looks at on its way: the held-out loss, figures of a few transfers, and a preview sheet."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from isonext.config import InferenceConfig, TrainingConfig
from isonext.data import images
from isonext.data.dataset import LatentSplit
from isonext.errors import UserError, first_line, is_out_of_memory
from isonext.evaluation.evaluator import base_figures, point
from isonext.evaluation.metrics import StyleClassifier, ssim, train_style_classifier
from isonext.flow.transfer import TransferSettings, latents_of
from isonext.models.cost import call_flops, forward_flops, step_flops
from isonext.pipeline import Pipeline, Style, front_line, transfer_settings
from isonext.training.batches import Batch, Samples
from isonext.training.watching import (
    MOST_PREVIEWED,
    MOST_ROWS,
    MOST_TRANSFERRED,
    Operations,
    WatchPlan,
    count_losses,
    plan_watching,
    transfer_evaluations,
)
from isonext.utils.seeding import seeded
from model import VelocityNetwork

MAX_KNOWN = 128  # training pictures that the classifier learns from, over all styles
WINDOW, MIN_CELLS = 64, 8  # side of the part of them that is decoded: pixels, and latent cells at least
CLASSIFIER = {
    "steps": 150,
    "batch_size": 32,
    "largest": 32,
}  # cheap beside evaluate.py's own
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)  # of guidance, among which `auto` chooses
ENOUGH = 0.95  # of the classifier's own accuracy: more style than that only costs structure
WATCHED_SCALE = 2.0  # of validations and previews where the config says auto

#################################################################################
#                                 The validation                                #
#################################################################################


@dataclass
class Validation:
    """How good the averaged network is by now."""

    train: LatentSplit
    val: LatentSplit  # held out; empty where nothing is
    training: TrainingConfig
    inference: InferenceConfig  # of the transfers
    network: VelocityNetwork  # the averaged one
    losses: Callable[[Batch], Tensor]  # (B,) of the averaged network
    samples: Samples  # for the held-out loss
    steps: int  # an epoch
    make_pipeline: Callable[[], Pipeline]  # the averaged network and its autoencoder; asked for once
    figures: "TransferFigures | None" = None  # made when they are first asked for
    front: dict = field(default_factory=dict)  # see `measure_front`

    def __post_init__(self) -> None:
        if self.inference.cfg_scale == "auto" and not can_be_transferred(self.val):
            raise UserError(
                "inference.cfg_scale auto: is measured on held-out pictures of two styles or more, and this store has "
                "none; raise data.val_fraction, or give a number in its place, such as 2"
            )

    @property
    def settings(self) -> TransferSettings:
        """Of the transfers on the way: at one scale all along, so that figures can be compared."""
        scale = WATCHED_SCALE
        if self.inference.method == "map":
            low, high = self.training.stage2_scales
            scale = min(max(scale, low), high)
        return transfer_settings(self.inference, front={"scale": scale})

    @property
    def scales(self) -> list[float]:
        """Among which `auto` chooses; of stage 2, among those that it was taught, from the one that was asked for on: a
        map has at most the style of its teacher at the same scale."""
        if self.inference.method != "map":
            return list(SCALES)
        low, high = self.training.stage2_scales
        if self.inference.cfg_scale != "auto":
            low = self.inference.cfg_scale
        return sorted({low, high, *(scale for scale in SCALES if low <= scale <= high)})

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        return self.make_pipeline()

    @functools.cached_property
    def _counts(self) -> tuple[int, int]:
        """Operations of a step, and of an evaluation of one picture."""
        space = self.val.spec.space
        return step_flops(self.network, self.training.batch_size, space), forward_flops(self.network, 1, space)

    @functools.cached_property
    def plan(self) -> WatchPlan:
        """How many pictures figures and previews are of, and when there are figures."""
        (step, evaluation), spec = self._counts, self.val.spec
        decoding = call_flops(self.pipeline.codec.decode, (1, spec.channels, *spec.space), self.pipeline.device)
        cost = Operations(step, evaluation, decoding, *transfer_evaluations(self.settings))
        return plan_watching(self.training, self.steps, len(spec.styles), len(self.val), cost)

    def validate(self, pictures: int, epoch: int, last: bool) -> dict[str, float]:
        """All figures by the names they have in the log; `pictures` at once are known to fit."""
        numbers = {"val_loss": self.held_out_loss(pictures)}
        if can_be_transferred(self.val):
            with dispensable("figures of transfers"):
                if self.plan.has_figures(self.training, epoch, last):
                    if self.figures is None:
                        count = self.plan.transferred
                        self.figures = TransferFigures(self.pipeline, self.train, self.val, self.settings, count)
                    numbers |= self.figures.measure()
        return numbers

    def measure_front(self) -> None:
        """Style success and SSIM at each of SCALES, and which of those `auto` is, for the checkpoint."""
        with dispensable("front for cfg_scale auto"):
            figures, points = TransferFigures(self.pipeline, self.train, self.val, self.settings), []
            for scale in self.scales:
                numbers = figures.measure(scale)
                success, similarity = numbers["val_style_success"], numbers["val_ssim"]
                points.append({"cfg_scale": scale, "style_success": success, "ssim": similarity})
            self.front = {"scale": choose_scale(points, figures.ceiling), "ceiling": figures.ceiling}
            self.front |= {"pictures": figures.pictures, "points": points}
            print(front_line(self.front))

    @property
    def loss_count(self) -> int:
        """The pictures of the held-out loss."""
        return count_losses(self.training, self.steps, self.samples.held, *self._counts)

    @torch.no_grad()
    def held_out_loss(self, pictures: int) -> float:
        """The loss on held-out samples; `pictures` at once."""
        count = self.loss_count
        batch = self.samples.held_out(count)
        parts = (batch.part(slice(start, start + pictures)) for start in range(0, count, pictures))
        return sum(self.losses(part).sum().item() for part in parts) / count

    def save_preview(self, path: Path, epoch: int, last: bool) -> None:
        """The sheet, of held-out pictures where there are any; not after every epoch where that would cost too much."""
        with dispensable("preview"):
            if not self.plan.has_preview(self.training, epoch, last):
                return
            split = self.val if len(self.val) else self.train
            size = self.plan.rows, self.plan.previewed
            images.save_picture(draw_preview(self.pipeline, split, self.settings, *size), path)


@contextmanager
def dispensable(what: str) -> Iterator[None]:
    """A picture or a figure less is no reason to stop a training run."""
    try:
        yield
    except (UserError, FloatingPointError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        print(f"warning: no {what}: {first_line(error)}")


#################################################################################
#                             Transfers, and the sheet                          #
#################################################################################


def can_be_transferred(val: LatentSplit) -> bool:
    """Two styles or more with held-out pictures in each, large enough for SSIM."""
    spec = val.spec
    return len(spec.styles) > 1 and len(val.styles.unique()) == len(spec.styles) and spec.image_size >= 11


def choose_scale(points: list[dict[str, float]], ceiling: float) -> float:
    """The smallest scale whose style success is ENOUGH of the ceiling; where none is, the smallest of the best.

    `points`: cfg_scale and style_success of each, by rising scale.
    """
    reached = [point for point in points if point["style_success"] >= ENOUGH * ceiling - 1e-9]
    return (reached[0] if reached else max(points, key=lambda point: point["style_success"]))["cfg_scale"]


def pick_by_style(split: LatentSplit, count: int) -> dict[str, Tensor]:
    """Style -> up to `count` of its standardised latents (n, C, h, w), evenly spaced in the split."""
    chosen = {}
    for number, style in enumerate(split.spec.styles):
        index = (split.styles == number).nonzero().flatten()
        chosen[style] = split.batch(index[:: max(1, math.ceil(len(index) / count))])[0]
    return chosen


class TransferFigures:
    """Style success, structure and leakage of a network that is being trained.

    The held-out pictures are those of the store, so what the autoencoder loses is left out of the figures. Each style
    is transferred to the next one. The score is sqrt(style success x SSIM to the source): nothing without the style,
    nothing without the structure. What does not change with the network is made once.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        train: LatentSplit,
        val: LatentSplit,
        settings: TransferSettings,
        count: int = MOST_TRANSFERRED,  # pictures that are transferred, over all styles
    ) -> None:
        styles = pipeline.spec.styles
        self.pipeline, self.settings = pipeline, settings
        self.classifier = self._train_classifier(pick_by_style(train, math.ceil(MAX_KNOWN / len(styles))))
        self.held = list(pick_by_style(val, max(1, count // len(styles))).values())  # (n, C, h, w) of each style
        self.pictures_of = [self._decode(latents) for latents in self.held]
        hits = [self.classifier.predict(part) == style for style, part in enumerate(self.pictures_of)]
        self.ceiling = torch.cat(hits).double().mean().item()  # the classifier's accuracy on them
        self.pictures = sum(map(len, self.held))

    def _train_classifier(self, known: dict[str, Tensor]) -> StyleClassifier:
        """On windows of the training pictures: it sees small crops only, and a VAE takes its time for whole ones."""
        factor, generator = self.pipeline.codec.factor, seeded(0, "windows", 0)
        windows = []
        for latents in known.values():
            cells = min(latents.shape[-1], max(MIN_CELLS, math.ceil(WINDOW / factor)))
            corners = torch.randint(latents.shape[-1] - cells + 1, (len(latents), 2), generator=generator).tolist()
            parts = [x[:, y : y + cells, z : z + cells] for x, (y, z) in zip(latents, corners, strict=True)]
            windows.append(self._decode(torch.stack(parts)))
        labels = [torch.full((len(part),), style) for style, part in enumerate(windows)]
        return train_style_classifier(torch.cat(windows), torch.cat(labels), len(known), **CLASSIFIER)

    def _decode(self, latents: Tensor) -> Tensor:
        """Standardised latents (n, C, h, w) -> pixels in [-1, 1]."""
        side, device = latents.shape[-1] * self.pipeline.codec.factor, self.pipeline.device
        parts = [self.pipeline.decode(part.to(device), side, side).cpu() for part in latents.split(MOST_TRANSFERRED)]
        return torch.cat(parts).clamp(-1, 1)

    def measure(self, scale: float | None = None) -> dict[str, float]:
        """The figures, by the names they have in the log; at another scale of guidance, if one is given."""
        settings = self.settings if scale is None else replace(self.settings, cfg_scale=scale)
        hits, similarities, structures = [], [], {}
        for source, latents in enumerate(self.held):
            target = (source + 1) % len(self.held)
            moved, structures[source] = transferred(self.pipeline, latents, source, [target], settings)
            results = self._decode(moved[0].cpu())
            hits.append(self.classifier.predict(results) == target)
            similarities.append(ssim(results, self.pictures_of[source]))
        success = torch.cat(hits).double().mean().item()
        similarity = torch.cat(similarities).double().mean().item()
        numbers = {"val_style_success": success, "val_ssim": similarity}
        numbers["val_score"] = math.sqrt(success * max(0.0, similarity))
        known = {str(style): x0.cpu() for style, x0 in structures.items() if x0 is not None and len(x0) >= 5}
        if len(known) < len(self.held):  # too few for a probe, or a method that has no structure
            return numbers
        return numbers | {"val_leakage": point(base_figures(known)["leakage"])}


def transferred(
    pipeline: Pipeline, latents: Tensor, source: Style, targets: list[int], settings: TransferSettings
) -> tuple[list[Tensor], Tensor | None]:
    """The latents (n, C, h, w) in every target style, inverted once, and their structure x0, if the method has one."""
    x1 = latents.to(pipeline.device)
    if settings.method in ("flowedit", "map"):
        return [pipeline.transfer(x1, source, target, settings).latents for target in targets], None
    inverted = pipeline.invert(x1, source, settings)
    moved = [pipeline.generate(inverted, source, target, settings).latents for target in targets]
    return moved, latents_of(inverted.state)


def draw_preview(
    pipeline: Pipeline,
    split: LatentSplit,
    settings: TransferSettings,
    rows: int = MOST_ROWS,
    shown: int = MOST_PREVIEWED,
) -> Image.Image:
    """A sheet of `rows` fixed pictures of each style, each transferred to every style; the first `shown` of them."""
    spec = pipeline.spec
    styles = spec.styles[:shown]
    chosen = torch.cat([(split.styles == style).nonzero().flatten()[:rows] for style in range(len(styles))])
    latents, sources = split.batch(chosen)
    moved, _ = transferred(pipeline, latents, sources.to(pipeline.device), list(range(len(styles))), settings)
    side = spec.image_size
    columns = [pipeline.decode(part.to(pipeline.device), side, side) for part in (latents, *moved)]
    lines = [[images.to_picture(pixels) for pixels in line] for line in zip(*columns, strict=True)]
    return images.contact_sheet(lines, ["held out", *(f"as {style}" for style in styles)])
