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
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


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
    power: Tensor = field(default_factory=lambda: torch.empty(0))  # (C, h // cells, w // cells) of S by frequency

    def structure(self, x1: Tensor, style: Tensor) -> Tensor:
        """S of latents (B, C, h, w) of styles (B,): (B, C, h // cells, w // cells)."""
        mean, deviation = (each.to(x1.device)[style][:, :, None, None] for each in (self.mean, self.deviation))
        return (low_band(x1, self.cells) - mean) / deviation

    def x0(self, noise: Tensor, x1: Tensor, style: Tensor) -> Tensor:
        """The x0 (B, C, h, w) that goes with pictures x1 of styles (B,), made of white noise of the same shape."""
        return self._with_low_band(noise, self.structure(x1, style)) if self.strength else noise

    def sample(self, noise: Tensor, layout: Tensor) -> Tensor:
        """An x0 (B, C, h, w) that goes with no picture, for generation: S is drawn from the Gaussian of its power.

        noise, layout: white, independent, of the shapes of x0 and of S; h and w are those that the base was fitted to.
        """
        if not self.strength:
            return noise
        return self._with_low_band(noise, torch.fft.ifft2(torch.fft.fft2(layout) * self.power.sqrt()).real)

    def _with_low_band(self, noise: Tensor, structure: Tensor) -> Tensor:
        """A border that no whole square covers stays noise."""
        low = low_band(noise, self.cells)
        wanted = self.strength * structure + math.sqrt(1 - self.strength**2) * low
        change = F.interpolate((wanted - low) / self.cells, scale_factor=self.cells, mode="nearest")
        down, right = (whole - part for whole, part in zip(noise.shape[-2:], change.shape[-2:], strict=True))
        return noise + F.pad(change, (0, right, 0, down))


def fit_base(
    latents: Callable[[int], Tensor],  # style -> some of its standardised latents (n, C, h, w)
    num_styles: int,
    strength: float,
    cells: int,
) -> Base:
    """Mean and spread of the low bands of each style, and the power of S over all; white noise at strength 0."""
    if not strength:
        return Base()
    lows = [low_band(latents(style), cells) for style in range(num_styles)]  # (n, C, h', w')
    mean = torch.stack([low.double().mean((0, 2, 3)) for low in lows])
    deviation = torch.stack([low.double().std((0, 2, 3), correction=0) for low in lows])
    deviation = deviation.clamp_min(1e-3)  # a constant channel has no spread that could be made 1
    each = [(low - m[:, None, None]) / d[:, None, None] for low, m, d in zip(lows, mean, deviation, strict=True)]
    power = torch.cat([torch.fft.fft2(s).abs().square() for s in each]).mean(0) / lows[0][0, 0].numel()
    return Base(strength, cells, mean.float(), deviation.float(), power.float())
