"""The network of stage 2: IsoNext on the straight line from a picture to its transfer, one network for all pairs.

Stage 1's flow leads from noise to each style, and a transfer is two legs of it. Stage 2 learns where both legs together
lead: x0 is the picture's latents and x1 those of the transfer, by stage 1 at some scale of guidance. The velocity of

    x_t = (1 - t) x0 + t x1,        v = x1 - x0

is nearly constant along the line, so that a leg of one step is a transfer (rectified flow: Liu et al.,
arXiv:2209.03003, with the teacher's coupling in place of noise and data).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import IsoNext


class Pair(NamedTuple):
    """What a transfer is: from which style to which, and how strong."""

    source: Tensor  # (B,) int64
    target: Tensor  # (B,) int64, or embeddings (B, style_dim) that lie between those of two styles
    scale: Tensor  # (B,) float32: the teacher's guidance, 1 is none


class FlowMap(IsoNext):
    """The velocity of a straight leg, v = model(x, t, pair); x (B, latent_channels, h, w) of any size, t (B,).

    It starts as stage 1's network under the target style: what is new has weights of zero. Guidance is an input and
    costs no second evaluation.
    """

    def __init__(self, latent_channels: int, num_styles: int, **options) -> None:
        super().__init__(latent_channels, num_styles, **options)
        width = self.style.embedding_dim  # type: ignore[union-attr]  # of IsoNext there always is one
        self.source = nn.Embedding(num_styles, width)
        self.guidance = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.source.weight)
        nn.init.zeros_(self.guidance.weight)

    def embed_pair(self, pair: Pair) -> Tensor:
        """e(target) + source(source) + guidance((scale - 1) (e(target) - e(source))): (B, style_dim), in float32."""
        with torch.autocast(pair.scale.device.type, enabled=False):
            target = pair.target if pair.target.is_floating_point() else self.embed(pair.target)
            contrast = target - self.embed(pair.source)
            return target + self.source(pair.source) + self.guidance((pair.scale[:, None] - 1) * contrast)

    def forward(self, x: Tensor, t: Tensor, style: Pair) -> Tensor:  # type: ignore[override]  # a pair of styles
        return super().forward(x, t, self.embed_pair(style))
