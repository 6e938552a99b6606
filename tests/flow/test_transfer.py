"""The transfer: both legs and the way back, what a floor on structure finds, and FlowEdit, which has no legs."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_cases import EVALUATIONS, MODEL, ORDER, PICTURES, A, B, C, Zero, picture, same
from isonext.flow.solvers import LATTICE, ONE_STEP_METHODS, LatticeState, from_lattice, to_lattice
from isonext.flow.transfer import (
    Inverted,
    TransferSettings,
    generate,
    invert,
    keep_structure,
    latents_of,
    restore,
    transfer,
    undo,
)

quick = settings(deadline=None, max_examples=25)


def white(self, noise, x1, style):
    """The base of these models."""
    return noise


SOLVED = [(method, "fixed_point") for method in ONE_STEP_METHODS]
WITH_LEGS = [("alf", "explicit"), *((method, "explicit") for method in ONE_STEP_METHODS), *SOLVED]


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
    assert torch.equal(undo(MODEL, made, A, B, chosen)[1].x, on_lattice(x1))
    assert strength == 0 or (made.latents - x1).abs().max() > 0.05


def test_alf_undoes_a_transfer_of_pictures_of_different_styles_bit_for_bit():
    x1, chosen = picture(2), TransferSettings("alf", 4, 1.0, 3.0, "source")
    source, target = torch.tensor([0, 1]), torch.tensor([2, 1])
    made = transfer(MODEL, x1, source, target, chosen)
    assert torch.equal(undo(MODEL, made, source, target, chosen)[1].x, on_lattice(x1))


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_alf_to_its_own_style_returns_the_picture_bit_for_bit_at_every_scale(scale, strength):
    x1 = picture(3)
    made = transfer(MODEL, x1, A, A, TransferSettings("alf", 4, strength, scale, "source"))
    assert torch.equal(made.latents, on_lattice(x1))
    assert not torch.equal(latents_of(made.start), made.latents)


@pytest.mark.parametrize("method", ORDER)
def test_strength_zero_returns_the_picture(method):
    x1 = picture(4)
    made = transfer(MODEL, x1, A, B, TransferSettings(method, 3, 0.0, 2.0, "null"))
    kept = on_lattice(x1) if method == "alf" else x1
    assert torch.equal(made.latents, kept)
    assert torch.equal(latents_of(made.start), kept)


class Hyperbolas:
    """x' = -2 t k x^2, one k a style: 1 / x grows by k (b^2 - a^2) from a to b, so that every transfer is known."""

    null_style = 2
    x0 = white
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
@pytest.mark.parametrize("method", ORDER)
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
        (latents_of(twice.start), latents_of(once.start), structure),
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
        error.append((undo(Hyperbolas(), made, source, target, chosen)[1] - x1).abs().max().item())
    # At least first order: near half the error at half the step, or nothing but float32 rounding is left.
    assert error[1] < max(0.6 * error[0], 1e-6)
    assert error[1] < 0.1


@pytest.mark.parametrize("method", ORDER)
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
    assert torch.equal(clamped.start.x, free.start.x)
    assert torch.equal(clamped.latents, free.latents.clamp(-0.75, 0.75))
    assert torch.equal(undo(MODEL, clamped, A, B, replace(chosen, latent_clamp=0.75))[1].x, on_lattice(x1))


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("method", ORDER)
def test_a_transfer_costs_two_legs_and_a_guided_one_three(method, num_steps):
    x1, one_leg = torch.ones(PICTURES, 1, 1, 1), EVALUATIONS[method](num_steps)
    assert transfer(Zero(), x1, A, B, TransferSettings(method, num_steps)).nfe == 2 * one_leg
    guided = TransferSettings(method, num_steps, cfg_scale=2.0, guidance="null")
    assert transfer(Zero(), x1, A, B, guided).nfe == 3 * one_leg
    carried = 1 if method == "alf" else 0  # the defect, which a picture takes along to its own style
    assert transfer(Zero(), x1, A, A, replace(guided, guidance="source")).nfe == 2 * one_leg + carried


def test_guidance_costs_a_second_forward_only_inside_its_interval():
    # alf, 4 steps on either leg: 4 + 1; two of the second leg's are guided, and at each end of the interval the
    # velocity is carried over by a guided evaluation
    chosen = TransferSettings("alf", 4, cfg_scale=2.0, guidance="null", cfg_interval=(0.25, 0.75))
    assert transfer(Zero(), torch.ones(PICTURES, 1, 1, 1), A, B, chosen).nfe == 5 + (5 + 2) + 2 * 2
    # the ends are not on the grid: 0, 1/4, 0.3, 1/2, 0.7, 3/4, 1
    between = replace(chosen, cfg_interval=(0.3, 0.7))
    assert between.grid == [0.0, 0.25, 0.3, 0.5, 0.7, 0.75, 1.0]
    assert transfer(Zero(), torch.ones(PICTURES, 1, 1, 1), A, B, between).nfe == 7 + (7 + 2) + 2 * 2
    assert transfer(Zero(), torch.ones(PICTURES, 1, 1, 1), A, B, replace(between, method="euler")).nfe == 6 + 6 + 2


