"""The transfer: an inversion leg under the source style, a generation leg under the target style, and the way back."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from isonext.flow.guidance import GuidedField
from isonext.flow.loss import Model
from isonext.flow.solvers import (
    ONE_STEP_METHODS,
    LatticeState,
    check_finite,
    from_lattice,
    integrate,
    integrate_back,
    leapfrog_leg,
    time_grid,
    to_lattice,
)

METHODS = ("alf", *ONE_STEP_METHODS, "flowedit")
State = LatticeState | Tensor  # where a leg begins and ends: on the lattice for alf, plain latents for the others


@dataclass(frozen=True)
class TransferSettings:
    method: str = "alf"
    num_steps: int = 20  # a leg
    strength: float = 1.0  # the inversion stops at t = 1 - strength; smaller keeps more of the picture
    cfg_scale: float = 1.0  # of the generation leg; the inversion is never guided
    guidance: str = "source"  # the reference: "source" or "null"
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    latent_clamp: float | None = None  # bound of the final latent; of every state for the explicit methods
    cfg_rescale: float = 0.0
    time_grid: str = "uniform"
    time_shift: float = 1.0
    skip: int = 0  # steps left out at the structure's end of both legs: the strength that `keep_structure` found
    inversion: str = "explicit"  # or "fixed_point": every leg towards structure solves for the other's steps
    tolerance: float = 1e-5  # largest residual of a fixed point that counts as solved
    noise_samples: int = 1  # of flowedit
    seed: int = 0  # of flowedit's noise

    @property
    def grid(self) -> list[float]:
        """The times of the generation leg; the inversion takes them from the end."""
        return time_grid(self.num_steps, 1 - self.strength, 1.0, self.time_grid, self.time_shift)[self.skip :]

    def legs(self, model: Model, source: Tensor, target: Tensor) -> tuple[GuidedField, GuidedField]:
        """The fields of the inversion and of the generation leg."""
        reference = (
            source if self.guidance == "source" else torch.full((len(source),), model.null_style, device=source.device)
        )
        guided = GuidedField(model, target, self.cfg_scale, reference, self.cfg_interval, self.cfg_rescale)
        return GuidedField(model, source), guided


@dataclass
class Inverted:
    """Pictures at their structure, t = 1 - strength."""

    state: State
    nfe: int  # network evaluations a picture
    residual: Tensor | None = None  # (B,) of a fixed-point inversion, else None


@dataclass
class Transfer:
    latents: Tensor  # (B, C, h, w), in the target style, float32
    nfe: int  # network evaluations a picture, both legs
    start: State | None  # of the generation leg: the structure; None for flowedit, which has none
    end: State | None  # of the generation leg, which `undo` starts from
    residual: Tensor | None = None


def latents_of(state: State) -> Tensor:
    """The position of a state as float32 latents."""
    return state.x if isinstance(state, LatticeState) else state


@torch.inference_mode()
def transfer(model: Model, x1: Tensor, source: Tensor, target: Tensor, settings: TransferSettings) -> Transfer:
    """x1 (B, C, h, w) standardised latents of style `source` (B,) -> the same pictures in style `target` (B,).

    `model` has `null_style`, the id that stands for a dropped label, and for flowedit `x0`, its base (base.py).
    A target may be an embedding.
    """
    if settings.method == "flowedit":
        return _flowedit(model, x1, source, target, settings)
    return generate(model, invert(model, x1, source, settings), source, target, settings)


@torch.inference_mode()
def invert(model: Model, x1: Tensor, source: Tensor, settings: TransferSettings) -> Inverted:
    """The inversion leg: latents (B, C, h, w) of style `source` (B,) to their structure."""
    field = GuidedField(model, source)
    state, residual = _run_leg(field, _start(x1, settings), settings.grid[::-1], settings)
    return Inverted(state, field.nfe, residual)


@torch.inference_mode()
def generate(model: Model, inverted: Inverted, source: Tensor, target: Tensor, settings: TransferSettings) -> Transfer:
    """The generation leg: structure to latents of style `target` (B,), or of an embedding (B, style_dim)."""
    field = settings.legs(model, source, target)[1]
    end, _ = _run_leg(field, inverted.state, settings.grid, settings)
    latents = _finished(latents_of(end), settings)
    return Transfer(latents, inverted.nfe + field.nfe, inverted.state, end, inverted.residual)


@torch.inference_mode()
def sample(model: Model, x0: Tensor, style: Tensor, settings: TransferSettings) -> Tensor:
    """A leg from the base: x0 (B, C, ...) -> latents of `style` (B,), guided against the null style."""
    null = torch.full((len(style),), model.null_style, device=style.device)
    field = GuidedField(model, style, settings.cfg_scale, null, settings.cfg_interval, settings.cfg_rescale)
    end, _ = _run_leg(field, _start(x0, settings), settings.grid, settings)
    return _finished(latents_of(end), settings)


@torch.inference_mode()
def undo(
    model: Model, end: State, source: Tensor, target: Tensor, settings: TransferSettings
) -> tuple[State, State, Tensor | None]:
    """A transfer run backwards: the states at its structure and at its picture, and a fixed point's residual (B,)."""
    inversion, generation = settings.legs(model, source, target)
    free = replace(settings, latent_clamp=None)  # a clamp has no way back
    start, residual = _run_leg(generation, end, settings.grid[::-1], free)
    return start, _run_leg(inversion, start, settings.grid, free)[0], residual


