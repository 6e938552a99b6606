"""The training state: its average, what a step does to it and what a refused one leaves, and its entries in a file."""

import copy
import math

import pytest
import torch

from isonext.config import TrainingConfig
from isonext.errors import UserError
from isonext.training.optim import MAX_SKIPPED, learning_rate
from isonext.training.state import EMA, TrainState

TRAINING = TrainingConfig(learning_rate=0.1, warmup_steps=2, grad_clip=1.0, ema_decay=0.5)
TOTAL = 10


def start(training: TrainingConfig = TRAINING) -> TrainState:
    torch.manual_seed(0)
    return TrainState.start(torch.nn.Linear(3, 2), training)


def step(state: TrainState, scale: float = 1.0):
    """A step by the gradients of a loss that is a function of the step."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(state.step))
    (scale * state.model(x).square().sum()).backward()
    return state.take_step(TRAINING, TOTAL)


def assert_same(one, other) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


#################################################################################
#                                    Average                                    #
#################################################################################


def test_the_average_warms_up_as_by_hand_and_moves_towards_the_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, 0.9995)
    expected = 0.0
    for step, weight, decay in [(0, 1.0, 1 / 10), (1, 3.0, 2 / 11), (2, -1.0, 3 / 12)]:
        torch.nn.init.constant_(model.weight, weight)
        ema.update(model, step)
        distance = abs(expected - weight)
        expected = decay * expected + (1 - decay) * weight
        assert ema.model.weight.item() == pytest.approx(expected, abs=1e-6)
        assert abs(ema.model.weight.item() - weight) < distance
    assert model.weight.item() == -1.0, "the weights themselves stay"


def test_after_the_warm_up_the_decay_is_the_configs():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, 0.75)
    torch.nn.init.ones_(model.weight)
    ema.update(model, 10**6)
    assert ema.model.weight.item() == pytest.approx(0.25, abs=1e-6)


#################################################################################
#                                     A step                                    #
#################################################################################


def test_a_step_moves_weights_and_average_and_forgets_the_gradients():
    state, before = start(), start()
    result = step(state, 100.0)
    assert result.taken and result.rate == learning_rate(TRAINING, 0, TOTAL) == 0.05 and result.norm > 1
    assert state.step == 1 and state.guard.norms == [result.norm]
    assert not torch.equal(state.model.weight, before.model.weight)
    before.ema.update(state.model, 0)
    assert torch.equal(state.ema.model.weight, before.ema.model.weight)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert [group["lr"] for group in state.optimizer.param_groups] == [0.05, 0.05]


def test_a_refused_step_is_counted_and_changes_nothing_else():
    state = start()
    step(state)
    before = copy.deepcopy(state.to_tree())
    result = step(state, math.nan)
    assert not result.taken and math.isnan(result.norm)
    after = state.to_tree()
    assert (after.pop("step"), after.pop("guard")["skipped"]) == (2, 1)
    for name, entry in after.items():
        assert_same(entry, before[name])
    assert all(parameter.grad is None for parameter in state.model.parameters())
    for _ in range(MAX_SKIPPED - 1):
        step(state, math.nan)
    assert state.guard.has_given_up


#################################################################################
#                                   In a file                                   #
#################################################################################


def test_a_state_from_its_tree_goes_on_as_the_one_that_went_on(tmp_path):
    whole = start()
    for _ in range(3):
        step(whole)
    torch.save(whole.to_tree(), tmp_path / "state.pt")
    again = TrainState.start(torch.nn.Linear(3, 2), TRAINING)
    again.load_tree(torch.load(tmp_path / "state.pt", weights_only=True), tmp_path / "state.pt")
    assert again.step == 3
    for state in (whole, again):
        for _ in range(3):
            step(state)
    assert_same(again.to_tree(), whole.to_tree())


def test_weight_decay_and_betas_are_those_of_the_config_and_not_of_the_file(tmp_path):
    tree = start().to_tree()
    other = start(TrainingConfig(weight_decay=0.3, betas=(0.5, 0.6)))
    other.load_tree(tree, tmp_path / "state.pt")
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.5, 0.6) for group in other.optimizer.param_groups)


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = TrainState.start(torch.nn.Linear(3, 5), TRAINING)
    with pytest.raises(UserError, match=r"state\.pt: 2 weights missing, extra or of another shape: bias, weight"):
        state.load_tree(start().to_tree(), tmp_path / "state.pt")
