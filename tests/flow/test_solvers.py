"""The solvers against ODEs with known answers, their solved inverses, and the leapfrog's way back bit for bit."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_cases import CHANNELS, EVALUATIONS, MODEL, ORDER, PICTURES, SIZE, A, B, C, Zero, picture, same
from isonext.flow.guidance import GuidedField
from isonext.flow.solvers import (
    LATTICE,
    ONE_STEP_METHODS,
    LatticeState,
    from_lattice,
    integrate,
    integrate_back,
    leapfrog_leg,
    straight_leg,
    straight_leg_back,
    time_grid,
    to_lattice,
)

quick = settings(deadline=None, max_examples=15)


def solve(field, x, grid, method):
    if method == "alf":
        return leapfrog_leg([(field, grid)], LatticeState.at_picture(x)).x
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


def test_a_cosine_grid_is_half_of_one_minus_the_cosine():
    # the cosines of 0, 60, 120 and 180 degrees, then of multiples of 45
    assert time_grid(3, kind="cosine") == pytest.approx([0.0, 0.25, 0.75, 1.0], abs=1e-15)
    by_45 = [0.0, 1 - math.sqrt(0.5), 1.0, 1 + math.sqrt(0.5), 2.0]
    assert time_grid(4, 0.0, 2.0, "cosine") == pytest.approx(by_45, abs=1e-15)


@pytest.mark.parametrize(
    ("kind", "shift", "ends", "grid"),  # s u / (1 + (s - 1) u) of quarters, of thirds and of the cosine's 1/4 and 3/4
    [
        ("uniform", 3.0, (0.0, 1.0), [0.0, 0.5, 0.75, 0.9, 1.0]),
        ("uniform", 3.0, (0.5, 1.0), [0.5, 0.75, 0.875, 0.95, 1.0]),
        ("uniform", 3.0, (1.0, 0.0), [1.0, 0.5, 0.25, 0.1, 0.0]),
        ("uniform", 0.5, (0.0, 1.0), [0.0, 1 / 7, 1 / 3, 3 / 5, 1.0]),
        ("uniform", 2.0, (0.0, 1.0), [0.0, 1 / 2, 4 / 5, 1.0]),
        ("cosine", 3.0, (0.0, 1.0), [0.0, 0.5, 0.9, 1.0]),
    ],
)
def test_a_shifted_grid_is_what_the_formula_gives_by_hand(kind, shift, ends, grid):
    assert time_grid(len(grid) - 1, *ends, kind, shift) == pytest.approx(grid, abs=1e-15)


kinds, shifts = st.sampled_from(["uniform", "cosine"]), st.floats(0.01, 100)


@settings(deadline=None, max_examples=100)
@given(num_steps=st.integers(1, 300), start=st.floats(0, 0.99), kind=kinds, shift=shifts)
def test_every_grid_rises_all_the_way_and_hits_both_ends_exactly(num_steps, start, kind, shift):
    grid = time_grid(num_steps, start, 1.0, kind, shift)
    assert len(grid) == num_steps + 1
    assert (grid[0], grid[-1]) == (start, 1.0)
    assert all(a < b for a, b in pairwise(grid))


@settings(deadline=None, max_examples=100)
@given(num_steps=st.integers(2, 100), kind=kinds, shift=st.floats(1.1, 100))
def test_a_shift_above_one_refines_the_end_and_its_inverse_the_start_as_a_mirror_image(num_steps, kind, shift):
    late, early = time_grid(num_steps, kind=kind, shift=shift), time_grid(num_steps, kind=kind, shift=1 / shift)
    assert late[-1] - late[-2] < late[1] - late[0]
    # exact but for a few roundings in float64, which s u / (1 + (s - 1) u) enlarges by s at most
    assert [1 - t for t in early[::-1]] == pytest.approx(late, abs=1e-13)


@settings(deadline=None, max_examples=100)
@given(num_steps=st.integers(2, 40), p=st.integers(1, 9), q=st.integers(1, 9), data=st.data())
def test_a_shift_is_undone_by_its_inverse(num_steps, p, q, data):
    # p / q takes i / n to j / m with j = p i and m = p i + q (n - i): a point of a grid again, of m steps
    i = data.draw(st.integers(1, num_steps - 1))
    j, m = p * i, p * i + q * (num_steps - i)
    assert time_grid(num_steps, shift=p / q)[i] == pytest.approx(j / m, abs=1e-14)
    assert time_grid(m, shift=q / p)[j] == pytest.approx(i / num_steps, abs=1e-14)


@settings(deadline=None, max_examples=50)
@given(num_steps=st.integers(3, 100))
def test_a_cosine_grid_is_symmetric_and_coarsest_in_the_middle(num_steps):
    grid = time_grid(num_steps, kind="cosine")
    steps = [b - a for a, b in pairwise(grid)]
    assert [1 - t for t in grid[::-1]] == pytest.approx(grid, abs=1e-15)
    rising = steps[: (num_steps + 1) // 2]
    assert all(a < b for a, b in pairwise(rising))


def test_an_unknown_kind_of_grid_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'karras' is not one of uniform, cosine"):
        time_grid(4, kind="karras")


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
    end = leapfrog_leg([(lambda x, t: x, [0.0, 1.0])], start)
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
@pytest.mark.parametrize("method", ORDER)
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


@pytest.mark.parametrize("num_steps", [1, 3, 20])
@pytest.mark.parametrize("method", ORDER)
def test_a_leg_costs_what_the_method_says(method, num_steps):
    field = GuidedField(Zero(), torch.tensor([0]))
    solve(field, torch.ones(1, 1, 1, 1), time_grid(num_steps), method)
    assert field.nfe == EVALUATIONS[method](num_steps)


def test_the_defect_at_the_end_of_a_leg_costs_one_evaluation_and_only_when_it_is_asked_for():
    field = GuidedField(MODEL, A)
    end = leapfrog_leg([(field, time_grid(3))], LatticeState.at_picture(picture(1)))
    assert field.nfe == 4 and not end.knows_defect
    w = to_lattice(MODEL(end.x, torch.ones(PICTURES), A)) + end.defect
    assert field.nfe == 5 and end.knows_defect
    assert torch.equal(end.defect, w - to_lattice(MODEL(end.x, torch.ones(PICTURES), A)))
    assert field.nfe == 5


@pytest.mark.parametrize("method", ONE_STEP_METHODS)
def test_the_clamp_of_an_explicit_method_bounds_every_state_of_the_leg(method):
    def field(x, t):  # up for two steps, then down: 0.25, 0.3 (not 0.5), 0.05, -0.2
        return torch.full_like(x, 1.0 if t < 0.5 else -1.0)

    if method == "euler":
        assert integrate(field, torch.zeros(1), time_grid(4), method, 0.3).item() == pytest.approx(-0.2)
    up = integrate(lambda x, t: torch.ones_like(x), torch.zeros(1), time_grid(4), method, 0.3)
    assert up.item() == pytest.approx(0.3)


@pytest.mark.parametrize("clamp", [None, 0.9])
@pytest.mark.parametrize("method", ONE_STEP_METHODS)
def test_the_trail_of_an_explicit_leg_is_where_each_shorter_leg_ends(method, clamp):
    field, grid, trail = PENDULUM[0], time_grid(4, kind="cosine"), []
    end = integrate(field, START, grid, method, clamp, trail)
    shorter = [integrate(field, START, grid[: n + 1], method, clamp) for n in range(1, 5)]
    assert [x.tolist() for x in trail] == [x.tolist() for x in shorter]
    assert torch.equal(trail[-1], end)


#################################################################################
#                        The inverse, by fixed point                            #
#################################################################################

TOLERANCE = 1e-6


def back_and_residuals(field, y, grid, method):
    """What `integrate_back` gives, and what each of its steps misses, computed anew: the largest of each sample."""
    trail = []
    x, worst = integrate_back(field, y, grid[::-1], method, TOLERANCE, trail)
    assert trail[-1][0] is x and trail[-1][1] is worst
    misses = [
        (after - ONE_STEP_METHODS[method](field, before, a, b)).abs().flatten(1).amax(1)
        for (after, before), (b, a) in zip(
            pairwise([y, *(each for each, _ in trail)]), pairwise(grid[::-1]), strict=True
        )
    ]
    return x, worst, torch.stack(misses).amax(0)


@pytest.mark.parametrize("num_steps", [2, 8])
@pytest.mark.parametrize("method", ONE_STEP_METHODS)
def test_integrate_back_inverts_the_explicit_steps_and_reports_the_true_residual(method, num_steps):
    # 1.5 deviations: past the turning points of the pendulum at pi, where the field contracts one way and not the other
    x = 1.5 * torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    field, grid = PENDULUM[0], time_grid(num_steps, kind="cosine", shift=0.8)
    y = integrate(field, x, grid, method)
    back, worst, misses = back_and_residuals(field, y, grid, method)
    assert torch.equal(worst, misses)
    assert (worst <= TOLERANCE).all()
    # What a step misses (its tolerance, and the rounding of values up to 8: as much again) the steps beyond it enlarge
    # by 1 / (1 - h (1 + t)) each at most: 8 in all for Euler's two steps, less for more steps or a better method.
    assert (back - x).abs().max() <= 8 * num_steps * 2 * TOLERANCE
    if num_steps == 2:
        explicit = integrate(field, y, grid[::-1], method)
        assert (explicit - x).abs().max() > 50 * (back - x).abs().max()


def squared(x, t):
    return x * x


ROOTS = torch.tensor([[0.3, 0.2], [0.1, 0.4], [0.2, -0.2]])  # x + x^2 = y has a root near 0 for y > -1/4


@pytest.mark.parametrize("bad", [-1.0, -1e6, math.nan, math.inf])
def test_a_sample_without_an_inverse_is_reported_and_its_batch_mates_do_not_notice(bad):
    y = torch.cat([ROOTS[:1], torch.tensor([[0.3, bad]]), ROOTS[1:]])
    x, residual, misses = back_and_residuals(squared, y, [0.0, 1.0], "euler")
    mates = [0, 2, 3]
    for row in range(4):
        alone, its = integrate_back(squared, y[row : row + 1], [1.0, 0.0], "euler", TOLERANCE)
        assert torch.equal(alone[0].nan_to_num(), x[row].nan_to_num())
        assert its[0] == residual[row]
    assert (residual[mates] <= TOLERANCE).all()
    assert torch.equal(residual[mates], misses[mates])
    # by the quadratic formula; 1 + 2 x > 0.4 is the slope that turns a residual into an error
    assert (x[mates] - ((1 + 4 * ROOTS).sqrt() - 1) / 2).abs().max() <= TOLERANCE / 0.4 + 1e-7
    if math.isfinite(bad):  # x + x^2 is never below -1/4
        assert residual[1] >= -0.25 - bad
        assert residual[1] == misses[1]
    else:
        assert residual[1] == math.inf


@pytest.mark.parametrize("method", ONE_STEP_METHODS)
def test_a_field_that_is_not_a_number_for_one_sample_leaves_the_others_alone(method):
    def field(x, t):
        return 0.5 * x * (1 - x)

    def broken(x, t):
        return torch.where(torch.arange(len(x)).view(-1, 1) == 1, math.nan, field(x, t))

    grid = time_grid(3)
    x, residual = integrate_back(broken, ROOTS, grid[::-1], method, TOLERANCE)
    whole, fine = integrate_back(field, ROOTS, grid[::-1], method, TOLERANCE)
    assert torch.equal(x[[0, 2]], whole[[0, 2]])
    assert torch.equal(residual[[0, 2]], fine[[0, 2]])
    assert (fine <= TOLERANCE).all()
    assert residual[1] == math.inf


def evaluations(matrix, y, solve_back):
    """Network evaluations for x + matrix x = y, from the guess y - matrix y."""
    calls = []

    def field(x, t):
        calls.append(t)
        return x @ matrix.T

    x = solve_back(field, y)
    assert ((x + x @ matrix.T) - y).abs().max() <= 1e-5
    return len(calls)


def plain_fixed_point(field, y):
    x = y - field(y, 0.0)
    while ((miss := y - (x + field(x, 0.0))).abs()).max() > 1e-5:
        x = x + miss
    return x


def anderson(field, y):
    return integrate_back(field, y, [1.0, 0.0], "euler", 1e-5)[0]


@pytest.mark.parametrize(("size", "lowest"), [(4, -0.9), (48, 0.0)])
def test_anderson_needs_a_tenth_of_the_evaluations_of_a_plain_fixed_point_that_contracts_by_0_9(size, lowest):
    # 4 eigenvalues, which five iterates exhaust; or a spectrum 1 + [0, 0.9] of condition 1.9, of which the best
    # polynomial of degree k leaves 2 * 0.16^k: 1e-5 at k = 7. A few more for float32, and for what is forgotten.
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = (basis * torch.linspace(lowest, 0.9, size).double() @ basis.T).float()
    y = torch.randn(3, size, generator=generator)
    plain = evaluations(matrix, y, plain_fixed_point)
    assert plain > 90  # 0.9^k is 1e-4 at k = 87
    assert evaluations(matrix, y, anderson) <= 12


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


def random_state(seed, reach):
    """Random position and defect, as far from zero as `reach` lattice points."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, PICTURES, CHANNELS, SIZE, SIZE)
    return LatticeState(*torch.randint(-reach, reach + 1, shape, generator=generator))


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
    end = leapfrog_leg([(GuidedField(MODEL, A), grid[::-1])], state)
    assert same(leapfrog_leg([(GuidedField(MODEL, A), grid)], end), state)
    assert grid[-1] - grid[0] < 0.01 or not same(end, state)  # so the legs do something


