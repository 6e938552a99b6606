"""The transfer: an inversion leg under the source style, a generation leg under the target style, and the way back.

Or, by stage 2's `map`, one straight leg from the picture to its transfer: its structure is the picture itself.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from isonext.flow.guidance import GuidedField, Map, MapField
from isonext.flow.guidance import Model as Network
from isonext.flow.solvers import (
    ONE_STEP_METHODS,
    LatticeState,
    check_finite,
    from_lattice,
    integrate,
    integrate_back,
    leapfrog_leg,
    straight_leg,
    straight_leg_back,
    time_grid,
    to_lattice,
    with_times,
)

METHODS = ("alf", *ONE_STEP_METHODS, "flowedit", "map")
EXACT = ("alf", "map")  # reversible bit for bit
TRIALS = 16  # strengths among which `keep_structure` of map finds its own
State = LatticeState | Tensor  # where a leg begins and ends: on the lattice for EXACT, plain latents for the others


class Model(Network, Map, Protocol):
    """The networks and where the flow starts; `x0` is for flowedit alone, and what Map has for map."""

    def x0(self, noise: Tensor, x1: Tensor, style: Tensor) -> Tensor: ...


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
    def times(self) -> list[float]:
        """The times that the steps are asked for, whatever the guidance: the first is the structure's."""
        return time_grid(self.num_steps, 1 - self.strength, 1.0, self.time_grid, self.time_shift)[self.skip :]

    @property
    def grid(self) -> list[float]:
        """The times of the generation leg; the inversion takes them from the end.

        Where guidance acts, its ends are times of the grid, at the price of a step each where they were not already: a
        step across an end would cost every method its order. For map, those of its one leg, from the picture on.
        """
        if self.method == "map":
            return time_grid(self.num_steps, 0.0, self.strength)
        return self.times if self.cfg_scale == 1 else with_times(self.times, self.cfg_interval)

    @property
    def reached(self) -> float:
        """The strength that is left of `strength` where steps are skipped."""
        return self.strength if self.method == "map" else 1 - self.grid[0]

    def legs(self, model: Model, source: Tensor, target: Tensor) -> tuple["Leg", "Leg"]:
        """The inversion, from the picture to its structure, and the generation leg, from there to the target."""
        inversion = Leg([(GuidedField(model, source), self.grid[::-1])])
        reference = source if self.guidance == "source" else null_styles(model, source)
        return inversion, self.generation(model, target, reference)

    def generation(self, model: Model, style: Tensor, reference: Tensor) -> "Leg":
        """The leg from structure to `style`, guided in the steps that lie inside the interval of guidance (Kynkaanniemi
        et al., arXiv:2404.07724)."""
        plain = GuidedField(model, style)
        guided = GuidedField(model, style, self.cfg_scale, reference, self.cfg_rescale)
        low, high = self.cfg_interval
        pieces: list[tuple[GuidedField, list[float]]] = []
        for a, b in pairwise(self.grid):
            field = guided if guided.scale != 1 and low <= (a + b) / 2 <= high else plain
            if pieces and pieces[-1][0] is field:
                pieces[-1][1].append(b)
            else:
                pieces.append((field, [a, b]))
        return Leg(pieces or [(plain, self.grid)])


@dataclass(frozen=True)
class Leg:
    """One integration from end to end: pieces of the grid, one after another, with the field of each."""

    pieces: list[tuple[GuidedField, list[float]]]

    def backwards(self) -> "Leg":
        return Leg([(field, grid[::-1]) for field, grid in reversed(self.pieces)])

    @property
    def nfe(self) -> int:
        """Network evaluations a picture so far."""
        return sum({id(field): field.nfe for field, _ in self.pieces}.values())


@dataclass
class Inverted:
    """Pictures at their structure, t = 1 - strength."""

    state: State  # for alf with the defect that the inversion ended with, which the way back to the picture needs
    nfe: int  # network evaluations a picture
    residual: Tensor | None = None  # (B,) of a fixed-point inversion, else None


@dataclass
class Transfer:
    latents: Tensor  # (B, C, h, w), in the target style, float32
    nfe: int  # network evaluations a picture, both legs
    start: State | None  # the structure, as the inversion left it; None for flowedit, which has none
    end: State | None  # of the generation leg
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
    if settings.method == "map":
        return Inverted(_start(x1, settings), 0)
    leg = Leg([(GuidedField(model, source), settings.grid[::-1])])
    state, residual = _run_leg(leg, _start(x1, settings), settings)
    return Inverted(state, leg.nfe, residual)