@pytest.mark.parametrize("ends", [(0.3, 0.7), (0.0, 0.55), (0.45, 1.0), (0.25, 0.25), (0.4, 0.45)])
@pytest.mark.parametrize("kind", ["uniform", "cosine"])
def test_a_step_is_guided_exactly_where_it_lies_inside_the_interval(ends, kind):
    chosen = TransferSettings(num_steps=8, cfg_scale=2.0, guidance="null", cfg_interval=ends, time_grid=kind)
    pieces = chosen.legs(Zero(), A, B)[1].pieces
    assert [time for _, grid in pieces for time in grid[:-1]] + [1.0] == chosen.grid
    guided = sum(grid[-1] - grid[0] for field, grid in pieces if field.scale == 2.0)
    assert guided == pytest.approx(ends[1] - ends[0], abs=1e-12)  # Euler's and all others' alike
    assert all(low <= grid[0] for field, grid in pieces if field.scale == 2.0 for low in ends[:1])


@pytest.mark.parametrize("skip", range(5))
def test_a_structure_lies_at_the_same_time_whatever_the_guidance_that_it_is_generated_with(skip):
    plain = TransferSettings(num_steps=4, skip=skip)  # times 0, 1/4, 1/2, 3/4, 1; the interval's ends are none of them
    for guided in (replace(plain, cfg_scale=2.0, cfg_interval=ends) for ends in ((0.1, 0.9), (0.6, 0.7), (0.0, 1.0))):
        assert guided.grid[0] == plain.grid[0] == skip / 4
        assert set(plain.grid) <= set(guided.grid)


@pytest.mark.parametrize("scale", [2.0, 3.0])
@pytest.mark.parametrize("method", ORDER)
def test_guidance_on_an_interval_costs_no_method_its_order(method, scale):
    # Hyperbolas: 1 / x grows by k (b^2 - a^2), with k guided from 0.2 to 0.63 alone.
    x1 = torch.tensor([0.3, 0.5, 0.9, 1.2]).view(1, 1, 2, 2).double()
    chosen = TransferSettings(method, 10, cfg_scale=scale, guidance="null", cfg_interval=(0.2, 0.63))
    forward = 1.0 + (scale - 1) * (1.0 - 0.25) * (0.63**2 - 0.2**2)
    exact = 1 / (1 / x1 - 0.5 + forward)
    error = {}
    for num_steps in (10, 20, 40, 80):
        made = transfer(Hyperbolas(), x1.float(), one(0), one(1), replace(chosen, num_steps=num_steps))
        error[num_steps] = (made.latents - exact).abs().max().item()
    # Over three halvings of the step, or until float32 and the lattice are all that is left. (A single one may mislead:
    # the errors of the two legs have signs of their own.)
    assert error[80] <= max(error[10] / 8 ** (ORDER[method] - 0.3), 4e-6), error


def test_the_defect_of_the_inversion_does_not_enter_the_generation():
    # The leg from the structure alone, as if nobody had inverted, is the generation leg to the bit.
    x1, chosen = picture(7), TransferSettings("alf", 4, cfg_scale=2.0, cfg_interval=(0.25, 0.75))
    made = transfer(MODEL, x1, A, B, chosen)
    assert made.start.defect.abs().max() > 0
    bare = LatticeState(made.start.position, torch.zeros_like(made.start.defect))
    alone = generate(MODEL, Inverted(bare, 0), A, B, chosen)
    assert torch.equal(alone.latents, made.latents)
    assert same(alone.end, made.end)


def test_pictures_of_a_batch_whose_target_is_their_source_alone_take_their_defect_along():
    x1, chosen = picture(9), TransferSettings("alf", 3)
    source, target = torch.tensor([0, 1]), torch.tensor([2, 1])
    made = transfer(MODEL, x1, source, target, chosen)
    assert torch.equal(made.latents[1], on_lattice(x1)[1])
    start, back, _ = undo(MODEL, made, source, target, chosen)
    assert same(start, made.start)
    assert same(back, LatticeState.at_picture(x1))


def test_a_structure_is_restored_to_its_picture_without_its_transfer():
    x1, chosen = picture(3), TransferSettings("alf", 4, 0.8)
    assert same(restore(MODEL, invert(MODEL, x1, A, chosen).state, A, chosen), LatticeState.at_picture(x1))


def test_the_grid_of_the_settings_is_shifted_over_what_the_strength_leaves_and_skips_at_the_structures_end():
    # the upper half of time, in quarters that a shift by 3 moves to 1/2, 3/4, 9/10, of which the first is left out
    chosen = TransferSettings(num_steps=4, strength=0.5, time_shift=3.0, skip=1)
    assert chosen.grid == pytest.approx([0.75, 0.875, 0.95, 1.0], abs=1e-15)
    cosine = replace(chosen, num_steps=3, time_grid="cosine", skip=0)
    assert cosine.grid == pytest.approx([0.5, 0.75, 0.95, 1.0], abs=1e-15)


