"""The field that a leg integrates: the network under one style, guided where asked; or stage 2's, of two styles."""

from typing import Protocol

import torch
from torch import Tensor


class Model(Protocol):
    """What a leg needs of a network; `embed` only where styles are embeddings."""

    @property
    def null_style(self) -> int: ...  # the id that stands for a dropped label

    def __call__(self, x: Tensor, t: Tensor, style: Tensor, /) -> Tensor: ...  # (B, ...), (B,), (B,) -> v (B, ...)

    def embed(self, style: Tensor) -> Tensor: ...  # ids (B,) -> (B, style_dim)


class GuidedField:
    """The velocity field of one leg: `field(x, t)` with t a number, guided where asked; counts its evaluations.

        v = v_style                                          at scale 1: one forward
        v = v_style + (scale - 1) (v_style - v_reference)    else: both in one forward of twice the batch

    With the null style as reference this is classifier-free guidance (arXiv:2207.12598) on all channels. With the
    *source* style it is the contrast of the two styles, nothing where they are equal; where they are for the whole
    batch, one forward is made, as at scale 1.
    `rescale` brings the deviation of a guided velocity that far back to the unguided one's (Lin et al.,
    arXiv:2305.08891, eq. 15 and 16).

    Styles are ids (B,) int64, or embeddings (B, style_dim) that lie between those of two styles.
    """

    def __init__(
        self,
        model: Model,
        style: Tensor,
        scale: float = 1.0,
        reference: Tensor | None = None,  # needed when scale is not 1
        rescale: float = 0.0,  # from 0, not at all, to 1, wholly
    ) -> None:
        if scale != 1 and reference is None:
            raise ValueError(f"guidance at scale {scale} needs a reference style")
        if reference is not None and style.is_floating_point() and not reference.is_floating_point():
            reference = model.embed(reference)
        self.model, self.style, self.reference, self.rescale = model, style, reference, rescale
        # Decided once: with equal styles a doubled batch would add nothing but the rounding of another batch shape.
        self.scale = 1.0 if reference is not None and torch.equal(style, reference) else scale
        self.nfe = 0  # network evaluations a picture so far

    def __call__(self, x: Tensor, t: float) -> Tensor:
        if self.scale == 1:
            self.nfe += 1
            return self.model(x, _times(x, t), self.style).float()
        return self._plain_and_guided(x, t)[1]

    def change_from(self, before: "GuidedField", x: Tensor, t: float) -> Tensor:
        """self(x, t) - before(x, t), where the two differ in that one of them is guided: two evaluations, not three.

        The same bits, but for the sign, as `before.change_from(self, x, t)`.
        """
        guided, sign = (self, 1) if self.scale != 1 else (before, -1)
        if guided.scale == 1:
            return torch.zeros_like(x)
        plain, v = guided._plain_and_guided(x, t)
        return sign * (v - plain)

    def _plain_and_guided(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        self.nfe += 2
        twice = torch.cat([x, x])
        assert self.reference is not None  # as the scale is not 1
        both = self.model(twice, _times(twice, t), torch.cat([self.style, self.reference]))
        v, v_reference = both.float().chunk(2)
        each = (-1, *[1] * (x.ndim - 1))
        differs = self.style.ne(self.reference).view(len(x), -1).any(1).view(each)
        guided = v + (self.scale - 1) * differs * (v - v_reference)
        if not self.rescale:
            return v, guided
        before, after = (part.flatten(1).std(1, correction=0) for part in (v, guided))
        shrink = torch.where(after > 0, before / after, 1.0)
        return v, guided * (1 + self.rescale * (shrink - 1)).view(each)


class Map(Protocol):
    """What a straight leg needs of stage 2's network."""

    def map_velocity(self, x: Tensor, t: Tensor, source: Tensor, target: Tensor, scale: Tensor, /) -> Tensor: ...

    def map_embed(self, style: Tensor) -> Tensor: ...  # ids (B,) -> (B, style_dim)


class MapField:
    """The velocity of stage 2's straight leg from pictures of style `source` (B,) to those of style `target`, ids or
    embeddings of the map; counts its evaluations. 0 in pictures whose styles are equal: those stay as they are."""

    def __init__(self, model: Map, source: Tensor, target: Tensor, scale: float) -> None:
        self.model, self.styles = model, (source, target)
        self.scale = torch.full((len(source),), scale, dtype=torch.float32, device=source.device)
        equal = (model.map_embed(source) == target).all(1) if target.is_floating_point() else source == target
        self.moves = ~equal
        self.nfe = 0  # network evaluations a picture so far

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.nfe += 1
        v = self.model.map_velocity(x, _times(x, t), *self.styles, self.scale).float()
        return v * self.moves.view(-1, *[1] * (x.ndim - 1))


def _times(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float32, device=x.device)
