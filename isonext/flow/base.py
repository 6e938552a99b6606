"""The base p(x0) that the flow starts from: white noise, or noise whose low band carries the picture's layout.

From white noise a flow has to learn by luck which x0 belongs to which picture. The *structure-anchored* base couples
the two: the low band of x0, the means over squares of `cells` x `cells` latent cells, is

    strength S + sqrt(1 - strength^2) eps,        S = (low(x1) - mean_style) / deviation_style  per channel,

and eps alone fills the rest. S is the low band without its style's palette and contrast, so that x0 keeps the layout
and as little of the style as a mean and a deviation can take away. Such a coupling of x0 to x1 leaves the flow, its
loss and its solvers as they are (stochastic interpolants with data-dependent couplings, Albergo et al.,
arXiv:2310.03725); what it needs is known at training only, but for generation from noise, see `sample`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

ANCHORED = 0.8  # the strength that "auto" takes where it anchors
MOST_TONE = 0.2  # of the low band's variance; measured on drawings and photographs, see docs/quality.md
LAYOUTS = 1024  # a style, at most
LAYOUT_NUMBERS = 2**22  # of all styles together, at most: 8 MB of a checkpoint, in float16


def low_band(x: Tensor, cells: int) -> Tensor:
    """(B, C, h, w) -> (B, C, h // cells, w // cells): the orthonormal low band; white noise gives white noise."""
    return F.avg_pool2d(x, cells) * cells


@dataclass
class Base:
    """As made by `fit_base`; without arguments it is white noise."""

    strength: float = 0.0  # from 0, white noise, to 1, no noise in the low band
    cells: int = 1  # side of a square, in latent cells
    mean: Tensor = field(default_factory=lambda: torch.empty(0))  # (styles, C) of the low band
    deviation: Tensor = field(default_factory=lambda: torch.empty(0))  # (styles, C)
    # S of some training pictures of each style (styles, n, C, h // cells, w // cells) float16, for generation.
    layouts: Tensor = field(default_factory=lambda: torch.empty(0))

    def structure(self, x1: Tensor, style: Tensor) -> Tensor:
        """S of latents (B, C, h, w) of styles (B,): (B, C, h // cells, w // cells)."""
        mean, deviation = (each.to(x1.device)[style][:, :, None, None] for each in (self.mean, self.deviation))
        return (low_band(x1, self.cells) - mean) / deviation

    def x0(self, noise: Tensor, x1: Tensor, style: Tensor) -> Tensor:
        """The x0 (B, C, h, w) that goes with pictures x1 of styles (B,), made of white noise of the same shape; the
        noise itself where a picture is smaller than a square."""
        if not self.strength or min(x1.shape[-2:]) < self.cells:
            return noise
        return self._with_low_band(noise, self.structure(x1, style))

    def above(self, x1: Tensor) -> Tensor:
        """x1 (B, C, h, w) less its low band: what noise may be paired with, where the low band is not noise's alone."""
        if not self.strength:
            return x1
        low = F.interpolate(low_band(x1, self.cells) / self.cells, scale_factor=self.cells, mode="nearest")
        return x1 - F.pad(low, self._border(x1, low))

    @property
    def can_sample(self) -> bool:
        """Whether there are layouts; a base saved before there were goes with pictures alone."""
        return not self.strength or self.layouts.numel() > 0

    def sample(self, noise: Tensor, place: Tensor, style: Tensor) -> Tensor:
        """An x0 (B, C, h, w) that goes with no picture, for generation: with the layout of some training picture.

        A Gaussian of S has its mean and its covariance, and yet none of its pictures: they differ in kind more than a
        Gaussian's draws do, and what the flow makes of those has no shape.

        noise: white, of the shape of x0; place (B,) in [0, 1): which of the layouts; style (B,); h and w are those that
        the base was fitted to.
        """
        if not self.strength:
            return noise
        number = (place * self.layouts.shape[1]).long()
        return self._with_low_band(noise, self.layouts[style, number].float())

    def _with_low_band(self, noise: Tensor, structure: Tensor) -> Tensor:
        """A border that no whole square covers stays noise."""
        low = low_band(noise, self.cells)
        wanted = self.strength * structure + math.sqrt(1 - self.strength**2) * low
        change = F.interpolate((wanted - low) / self.cells, scale_factor=self.cells, mode="nearest")
        return noise + F.pad(change, self._border(noise, change))

    @staticmethod
    def _border(x: Tensor, squares: Tensor) -> tuple[int, int, int, int]:
        """Padding (left, right, top, bottom) that brings whole squares to the size of x."""
        down, right = (whole - part for whole, part in zip(x.shape[-2:], squares.shape[-2:], strict=True))
        return 0, right, 0, down


def fit_base(
    latents: Callable[[int], Tensor],  # style -> some of its standardised latents (n, C, h, w)
    num_styles: int,
    strength: float,
    cells: int,
) -> Base:
    """Mean and spread of the low bands of each style, and some layouts; white noise at strength 0."""
    if not strength:
        return Base()
    lows = [low_band(latents(style), cells) for style in range(num_styles)]  # (n, C, h', w')
    mean = torch.stack([low.double().mean((0, 2, 3)) for low in lows])
    deviation = torch.stack([low.double().std((0, 2, 3), correction=0) for low in lows])
    deviation = deviation.clamp_min(1e-3)  # a constant channel has no spread that could be made 1
    structures = [(low - m[:, None, None]) / d[:, None, None] for low, m, d in zip(lows, mean, deviation, strict=True)]
    most = LAYOUT_NUMBERS // (num_styles * structures[0][0].numel())
    count = max(1, min(LAYOUTS, most, max(map(len, structures))))
    layouts = torch.stack([spread_out(structure, count) for structure in structures])
    return Base(strength, cells, mean.float(), deviation.float(), layouts.half())


def choose_strength(latents: Callable[[int], Tensor], num_styles: int, cells: int) -> tuple[float, str]:
    """What anchor_strength "auto" is for these latents (see `fit_base`), and a line that says why."""
    share = tone_share([low_band(latents(style), cells) for style in range(num_styles)])
    strength, side = (ANCHORED, "below") if share < MOST_TONE else (0.0, "not below")
    return strength, (
        f"training.anchor_strength auto is {strength:g}: {share:.2f} of the low band's variance is whole pictures' "
        f"light and colour, {side} {MOST_TONE:g}"
    )


def tone_share(lows: Sequence[Tensor]) -> float:
    """How much of the variance of low bands (n, C, h', w'), one a style, lies between the means of whole pictures.

    Such means are light and colour. Where they are much of S, an x0 that is anchored to S carries a picture's look.
    """
    shares = []
    for low in lows:
        centred = low.double() - low.double().mean((0, 2, 3), keepdim=True)
        between, total = centred.mean((2, 3)).square().mean(0), centred.square().mean((0, 2, 3))
        shares.append((between / total.clamp_min(1e-6)).mean())
    return torch.stack(shares).mean().item()


def spread_out(rows: Tensor, count: int) -> Tensor:
    """`count` of the rows (n, ...), evenly spaced; where there are fewer, each as often as any other to within one."""
    return rows[torch.arange(count) * len(rows) // count]
