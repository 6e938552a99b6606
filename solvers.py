"""ODE solvers: explicit one-step methods, and the reversible lattice leapfrog.

A *grid* is a list of N + 1 times. Generation runs it from 0 to 1, inversion runs the same field on the same grid
backwards: never with a negated v as well. A *field* is a function (x, t) -> v with t a number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flow import Field, Model

VelocityField = Callable[[Tensor, float], Tensor]

LATTICE = 2.0**-20  # the spacing of the integer lattice: 1e-6 of a standard deviation of the latents


def time_grid(num_steps: int, start: float = 0.0, end: float = 1.0) -> list[float]:
    """N + 1 uniform times from `start` to `end`, both hit exactly."""
    if num_steps < 1:
        raise ValueError(f"a leg needs at least 1 step, not {num_steps}")
    return [start + (end - start) * (i / num_steps) for i in range(num_steps)] + [end]


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


ONE_STEP_METHODS = {"euler": euler_step, "midpoint": midpoint_step, "heun": heun_step, "rk4": rk4_step}
METHODS = ("alf", *ONE_STEP_METHODS)


def integrate(
    field: VelocityField, x: Tensor, grid: Sequence[float], method: str, clamp: float | None = None
) -> Tensor:
    """x at grid[0] -> x at grid[-1]; `clamp` bounds the state after every step, in units of x."""
    step = ONE_STEP_METHODS[method]
    for a, b in pairwise(grid):
        x = step(field, x, a, b)
        x = x if clamp is None else x.clamp(-clamp, clamp)
    return x


#################################################################################
#                 The reversible solver: leapfrog on an integer lattice         #
#################################################################################


@dataclass
class LatticeState:
    """Position and defect at one end of a leg, as int64 multiples of `LATTICE`; both like x in shape.

    The defect d = w - v(x, t, style) is what the leapfrog's velocity w has drifted from the field. It is zero at a
    picture, and it is what makes the way back exact: a leg starts with w = v + d under *its own* style, so the style
    may change between two legs and the whole stays a bijection.
    """

    position: Tensor
    defect: Tensor

    @classmethod
    def at_picture(cls, x: Tensor) -> "LatticeState":
        position = to_lattice(x)
        return cls(position, torch.zeros_like(position))

    @property
    def x(self) -> Tensor:
        return from_lattice(self.position)


def to_lattice(x: Tensor) -> Tensor:
    """Float tensor -> the nearest lattice points, int64; FloatingPointError for what is not a number, or is absurd."""
    points = torch.round(x.float() / LATTICE)
    if not (points.abs() < 2**52).all():  # false for NaN too; sums of these stay far from overflow
        raise FloatingPointError("the network's output is not finite: the checkpoint diverged or the input is broken")
    return points.to(torch.int64)


def from_lattice(points: Tensor) -> Tensor:
    return points.to(torch.float32) * LATTICE


def leapfrog_leg(field: VelocityField, state: LatticeState, grid: Sequence[float]) -> LatticeState:
    """Asynchronous leapfrog (Zhuang et al., "MALI", arXiv:2102.04668, eq. 3) on integers; N + 2 evaluations.

        m = x + half * w;    w' = 2 v(m, (a + b) / 2) - w;    x' = m + half * w',    half = (b - a) / 2

    Undone exactly by the same leg on the reversed grid: (b + a) / 2 is the same number both ways, the drift by
    -half is the exact opposite (rounding is symmetric), so the network meets the same m, bit for bit.
    """
    x = state.position
    w = to_lattice(field(from_lattice(x), grid[0])) + state.defect
    for a, b in pairwise(grid):
        half = (b - a) / 2
        m = x + _drift(w, half)
        w = 2 * to_lattice(field(from_lattice(m), (a + b) / 2)) - w
        x = m + _drift(w, half)
    return LatticeState(x, w - to_lattice(field(from_lattice(x), grid[-1])))


def _drift(w: Tensor, half: float) -> Tensor:
    """half * w rounded to the lattice; odd in `half`, which is all that exactness asks of it."""
    return torch.round(half * w.to(torch.float32)).to(torch.int64)


#################################################################################
#                   The transfer: an inversion and a generation leg             #
#################################################################################


@dataclass(frozen=True)
class TransferSettings:
    method: str = "alf"
    num_steps: int = 20  # a leg
    strength: float = 1.0  # the inversion stops at t = 1 - strength; smaller keeps more of the picture
    cfg_scale: float = 1.0  # of the generation leg; the inversion is never guided
    guidance: str = "source"  # the reference: "source" or "null"
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    latent_clamp: float | None = None  # bound of the final latent; of every state for the explicit methods


@dataclass
class Transfer:
    latents: Tensor  # (B, C, h, w), in the target style, float32
    structure: Tensor  # the same at t = 1 - strength
    nfe: int  # network evaluations a picture, both legs
    end: LatticeState | None  # of the generation leg, which `undo` starts from; alf only


@torch.inference_mode()
def transfer(model: Model, x1: Tensor, source: Tensor, target: Tensor, settings: TransferSettings) -> Transfer:
    """x1 (B, C, h, w) standardised latents of style `source` (B,) -> the same pictures in style `target` (B,).

    `model` has an attribute `null_style`, the id that stands for a dropped label.
    """
    inversion, generation, grid = _legs(model, source, target, settings)
    clamp = settings.latent_clamp
    if settings.method == "alf":
        start = leapfrog_leg(inversion, LatticeState.at_picture(x1), grid[::-1])
        end = leapfrog_leg(generation, start, grid)
        structure, latents = start.x, end.x if clamp is None else end.x.clamp(-clamp, clamp)
    else:
        end = None
        structure = integrate(inversion, x1, grid[::-1], settings.method, clamp)
        latents = integrate(generation, structure, grid, settings.method, clamp)
    return Transfer(latents, structure, inversion.nfe + generation.nfe, end)


@torch.inference_mode()
def undo(model: Model, made: Transfer, source: Tensor, target: Tensor, settings: TransferSettings) -> Tensor:
    """The way back of a transfer, target to structure to source: with alf the very x1, on the lattice."""
    inversion, generation, grid = _legs(model, source, target, settings)
    if made.end is not None:
        return leapfrog_leg(inversion, leapfrog_leg(generation, made.end, grid[::-1]), grid).x
    structure = integrate(generation, made.latents, grid[::-1], settings.method)
    return integrate(inversion, structure, grid, settings.method)


def _legs(model: Model, source: Tensor, target: Tensor, settings: TransferSettings) -> tuple[Field, Field, list[float]]:
    """The fields of the inversion and of the generation leg, and the grid, rising."""
    reference = source if settings.guidance == "source" else torch.full_like(source, model.null_style)
    generation = Field(model, target, settings.cfg_scale, reference, settings.cfg_interval)
    return Field(model, source), generation, time_grid(settings.num_steps, 1 - settings.strength, 1.0)
