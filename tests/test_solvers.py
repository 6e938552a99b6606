"""The solvers against ODEs with known answers, and the leapfrog's way back bit for bit."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flow import Field
from model import IsoNext
from solvers import (
    LATTICE,
    METHODS,
    ONE_STEP_METHODS,
    LatticeState,
    TransferSettings,
    from_lattice,
    integrate,
    leapfrog_leg,
    time_grid,
    to_lattice,
    transfer,
    undo,
)

ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "alf": 2}
EVALUATIONS = {"euler": lambda n: n, "midpoint": lambda n: 2 * n, "heun": lambda n: 2 * n, "rk4": lambda n: 4 * n}
EVALUATIONS["alf"] = lambda n: n + 2

quick = settings(deadline=None, max_examples=15)


def solve(field, x, grid, method):
    if method == "alf":
        return leapfrog_leg(field, LatticeState.at_picture(x), grid).x
    return integrate(field, x, grid, method)


#################################################################################
#                                     Grids                                     #
#################################################################################


@settings(deadline=None, max_examples=100)
@given(num_steps=st.integers(1, 300), start=st.floats(0, 1), end=st.floats(0, 1))
def test_a_grid_of_n_steps_is_uniform_and_hits_both_ends_exactly(num_steps, start, end):
    grid = time_grid(num_steps, start, end)
    assert len(grid) == num_steps + 1
    assert grid[0] == start
    assert grid[-1] == end
    for i, t in enumerate(grid):  # a convex combination, in float64: a few roundings of numbers of at most 1
        assert t == pytest.approx(start * (1 - i / num_steps) + end * (i / num_steps), abs=1e-15)


def test_a_grid_of_four_steps_is_quarters():
    assert time_grid(4) == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("num_steps", [0, -1])
def test_a_leg_without_steps_is_an_error(num_steps):
    with pytest.raises(ValueError, match=f"at least 1 step, not {num_steps}"):
        time_grid(num_steps)


#################################################################################
#                          Values, orders and evaluations                       #
#################################################################################


@pytest.mark.parametrize(
    ("method", "growth", "square"),  # of x' = x from 1 and of x' = t^2 from 0, over one step of length 1
    [("euler", 2, 0), ("midpoint", 2.5, 0.25), ("heun", 2.5, 0.5), ("rk4", 65 / 24, 1 / 3), ("alf", 2.5, 0.25)],
)
def test_one_step_is_what_the_formula_gives_by_hand(method, growth, square):
    one, zero = torch.ones(1), torch.zeros(1)
    assert solve(lambda x, t: x, one, [0.0, 1.0], method).item() == pytest.approx(growth, abs=1e-6)
    assert solve(lambda x, t: x * 0 + t * t, zero, [0.0, 1.0], method).item() == pytest.approx(square, abs=1e-6)


def test_a_leapfrog_step_starts_from_the_defect_and_leaves_one():
    # x' = x from x = 1, w = 1 + 0.5: m = 1.75, w' = 2 * 1.75 - 1.5 = 2, x' = 2.75, defect 2 - 2.75
    start = LatticeState(to_lattice(torch.tensor([1.0])), to_lattice(torch.tensor([0.5])))
    end = leapfrog_leg(lambda x, t: x, start, [0.0, 1.0])
    assert from_lattice(end.position).item() == 2.75
    assert from_lattice(end.defect).item() == -0.75


# Both depend on t and are not linear in x, so that no order is had by accident.
HYPERBOLA = (lambda x, t: -t * x**2, lambda x, a, b: 1 / (1 / x + (b**2 - a**2) / 2))
PENDULUM = (
    lambda x, t: (1 + t) * x.sin(),
    lambda x, a, b: 2 * torch.atan((x / 2).tan() * math.exp(b - a + (b**2 - a**2) / 2)),
)
START = torch.tensor([0.4, 0.7, 1.1], dtype=torch.float64)


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (1.0, 0.0)], ids=["generation", "inversion"])
@pytest.mark.parametrize(("field", "flow"), [HYPERBOLA, PENDULUM], ids=["hyperbola", "pendulum"])
@pytest.mark.parametrize("method", METHODS)
def test_the_observed_order_is_the_methods_order_in_both_directions(method, field, flow, a, b):
    # Halving the step divides the error by 2^p (1 + O(h)). Orders are whole numbers, so 0.25 tells them apart with the
    # O(h) to spare; the steps keep the error far above the rounding of float64, and of the lattice (1e-6) for alf.
    coarse = {"alf": 12, "euler": 100}.get(method, 40)
    error = [
        (solve(field, START, time_grid(n, a, b), method).double() - flow(START, a, b)).norm().item()
        for n in (coarse, 2 * coarse)
    ]
    assert math.log2(error[0] / error[1]) == pytest.approx(ORDER[method], abs=0.25)


@pytest.mark.parametrize(("field", "flow"), [HYPERBOLA, PENDULUM], ids=["hyperbola", "pendulum"])
def test_the_leapfrog_converges_to_the_exact_flow_down_to_the_lattice(field, flow):
    # With order 2, the change from 64 to 128 steps is three times the error that is left. Rounding moves x by at most a
    # lattice point a step (two drifts, half a point each) and w by another: 2 * 128 points, were they all to add up.
    made = {n: solve(field, START, time_grid(n), "alf").double() for n in (64, 128)}
    error = (made[128] - flow(START, 0.0, 1.0)).abs()
    assert (error <= (made[128] - made[64]).abs() / 2 + 256 * LATTICE).all()
    assert error.max() < 1e-3


class Zero:
    null_style = 2

    def __call__(self, x, t, style):
        return torch.zeros_like(x)


@pytest.mark.parametrize("num_steps", [1, 3, 20])
@pytest.mark.parametrize("method", METHODS)
def test_a_leg_costs_what_the_method_says(method, num_steps):
    field = Field(Zero(), torch.tensor([0]))
    solve(field, torch.ones(1, 1, 1, 1), time_grid(num_steps), method)
    assert field.nfe == EVALUATIONS[method](num_steps)


@pytest.mark.parametrize("method", ONE_STEP_METHODS)
def test_the_clamp_of_an_explicit_method_bounds_every_state_of_the_leg(method):
    def field(x, t):  # up for two steps, then down: 0.25, 0.3 (not 0.5), 0.05, -0.2
        return torch.full_like(x, 1.0 if t < 0.5 else -1.0)

    if method == "euler":
        assert integrate(field, torch.zeros(1), time_grid(4), method, 0.3).item() == pytest.approx(-0.2)
    up = integrate(lambda x, t: torch.ones_like(x), torch.zeros(1), time_grid(4), method, 0.3)
    assert up.item() == pytest.approx(0.3)


#################################################################################
#                                  The lattice                                  #
#################################################################################


@settings(deadline=None, max_examples=200)
@given(st.floats(-15, 15, width=32))
def test_the_nearest_lattice_point_is_within_half_a_spacing_and_stays(value):
    points = to_lattice(torch.tensor([value]))
    back = from_lattice(points)
    assert points.dtype == torch.int64
    assert abs(back.item() - value) <= LATTICE / 2
    assert torch.equal(to_lattice(back), points)


def test_lattice_points_are_multiples_of_two_to_the_minus_twenty():
    assert LATTICE == 1 / 1048576
    assert to_lattice(torch.tensor([1.0, -0.5, 3 * 2.0**-20])).tolist() == [1048576, -524288, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_lattice_refuses_what_is_not_finite(bad):
    with pytest.raises(FloatingPointError, match="not finite"):
        to_lattice(torch.tensor([0.0, bad]))


#################################################################################
#                          The way back, bit for bit                            #
#################################################################################

CHANNELS, SIZE, PICTURES = 3, 5, 2
A, B, C = (torch.full((PICTURES,), style) for style in range(3))


class Bf16:
    """A small IsoNext with random weights, none of them zero, run under bf16 autocast."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = IsoNext(CHANNELS, 3, hidden_dim=16, num_layers=2, style_dim=8, time_dim=16, num_groups=4).eval()
        for parameter in self.net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.null_style = self.net.null_style

    @torch.inference_mode()
    def __call__(self, x, t, style):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x, t, style)