def test_the_generation_leg_alone_is_guided_and_rescaled_by_hand():
    of_style = torch.tensor([[1.0, 2.0], [1.0, 3.0]]).view(2, 1, 1, 2)

    def model(x, t, style):
        return of_style[style] + 0 * x

    # down by (1, 2); up by (1, 3) + 2 (0, 1) = (1, 5), of deviation 2 where (1, 3) has 1: half of it at 1, 3/4 at 1/2
    for rescale, up in ((0.0, [1.0, 5.0]), (0.5, [0.75, 3.75]), (1.0, [0.5, 2.5])):
        how = TransferSettings("euler", 1, cfg_scale=3.0, cfg_rescale=rescale)
        made = transfer(model, torch.zeros(1, 1, 1, 2), torch.tensor([0]), torch.tensor([1]), how)
        assert made.start.flatten().tolist() == [-1.0, -2.0]
        assert made.latents.flatten().tolist() == pytest.approx([up[0] - 1, up[1] - 2], abs=1e-6)


@pytest.mark.parametrize("method", ONE_STEP_METHODS)
def test_the_way_back_of_an_explicit_method_is_not_clamped(method):
    x1, chosen = picture(5), TransferSettings(method, 3, latent_clamp=0.75)
    made = transfer(MODEL, x1, A, B, chosen)
    clamped, free = (undo(MODEL, made, A, B, how) for how in (chosen, replace(chosen, latent_clamp=None)))
    assert torch.equal(clamped[0], free[0])
    assert torch.equal(clamped[1], free[1])
    assert free[1].abs().max() > 0.75


#################################################################################
#                       Exact whatever the settings, and between many styles    #
#################################################################################


def settings_of(method, inversion, num_steps, skip, interval, **rest):
    interval, skip = tuple(sorted(interval)), skip % (num_steps + 1)
    return TransferSettings(method, num_steps, skip=skip, inversion=inversion, cfg_interval=interval, **rest)


def random_settings(method="alf", inversion="explicit", steps=(1, 4), strength=(0, 1), **fixed):
    free = {
        "num_steps": st.integers(*steps),
        "skip": st.integers(0, 4),
        "interval": st.tuples(st.floats(0, 1), st.floats(0, 1)) | st.just((0.0, 1.0)),
        "strength": st.floats(*strength),
        "cfg_scale": st.sampled_from([1.0, 0.0, 2.5]),
        "guidance": st.sampled_from(["source", "null"]),
        "cfg_rescale": st.sampled_from([0.0, 0.4, 1.0]),
        "time_grid": st.sampled_from(["uniform", "cosine"]),
        "time_shift": st.floats(0.05, 20),
    }
    return st.builds(settings_of, st.just(method), st.just(inversion), **free | fixed)


def same_states(a, b):
    return same(a, b) if isinstance(a, LatticeState) else torch.equal(a, b)


def same_transfers(a, b):
    if a.residual is None or b.residual is None:
        residuals_agree = a.residual is b.residual
    else:
        residuals_agree = torch.equal(a.residual, b.residual)
    return (
        torch.equal(a.latents, b.latents)
        and same_states(a.start, b.start)
        and same_states(a.end, b.end)
        and residuals_agree
    )


@quick
@given(seed=st.integers(0, 1000), how=random_settings())
def test_alf_undoes_a_transfer_bit_for_bit_whatever_the_settings(seed, how):
    x1 = picture(seed)
    made = transfer(MODEL, x1, A, B, how)
    start, back, residual = undo(MODEL, made, A, B, how)
    assert same(start, made.start)
    assert same(back, LatticeState.at_picture(x1))  # with a defect of zero, as pictures have
    assert residual is None
    assert len(how.grid) == 1 or how.strength < 0.1 or not torch.equal(start.position, back.position)


@quick
@given(seed=st.integers(0, 1000), first=random_settings(), second=random_settings())
def test_a_picture_passed_on_from_a_to_b_to_c_comes_back_to_b_to_a_bit_for_bit(seed, first, second):
    x1 = picture(seed)
    in_b = generate(MODEL, invert(MODEL, x1, A, first), A, B, first)
    in_c = generate(MODEL, invert(MODEL, in_b.latents, B, second), B, C, second)
    back_in_b = undo(MODEL, in_c, B, C, second)[1]
    assert torch.equal(back_in_b.x, in_b.latents)
    again = replace(in_b, end=LatticeState(back_in_b.position, in_b.end.defect))
    assert same(undo(MODEL, again, A, B, first)[1], LatticeState.at_picture(x1))


