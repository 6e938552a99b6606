"""Which style a picture has, by the network itself: the one under whose label it predicts the velocity best.

No classifier is kept with a checkpoint. The flow is one: for each style the flow-matching loss of the picture is
measured at a few times with the same noise, and the lowest loss names the style (Li et al., arXiv:2303.16203).
"""

import torch
from torch import Tensor

from isonext.pipeline import Pipeline
from isonext.utils.seeding import seeded

TIMES = (0.3, 0.5, 0.7, 0.9)
NOISES = 2  # at each time
MOST_STYLES = 32  # more would take longer than choosing one by hand


@torch.inference_mode()
def style_losses(pipeline: Pipeline, latents: Tensor) -> list[float]:
    """The loss of standardised latents (1, C, h, w) under each style; [] where there are too many styles to try."""
    styles = len(pipeline.spec.styles)
    if styles > MOST_STYLES:
        return []
    count = NOISES * len(TIMES)
    x1 = latents.to(pipeline.device).expand(count, *latents.shape[1:])
    noise = torch.randn(x1.shape, generator=seeded(0, "guess", 0)).to(pipeline.device)
    t = torch.tensor(TIMES * NOISES, device=pipeline.device)
    share = t.view(-1, 1, 1, 1)
    losses = []
    for number in range(styles):
        style = torch.full((count,), number, device=pipeline.device)
        x0 = pipeline.x0(noise, x1, style)
        velocity = pipeline((1 - share) * x0 + share * x1, t, style)
        losses.append((velocity.float() - (x1 - x0)).square().mean().item())
    return losses
