"""ODE solvers: explicit one-step methods, their inversion by fixed point, and the reversible lattice leapfrog.

A *grid* is a list of N + 1 times. Generation runs it from 0 to 1, inversion runs the same field on the same grid
backwards: never with a negated v as well. A *field* is a function (x, t) -> v with t a number.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

VelocityField = Callable[[Tensor, float], Tensor]

LATTICE = 2.0**-20  # the spacing of the integer lattice: 1e-6 of a standard deviation of the latents
LARGEST = 2**52  # lattice points; sums of what lies below stay far from overflow


def time_grid(
    num_steps: int, start: float = 0.0, end: float = 1.0, kind: str = "uniform", shift: float = 1.0
) -> list[float]:
    """N + 1 times from `start` to `end`, both hit exactly; `uniform`, or `cosine`: finer towards both ends.

    `shift` s moves a time u of [0, 1] to s u / (1 + (s - 1) u) (Esser et al., arXiv:2403.03206, eq. 23): above 1 the
    steps are finer towards `end`, below 1 towards `start`.
    """
    if num_steps < 1:
        raise ValueError(f"a leg needs at least 1 step, not {num_steps}")
    if kind not in ("uniform", "cosine"):
        raise ValueError(f"time grid {kind!r} is not one of uniform, cosine")
    unit = [i / num_steps for i in range(num_steps)]
    if kind == "cosine":
        unit = [(1 - math.cos(math.pi * u)) / 2 for u in unit]
    unit = [shift * u / (1 + (shift - 1) * u) for u in unit]
    return [start + (end - start) * u for u in unit] + [end]


def with_times(grid: Sequence[float], times: Sequence[float]) -> list[float]:
    """The rising grid with these times put in, where they lie inside it and no time of the grid is theirs already."""
    inside = {time for time in times if grid[0] < time < grid[-1] and min(abs(time - t) for t in grid) > 1e-9}
    return sorted([*grid, *inside])


#################################################################################
#                            Explicit one-step methods                          #
#################################################################################


def euler_step(field: VelocityField, x: Tensor, a: float, b: float) -> Tensor:
    return x + (b - a) * field(x, a)


def midpoint_step(field: VelocityField, x: Tensor, a: float, b: float) -> Tensor:
    middle = x + (b - a) / 2 * field(x, a)
    return x + (b - a) * field(middle, (a + b) / 2)


def heun_step(field: VelocityField, x: Tensor, a: float, b: float) -> Tensor:
    v = field(x, a)
    return x + (b - a) / 2 * (v + field(x + (b - a) * v, b))


def rk4_step(field: VelocityField, x: Tensor, a: float, b: float) -> Tensor:
    h, middle = b - a, (a + b) / 2
    k1 = field(x, a)
    k2 = field(x + h / 2 * k1, middle)
    k3 = field(x + h / 2 * k2, middle)
    k4 = field(x + h * k3, b)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


Step = Callable[[VelocityField, Tensor, float, float], Tensor]
ONE_STEP_METHODS: dict[str, Step] = {"euler": euler_step, "midpoint": midpoint_step, "heun": heun_step, "rk4": rk4_step}


def integrate(
    field: VelocityField,
    x: Tensor,
    grid: Sequence[float],
    method: str,
    clamp: float | None = None,  # bounds the state after every step, in units of x
    trail: list[Tensor] | None = None,  # is given the state after every step
) -> Tensor:
    """x at grid[0] -> x at grid[-1]."""
    step, peaks = ONE_STEP_METHODS[method], [x.abs().amax()]  # looked at in the end: a clamp would hide an infinity
    for a, b in pairwise(grid):
        x = step(field, x, a, b)
        peaks.append(x.abs().amax())
        x = x if clamp is None else x.clamp(-clamp, clamp)
        if trail is not None:
            trail.append(x)
    check_finite(torch.stack(peaks).amax())
    return x


def integrate_back(
    field: VelocityField,
    y: Tensor,  # (B, ...) float32
    grid: Sequence[float],  # falling: from where y is to where x is sought
    method: str,
    tolerance: float,
    trail: list[tuple[Tensor, Tensor]] | None = None,  # is given the state and the residual so far after every step
) -> tuple[Tensor, Tensor]:
    """The x whose steps on the rising grid lead to y, and how far each sample misses (B,): its largest residual.

    Each step solves x = y - Psi_h(x), where x + Psi_h(x) is the explicit step, by Anderson's acceleration of the
    fixed-point iteration. A residual above `tolerance` says that a sample did not converge, or has no inverse.
    """
    step = ONE_STEP_METHODS[method]
    worst = torch.zeros(len(y), device=y.device)
    for b, a in pairwise(grid):
        y, residual = _invert_step(partial(_forward, step, field, a, b), step(field, y, b, a), y, tolerance)
        worst = torch.maximum(worst, residual)
        if trail is not None:
            trail.append((y, worst))
    return y, worst


def _forward(step: Step, field: VelocityField, a: float, b: float, x: Tensor) -> Tensor:
    return step(field, x, a, b)


def _invert_step(
    forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, tolerance: float, limit: int = 40, memory: int = 5
) -> tuple[Tensor, Tensor]:
    """x (B, ...) such that forward(x) = y, from a first guess; the best that was met, and its residual (B,)."""
    best, residual = x, torch.full((len(x),), math.inf, device=x.device)
    points: list[Tensor] = []  # the last few iterates (B, n)
    misses: list[Tensor] = []  # what each of them lacks
    for _ in range(limit):
        miss = y - forward(x)
        size = miss.abs().flatten(1).amax(1)
        better = (size < residual) & (residual > tolerance)  # a sample that has converged waits for the others
        best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), x, best)
        residual = torch.where(better, size, residual)
        if (residual <= tolerance).all():
            break
        points, misses = [*points[1 - memory :], x.flatten(1)], [*misses[1 - memory :], miss.flatten(1)]
        x = _anderson(points, misses).view_as(x)
    return best, residual


def _anderson(points: list[Tensor], misses: list[Tensor]) -> Tensor:
    """The next iterate (B, n): Walker & Ni, SIAM J. Numer. Anal. 49(4), 2011, algorithm AA, each sample by itself."""
    x, f = points[-1], misses[-1]
    if len(points) == 1:
        return x + f
    dx, df = (torch.stack(values, 2).diff(dim=2) for values in (points, misses))  # (B, n, m)
    gram = (df.mT.double() @ df.double()) + 1e-30
    ridge = 1e-12 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(gram.shape[-1]).to(gram)
    weights, _ = torch.linalg.solve_ex(gram + ridge, df.mT.double() @ f[..., None].double())
    return x + f - ((dx + df) @ weights.float()).squeeze(2)


#################################################################################
#                 The reversible solver: leapfrog on an integer lattice         #
#################################################################################


class LatticeState:
    """Position and defect at one end of a leg, as int64 multiples of `LATTICE`; both like x in shape.

    The defect d = w - v(x, t, style) is what the leapfrog's velocity w has drifted from the field by the end of a leg.
    It is what the way back needs: it starts with w = v + d and ends at a defect of zero, where the leg began. As it
    costs an evaluation of the network, a leg leaves it as a function, which is called when the defect is asked for:
    under the autocast of the leg, or the network gives other bits.
    """

    def __init__(self, position: Tensor, defect: Tensor | Callable[[], Tensor]) -> None:
        self.position = position
        self._defect = defect

    @classmethod
    def at_picture(cls, x: Tensor) -> "LatticeState":
        position = to_lattice(x)
        return cls(position, torch.zeros_like(position))

    @property
    def defect(self) -> Tensor:
        if not self.knows_defect:
            self._defect = self._defect()  # type: ignore[operator]
        return self._defect  # type: ignore[return-value]

    @property
    def knows_defect(self) -> bool:
        """Whether asking for the defect costs nothing."""
        return isinstance(self._defect, Tensor)

    @property
    def x(self) -> Tensor:
        return from_lattice(self.position)


def to_lattice(x: Tensor) -> Tensor:
    """Float tensor -> the nearest lattice points, int64; FloatingPointError for what is not a number, or is absurd."""
    check_finite(x.abs().amax())
    return _nearest(x)


def from_lattice(points: Tensor) -> Tensor:
    return points.to(torch.float32) * LATTICE


def _nearest(x: Tensor) -> Tensor:
    return torch.round(x.float() / LATTICE).to(torch.int64)


def check_finite(peak: Tensor) -> None:
    """FloatingPointError where the largest magnitude (a scalar) is not a number, or beyond the lattice."""
    if not peak < LARGEST * LATTICE:  # false for NaN, too
        raise FloatingPointError("the network's output is not finite: the checkpoint diverged or the input is broken")


def leapfrog_leg(
    pieces: Sequence[tuple[VelocityField, Sequence[float]]],  # a field and its part of the grid, one after another
    state: LatticeState,
    trail: list[tuple[Tensor, Tensor]] | None = None,  # is given x and w, on the lattice, after every step
) -> LatticeState:
    """Asynchronous leapfrog (Zhuang et al., "MALI", arXiv:2102.04668, eq. 3) on integers; N + 1 evaluations, and one
    more when the defect of where it ends is asked for.

        m = x + half * w;    w' = 2 v(m, (a + b) / 2) - w;    x' = m + half * w',    half = (b - a) / 2

    Undone exactly by the pieces in reverse, on reversed grids: (b + a) / 2 is the same number both ways, the drift by
    -half is the exact opposite (rounding is symmetric), so the network meets the same m, bit for bit.

    A field that jumps inside a step would cost the second order; where one piece follows another, w takes the jump
    along, w + v_next - v_before (GuidedField.change_from), so that its defect, and the order, stay what they are.
    """
    peaks = []  # looked at when the leg is over, so that no step waits for the device

    def velocity(field: VelocityField, points: Tensor, t: float) -> Tensor:
        v = field(from_lattice(points), t)
        peaks.append(v.abs().amax())
        return _nearest(v)

    @torch.inference_mode()
    def defect() -> Tensor:
        return w - to_lattice(field(from_lattice(x), grid[-1]))

    x = state.position
    before: VelocityField | None = None
    for field, grid in pieces:
        if before is None:
            w = velocity(field, x, grid[0]) + state.defect
        else:  # only guided fields come in several pieces
            w = w + velocity(partial(field.change_from, before), x, grid[0])  # type: ignore[attr-defined]
        for a, b in pairwise(grid):
            half = (b - a) / 2
            m = x + _drift(w, half)
            w = 2 * velocity(field, m, (a + b) / 2) - w
            x = m + _drift(w, half)
            if trail is not None:
                trail.append((x, w))
        before = field
    check_finite(torch.stack(peaks).amax())
    return LatticeState(x, defect)


def straight_leg(field: VelocityField, state: LatticeState, grid: Sequence[float]) -> LatticeState:
    """The leg of a map of few steps: two states y and z on the lattice, z = y + defect, that move each other.

        y += R[h v(z, a)];    z += R[h v(y, b)],    h = b - a

    y is the position; it is explicit Euler's but for z in place of y, of first order. An evaluation for the first step,
    two for each one after it, and one for the defect, where that is asked for. Undone by `straight_leg_back`, whatever
    v is: an increment depends on the other state alone, and is rounded as a whole.
    """
    peaks: list[Tensor] = []
    y, z = state.position, state.position + state.defect
    *steps, (a, b) = pairwise(grid)
    for start, end in steps:
        y = y + _increment(field, z, start, end - start, peaks)
        z = z + _increment(field, y, end, end - start, peaks)
    y = y + _increment(field, z, a, b - a, peaks)

    @torch.inference_mode()
    def defect() -> Tensor:
        last: list[Tensor] = []
        reached = z + _increment(field, y, b, b - a, last)
        check_finite(last[0])
        return reached - y

    check_finite(torch.stack(peaks).amax())
    return LatticeState(y, defect)


def straight_leg_back(field: VelocityField, state: LatticeState, grid: Sequence[float]) -> LatticeState:
    """`straight_leg` undone to the bit: the state that led to `state` on the same grid."""
    peaks: list[Tensor] = []
    y, z = state.position, state.position + state.defect
    for a, b in reversed(list(pairwise(grid))):
        z = z - _increment(field, y, b, b - a, peaks)
        y = y - _increment(field, z, a, b - a, peaks)
    check_finite(torch.stack(peaks).amax())
    return LatticeState(y, z - y)


def _increment(field: VelocityField, points: Tensor, t: float, h: float, peaks: list[Tensor]) -> Tensor:
    """R[h v] where v is the field at these points of the lattice; `peaks` is given its largest magnitude."""
    v = field(from_lattice(points), t)
    peaks.append(v.abs().amax())
    return _nearest(h * v)


def _drift(w: Tensor, half: float) -> Tensor:
    """half * w rounded to the lattice; odd in `half`, which is all that exactness asks of it."""
    return torch.round(half * w.to(torch.float32)).to(torch.int64)