@pytest.mark.parametrize(("method", "inversion"), WITH_LEGS)
@settings(deadline=None, max_examples=3)
@given(data=st.data())
def test_many_targets_of_one_inversion_are_the_very_bits_of_a_transfer_each(method, inversion, data):
    tolerant = {"tolerance": st.just(1e-2)} if inversion == "fixed_point" else {}
    how = data.draw(random_settings(method, inversion, (1, 2), **tolerant))
    x1, between = picture(8), torch.lerp(MODEL.embed(B), MODEL.embed(C), 0.3)
    inverted = invert(MODEL, x1, A, how)
    for target in (B, between, A, C):
        made, anew = generate(MODEL, inverted, A, target, how), transfer(MODEL, x1, A, target, how)
        assert same_transfers(made, anew)
        assert made.nfe == anew.nfe if target is not A else made.nfe in (anew.nfe, anew.nfe - 1)  # the defect is known
        assert same_states(made.start, inverted.state)


def test_embeddings_of_a_style_make_the_very_bits_of_its_id():
    how = TransferSettings("alf", 3, cfg_scale=2.0, cfg_rescale=0.5)
    by_id, made = (transfer(MODEL, picture(9), A, target, how) for target in (B, MODEL.embed(B)))
    assert same_transfers(by_id, made)
    home = transfer(MODEL, picture(9), A, MODEL.embed(A), how)  # the source's own embedding: no contrast, no change
    assert torch.equal(home.latents, on_lattice(picture(9)))


#################################################################################
#                          A floor on what is kept                              #
#################################################################################


class Counted:
    """A model that counts the rows it is given: for one picture, its network evaluations."""

    null_style = 3
    x0 = white

    def __init__(self, model):
        self.model, self.rows = model, 0

    def __call__(self, x, t, style):
        self.rows += len(x)
        return self.model(x, t, style)


def one(style):
    return torch.tensor([style])


@pytest.mark.parametrize(
    ("method", "inversion"),
    [("alf", "explicit"), ("euler", "explicit"), ("rk4", "explicit"), ("euler", "fixed_point"), ("rk4", "fixed_point")],
)
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_the_strongest_transfer_that_passes_is_found_and_is_the_transfer_of_its_settings(method, inversion, data):
    fixed = {"cfg_scale": st.sampled_from([1.0, 2.5]), "time_shift": st.just(2.0)}  # so that every strength differs
    if inversion == "fixed_point":
        fixed |= {"tolerance": st.just(1e-2), "num_steps": st.integers(1, 3)}  # as far as bf16 can be solved for
    how = data.draw(random_settings(method, inversion, (1, 5), (0.3, 1), **fixed))
    x1, steps = picture(10)[:1], len(how.times) - 1
    cuts = [replace(how, skip=how.skip + skip) for skip in range(steps + 1)]
    every = [transfer(MODEL, x1, one(0), one(1), cut) for cut in cuts]
    of_bits = {made.latents.numpy().tobytes(): skip for skip, made in enumerate(every)}
    assert len(of_bits) == steps + 1

    def score(latents):  # rises with what is left out; a KeyError if these are not the bits of a plain transfer
        return of_bits[latents.numpy().tobytes()] / 10

    least = data.draw(st.integers(0, steps + 1))  # one more than the picture itself reaches
    model = Counted(MODEL)
    made, cut, tried = keep_structure(model, x1, one(0), one(1), how, score, least / 10)

    assert made.nfe == model.rows  # before the defects are asked for
    found = min(least, steps)
    assert cut == cuts[found]
    assert same_transfers(made, every[found])
    assert (1 - cut.grid[0], found / 10) in tried
    assert all(strength == 1 - how.times[round(10 * reached)] for strength, reached in tried)
    assert len(tried) == len(set(tried)) <= math.ceil(math.log2(steps + 1)) + 1
    if method == "alf":
        assert same(undo(MODEL, made, one(0), one(1), cut)[1], LatticeState.at_picture(x1))
    if found == steps:
        assert torch.equal(made.latents, on_lattice(x1) if method == "alf" else x1)


class Drift:
    """v = the style's own number, everywhere: a transfer moves by strength * (target - source)."""

    null_style = 3
    x0 = white
    speed = torch.tensor([1.0, -2.0, 0.5, 4.0])

    def __call__(self, x, t, style):
        return self.speed[style].view(-1, 1, 1, 1) + 0 * x


@quick
@given(
    how=random_settings(steps=(1, 40), strength=(0.1, 1), cfg_scale=st.just(1.0)),
    method=st.sampled_from([*ORDER]),
    where=st.integers(0, 40),
)
def test_the_strength_found_is_the_last_of_the_grid_that_moves_no_further_than_allowed(how, method, where):
    how, x1 = replace(how, method=method), picture(11)[:1]
    strengths = [1 - t for t in how.times]
    where = where % len(strengths)
    allowed = strengths[where] + (strengths[where - 1] - strengths[where]) / 2 if where else 2.0
    made, cut, _ = keep_structure(
        Drift(), x1, one(0), one(1), how, lambda latents: -(latents - x1).abs().max().item(), -3 * allowed
    )
    assert cut.times == how.times[where:]
    # float32, or the lattice, at every step of two legs: 5e-7 each
    assert (made.latents - (x1 - 3 * strengths[where])).abs().max() <= 80 * 5e-7


