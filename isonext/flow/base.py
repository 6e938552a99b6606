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

RANK = 64  # factors of a style's layouts
LAYOUT_NUMBERS = 2**22  # of all styles together, at most: 16 MB of a checkpoint


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
    # What S looks like in each style, for generation: a Gaussian over its D = C (h // cells) (w // cells) numbers.
    layout_mean: Tensor = field(default_factory=lambda: torch.empty(0))  # (styles, C, h // cells, w // cells)
    layout_factors: Tensor = field(default_factory=lambda: torch.empty(0))  # (styles, rank, C, ...): their covariance
    layout_rest: Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # (styles, C, ...): deviation beyond the factors

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
    def layout_numbers(self) -> int:
        """How many numbers of white noise `sample` needs for the layout of one picture."""
        return self.layout_factors.shape[1] + self.layout_mean[0].numel() if self.can_sample and self.strength else 0

    @property
    def can_sample(self) -> bool:
        """Whether there is a Gaussian of layouts; a base saved before there was one goes with pictures alone."""
        return not self.strength or self.layout_mean.numel() > 0

    def sample(self, noise: Tensor, layout: Tensor, style: Tensor) -> Tensor:
        """An x0 (B, C, h, w) that goes with no picture, for generation: S is drawn from its style's Gaussian.

        noise, layout: white, independent, of the shapes of x0 and (B, layout_numbers); style (B,); h and w are those
        that the base was fitted to.
        """
        if not self.strength:
            return noise
        mean, factors, rest = (part[style] for part in (self.layout_mean, self.layout_factors, self.layout_rest))
        weights, own = layout[:, : factors.shape[1]], layout[:, factors.shape[1] :].view_as(mean)
        return self._with_low_band(noise, mean + torch.einsum("bk,bkchw->bchw", weights, factors) + rest * own)

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
    """Mean and spread of the low bands of each style, and the Gaussian of their S; white noise at strength 0."""
    if not strength:
        return Base()
    lows = [low_band(latents(style), cells) for style in range(num_styles)]  # (n, C, h', w')
    mean = torch.stack([low.double().mean((0, 2, 3)) for low in lows])
    deviation = torch.stack([low.double().std((0, 2, 3), correction=0) for low in lows])
    deviation = deviation.clamp_min(1e-3)  # a constant channel has no spread that could be made 1
    structures = [(low - m[:, None, None]) / d[:, None, None] for low, m, d in zip(lows, mean, deviation, strict=True)]
    rank = max(1, min(RANK, LAYOUT_NUMBERS // (num_styles * structures[0][0].numel())))
    layouts = [torch.stack(parts) for parts in zip(*(fit_layout(s, rank) for s in structures), strict=True)]
    return Base(strength, cells, mean.float(), deviation.float(), *(part.float() for part in layouts))


def fit_layout(structures: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The Gaussian of S (n, C, h', w'): its mean (C, h', w'), `rank` factors (rank, C, h', w') and the deviation beyond
    them (C, h', w'), so that mean, variance of every number, and the covariance's largest part are those of S.

    Factors are principal components, each as long as S is spread along it (Tipping & Bishop, J. R. Stat. Soc. B 61(3),
    1999, but with a deviation a number).
    """
    mean = structures.mean(0)
    rows = (structures - mean).flatten(1) / max(1, len(structures) - 1) ** 0.5  # covariance = rows.T @ rows
    factors = torch.zeros(rank, rows.shape[1], dtype=rows.dtype)
    strongest = min(rank, len(rows))
    # The n x n matrix has the same spectrum as the D x D one, and there may be far more numbers than pictures.
    vectors = torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -strongest:]
    factors[:strongest] = vectors.T @ rows
    rest = (rows.square().sum(0) - factors.square().sum(0)).clamp_min(0).sqrt()
    return mean, factors.view(rank, *mean.shape), rest.view_as(mean)
