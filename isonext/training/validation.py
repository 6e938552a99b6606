"""What a training run looks at on its way: the held-out loss, figures of a few transfers, and a preview sheet."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from isonext.config import InferenceConfig
from isonext.data import images
from isonext.data.dataset import LatentSplit
from isonext.errors import UserError, first_line, is_out_of_memory
from isonext.evaluation.evaluator import Evaluator, point
from isonext.flow.base import Base
from isonext.flow.transfer import TransferSettings
from isonext.pipeline import Pipeline, transfer_settings
from isonext.training.batches import Batch
from isonext.utils.seeding import seeded

MAX_LOSSES = 512  # pictures of the held-out loss
MAX_PREVIEWED = 8  # styles on the preview sheet: its cost grows with their square
MAX_KNOWN, MAX_TRANSFERRED = 256, 32  # over all styles: what the classifier learns from, and what is transferred

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

    def validate(self, pictures: int) -> dict[str, float]:
        """All figures by the names they have in the log; `pictures` at once are known to fit."""
        numbers = {"val_loss": self.held_out_loss(pictures)}
        if can_be_transferred(self.val):
            with dispensable("figures of transfers"):
                settings = transfer_settings(self.inference)
                self.figures = self.figures or TransferFigures(self.make_pipeline(), self.train, self.val, settings)
                numbers |= self.figures.measure()
        return numbers

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
            split, settings = self.val if len(self.val) else self.train, transfer_settings(self.inference)
            images.save_picture(draw_preview(self.make_pipeline(), split, settings), path)


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

    def measure(self) -> dict[str, float]:
        """The figures, by the names they have in the log."""
        result = self.evaluator.measure(self.pipeline, self.settings, "", self.directions, quick=True, quiet=True)
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
    return images.contact_sheet(rows, ["held out", *(f"as {style}" for style in styles)])