@pytest.mark.parametrize(
    ("method", "limit", "found", "tried", "nfe"),
    [
        # alf: 4 + 1 for the inversion, then of s steps s + 1
        ("alf", 1.0, 1.0, [0.5, 0.75, 1.0], 5 + (2 + 1) + (3 + 1) + (4 + 1)),
        ("alf", 0.6, 0.5, [0.5, 0.75], 5 + (2 + 1) + (3 + 1)),
        ("alf", 0.0, 0.0, [0.5, 0.25, 0.0], 5 + (2 + 1) + (1 + 1) + 1),
        ("euler", 0.9, 0.75, [0.5, 0.75, 1.0], 4 + 2 + 3 + 4),
        ("euler", -1.0, 0.0, [0.5, 0.25, 0.0], 4 + 2 + 1 + 0),
        ("rk4", 0.3, 0.25, [0.5, 0.25], 4 * (4 + 2 + 1)),
    ],
)
def test_a_search_bisects_and_costs_one_inversion_and_its_trials_by_hand(method, limit, found, tried, nfe):
    def score(latents):  # full strength moves by 3
        return 0.8 if latents.abs().max() / 3 <= limit + 1e-5 else 0.4

    x1, chosen = torch.zeros(1, 1, 2, 2), TransferSettings(method, 4)
    made, cut, scores = keep_structure(Drift(), x1, one(0), one(1), chosen, score, 0.8)
    assert scores == [(strength, 0.8 if strength <= limit else 0.4) for strength in tried]
    assert cut == replace(chosen, skip=round(4 * (1 - found)))
    assert made.nfe == nfe


@pytest.mark.parametrize("method", ORDER)
def test_a_floor_that_nothing_reaches_gives_the_picture_itself(method):
    x1 = picture(12)[:1]
    made, cut, _ = keep_structure(MODEL, x1, one(0), one(1), TransferSettings(method, 5), lambda x: 0.2, 0.5)
    assert torch.equal(made.latents, on_lattice(x1) if method == "alf" else x1)
    assert cut.grid == [1.0]


#################################################################################
#                          Inversion by fixed point                             #
#################################################################################


@pytest.mark.parametrize("method", ONE_STEP_METHODS)
def test_a_solved_inversion_comes_back_to_its_tolerance_where_an_explicit_one_does_not(method):
    x1 = torch.tensor([0.3, 0.5, 0.9, 1.2]).view(1, 1, 2, 2)
    error = {}
    for inversion in ("explicit", "fixed_point"):
        chosen = TransferSettings(method, 5, inversion=inversion, tolerance=1e-6)
        made = transfer(Hyperbolas(), x1, one(0), one(1), chosen)
        _, back, residual = undo(Hyperbolas(), made, one(0), one(1), chosen)
        error[inversion] = (back - x1).abs().max().item()
    assert (made.residual <= 1e-6).all()
    assert (residual <= 1e-6).all()
    # Each of two legs misses 1e-6 and some float32 rounding a step. The hyperbolas carry a change of x on by the square
    # of the ratio of x: the largest, 1.2, has its structure at 3 and is .75 in the other style. So the first leg's
    # misses shrink and the second's are enlarged by (1.2 / .75)^2 = 2.6 at most, by 4 with steps as coarse as these.
    assert error["fixed_point"] <= 5 * 2e-6 * (1 + 4)
    assert error["explicit"] > 10 * error["fixed_point"]


@pytest.mark.parametrize("method", ONE_STEP_METHODS)
def test_a_solved_inversion_leads_to_the_picture_by_the_steps_of_the_method(method):
    x1, chosen = picture(13), TransferSettings(method, 3, inversion="fixed_point", tolerance=1e-5)
    inverted = invert(MODEL.net, x1, A, chosen)
    again = generate(MODEL.net, inverted, A, A, chosen)
    assert (inverted.residual <= 1e-5).all()
    assert again.residual is inverted.residual
    assert (again.latents - x1).abs().max() <= 1e-3


@pytest.mark.parametrize("method", ONE_STEP_METHODS)
def test_the_latent_clamp_bounds_the_result_of_a_solved_inversion_and_spoils_neither_leg(method):
    x1 = torch.tensor([0.3, 0.5, 0.9, 1.2]).view(1, 1, 2, 2)
    chosen = TransferSettings(method, 5, inversion="fixed_point", tolerance=1e-6)
    clamping = replace(chosen, latent_clamp=0.6)
    free, clamped = (transfer(Hyperbolas(), x1, one(0), one(1), how) for how in (chosen, clamping))
    assert free.latents.abs().max() > 0.65
    assert torch.equal(clamped.latents, free.latents.clamp(-0.6, 0.6))
    assert torch.equal(clamped.start, free.start)
    assert torch.equal(clamped.end, free.end)
    assert (undo(Hyperbolas(), clamped, one(0), one(1), clamping)[1] - x1).abs().max() <= 5e-5  # as above