@quick
@given(state=random_states, grid=random_grids, scale=st.sampled_from([1.0, 0.0, 2.5]))
def test_style_a_to_b_to_a_comes_back_bit_for_bit_with_guidance(state, grid, scale):
    in_a, in_b = GuidedField(MODEL, A), GuidedField(MODEL, B)
    guided = GuidedField(MODEL, B, scale, torch.full_like(B, MODEL.null_style))
    there = [(in_b, grid[:2]), (guided, grid[1:]), (in_b, grid[-1:])]  # guided from the second time on
    back = [(field, times[::-1]) for field, times in reversed(there)]
    end = leapfrog_leg(there, leapfrog_leg([(in_a, grid[::-1])], state))
    assert same(leapfrog_leg([(in_a, grid)], leapfrog_leg(back, end)), state)


@quick
@given(state=random_states, grid=random_grids)
def test_style_a_to_b_to_c_to_b_to_a_comes_back_bit_for_bit(state, grid):
    def change(state, source, target):
        return leapfrog_leg(
            [(GuidedField(MODEL, target), grid)], leapfrog_leg([(GuidedField(MODEL, source), grid[::-1])], state)
        )

    in_b = change(state, A, B)
    in_c = change(in_b, B, C)
    assert same(change(in_c, C, B), in_b)
    assert same(change(change(in_c, C, B), B, A), state)
    assert grid[-1] - grid[0] < 0.01 or not same(in_b, in_c)


