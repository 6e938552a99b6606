"""The flow: one path, one loss, one way to guide. Tensors in, tensors out.

The convention, here and nowhere else: t = 0 is the base (Gaussian, "structure"), t = 1 is data, and

    x_t = (1 - t) x0 + t x1,        v = d x_t / dt = x1 - x0.

This straight line is the optimal-transport path of conditional flow matching (Lipman et al., arXiv:2210.02747,
eq. 20 with sigma_min = 0; Liu et al., arXiv:2209.03003). *Minibatch OT* is another thing: an assignment of noise
to data inside a batch (Tong et al., arXiv:2302.00482; Pooladian et al., arXiv:2304.14772), see `pair_noise`.
"""

from collections.abc import Callable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Any], Tensor]  # (x (B, ...), t (B,), style (B,), or a pair) -> v (B, ...)
Loss = Callable[[Velocity, Tensor, Tensor, Tensor, Any], Tensor]  # (model, x0, x1, t, style) -> (B,)

#################################################################################
#                                    Training                                   #
#################################################################################


def path(x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The point x_t and the target velocity v; x0, x1 (B, ...), t (B,)."""
    t = t.view(-1, *[1] * (x1.ndim - 1))
    return (1 - t) * x0 + t * x1, x1 - x0


def sample_time(count: int, kind: str, generator: torch.Generator) -> Tensor:
    """(count,) times in [0, 1): `uniform`, or `logit_normal` (sigmoid of N(0, 1): Esser et al., arXiv:2403.03206)."""
    if kind == "uniform":
        return torch.rand(count, generator=generator)
    if kind == "logit_normal":
        return torch.sigmoid(torch.randn(count, generator=generator))
    raise ValueError(f"time sampling {kind!r} is not one of uniform, logit_normal")


def drop_labels(style: Tensor, probability: float, null_style: int, generator: torch.Generator) -> Tensor:
    """Each label becomes the null style with the given probability (Ho & Salimans, arXiv:2207.12598)."""
    dropped = torch.rand(style.shape, generator=generator) < probability
    return torch.where(dropped, null_style, style)


def pair_noise(x0: Tensor, x1: Tensor, style: Tensor) -> Tensor:
    """Minibatch OT: x0 permuted inside each style so that the sum of |x0 - x1|^2 is the least there is.

    Only noise moves, and only between pictures of one style: an assignment across styles would give each
    style its own p(x0), and x0 would then tell the style that it is meant to have lost.
    """
    paired = x0.clone()
    for label in style.unique():
        index = (style == label).nonzero().flatten()
        # |x0 - x1|^2 = |x0|^2 + |x1|^2 - 2 x0.x1, and the first two do not depend on the assignment.
        similarity = x1[index].flatten(1).double() @ x0[index].flatten(1).double().T
        _, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
        paired[index] = x0[index[torch.as_tensor(columns, device=index.device)]]
    return paired


def flow_loss(model: Velocity, x0: Tensor, x1: Tensor, t: Tensor, style: Any) -> Tensor:
    """(B,) mean squared error of the velocity of each sample: E |model(x_t, t, style) - (x1 - x0)|^2."""
    xt, target = path(x0, x1, t)
    return (model(xt, t, style).float() - target).square().flatten(1).mean(1)


def map_loss(model: Velocity, x0: Tensor, x1: Tensor, t: Tensor, pair: Any) -> Tensor:
    """(B,) mean absolute error of the velocity of each sample, x1 - x0 being its teacher's.

    Squares would have the map follow its teacher most where that fails, in the cells that it fills with debris; of what
    the teacher does in like places, this learns the median (docs/few_steps.md has both).
    """
    xt, target = path(x0, x1, t)
    return (model(xt, t, pair).float() - target).abs().flatten(1).mean(1)
