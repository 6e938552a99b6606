"""AdamW by hand, and what it decays; the guard: which steps it refuses, by hand and for any course of a run."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isonext.config import TrainingConfig
from isonext.models.dit import DiT
from isonext.training.optim import MAX_LEAP, MAX_NORMS, MAX_SKIPPED, MIN_NORMS, Guard
from isonext.training.state import TrainState
from model import IsoNext

norms = st.one_of(st.floats(1e-6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf]))


#################################################################################
#                                     AdamW                                     #
#################################################################################


class Weights(torch.nn.Module):
    """A matrix, a gate and a style's embedding, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.tensor([[2.0, -3.0]], dtype=torch.float64))
        self.gate = torch.nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
        self.style = torch.nn.Embedding(1, 1, dtype=torch.float64)
        torch.nn.init.constant_(self.style.weight, 4.0)


def test_five_steps_are_those_of_adamw_by_hand():
    training = TrainingConfig(
        learning_rate=0.1, warmup_steps=2, weight_decay=0.3, betas=(0.6, 0.8), grad_clip=0, ema_decay=0.2
    )
    rates = [0.05, 0.1, 0.1, 0.1 * (1 + math.cos(math.pi / 3)) / 2, 0.1 * (1 + math.cos(2 * math.pi / 3)) / 2]
    gradients = {"matrix": [[1.0, -2.0], [0.5, 3.0], [-1.0, 0.1], [2.0, 2.0], [0.3, -0.7]]}
    gradients |= {"gate": [[1.0], [-4.0], [0.2], [0.2], [5.0]], "style.weight": [[-1.0], [-1.0], [2.0], [0.5], [3.0]]}
    state = TrainState.start(Weights(), training)
    weights, averages = (
        {name: p.detach().flatten().tolist() for name, p in Weights().named_parameters()} for _ in "ab"
    )
    first, second = ({name: [0.0] * len(values) for name, values in weights.items()} for _ in "ab")  # the moments
    for step, rate in enumerate(rates):
        for name, parameter in state.model.named_parameters():
            parameter.grad = torch.tensor(gradients[name][step], dtype=torch.float64).view_as(parameter)
            decay = 0.3 if name == "matrix" else 0.0
            for place, g in enumerate(gradients[name][step]):
                first[name][place] = m = 0.6 * first[name][place] + 0.4 * g
                second[name][place] = v = 0.8 * second[name][place] + 0.2 * g * g
                unbiased = m / (1 - 0.6 ** (step + 1)) / (math.sqrt(v / (1 - 0.8 ** (step + 1))) + 1e-8)
                weights[name][place] = w = weights[name][place] * (1 - rate * decay) - rate * unbiased
                kept = min(0.2, (1 + step) / (10 + step))
                averages[name][place] = kept * averages[name][place] + (1 - kept) * w
        assert state.take_step(training, total_steps=5).rate == pytest.approx(rate, rel=1e-12)
        for expected, model in ((weights, state.model), (averages, state.ema.model)):
            found = {name: parameter.detach().flatten().tolist() for name, parameter in model.named_parameters()}
            assert found == {name: pytest.approx(values, rel=1e-10) for name, values in expected.items()}, step


MATRICES = {
    "isonext": "time.mlp.0 time.mlp.2 join stem blocks.0.depthwise blocks.0.norm.affine blocks.0.widen blocks.0.narrow "
    "norm.affine head",
    "dit": "time.mlp.0 time.mlp.2 stem blocks.0.attention.qkv blocks.0.attention.out blocks.0.mlp.widen "
    "blocks.0.mlp.narrow blocks.0.affine affine head",
}


@pytest.mark.parametrize("kind", ["isonext", "dit"])
def test_weights_are_decayed_and_biases_gates_norms_and_embeddings_are_not(kind):
    training = TrainingConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.25)
    if kind == "isonext":
        model = IsoNext(4, 2, hidden_dim=8, num_layers=1, num_groups=4, style_dim=8, time_dim=8, kernel_size=3)
    else:
        model = DiT(4, 2, (4, 4), hidden_dim=16, num_layers=1, num_heads=2, time_dim=8, norm="rms", qk_norm=True)
    state = TrainState.start(model, training)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)  # so that only the decay moves it
    state.take_step(training, total_steps=10)
    assert {p.unique().item() for p in model.parameters()} == {1.0, 1 - 0.5 * 0.25}
    moved = {name for name, p in model.named_parameters() if p.unique().item() != 1}
    assert moved == {f"{name}.weight" for name in MATRICES[kind].split()}


#################################################################################
#                                   The guard                                   #
#################################################################################


def steady(count: int, norm: float = 2.0) -> Guard:
    guard = Guard()
    assert all(guard.passes(norm) for _ in range(count))
    return guard


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(norm):
    assert not Guard().passes(norm)
    assert not steady(200).passes(norm)


def test_a_leap_is_one_only_against_enough_others():
    assert steady(MIN_NORMS - 1).passes(1e9)
    guard = steady(MIN_NORMS)
    assert guard.passes(MAX_LEAP * 2.0) and not guard.passes(MAX_LEAP * 2.0 * 1.001)
    assert (guard.skipped, guard.in_a_row) == (1, 1)


def test_the_median_is_of_the_last_steps_that_were_taken():
    guard = steady(MAX_NORMS, 100.0)
    for _ in range(MAX_NORMS // 2 + 1):  # now most of the window is small
        assert guard.passes(1.0)
    assert len(guard.norms) == MAX_NORMS
    assert not guard.passes(100.0)
    assert guard.passes(10.0)
    assert guard.in_a_row == 0 and guard.skipped == 1
    assert (
        100.0 in guard.norms and guard.norms.count(100.0) == MAX_NORMS - MAX_NORMS // 2 - 2
    )  # the refused one is not there


def test_it_gives_up_after_that_many_in_a_row_and_not_in_all():
    guard = steady(3)
    for _ in range(MAX_SKIPPED - 1):
        guard.passes(math.nan)
    assert not guard.has_given_up
    guard.passes(1.0)
    for _ in range(MAX_SKIPPED - 1):
        guard.passes(math.nan)
    assert not guard.has_given_up and guard.skipped == 2 * MAX_SKIPPED - 2
    guard.passes(math.nan)
    assert guard.has_given_up


@given(before=st.lists(norms, max_size=150), after=st.lists(norms, max_size=30))
def test_a_guard_from_its_record_judges_as_the_one_that_went_on(before, after):
    guard = Guard()
    for norm in before:
        guard.passes(norm)
    again = Guard(json.loads(json.dumps(guard.record)))
    assert [again.passes(norm) for norm in after] == [guard.passes(norm) for norm in after]
    assert again.record == guard.record
    assert guard.skipped + len(guard.norms) >= min(MAX_NORMS, len(before) + len(after))
    assert all(math.isfinite(norm) for norm in guard.norms)