@pytest.mark.parametrize(("skip", "passes"), [(0, [1, 1, 1]), (1, [1, 1, 0]), (3, [0, 1]), (4, [0, 0, 0])])
def test_the_residual_of_the_inversion_comes_with_the_strongest_transfer_that_passes(skip, passes):
    # Bisection asks for skips 2, 1 and 0, or 2, 3 and 4. The steps grow towards structure, and what each misses with
    # them: too hard to solve for in bf16, so that every strength has a residual of its own.
    x1, fixed = picture(17)[:1], {"inversion": "fixed_point", "tolerance": 1e-6}
    chosen = TransferSettings("euler", 4, time_shift=8.0, **fixed)
    answers = iter(passes)
    made, cut, _ = keep_structure(MODEL, x1, one(0), one(1), chosen, lambda latents: next(answers), 1)
    assert cut.skip == skip
    assert same_transfers(made, transfer(MODEL, x1, one(0), one(1), cut))
    if skip:
        assert made.residual < transfer(MODEL, x1, one(0), one(1), replace(cut, skip=skip - 1)).residual


def test_a_solved_inversion_of_strength_zero_has_a_residual_of_zero():
    chosen = TransferSettings("euler", 2, 0.0, inversion="fixed_point")
    assert transfer(Drift(), picture(18), A, B, chosen).residual.tolist() == [0.0] * PICTURES


#################################################################################
#                                    FlowEdit                                   #
#################################################################################


@quick
@given(
    seed=st.integers(0, 1000),
    how=random_settings(
        "flowedit", guidance=st.just("source"), noise_samples=st.integers(1, 3), seed=st.integers(0, 9)
    ),
)
def test_flowedit_to_its_own_style_returns_the_picture_bit_for_bit(seed, how):
    x1 = picture(seed)
    assert torch.equal(transfer(MODEL, x1, A, A, how).latents, x1)


def test_flowedit_leaves_the_pictures_of_a_mixed_batch_whose_styles_are_equal_alone():
    x1, how = torch.rand(2, 1, 2, 2), TransferSettings("flowedit", 4, cfg_scale=3.0, noise_samples=2)
    made = transfer(Hyperbolas(), x1, torch.tensor([0, 1]), torch.tensor([0, 2]), how)
    assert torch.equal(made.latents[0], x1[0])
    assert not torch.equal(made.latents[1], x1[1])


@quick
@given(
    how=random_settings("flowedit", (1, 8), skip=st.just(0), noise_samples=st.integers(1, 3), interval=st.just((0, 1)))
)
def test_flowedit_between_two_drifts_moves_by_their_difference_times_the_strength(how):
    how = replace(how, cfg_rescale=0.0)
    x1, reference = picture(14), {"source": 1.0, "null": 4.0}[how.guidance]
    made = transfer(Drift(), x1, A, B, how)
    speed = -2.0 + (how.cfg_scale - 1) * (-2.0 - reference) - 1.0
    # The steps of any grid add up to the strength; each rounds values of at most 20 in float32, as does each noise.
    assert (made.latents - (x1 + how.strength * speed)).abs().max() <= 8 * 4 * 2e-6
    assert made.start is None
    assert made.end is None


class Tied(Hyperbolas):
    """A base that depends on the picture and its style."""

    def x0(self, noise, x1, style):
        return 0.5 * noise + 0.25 * x1 + style.view(-1, 1, 1, 1)


@pytest.mark.parametrize(("model", "of_noise", "of_x1"), [(Hyperbolas(), 1.0, 0.0), (Tied(), 0.5, 0.25)])
def test_flowedit_is_the_formula_of_its_paper_step_by_step_in_float64(model, of_noise, of_x1):
    x1, scale = 0.5 * torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(3)), 1.5
    how = TransferSettings("flowedit", 3, 0.75, scale, "null", time_grid="cosine", noise_samples=2, seed=11)
    generator = torch.Generator().manual_seed(11)
    edited = x1.double()
    times = [0.25 + 0.75 * u for u in (0, 0.25, 0.75, 1)]
    for a, b in pairwise(times):
        moved = torch.zeros_like(edited)
        for noise in torch.randn(2, 1, 3, 3, generator=generator).double():  # drawn anew for every step
            source = (1 - a) * (of_noise * noise + of_x1 * x1.double()) + a * x1.double()
            target = edited + source - x1.double()
            k = 1.0 + (scale - 1) * (1.0 - 0.25)
            moved += (-2 * a * k * target**2 + 2 * a * 0.5 * source**2) / 2
        edited = edited + (b - a) * moved
    made = transfer(model, x1, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), how)
    # squares of values up to 4 in float32, over some ten operations a step
    assert (made.latents - edited).abs().max() < 2e-5
    assert (edited - x1).abs().max() > 0.05


