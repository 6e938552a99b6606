"""The field that a leg integrates: the network under one style, guided where asked."""

import torch
from torch import Tensor

from isonext.flow.loss import Model


class GuidedField:
    """The velocity field of one leg: `field(x, t)` with t a number, guided where asked; counts its evaluations.

        v = v_style                                          at scale 1 or outside the interval: one forward
        v = v_style + (scale - 1) (v_style - v_reference)    inside it: both in one forward of twice the batch

    With the null style as reference this is classifier-free guidance (arXiv:2207.12598) on all channels, limited to
    an interval of t (Kynkaanniemi et al., arXiv:2404.07724). With the *source* style it is the contrast of the two
    styles, nothing where they are equal; where they are for the whole batch, one forward is made, as at scale 1.
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
        interval: tuple[float, float] = (0.0, 1.0),  # inclusive
        rescale: float = 0.0,  # from 0, not at all, to 1, wholly
    ) -> None:
        if scale != 1 and reference is None:
            raise ValueError(f"guidance at scale {scale} needs a reference style")
        if reference is not None and style.is_floating_point() and not reference.is_floating_point():
            reference = model.embed(reference)
        self.model, self.style, self.reference, self.interval = model, style, reference, interval
        self.rescale = rescale
        # Decided once: with equal styles a doubled batch would add nothing but the rounding of another batch shape.
        self.scale = 1.0 if reference is not None and torch.equal(style, reference) else scale
        self.nfe = 0  # network evaluations a picture so far

    def __call__(self, x: Tensor, t: float) -> Tensor:
        low, high = self.interval
        if self.scale == 1 or not low <= t <= high:
            self.nfe += 1
            return self.model(x, self._times(x, t), self.style).float()
        self.nfe += 2
        twice = torch.cat([x, x])
        both = self.model(twice, self._times(twice, t), torch.cat([self.style, self.reference]))
        v, v_reference = both.float().chunk(2)
        each = (-1, *[1] * (x.ndim - 1))
        differs = (self.style != self.reference).view(len(x), -1).any(1).view(each)
        guided = v + (self.scale - 1) * differs * (v - v_reference)
        if not self.rescale:
            return guided
        before, after = (each.flatten(1).std(1, correction=0) for each in (v, guided))
        shrink = torch.where(after > 0, before / after, 1.0)
        return guided * (1 + self.rescale * (shrink - 1)).view(each)

    @staticmethod
    def _times(x: Tensor, t: float) -> Tensor:
        return torch.full((len(x),), t, dtype=torch.float32, device=x.device)