any_grids = st.one_of(
    st.lists(st.sampled_from([0.0, 0.25, 1.0]) | st.floats(0, 1), min_size=2, max_size=6),  # in no order, some twice
    st.builds(time_grid, st.integers(1, 5), st.floats(0, 0.9), st.just(1.0), kinds, shifts),
)


@quick
@given(state=random_states, grid=any_grids)
def test_a_leg_on_any_grid_passes_on_its_way_back_through_the_states_of_its_way_there(state, grid):
    there, back = [], []
    end = leapfrog_leg([(GuidedField(MODEL, A), grid)], state, there)
    assert same(leapfrog_leg([(GuidedField(MODEL, A), grid[::-1])], end, back), state)
    assert len(there) == len(back) == len(grid) - 1
    first = state.position, to_lattice(MODEL(state.x, torch.full((PICTURES,), grid[0]), A)) + state.defect
    for (x, w), (x_back, w_back) in zip([first, *there[:-1]], back[::-1], strict=True):
        assert torch.equal(x, x_back)
        assert torch.equal(w, w_back)


@quick
@given(state=random_states, grid=any_grids)
def test_the_trail_of_a_leapfrog_leg_is_where_each_shorter_leg_ends(state, grid):
    trail = []
    leapfrog_leg([(GuidedField(MODEL, A), grid)], state, trail)
    for n, (x, w) in enumerate(trail, 1):
        shorter = leapfrog_leg([(GuidedField(MODEL, A), grid[: n + 1])], state)
        v = to_lattice(MODEL(from_lattice(x), torch.full((PICTURES,), grid[n]), A))
        assert same(LatticeState(x, w - v), shorter)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**32])