def test_flowedit_of_a_picture_does_not_depend_on_the_others_of_its_batch():
    x1 = torch.rand(3, 1, 3, 3)
    x1[2] = x1[0]
    source, target = torch.tensor([0, 2, 0]), torch.tensor([1, 1, 1])
    how = TransferSettings("flowedit", 4, cfg_scale=2.0, noise_samples=2, seed=5)
    whole = transfer(Hyperbolas(), x1, source, target, how).latents
    for row in range(3):
        part = slice(row, row + 1)
        assert torch.equal(transfer(Hyperbolas(), x1[part], source[part], target[part], how).latents, whole[part])
    assert torch.equal(whole[2], whole[0])  # the same noise for every picture


def test_the_seed_of_flowedit_fixes_its_noise_and_more_samples_depend_on_it_less():
    x1 = picture(15)

    def made(seed, samples):
        how = TransferSettings("flowedit", 2, 0.6, noise_samples=samples, seed=seed)
        return transfer(Hyperbolas(), x1, A, B, how).latents

    assert torch.equal(made(0, 1), made(0, 1))
    few, many = ((made(0, samples) - made(1, samples)).square().mean().sqrt() for samples in (1, 64))
    assert few > 0.01
    assert many < few / 3  # a mean of 64: an eighth, were the second step linear in the first


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_flowedit_costs_two_evaluations_a_step_and_noise_and_three_where_it_is_guided(num_steps, samples):
    how = TransferSettings("flowedit", num_steps, noise_samples=samples)
    guided = replace(how, cfg_scale=2.0, guidance="null")
    # 0, 0.2, 0.6, 1, and of four steps 1/4, 1/2, 3/4 besides: one step inside the interval, or three
    partly = replace(guided, cfg_interval=(0.2, 0.6))
    for chosen, evaluations in (
        (how, 2 * num_steps),
        (guided, 3 * num_steps),
        (partly, 2 * 3 + 1 if num_steps == 1 else 2 * 6 + 3),
    ):
        model = Counted(Drift())
        made = transfer(model, torch.zeros(1, 1, 2, 2), one(0), one(1), chosen)
        assert made.nfe == model.rows == samples * evaluations


#################################################################################
#                           A network that diverged                             #
#################################################################################


class Broken:
    """One value of one picture is `bad`, under the styles given."""

    null_style = 3
    x0 = white

    def __init__(self, bad, styles):
        self.bad, self.styles = bad, torch.tensor(styles)

    def __call__(self, x, t, style):
        v = -0.5 * x
        v[-1, 0, 1, 1] = torch.where(torch.isin(style[-1], self.styles), self.bad, v[-1, 0, 1, 1])
        return v


@pytest.mark.parametrize("styles", [[0], [1], [0, 1]], ids=["source", "target", "both"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("method", "inversion"), [*WITH_LEGS, ("flowedit", "explicit")])
def test_a_network_that_is_not_finite_is_an_error_for_every_method(method, inversion, bad, styles):
    how = TransferSettings(method, 2, inversion=inversion)
    with pytest.raises(FloatingPointError, match="not finite"):
        transfer(Broken(bad, styles), picture(16), A, B, how)


@pytest.mark.parametrize(
    ("method", "inversion"),
    [
        ("alf", "explicit"),
        ("flowedit", "explicit"),
        *SOLVED,
        *((method, "explicit") for method in ONE_STEP_METHODS),
    ],
)
def test_a_clamp_does_not_hide_a_network_that_is_infinite(method, inversion):
    how = TransferSettings(method, 2, inversion=inversion, latent_clamp=3.0)
    with pytest.raises(FloatingPointError, match="not finite"):
        transfer(Broken(math.inf, [1]), picture(16), A, B, how)


#################################################################################
#                        Stage 2: one leg from picture to picture               #
#################################################################################


@quick
@given(
    seed=st.integers(0, 1000),
    how=st.builds(
        TransferSettings,
        method=st.just("map"),
        num_steps=st.integers(1, 4),
        strength=st.floats(0, 1),
        cfg_scale=st.floats(1, 4),
        latent_clamp=st.none() | st.floats(0.1, 3),
    ),
    styles=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=PICTURES, max_size=PICTURES),
)
def test_map_undoes_a_transfer_bit_for_bit_whatever_the_settings_and_the_styles(seed, how, styles):
    x1, (source, target) = picture(seed), torch.tensor(styles).T
    made = transfer(MODEL, x1, source, target, how)
    start, back, residual = undo(MODEL, made, source, target, how)
    assert same(back, LatticeState.at_picture(x1)) and same(start, made.start) and residual is None
    assert same(restore(MODEL, made.end, source, how, target), back)
    for row in range(PICTURES):
        stays = bool(source[row] == target[row])
        assert torch.equal(made.end.x[row], on_lattice(x1)[row]) == stays or (not stays and how.strength < 0.01)


