"""What a training run looks at on its way: the held-out loss, figures of a few transfers, and a preview sheet."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from isonext.config import InferenceConfig
from isonext.data import images
from isonext.data.dataset import LatentSplit
from isonext.errors import UserError, first_line
from isonext.evaluation.evaluator import Evaluator, point
from isonext.flow.base import Base
from isonext.flow.transfer import TransferSettings
from isonext.pipeline import Pipeline, front_line, transfer_settings
from isonext.training.batches import Batch
from isonext.utils.device import is_out_of_memory
from isonext.utils.seeding import seeded

MAX_LOSSES = 512  # pictures of the held-out loss
MAX_PREVIEWED = 8  # styles on the preview sheet: its cost grows with their square
MAX_KNOWN, MAX_TRANSFERRED = 256, 32  # over all styles: what the classifier learns from, and what is transferred
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
    base: Base
    seed: int
    inference: InferenceConfig  # of the transfers
    losses: Callable[[Batch], Tensor]  # (B,) of the averaged network
    make_pipeline: Callable[[], Pipeline]  # the averaged network and its autoencoder
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
        return transfer_settings(self.inference, front={"scale": WATCHED_SCALE})

    def validate(self, pictures: int) -> dict[str, float]:
        """All figures by the names they have in the log; `pictures` at once are known to fit."""
        numbers = {"val_loss": self.held_out_loss(pictures)}
        if can_be_transferred(self.val):
            with dispensable("figures of transfers"):
                numbers |= self._figures().measure()
        return numbers

    def _figures(self) -> "TransferFigures":
        self.figures = self.figures or TransferFigures(self.make_pipeline(), self.train, self.val, self.settings)
        return self.figures

    def measure_front(self) -> None:
        """Style success and SSIM at each of SCALES, and which of those `auto` is, for the checkpoint."""
        with dispensable("front for cfg_scale auto"):
            figures, points = self._figures(), []
            for scale in SCALES:
                numbers = figures.measure(scale)
                success, similarity = numbers["val_style_success"], numbers["val_ssim"]
                points.append({"cfg_scale": scale, "style_success": success, "ssim": similarity})
            self.front = {"scale": choose_scale(points, figures.ceiling), "ceiling": figures.ceiling}
            self.front |= {"pictures": figures.pictures, "points": points}
            print(front_line(self.front))

    @torch.no_grad()
    def held_out_loss(self, pictures: int) -> float:
        """The loss on held-out latents, with noise and times that never change."""
        total, count = 0.0, min(len(self.val), MAX_LOSSES)
        generator = seeded(self.seed, "validation", 0)
        chosen = torch.randperm(len(self.val), generator=generator)[:count]
        noise = torch.randn(count, *self.val.latents.shape[2:], generator=generator)
        times = (torch.arange(count) + 0.5) / count  # spread evenly, so that few pictures suffice
        for start in range(0, count, pictures):
            part = slice(start, start + pictures)
            x1, style = self.val.batch(chosen[part])
            total += self.losses(Batch(self.base.x0(noise[part], x1, style), x1, times[part], style)).sum().item()
        return total / count

    def save_preview(self, path: Path) -> None:
        """The sheet, of held-out pictures where there are any."""
        with dispensable("preview"):
            split = self.val if len(self.val) else self.train
            images.save_picture(draw_preview(self.make_pipeline(), split, self.settings), path)


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
    nothing without the structure.
    """

    def __init__(self, pipeline: Pipeline, train: LatentSplit, val: LatentSplit, settings: TransferSettings) -> None:
        styles, size = pipeline.spec.styles, pipeline.spec.image_size
        known, held = (
            pick_by_style(part, math.ceil(n / len(styles))) for part, n in ((train, MAX_KNOWN), (val, MAX_TRANSFERRED))
        )

        def decoded(latents: Tensor) -> Tensor:
            return pipeline.decode(latents.to(pipeline.device), size, size).cpu().clamp(-1, 1)

        pictures = {
            style: {str(number): pixels for number, pixels in enumerate(decoded(latents))}
            for style, latents in held.items()
        }
        self.pipeline, self.settings = pipeline, settings
        self.evaluator = Evaluator(pipeline, known, pictures, pairs=False)
        self.directions = list(zip(styles, styles[1:] + styles[:1], strict=True))

    @property
    def ceiling(self) -> float:
        """The classifier's accuracy on the held-out pictures themselves."""
        return point(self.evaluator.classifier_accuracy)

    @property
    def pictures(self) -> int:
        """That are transferred."""
        return sum(map(len, self.evaluator.test.values()))

    def measure(self, scale: float | None = None) -> dict[str, float]:
        """The figures, by the names they have in the log; at another scale of guidance, if one is given."""
        settings = self.settings if scale is None else replace(self.settings, cfg_scale=scale)
        result = self.evaluator.measure(self.pipeline, settings, "", self.directions, quick=True, quiet=True)
        success, similarity = (point(result.mean(figure)) for figure in ("style_success", "ssim_to_source"))
        numbers = {"val_style_success": success, "val_ssim": similarity}
        numbers["val_score"] = math.sqrt(success * max(0.0, similarity))
        return numbers | ({"val_leakage": point(result.base["leakage"])} if result.base else {})


def draw_preview(pipeline: Pipeline, split: LatentSplit, settings: TransferSettings) -> Image.Image:
    """A sheet of three fixed pictures of each style, each transferred to every style; the first eight of them."""
    spec = pipeline.spec
    styles = spec.styles[:MAX_PREVIEWED]
    chosen = torch.cat([(split.styles == style).nonzero().flatten()[:3] for style in range(len(styles))])
    latents, sources = split.batch(chosen)
    columns = [pipeline.decode(latents.to(pipeline.device), spec.image_size, spec.image_size)]
    for target in range(len(styles)):
        moved = pipeline.transfer(latents, sources.to(pipeline.device), target, settings)
        columns.append(pipeline.decode(moved.latents, spec.image_size, spec.image_size))
    rows = [[images.to_picture(pixels) for pixels in row] for row in zip(*columns, strict=True)]
    return images.contact_sheet(rows, ["held-out picture", *(f"as {style}" for style in styles)])