@torch.inference_mode()
def keep_structure(
    model: Model,
    x1: Tensor,  # (1, C, h, w): one picture, since each has a strength of its own
    source: Tensor,
    target: Tensor,
    settings: TransferSettings,  # its strength is the most that is tried
    score: Callable[[Tensor], float],  # of latents (1, C, h, w): how much of the picture's structure is left
    floor: float,
) -> tuple[Transfer, TransferSettings, list[tuple[float, float]]]:
    """The strongest transfer that scores `floor` or more, its settings, and the (strength, score) that were tried.

    Bisection over the points of the grid, for a score that falls with the strength. The inversion is run once and
    its states are kept: a trial costs a generation leg (and for alf one evaluation more). Where no step may be taken
    the picture itself is returned.
    """
    field, grid, trail = GuidedField(model, source), settings.grid, []
    _run_leg(field, _start(x1, settings), grid[::-1], settings, trail)
    trail = [*reversed(trail), None]  # at each time of the grid
    made, scores = {}, {}

    def inverted(skip: int) -> Inverted:
        solved = settings.inversion == "fixed_point"
        if trail[skip] is None:
            return Inverted(_start(x1, settings), 0, torch.zeros(len(x1), device=x1.device) if solved else None)
        if settings.method == "alf":
            x, w = trail[skip]
            return Inverted(LatticeState(x, w - to_lattice(field(from_lattice(x), grid[skip]))), 0)
        return Inverted(trail[skip][0], 0, trail[skip][1]) if solved else Inverted(trail[skip], 0)

    def passes(skip: int) -> bool:
        cut = replace(settings, skip=settings.skip + skip)
        made[skip] = generate(model, inverted(skip), source, target, cut)
        scores[skip] = score(made[skip].latents)
        return scores[skip] >= floor

    steps = len(grid) - 1
    skip = bisect.bisect_left(range(steps), True, key=passes)
    if skip == steps:  # nothing passed but the picture itself
        passes(skip)
    nfe = field.nfe + sum(each.nfe for each in made.values())
    tried = [(1 - grid[skip], score) for skip, score in scores.items()]
    return replace(made[skip], nfe=nfe), replace(settings, skip=settings.skip + skip), tried


def _run_leg(
    field: GuidedField, state: State, grid: list[float], settings: TransferSettings, trail: list | None = None
) -> tuple[State, Tensor | None]:
    """One leg either way, and the residual (B,) of a solved one; a falling grid leads towards the structure."""
    if settings.method == "alf":
        return leapfrog_leg(field, state, grid, trail), None
    if settings.inversion == "explicit":
        return integrate(field, state, grid, settings.method, settings.latent_clamp, trail), None
    if grid[0] >= grid[-1]:
        return integrate_back(field, state, grid, settings.method, settings.tolerance, trail)
    return integrate(field, state, grid, settings.method, None, trail), None  # a clamp would not be solved for


def _start(x: Tensor, settings: TransferSettings) -> State:
    return LatticeState.at_picture(x) if settings.method == "alf" else x


def _finished(latents: Tensor, settings: TransferSettings) -> Tensor:
    check_finite(latents.abs().amax())
    return latents if settings.latent_clamp is None else latents.clamp(-settings.latent_clamp, settings.latent_clamp)


def _flowedit(model: Model, x1: Tensor, source: Tensor, target: Tensor, settings: TransferSettings) -> Transfer:
    """FlowEdit (Kulikov et al., arXiv:2412.08629, algorithm 1): the two styles' difference along noised pictures.

    No inversion: z starts at the picture and moves by v_b(z + z_src - x1) - v_a(z_src), z_src = t x1 + (1 - t) x0, the
    mean over `noise_samples` x0 of the base, whose noise is the same for every picture and step. Equal styles change
    nothing.
    """
    of_source, of_target = settings.legs(model, source, target)
    generator = torch.Generator().manual_seed(settings.seed)
    noises = torch.randn(settings.noise_samples, 1, *x1.shape[1:], generator=generator).to(x1.device)
    z = x1
    bases = [model.x0(noise.expand_as(x1), x1, source) for noise in noises]
    for a, b in pairwise(settings.grid):
        change = torch.zeros_like(x1)
        for x0 in bases:
            noisy = a * x1 + (1 - a) * x0
            change += of_target(noisy + (z - x1), a) - of_source(noisy, a)
        z = z + (b - a) / len(noises) * change
    return Transfer(_finished(z, settings), of_source.nfe + of_target.nfe, None, None)