@torch.inference_mode()
def generate(model: Model, inverted: Inverted, source: Tensor, target: Tensor, settings: TransferSettings) -> Transfer:
    """The generation leg: structure to latents of style `target` (B,), or of an embedding (B, style_dim).

    It starts with a defect of zero, since the inversion's is an error under the source style that would only be added
    to its own; but back to the source style itself it takes it along, and so returns the picture to the bit.
    """
    if settings.method == "map":
        return _generate_by_map(model, inverted, source, target, settings)
    leg, start = settings.legs(model, source, target)[1], inverted.state
    begin, nfe = _start_of_generation(model, start, source, target)
    end, _ = _run_leg(leg, begin, settings)
    nfe += inverted.nfe + leg.nfe
    return Transfer(_finished(latents_of(end), settings), nfe, start, end, inverted.residual)


@torch.inference_mode()
def sample(model: Model, x0: Tensor, style: Tensor, settings: TransferSettings) -> Tensor:
    """A leg from the base: x0 (B, C, ...) -> latents of `style` (B,), guided against the null style."""
    end, _ = _run_leg(settings.generation(model, style, null_styles(model, style)), _start(x0, settings), settings)
    return _finished(latents_of(end), settings)


@torch.inference_mode()
def undo(
    model: Model, transfer: Transfer, source: Tensor, target: Tensor, settings: TransferSettings
) -> tuple[State, State, Tensor | None]:
    """A transfer run backwards: the states at its structure and at its picture, and a fixed point's residual (B,).

    For alf the first state is `transfer.start` to the bit, the second the picture with a defect of zero. The other
    methods have no use for `transfer.start`. For map, whose structure is the picture, both are that.
    """
    if transfer.end is None:
        raise ValueError("flowedit has no legs, so there is nothing to run backwards")
    if settings.method == "map":
        picture = restore(model, transfer.end, source, settings, target)
        return picture, picture, None
    leg = settings.legs(model, source, target)[1].backwards()
    start, residual = _run_leg(leg, transfer.end, _unclamped(settings))
    if isinstance(start, LatticeState):
        assert isinstance(transfer.start, LatticeState)
        begun, _ = _start_of_generation(model, transfer.start, source, target)
        assert isinstance(begun, LatticeState)
        start = LatticeState(start.position, start.defect - begun.defect + transfer.start.defect)
    return start, restore(model, start, source, settings), residual


@torch.inference_mode()
def restore(
    model: Model, structure: State, source: Tensor, settings: TransferSettings, target: Tensor | None = None
) -> State:
    """The inversion leg run backwards: a structure of style `source` (B,) to its picture.

    For map, whose structure is the picture already: the end of a transfer to `target` (B,) back to it.
    """
    if settings.method == "map":
        assert isinstance(structure, LatticeState) and target is not None
        return straight_leg_back(MapField(model, source, target, settings.cfg_scale), structure, settings.grid)
    leg = Leg([(GuidedField(model, source), settings.grid)])
    return _run_leg(leg, structure, _unclamped(settings))[0]


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
    its states are kept: a trial costs a generation leg. Where no step may be taken the picture itself is returned.
    For map, which has no inversion, over shares of its strength.
    """
    if settings.method == "map":
        whole = _start(x1, settings)

        def shorter(skip: int) -> tuple[Inverted, TransferSettings]:
            return Inverted(whole, 0), replace(settings, strength=settings.strength * (TRIALS - skip) / TRIALS)

        return _strongest(TRIALS, shorter, model, source, target, score, floor)
    field, grid, times = GuidedField(model, source), settings.grid, settings.times
    passed: list[Any] = []  # the states after each step
    _run_leg(Leg([(field, grid[::-1])]), _start(x1, settings), settings, passed)
    trail = dict(zip(grid, [*reversed(passed), None], strict=True))  # at each time of the grid

    def structure(skip: int) -> Inverted:
        solved, state = settings.inversion == "fixed_point", trail[times[skip]]
        if state is None:
            return Inverted(_start(x1, settings), 0, torch.zeros(len(x1), device=x1.device) if solved else None)
        if settings.method == "alf":
            x, w = state
            return Inverted(LatticeState(x, lambda: w - to_lattice(field(from_lattice(x), times[skip]))), 0)
        return Inverted(state[0], 0, state[1]) if solved else Inverted(state, 0)

    def cut(skip: int) -> tuple[Inverted, TransferSettings]:
        return structure(skip), replace(settings, skip=settings.skip + skip)

    found, its_settings, tried = _strongest(len(times) - 1, cut, model, source, target, score, floor)
    return replace(found, nfe=field.nfe + found.nfe), its_settings, tried


def _strongest(
    steps: int,
    cut: Callable[[int], tuple[Inverted, TransferSettings]],  # where a transfer of `skip` steps less begins
    model: Model,
    source: Tensor,
    target: Tensor,
    score: Callable[[Tensor], float],
    floor: float,
) -> tuple[Transfer, TransferSettings, list[tuple[float, float]]]:
    """The transfer of the fewest skipped steps that passes, of all trials' evaluations; see `keep_structure`."""
    trials: dict[int, tuple[Transfer, TransferSettings, float]] = {}

    def passes(skip: int) -> bool:
        begin, settings = cut(skip)
        made = generate(model, begin, source, target, settings)
        trials[skip] = made, settings, score(made.latents)
        return trials[skip][2] >= floor

    skip = bisect.bisect_left(range(steps), True, key=passes)
    if skip == steps:  # nothing passed but the picture itself
        passes(skip)
    nfe = sum(made.nfe for made, _, _ in trials.values())
    found, settings, _ = trials[skip]
    return replace(found, nfe=nfe), settings, [(settings.reached, score) for _, settings, score in trials.values()]