@pytest.mark.parametrize("when", range(5))
def test_one_velocity_that_is_not_finite_anywhere_in_a_leg_is_an_error_at_its_end(when, bad):
    calls = []

    def field(x, t):
        v = torch.zeros_like(x)
        v[1, 0, 2] = bad if len(calls) == when else 0.0
        calls.append(t)
        return v

    with pytest.raises(FloatingPointError, match="not finite"):
        end = leapfrog_leg([(field, time_grid(3))], LatticeState.at_picture(torch.zeros(2, 1, 3)))
        assert when == 4 and len(calls) == 4
        end.defect  # noqa: B018
    assert len(calls) == max(when + 1, 4)  # N + 1: no step waits for the answer


def test_a_velocity_that_is_absurd_but_on_the_lattice_passes():
    end = leapfrog_leg([(lambda x, t: x * 0 + 2.0**31, [0.0, 1.0])], LatticeState.at_picture(torch.zeros(1)))
    assert end.x.item() == 2.0**31


#################################################################################
#                        The straight leg of a map of few steps                 #
#################################################################################


def test_one_step_of_a_straight_leg_by_hand():
    """From y = 1, z = 1.5 with v(x, t) = x^2 + t, t from 0.5 to 0.75: y = 1 + 2.75 / 4 = 1.6875."""
    start = LatticeState(to_lattice(torch.tensor([1.0])), to_lattice(torch.tensor([0.5])))
    end = straight_leg(lambda x, t: x.square() + t, start, [0.5, 0.75])
    assert end.x.item() == 1.6875
    z = 1.5 + (1.6875**2 + 0.75) / 4
    assert from_lattice(end.defect).item() == pytest.approx(z - 1.6875, abs=LATTICE / 2)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_straight_leg_costs_an_evaluation_less_than_its_defect_and_its_way_back_two_a_step(num_steps):
    times, grid = [], time_grid(num_steps)

    def field(x, t):
        times.append(t)
        return -x

    end = straight_leg(field, LatticeState.at_picture(picture(1)), grid)
    assert len(times) == 2 * num_steps - 1 and not end.knows_defect
    end.defect  # noqa: B018
    end.defect  # noqa: B018
    assert times == [t for step in pairwise(grid) for t in step]
    straight_leg_back(field, end, grid)
    assert times[2 * num_steps :] == times[: 2 * num_steps][::-1]


