"""What a training run looks at on its way: the cheap part of evaluate.py on a fixed handful, and a preview sheet."""

import math
from pathlib import Path

import torch
from torch import Tensor

from isonext.data import images
from isonext.data.dataset import LatentSplit
from isonext.evaluation.evaluator import Evaluator
from isonext.flow.transfer import TransferSettings
from isonext.pipeline import Pipeline

PREVIEWED = 8  # styles on the preview sheet, at most: its cost grows with their square
KNOWN, HELD = 256, 32  # pictures over all styles: those the classifier learns from, and those that are transferred


def some_of_each(split: LatentSplit, count: int) -> dict[str, Tensor]:
    """Style -> up to `count` of its standardised latents (n, C, h, w), evenly spaced in the split."""
    chosen = {}
    for number, style in enumerate(split.spec.styles):
        index = (split.styles == number).nonzero().flatten()
        chosen[style] = split.batch(index[:: max(1, math.ceil(len(index) / count))])[0]
    return chosen


class Judge:
    """Style success, structure and leakage of a network that is being trained.

    The held-out pictures are those of the store, so what the autoencoder loses is left out of the figures. Each style
    is transferred to the next one. The score is sqrt(style success x SSIM to the source): nothing without the style,
    nothing without the structure.
    """

    def __init__(self, pipeline: Pipeline, train: LatentSplit, val: LatentSplit, settings: TransferSettings) -> None:
        styles, size = pipeline.spec.styles, pipeline.spec.image_size
        known, held = (some_of_each(part, math.ceil(n / len(styles))) for part, n in ((train, KNOWN), (val, HELD)))
        pictures = {
            style: dict(enumerate(pipeline.decode(latents.to(pipeline.device), size, size).cpu().clamp(-1, 1)))
            for style, latents in held.items()
        }
        self.pipeline, self.settings = pipeline, settings
        self.evaluator = Evaluator(pipeline, known, pictures, pairs=False)
        self.directions = list(zip(styles, styles[1:] + styles[:1], strict=True))

    @staticmethod
    def can_judge(val: LatentSplit) -> bool:
        """Two styles or more with held-out pictures in each, large enough for SSIM."""
        spec = val.spec
        return len(spec.styles) > 1 and len(val.styles.unique()) == len(spec.styles) and spec.image_size >= 11

    def __call__(self) -> dict[str, float]:
        """The figures, by the names they have in the log."""
        result = self.evaluator.measure(self.pipeline, self.settings, "", self.directions, quick=True, quiet=True)
        success, similarity = (result.mean(figure).mean for figure in ("style_success", "ssim_to_source"))
        numbers = {"val_style_success": success, "val_ssim": similarity}
        numbers["val_score"] = math.sqrt(success * max(0.0, similarity))
        return numbers | ({"val_leakage": result.base["leakage"].mean} if result.base else {})


def save_preview(pipeline: Pipeline, split: LatentSplit, settings: TransferSettings, path: Path) -> None:
    """A sheet of three fixed pictures of each style, each transferred to every style; the first eight of them."""
    spec = pipeline.spec
    styles = spec.styles[:PREVIEWED]
    chosen = torch.cat([(split.styles == style).nonzero().flatten()[:3] for style in range(len(styles))])
    latents, sources = split.batch(chosen)
    columns = [pipeline.decode(latents.to(pipeline.device), spec.image_size, spec.image_size)]
    for target in range(len(styles)):
        made = pipeline.transfer(latents, sources.to(pipeline.device), target, settings)
        columns.append(pipeline.decode(made.latents, spec.image_size, spec.image_size))
    rows = [[images.to_picture(pixels) for pixels in row] for row in zip(*columns, strict=True)]
    sheet = images.contact_sheet(rows, ["held-out picture", *(f"as {style}" for style in styles)])
    images.save_picture(sheet, path)