def test_one_step_of_map_by_hand_and_what_the_network_is_asked():
    asked = []

    class Pulls(Zero):
        def map_velocity(self, x, t, source, target, scale):
            asked.append((x, t.tolist(), source.tolist(), target.tolist(), scale.tolist()))
            return scale.view(-1, 1, 1, 1) * (1 - x) + t.view(-1, 1, 1, 1)

    x1, how = torch.full((2, 1, 1, 1), 0.5), TransferSettings("map", 1, 0.5, 3.0)
    made = transfer(Pulls(), x1, A, B, how)
    assert made.latents.flatten().tolist() == [0.5 + 0.5 * 1.5] * 2  # 1.25
    assert asked[0][1:] == ([0.0, 0.0], [0, 0], [1, 1], [3.0, 3.0]) and made.nfe == len(asked) == 1
    defect = 0.5 + 0.5 * (3 * (1 - 1.25) + 0.5) - 1.25  # z - y, of z = 0.5 + 0.5 v(1.25, 0.5)
    assert from_lattice(made.end.defect).flatten().tolist() == [defect] * 2
    assert asked[1][1] == [0.5, 0.5] and torch.equal(asked[1][0], made.latents)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_transfer_by_map_costs_one_evaluation_and_two_for_each_further_step_at_every_scale(num_steps):
    for scale in (1.0, 4.0):
        how = TransferSettings("map", num_steps, 1.0, scale)
        assert transfer(MODEL, picture(1), A, B, how).nfe == 2 * num_steps - 1


def test_map_heeds_neither_the_interval_of_guidance_nor_the_grids_of_the_other_methods():
    plain, x1 = TransferSettings("map", 3, 0.8, 2.0), picture(1)
    for change in ({"cfg_interval": (0.2, 0.4)}, {"time_grid": "cosine"}, {"time_shift": 3.0}, {"guidance": "null"}):
        other = replace(plain, **change)
        assert torch.equal(transfer(MODEL, x1, A, B, other).latents, transfer(MODEL, x1, A, B, plain).latents)
    assert plain.grid == pytest.approx([0, 0.8 / 3, 1.6 / 3, 0.8])
    assert not torch.equal(
        transfer(MODEL, x1, A, B, replace(plain, cfg_scale=3.0)).latents, transfer(MODEL, x1, A, B, plain).latents
    )


def test_embeddings_of_the_maps_styles_make_the_very_bits_of_their_ids_and_of_the_source_none():
    x1, how = picture(5), TransferSettings("map", 2, 1.0, 2.5)
    of_id, of_embedding = (transfer(MODEL, x1, A, target, how) for target in (B, MODEL.map_embed(B)))
    assert torch.equal(of_id.latents, of_embedding.latents)
    assert torch.equal(transfer(MODEL, x1, A, MODEL.map_embed(A), how).latents, on_lattice(x1))


def test_many_targets_of_a_picture_by_map_are_the_bits_of_a_transfer_each_and_its_inversion_is_free():
    x1, how = picture(6), TransferSettings("map", 1, 1.0, 2.0)
    inverted = invert(MODEL, x1, A, how)
    assert inverted.nfe == 0 and same(inverted.state, LatticeState.at_picture(x1))
    for target in (A, B, C):
        made = transfer(MODEL, x1, A, target, how)
        assert torch.equal(generate(MODEL, inverted, A, target, how).latents, made.latents)


class Ramp(Zero):
    """Moves every value by the strength."""

    def map_velocity(self, x, t, source, target, scale):
        return torch.ones_like(x)


@pytest.mark.parametrize(
    ("strength", "limit", "found"), [(1.0, 0.5, 0.5), (1.0, 0.55, 0.5), (0.5, 0.3, 9 / 32), (1.0, 2.0, 1.0)]
)
def test_map_keeps_structure_by_bisection_over_sixteenths_of_its_strength(strength, limit, found):
    x1, how = torch.zeros(1, 1, 2, 2), TransferSettings("map", 1, strength)
    made, cut, tried = keep_structure(Ramp(), x1, A[:1], B[:1], how, lambda z: -z.max().item(), -limit)
    assert cut == replace(how, strength=found) and cut.reached == found
    assert made.latents.max().item() == found == -dict(tried)[found]
    assert made.nfe == len(tried) <= 5
    assert torch.equal(made.latents, transfer(Ramp(), x1, A[:1], B[:1], cut).latents)


def test_a_floor_that_no_leg_of_map_reaches_gives_the_picture_itself():
    x1, how = picture(7)[:1], TransferSettings("map", 2, 1.0, 2.0)
    made, cut, tried = keep_structure(MODEL, x1, A[:1], B[:1], how, lambda _: 0.0, 1.0)
    assert cut.strength == 0 == min(strength for strength, _ in tried)
    assert torch.equal(made.latents, on_lattice(x1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_map_that_is_not_finite_is_an_error(bad):
    class Broken(Zero):
        def map_velocity(self, x, t, source, target, scale):
            return torch.full_like(x, bad)

    with pytest.raises(FloatingPointError, match="not finite"):
        transfer(Broken(), picture(1), A, B, TransferSettings("map", 1))