@quick
@given(state=random_states, grid=any_grids)
def test_a_straight_leg_is_undone_bit_for_bit_on_any_grid_from_any_state(state, grid):
    field = GuidedField(MODEL, A)
    end = straight_leg(field, state, grid)
    assert same(straight_leg_back(field, end, grid), state)
    assert max(grid) - min(grid) < 0.01 or not torch.equal(end.position, state.position)


@quick
@given(
    seed=st.integers(0, 1000), num_steps=st.integers(1, 6), size=st.sampled_from([1e-9, 1e-3, 1.0, 1e4]),
    strength=st.floats(0, 1),
)  # fmt: skip
def test_a_straight_leg_is_undone_bit_for_bit_for_any_field(seed, num_steps, size, strength):
    """Fields that are neither smooth nor continuous, and know the time: noise that the bits of x seed."""

    def field(x, t):
        mixed = int(to_lattice(x).sum()) + int(t * 2**40) + seed
        return size * torch.randn(x.shape, generator=torch.Generator().manual_seed(mixed % 2**62))

    start, grid = LatticeState.at_picture(picture(seed)), time_grid(num_steps, 0.0, strength)
    end = straight_leg(field, start, grid)
    assert same(straight_leg_back(field, end, grid), start)


def test_a_straight_leg_along_straight_lines_is_exact_in_one_step():
    start, ahead = picture(1), picture(2)
    end = straight_leg(lambda x, t: ahead - start, LatticeState.at_picture(start), [0.0, 1.0])
    assert (end.x - ahead).abs().max() <= 1.5 * LATTICE  # both pictures rounded, and what leads from one to the other
    assert not end.defect.any()


def test_a_straight_leg_converges_to_the_exact_flow_with_first_order_and_its_defect_too():
    """x' = -x cos t from t = 0 to 1 is x exp(-sin 1); halving the steps halves the error of y, and the defect."""
    x = picture(3)
    errors, defects = [], []
    for num_steps in (20, 40, 80):
        end = straight_leg(lambda x, t: -x * math.cos(t), LatticeState.at_picture(x), time_grid(num_steps))
        errors.append((end.x - x * math.exp(-math.sin(1))).abs().max())
        defects.append(from_lattice(end.defect).abs().max())
    for values in (errors, defects):
        assert values[0] / values[1] == pytest.approx(2, rel=0.1) and values[1] / values[2] == pytest.approx(2, rel=0.1)
    assert errors[2] < 0.01 * x.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**32])
@pytest.mark.parametrize("when", range(6))
def test_one_velocity_that_is_not_finite_in_a_straight_leg_is_an_error(when, bad):
    calls = []

    def field(x, t):
        calls.append(t)
        return torch.full_like(x, bad if len(calls) == when + 1 else 0.0)

    with pytest.raises(FloatingPointError, match="not finite"):
        end = straight_leg(field, LatticeState.at_picture(torch.zeros(2, 1)), time_grid(3))
        assert when == 5
        end.defect  # noqa: B018