def _generate_by_map(
    model: Model, inverted: Inverted, source: Tensor, target: Tensor, settings: TransferSettings
) -> Transfer:
    """The straight leg from pictures to their transfers."""
    assert isinstance(inverted.state, LatticeState)
    field = MapField(model, source, target, settings.cfg_scale)
    end = straight_leg(field, inverted.state, settings.grid)
    return Transfer(_finished(end.x, settings), inverted.nfe + field.nfe, inverted.state, end)


def _run_leg(
    leg: Leg, state: State, settings: TransferSettings, trail: list | None = None
) -> tuple[State, Tensor | None]:
    """One leg either way, and the residual (B,) of a solved one; a falling grid leads towards the structure."""
    if isinstance(state, LatticeState):
        return leapfrog_leg(leg.pieces, state, trail), None
    if settings.inversion == "explicit":
        for field, grid in leg.pieces:
            state = integrate(field, state, grid, settings.method, settings.latent_clamp, trail)
        return state, None
    if leg.pieces[0][1][0] < leg.pieces[-1][1][-1]:
        for field, grid in leg.pieces:
            state = integrate(field, state, grid, settings.method, None, trail)  # a clamp would not be solved for
        return state, None
    worst = torch.zeros(len(state), device=state.device)
    for field, grid in leg.pieces:
        state, residual = integrate_back(field, state, grid, settings.method, settings.tolerance, trail)
        worst = torch.maximum(worst, residual)
    return state, worst


def null_styles(model: Model, style: Tensor) -> Tensor:
    """The dropped label (B,) for as many pictures."""
    return torch.full((len(style),), model.null_style, device=style.device)


def _start_of_generation(model: Model, structure: State, source: Tensor, target: Tensor) -> tuple[State, int]:
    """Where the generation leg begins: for alf at the structure with a defect of zero, but in pictures whose target is
    their source. And how many evaluations it took to know the defect of those."""
    if not isinstance(structure, LatticeState):
        return structure, 0
    equal = (model.embed(source) == target).all(1) if target.is_floating_point() else source == target
    if not equal.any():
        return LatticeState(structure.position, torch.zeros_like(structure.position)), 0
    nfe = 0 if structure.knows_defect else 1
    carried = structure.defect * equal.view(-1, *[1] * (structure.position.ndim - 1))
    return LatticeState(structure.position, carried), nfe


def _unclamped(settings: TransferSettings) -> TransferSettings:
    return replace(settings, latent_clamp=None)  # a clamp has no way back


def _start(x: Tensor, settings: TransferSettings) -> State:
    return LatticeState.at_picture(x) if settings.method in EXACT else x


def _finished(latents: Tensor, settings: TransferSettings) -> Tensor:
    check_finite(latents.abs().amax())
    return latents if settings.latent_clamp is None else latents.clamp(-settings.latent_clamp, settings.latent_clamp)


def _flowedit(model: Model, x1: Tensor, source: Tensor, target: Tensor, settings: TransferSettings) -> Transfer:
    """FlowEdit (Kulikov et al., arXiv:2412.08629, algorithm 1): the two styles' difference along noised pictures.

    No inversion: z starts at the picture and moves by v_b(z + z_src - x1) - v_a(z_src), z_src = t x1 + (1 - t) x0, the
    mean over `noise_samples` x0 of the base, drawn anew for every step and the same for every picture. Equal styles
    change nothing.
    """
    of_source, leg = GuidedField(model, source), settings.legs(model, source, target)[1]
    generator = torch.Generator().manual_seed(settings.seed)
    z = x1
    for of_target, grid in leg.pieces:
        for a, b in pairwise(grid):
            noises = torch.randn(settings.noise_samples, 1, *x1.shape[1:], generator=generator).to(x1.device)
            change = torch.zeros_like(x1)
            for noise in noises:
                noisy = a * x1 + (1 - a) * model.x0(noise.expand_as(x1), x1, source)
                change += of_target(noisy + (z - x1), a) - of_source(noisy, a)
            z = z + (b - a) / len(noises) * change
    return Transfer(_finished(z, settings), of_source.nfe + leg.nfe, None, None)