MODEL = Bf16()


def picture(seed):
    return torch.randn(PICTURES, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def random_state(seed, reach):
    """Random position and defect, as far from zero as `reach` lattice points."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, PICTURES, CHANNELS, SIZE, SIZE)
    return LatticeState(*torch.randint(-reach, reach + 1, shape, generator=generator))


def same(a, b):
    return torch.equal(a.position, b.position) and torch.equal(a.defect, b.defect)


random_grids = st.lists(st.floats(0, 1), min_size=2, max_size=6).map(sorted)
random_states = st.builds(random_state, st.integers(0, 10_000), st.sampled_from([0, 1, 2**20, 2**22, 2**27]))


def test_the_network_of_these_tests_is_far_from_trivial():
    x, t = picture(0), torch.full((PICTURES,), 0.5)
    v = MODEL(x, t, A)
    with torch.inference_mode():
        assert not torch.equal(v, MODEL.net(x, t, A))  # bf16 is at work
    assert 0.3 < v.std() < 10
    assert (v - MODEL(x, t, B)).std() > 0.01


@quick
@given(state=random_states, grid=random_grids)
def test_a_leapfrog_leg_is_undone_bit_for_bit_on_any_grid_from_any_state(state, grid):
    end = leapfrog_leg(Field(MODEL, A), state, grid[::-1])
    assert same(leapfrog_leg(Field(MODEL, A), end, grid), state)
    assert grid[-1] - grid[0] < 0.01 or not same(end, state)  # so the legs do something


@quick
@given(state=random_states, grid=random_grids, scale=st.sampled_from([1.0, 0.0, 2.5]))
def test_style_a_to_b_to_a_comes_back_bit_for_bit_with_guidance(state, grid, scale):
    a, b = Field(MODEL, A), Field(MODEL, B, scale, torch.full_like(B, MODEL.null_style), (0.2, 0.8))
    made = leapfrog_leg(b, leapfrog_leg(a, state, grid[::-1]), grid)
    assert same(leapfrog_leg(a, leapfrog_leg(b, made, grid[::-1]), grid), state)


@quick
@given(state=random_states, grid=random_grids)
def test_style_a_to_b_to_c_to_b_to_a_comes_back_bit_for_bit(state, grid):
    def change(state, source, target):
        return leapfrog_leg(Field(MODEL, target), leapfrog_leg(Field(MODEL, source), state, grid[::-1]), grid)

    in_b = change(state, A, B)
    in_c = change(in_b, B, C)
    assert same(change(in_c, C, B), in_b)
    assert same(change(change(in_c, C, B), B, A), state)
    assert grid[-1] - grid[0] < 0.01 or not same(in_b, in_c)


#################################################################################
#                                 The transfer                                  #
#################################################################################


def on_lattice(x):
    return from_lattice(to_lattice(x))


@pytest.mark.parametrize("guidance", ["source", "null"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("strength", [0.0, 0.3, 0.7, 1.0])
def test_alf_undoes_a_transfer_bit_for_bit(strength, scale, guidance):
    x1 = picture(1)
    chosen = TransferSettings("alf", 3, strength, scale, guidance, (0.1, 0.9))
    made = transfer(MODEL, x1, A, B, chosen)
    assert torch.equal(undo(MODEL, made, A, B, chosen), on_lattice(x1))
    assert strength == 0 or (made.latents - x1).abs().max() > 0.05


def test_alf_undoes_a_transfer_of_pictures_of_different_styles_bit_for_bit():
    x1, chosen = picture(2), TransferSettings("alf", 4, 1.0, 3.0, "source")
    source, target = torch.tensor([0, 1]), torch.tensor([2, 1])
    made = transfer(MODEL, x1, source, target, chosen)
    assert torch.equal(undo(MODEL, made, source, target, chosen), on_lattice(x1))


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_alf_to_its_own_style_returns_the_picture_bit_for_bit_at_every_scale(scale, strength):
    x1 = picture(3)
    made = transfer(MODEL, x1, A, A, TransferSettings("alf", 4, strength, scale, "source"))
    assert torch.equal(made.latents, on_lattice(x1))
    assert not torch.equal(made.structure, made.latents)


@pytest.mark.parametrize("method", METHODS)
def test_strength_zero_returns_the_picture(method):
    x1 = picture(4)
    made = transfer(MODEL, x1, A, B, TransferSettings(method, 3, 0.0, 2.0, "null"))
    kept = on_lattice(x1) if method == "alf" else x1
    assert torch.equal(made.latents, kept)
    assert torch.equal(made.structure, kept)


class Hyperbolas:
    """x' = -2 t k x^2, one k a style: 1 / x grows by k (b^2 - a^2) from a to b, so that every transfer is known."""

    null_style = 2
    k = torch.tensor([0.5, 1.0, 0.25])

    def __call__(self, x, t, style):
        return -2 * t.view(-1, 1, 1, 1) * self.k[style].view(-1, 1, 1, 1) * x**2


@pytest.mark.parametrize(
    ("strength", "scale", "guidance", "forward"),
    [
        (1.0, 1.0, "null", 1.0),
        (0.5, 1.0, "null", 1.0),
        (1.0, 1.5, "null", 1.0 + 0.5 * (1.0 - 0.25)),
        (0.7, 1.5, "source", 1.0 + 0.5 * (1.0 - 0.5)),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_transfer_inverts_unguided_under_the_source_and_generates_guided_under_the_target(
    method, strength, scale, guidance, forward
):
    x1 = torch.tensor([0.3, 0.5, 0.9, 1.2]).view(1, 1, 2, 2)
    source, target = torch.tensor([0]), torch.tensor([1])
    chosen = TransferSettings(method, 64, strength, scale, guidance)
    twice = transfer(Hyperbolas(), x1, source, target, replace(chosen, num_steps=128))
    once = transfer(Hyperbolas(), x1, source, target, chosen)
    passed = 1 - (1 - strength) ** 2
    structure = 1 / (1 / x1 - 0.5 * passed)
    latents = 1 / (1 / structure + forward * passed)
    # The error left at 2N steps is the change from N to 2N divided by 2^order - 1; doubled for the O(h) beyond it,
    # and half a lattice step, or float32 rounding, at each of the 256 steps.
    for made, coarse, exact in (
        (twice.structure, once.structure, structure),
        (twice.latents, once.latents, latents),
    ):
        assert ((made - exact).abs() <= 2 * (made - coarse).abs() + 256 * LATTICE / 2).all()
        assert (made - exact).abs().max() < 0.05


@pytest.mark.parametrize("method", ONE_STEP_METHODS)
def test_undoing_an_explicit_method_comes_back_as_far_as_its_error_allows(method):
    x1 = torch.tensor([0.3, 0.5, 0.9, 1.2]).view(1, 1, 2, 2)
    source, target = torch.tensor([0]), torch.tensor([1])
    error = []
    for num_steps in (20, 40):
        chosen = TransferSettings(method, num_steps)
        made = transfer(Hyperbolas(), x1, source, target, chosen)
        error.append((undo(Hyperbolas(), made, source, target, chosen) - x1).abs().max().item())
    assert made.end is None
    # At least first order: near half the error at half the step, or nothing but float32 rounding is left.
    assert error[1] < max(0.6 * error[0], 1e-6)
    assert error[1] < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_the_latent_clamp_bounds_the_result(method):
    x1 = picture(5)
    free = transfer(MODEL, x1, A, B, TransferSettings(method, 3))
    made = transfer(MODEL, x1, A, B, TransferSettings(method, 3, latent_clamp=0.75))
    assert free.latents.abs().max() > 1
    assert made.latents.abs().max() == 0.75


def test_the_latent_clamp_leaves_the_end_of_alf_alone_and_so_its_way_back():
    x1, chosen = picture(6), TransferSettings("alf", 3)
    free = transfer(MODEL, x1, A, B, chosen)
    clamped = transfer(MODEL, x1, A, B, replace(chosen, latent_clamp=0.75))
    assert same(clamped.end, free.end)
    assert torch.equal(clamped.structure, free.structure)
    assert torch.equal(clamped.latents, free.latents.clamp(-0.75, 0.75))
    assert torch.equal(undo(MODEL, clamped, A, B, replace(chosen, latent_clamp=0.75)), on_lattice(x1))


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_transfer_costs_two_legs_and_a_guided_one_three(method, num_steps):
    x1, one_leg = torch.ones(PICTURES, 1, 1, 1), EVALUATIONS[method](num_steps)
    assert transfer(Zero(), x1, A, B, TransferSettings(method, num_steps)).nfe == 2 * one_leg
    guided = TransferSettings(method, num_steps, cfg_scale=2.0, guidance="null")
    assert transfer(Zero(), x1, A, B, guided).nfe == 3 * one_leg
    assert transfer(Zero(), x1, A, A, replace(guided, guidance="source")).nfe == 2 * one_leg


def test_guidance_costs_a_second_forward_only_inside_its_interval():
    # alf, 4 steps: t = 0, 1/8, 3/8, 5/8, 7/8, 1 on either leg, of which two are inside
    chosen = TransferSettings("alf", 4, cfg_scale=2.0, guidance="null", cfg_interval=(0.3, 0.7))
    assert transfer(Zero(), torch.ones(PICTURES, 1, 1, 1), A, B, chosen).nfe == 6 + 6 + 2
