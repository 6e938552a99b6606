import copy
import dataclasses
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor

from isonext.checkpoint import INTERRUPTED, epoch_checkpoints, load_checkpoint, network_of
from isonext.config import TrainingConfig
from isonext.data.dataset import LatentSplit
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.flow import base as base_module
from isonext.flow.base import Base, low_band
from isonext.training import batches, memory_plan, validation
from isonext.training import trainer as trainer_module
from isonext.training.batches import Batch, draw_batch
from isonext.training.gradients import GradientAccumulator
from isonext.training.log import read_metrics
from isonext.training.memory_plan import MicroBatch
from isonext.training.optim import learning_rate
from isonext.training.trainer import Trainer, train
from model import IsoNext

FOUR_EPOCHS = {"training.stage1_epochs": 4}
NO_FILES = {"training.save_every_epochs": 100}


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch):
    """How well validations tell the styles apart matters in none of these tests."""
    monkeypatch.setitem(validation.CLASSIFIER, "steps", 12)


@pytest.fixture
def config(store, make_config):
    """A function: {"section.key": value} -> the config of a run on `store`, by name of its folder."""
    return lambda changes=None, run="run": make_config(
        store, {"checkpoint.save_dir": str(store / run)} | (changes or {})
    )


def state(trainer: Trainer) -> dict:
    """A copy of all that a step may change: weights, average, optimizer."""
    parts = {"model": trainer.state.model, "ema": trainer.state.ema.model, "optimizer": trainer.state.optimizer}
    return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}


def assert_same(one, other, name: str = "") -> None:
    """Nested dicts and lists are equal, tensors bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_same(one[key], other[key], f"{name}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{name}/{number}")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name


#################################################################################
#                                    The base                                   #
#################################################################################

ANCHORED = {"training.anchor_strength": 0.8, "training.anchor_cells": 2}


def test_an_anchored_run_draws_x0_from_the_base_of_its_training_pictures_and_saves_it(config, store):
    trainer = Trainer(config(ANCHORED | {"training.stage1_epochs": 1}))
    batch = draw_batch(trainer.train, trainer.base, trainer.config.training, 0, null_style=2)
    plain = draw_batch(trainer.train, Base(), trainer.config.training, 0, null_style=2)
    assert torch.equal(batch.x1, plain.x1) and torch.equal(batch.t, plain.t) and torch.equal(batch.style, plain.style)
    labels = trainer.train.styles[batches.epoch_order(0, 0, len(trainer.train))[: len(batch.t)]]
    assert torch.equal(batch.x0, trainer.base.x0(plain.x0, batch.x1, labels))  # dropped labels keep their structure
    for style in range(2):
        low = low_band(trainer.train.batch((trainer.train.styles == style).nonzero().flatten())[0], 2)
        torch.testing.assert_close(trainer.base.mean[style], low.mean((0, 2, 3)), atol=1e-5, rtol=0)
        torch.testing.assert_close(trainer.base.deviation[style], low.std((0, 2, 3), correction=0), atol=1e-5, rtol=0)
    trainer.fit(quiet=True)
    saved = load_checkpoint(store / "run" / "stage1_epoch1.pt").base
    assert_same(dataclasses.asdict(saved), dataclasses.asdict(trainer.base))


def test_a_run_without_an_anchor_draws_white_noise(config):
    trainer = Trainer(config({"training.anchor_strength": 0.0}))
    assert trainer.base.strength == 0
    assert abs(draw_batch(trainer.train, trainer.base, trainer.config.training, 0, 2).x0.var() - 1) < 0.2


def test_auto_chooses_says_so_once_and_the_checkpoint_keeps_the_choice(config, store, capsys, monkeypatch):
    chosen = {}
    for most in (1.0, 0.0):  # all that there is lies below, nothing does
        monkeypatch.setattr(base_module, "MOST_TONE", most)
        trainer = Trainer(config({"training.anchor_strength": "auto", "checkpoint.save_dir": str(store / str(most))}))
        lines = trainer.describe().splitlines()
        chosen[most] = trainer.base.strength
        assert len(lines) == 2 and lines[1].startswith(f"training.anchor_strength auto is {chosen[most]:g}: ")
        trainer.fit(stop=lambda run=trainer: run.state.step == 1, quiet=True)
    assert chosen == {1.0: 0.8, 0.0: 0.0}
    there = {"checkpoint.save_dir": str(store / "1.0")}  # where another choice would be made by now
    for asked in ("auto", 0.8):
        resumed = Trainer(config({"training.anchor_strength": asked} | there), "newest")
        assert resumed.base.strength == 0.8 and resumed.choice == ""
    with pytest.raises(UserError, match=r"was trained with training\.anchor_strength auto, not 0\.3"):
        Trainer(config({"training.anchor_strength": 0.3} | there), "newest")


def test_a_run_of_a_given_strength_goes_on_under_auto(config, store):
    started = Trainer(config(ANCHORED))
    started.fit(stop=lambda: 1, quiet=True)
    auto = {"training.anchor_strength": "auto"}
    assert Trainer(config(auto), "newest").base.strength == 0.8
    others = Trainer(
        config(auto | {"checkpoint.save_dir": str(store / "other")}), init=str(started.folder / INTERRUPTED)
    )
    assert others.base.strength == 0.8 and others.choice == ""  # the weights were trained on that base


def test_squares_larger_than_the_latents_are_refused(config):
    with pytest.raises(UserError, match=r"anchor_cells = 5: the latents have 4 cells"):
        Trainer(config({"training.anchor_strength": 0.5, "training.anchor_cells": 5}))


#################################################################################
#                                  The schedule                                 #
#################################################################################


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 0.5),  # warm-up: (step + 1) / 4 of the peak 2
        ("cosine", 1, 1.0),
        ("cosine", 3, 2.0),
        ("cosine", 4, 2.0),  # 2 * (1 + cos(0)) / 2
        ("cosine", 6, 1 + math.cos(math.pi / 4)),
        ("cosine", 8, 1.0),
        ("cosine", 12, 0.0),
        ("constant", 2, 1.5),
        ("constant", 4, 2.0),
        ("constant", 12, 2.0),
    ],
)
def test_the_learning_rate_is_the_one_by_hand(schedule, step, expected):
    training = TrainingConfig(learning_rate=2.0, warmup_steps=4, lr_schedule=schedule)
    assert learning_rate(training, step, total_steps=12) == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_the_rate_starts_at_its_peak_and_falls():
    training = TrainingConfig(learning_rate=1.0, warmup_steps=0)
    rates = [learning_rate(training, step, 50) for step in range(50)]
    assert rates[0] == 1 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.01


@pytest.mark.parametrize("total", [1, 4])
def test_a_run_shorter_than_its_warm_up_has_a_rate(total):
    training = TrainingConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(training, step, total) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


#################################################################################
#                                   The batch                                   #
#################################################################################


def numbered_split(count: int) -> LatentSplit:
    """Latents that tell their picture (channel 0) and whether they are mirrored (channel 1: 1 or -1)."""
    latents = np.empty((2, count, 2, 2, 2), np.float32)
    latents[:, :, 0] = np.arange(count)[:, None, None]
    latents[0, :, 1], latents[1, :, 1] = 1, -1
    spec = LatentSpec("dct:f4c2", 2, 4, 8, ["a", "b", "c"], mean=[0.0, 0.0], std=[1.0, 1.0])
    return LatentSplit(spec, latents, torch.arange(count) % 3, [f"a/{n}" for n in range(count)])


def drawn(count: int, batch: int, steps, **options) -> list[Batch]:
    training = TrainingConfig(batch_size=batch, **options)
    return [draw_batch(numbered_split(count), Base(), training, step, null_style=3) for step in steps]


def fields(batch: Batch) -> tuple:
    return batch.x0, batch.x1, batch.t, batch.style


def test_a_batch_is_a_function_of_seed_and_step_alone():
    forwards = drawn(40, 8, range(12))
    batches.epoch_order.cache_clear()
    torch.manual_seed(123)
    backwards = drawn(40, 8, reversed(range(12)))[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(fields(one), fields(other), strict=True))


def test_batches_differ_between_steps_epochs_and_seeds():
    steps = [*drawn(40, 8, range(12)), *drawn(40, 8, [0], seed=1)]
    for part in range(3):  # noise, latents, times
        values = {fields(batch)[part].numpy().tobytes() for batch in steps}
        assert len(values) == len(steps)


@pytest.mark.parametrize(("count", "batch"), [(40, 8), (40, 40), (7, 1), (43, 8)])
def test_an_epoch_covers_every_picture_once_but_for_what_fills_no_batch(count, batch):
    steps = count // batch
    for epoch in range(3):
        batches = drawn(count, batch, range(epoch * steps, (epoch + 1) * steps))
        seen = torch.cat([b.x1[:, 0, 0, 0] for b in batches]).int().tolist()
        assert len(seen) == len(set(seen)) == steps * batch and set(seen) <= set(range(count))


def test_every_epoch_has_an_order_of_its_own():
    orders = {tuple(drawn(40, 40, [epoch])[0].x1[:, 0, 0, 0].tolist()) for epoch in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_the_rows_of_a_process_are_those_of_the_whole_batch_bit_for_bit_and_nothing_else_is_read(coupling, monkeypatch):
    training, split, read = TrainingConfig(batch_size=12, coupling=coupling), numbered_split(40), []
    base = Base(0.6, 2, torch.zeros(3, 2), torch.ones(3, 2))
    whole = draw_batch(split, base, training, 5, null_style=3)
    real = LatentSplit.batch
    monkeypatch.setattr(LatentSplit, "batch", lambda self, index, *rest: read.append(index) or real(self, index, *rest))
    parts = [draw_batch(split, base, training, 5, 3, slice(rank, None, 4)) for rank in range(4)]
    for rank, part in enumerate(parts):
        for mine, all_rows in zip(fields(part), fields(whole), strict=True):
            assert torch.equal(mine, all_rows[rank::4])
    assert [len(index) for index in read] == ([12] * 4 if coupling == "ot" else [3] * 4)  # pairing needs all of them


@pytest.mark.parametrize("probability", [0.0, 0.15, 1.0])
def test_labels_are_dropped_at_their_rate_and_the_others_are_the_pictures(probability):
    batches = drawn(256, 64, range(64), label_drop_prob=probability)
    style = torch.cat([b.style for b in batches])
    true = torch.cat([b.x1[:, 0, 0, 0] for b in batches]).long() % 3
    dropped = style == 3
    assert torch.equal(style[~dropped], true[~dropped])
    deviation = math.sqrt(probability * (1 - probability) / len(style))
    assert abs(dropped.double().mean().item() - probability) <= 4 * deviation


def test_half_of_the_pictures_are_mirrored_as_a_whole_and_times_and_noise_have_their_distribution():
    batches = drawn(256, 64, range(64), time_sampling="uniform")
    mirrored = torch.cat([b.x1[:, 1] for b in batches]).flatten(1)
    assert set(mirrored.unique().tolist()) == {-1.0, 1.0} and (mirrored == mirrored[:, :1]).all()
    assert abs((mirrored[:, 0] < 0).double().mean().item() - 0.5) < 4 * 0.5 / 64
    t, x0 = torch.cat([b.t for b in batches]), torch.cat([b.x0 for b in batches])
    assert abs(t.mean() - 0.5) < 0.02 and abs(t.var() - 1 / 12) < 0.005 and t.min() >= 0 and t.max() < 1
    assert abs(x0.mean()) < 0.03 and abs(x0.var() - 1) < 0.05


def test_minibatch_ot_only_moves_noise_and_only_inside_a_style():
    (plain,), (paired,) = (drawn(24, 24, [5], coupling=kind, label_drop_prob=0) for kind in ("independent", "ot"))
    assert all(torch.equal(a, b) for a, b in zip(fields(plain)[1:], fields(paired)[1:], strict=True))
    for style in range(3):
        chosen = plain.style == style
        before, after = ({x.numpy().tobytes() for x in batch.x0[chosen]} for batch in (plain, paired))
        assert before == after
    cost = [(batch.x0 - batch.x1).square().sum().item() for batch in (plain, paired)]
    assert cost[1] < cost[0]


#################################################################################
#                                   One step                                    #
#################################################################################


def test_a_step_is_adamw_with_its_rate_and_the_average_follows(config):
    trainer = Trainer(config())
    before = state(trainer)
    trainer.train_step()
    after = state(trainer)
    # At the first step AdamW moves every weight with a gradient by the rate: here the head alone, which starts at zero.
    moved = after["model"]["head.weight"] - before["model"]["head.weight"]
    rate = 1e-3 / 2  # the first of two warm-up steps
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, rate), rtol=1e-2, atol=0)
    averaged = 0.1 * before["ema"]["head.weight"] + 0.9 * after["model"]["head.weight"]
    torch.testing.assert_close(after["ema"]["head.weight"], averaged, rtol=1e-5, atol=1e-9)
    assert trainer.state.step == 1 and trainer.state.guard.skipped == 0


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_micro_batches_give_the_same_weights_within_rounding(config, size):
    changes = {"training.use_amp": False, "training.batch_size": 8} | NO_FILES
    runs = [Trainer(config(changes | {"training.micro_batch_size": micro})) for micro in (None, size)]
    for _ in range(3):
        norms = [trainer.train_step().norm for trainer in runs]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    whole, parts = (trainer.state.model.state_dict() for trainer in runs)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=2e-6, msg=name)
    torch.testing.assert_close(runs[1].tally.sums, runs[0].tally.sums, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_accumulated_gradients_are_those_of_the_whole_batch_within_float32_rounding(config, size):
    changes = {"training.use_amp": False, "training.batch_size": 8}
    runs = [Trainer(config(changes | {"training.micro_batch_size": micro})) for micro in (None, size)]
    for trainer in runs:
        torch.manual_seed(1)
        torch.nn.init.normal_(trainer.state.model.head.weight)  # at zero, nothing behind it would have a gradient
        trainer.gradients.accumulate(0)
    whole, parts = (dict(trainer.state.model.named_parameters()) for trainer in runs)
    for name in whole:
        error = (parts[name].grad - whole[name].grad).norm() / whole[name].grad.norm()
        assert error < 5e-6, f"{name}: {error}"  # some tens of roundings of 2^-24


def test_losses_are_summed_and_counted_by_quarter_of_t(config):
    changes = {"training.use_amp": False, "training.batch_size": 16, "training.micro_batch_size": 5}
    trainer = Trainer(config(changes))
    trainer.gradients.draw_ahead(1)  # of which step 0 takes nothing
    sums = trainer.gradients.accumulate(0)
    batch = draw_batch(trainer.train, trainer.base, trainer.config.training, 0, trainer.state.model.null_style)
    losses = (batch.x1 - batch.x0).square().mean((1, 2, 3))  # v is 0 at the start
    for quarter in range(4):
        chosen = (batch.t >= quarter / 4) & (batch.t < (quarter + 1) / 4)
        assert sums[:, quarter].tolist() == pytest.approx([losses[chosen].sum().item(), chosen.sum().item()])
    assert (sums[1] > 0).sum() >= 3, "the draw fills the quarters"


def test_gradients_are_clipped_to_the_norm_asked_for(config):
    free, bound = (Trainer(config({"training.grad_clip": clip, "training.betas": [0, 0]})) for clip in (0, 1e-9))
    assert free.train_step().norm == pytest.approx(bound.train_step().norm, rel=1e-6) and free.train_step().norm > 0
    # Clipped far below Adam's epsilon of 1e-8, a step hardly moves; the unclipped one moves by the rate.
    assert bound.state.model.head.weight.abs().max() < 0.2 * free.state.model.head.weight.abs().max()


def exchange(trainer: Trainer, latents: np.ndarray | float) -> None:
    """Other training latents from the next step on, which has been drawn already."""
    trainer.train.latents[...] = latents
    trainer.gradients.drawn = None


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(config):
    trainer = Trainer(config())
    trainer.train_step()
    sound, before = trainer.train.latents.copy(), state(trainer)
    exchange(trainer, np.inf)
    assert not math.isfinite(trainer.train_step().norm)
    assert_same(state(trainer), before)
    assert (trainer.state.step, trainer.state.guard.skipped, trainer.state.guard.in_a_row) == (2, 1, 1)
    exchange(trainer, sound)
    assert math.isfinite(trainer.train_step().norm)
    assert (trainer.state.step, trainer.state.guard.skipped, trainer.state.guard.in_a_row) == (3, 1, 0)
    assert not torch.equal(trainer.state.model.head.weight, before["model"]["head.weight"])


def test_20_such_steps_in_a_row_end_the_run_in_one_line(config):
    trainer = Trainer(config({"training.stage1_epochs": 10} | NO_FILES))
    before = state(trainer)
    exchange(trainer, np.inf)
    with pytest.raises(UserError, match=r"not finite, or leapt, in 20 .* step 20; .*learning_rate") as caught:
        trainer.fit(quiet=True)
    assert "\n" not in str(caught.value)
    assert trainer.state.step == 20
    assert_same(state(trainer), before)


def test_19_in_a_row_do_not_end_the_run_and_are_logged(config, store):
    trainer = Trainer(config({"training.stage1_epochs": 10} | NO_FILES))
    sound = trainer.train.latents.copy()
    exchange(trainer, np.inf)

    def stop() -> bool:
        if trainer.state.step == 19:
            exchange(trainer, sound)
        return trainer.state.step == 22

    trainer.fit(stop, quiet=True)
    assert (trainer.state.step, trainer.state.guard.skipped, trainer.state.guard.in_a_row) == (22, 19, 0)
    lines = [line for line in read_metrics(store / "run" / "metrics.jsonl") if "lr" in line]
    assert [line["skipped_steps"] for line in lines] == [*range(1, 20), 19, 19, 19]
    assert all("loss" not in line for line in lines[:19]) and all(line["loss"] > 0 for line in lines[19:])
    json.dumps(lines, allow_nan=False)


#################################################################################
#                              When memory runs out                             #
#################################################################################


class Card:
    """A network that runs out of memory, forwards or backwards, with more pictures at once than it has room for."""

    def __init__(self, monkeypatch, room: int, room_recomputing: int | None = None, backwards: bool = False) -> None:
        real, self.seen, self.attempts = IsoNext.forward, [], 0

        def forward(model, x, t, style):
            if isinstance(x, FakeTensor):  # the memory plan's count, which takes none
                return real(model, x, t, style)
            training = torch.is_grad_enabled()
            limit = room_recomputing if model.recompute == "full" and room_recomputing else room
            self.seen += [len(x)] * training
            if not training or len(x) <= limit:
                return real(model, x, t, style)
            self.attempts += 1
            if not backwards:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\na lot")
            handle = model.stem.weight.register_hook(lambda gradient: fail())  # all others have theirs by then

            def fail() -> None:
                handle.remove()
                raise torch.OutOfMemoryError("CUDA out of memory.")

            return real(model, x, t, style)

        monkeypatch.setattr(IsoNext, "forward", forward)


EIGHT = {"training.batch_size": 8, "training.stage1_epochs": 4, "training.log_every_steps": 3} | NO_FILES


@pytest.mark.parametrize("backwards", [False, True])
def test_out_of_memory_halves_the_micro_batch_and_the_run_is_that_of_the_smaller_one(
    config, store, monkeypatch, capsys, backwards
):
    train(config(EIGHT | {"training.micro_batch_size": 2}, "small"), quiet=True)
    capsys.readouterr()
    card = Card(monkeypatch, 2, backwards=backwards)
    halved = train(config(EIGHT, "halved"), quiet=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    words = ((8, "blocks that keep their products alone"), (8, 4), (4, 2))
    assert lines == [f"out of memory in a micro-batch of {n}: going on with {what}" for n, what in words]
    assert card.attempts == 3 and card.seen == [8, 8, 4] + [2] * 4 * halved.total_steps
    one, other = (torch.load(store / name / "stage1_epoch4.pt", weights_only=True) for name in ("small", "halved"))
    for part in ("model", "ema", "optimizer"):
        assert_same(one[part], other[part], part)
    one, other = (read_metrics(store / name / "metrics.jsonl") for name in ("small", "halved"))
    for name in ("loss", "val_loss", "grad_norm"):
        assert [line.get(name) for line in one] == [line.get(name) for line in other]
    saved = load_checkpoint(store / "halved" / "stage1_epoch4.pt").config.training
    assert saved.micro_batch_size == "auto", "what a machine has room for is none of the config"


def test_memory_that_runs_out_in_a_later_micro_batch_drops_what_the_earlier_ones_left(config, monkeypatch):
    small, halved = (Trainer(config(EIGHT | {"training.micro_batch_size": size})) for size in (2, 4))
    real, calls = halved.gradients.losses, []

    def losses(network, part):
        calls.append(len(part.t))
        if len(calls) in (2, 4):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(network, part)

    monkeypatch.setattr(halved.gradients, "losses", losses)
    assert [small.train_step() for _ in range(3)] == [halved.train_step() for _ in range(3)]
    assert calls == [4] * 4 + [2] * 12
    assert_same(state(small), state(halved))
    assert torch.equal(small.tally.sums, halved.tally.sums) and small.tally.sums[1].sum() == 24


def test_a_share_drawn_ahead_is_cut_anew_when_memory_runs_out_and_its_gradient_is_that_of_the_whole(
    config, monkeypatch
):
    changes = EIGHT | {"training.use_amp": False}
    whole, halved = (Trainer(config(changes | {"training.micro_batch_size": size})) for size in (8, 5))
    for trainer in (whole, halved):
        trainer.train_step()
        assert trainer.gradients.drawn[0] == 1
        torch.nn.init.normal_(trainer.state.model.head.weight, generator=torch.Generator().manual_seed(1))
    real, sizes = halved.gradients.losses, []

    def losses(network, part):
        sizes.append(len(part.t))
        assert len(sizes) < 9, "the same pieces again and again"
        if len(part.t) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(network, part)

    monkeypatch.setattr(halved.gradients, "losses", losses)
    sums = [trainer.gradients.compute(1) for trainer in (whole, halved)]
    assert sizes == [5, 5, 3, 3, 2] and halved.gradients.micro_batch.pictures == 3
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-6)
    of_whole, of_halved = (dict(trainer.state.model.named_parameters()) for trainer in (whole, halved))
    for name, parameter in of_whole.items():
        error = (of_halved[name].grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < 2e-5, f"{name}: {error}"


def test_at_one_picture_blocks_are_recomputed_where_that_is_left_to_the_program(config, monkeypatch, capsys):
    card = Card(monkeypatch, room=0, room_recomputing=1)
    trainer = Trainer(config(EIGHT | {"training.micro_batch_size": 2}))
    trainer.train_step()
    assert capsys.readouterr().out.splitlines() == [
        "out of memory in a micro-batch of 2: going on with blocks that keep their products alone",
        "out of memory in a micro-batch of 2: going on with 1",
        "out of memory in a micro-batch of 1: going on with blocks that keep their input alone",
    ]
    assert trainer.state.model.recompute == "full" and card.seen == [2, 2, 1] + [1] * 8


@pytest.mark.parametrize(("recompute", "sizes"), [(False, [2, 2, 1]), (True, [2, 1]), ("auto", [2, 2, 1, 1])])
def test_where_nothing_is_left_to_cut_the_error_stands(config, monkeypatch, recompute, sizes):
    card = Card(monkeypatch, room=0)
    changes = {"training.micro_batch_size": 2, "training.gradient_checkpointing": recompute}
    trainer = Trainer(config(EIGHT | changes))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train_step()
    assert card.seen == sizes and trainer.state.step == 0


def test_of_several_processes_none_begins_again_by_itself(config, monkeypatch):
    card = Card(monkeypatch, room=2)
    trainer = Trainer(config(EIGHT))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train_step()
    assert card.seen == [4]  # its half of the batch, once


def test_compiling_runs_out_of_memory_and_goes_on_too(config, monkeypatch, capsys):
    use_backend(monkeypatch, "eager")
    real, sizes = GradientAccumulator.losses, []

    def losses(gradients, network, part):
        sizes.append(len(part.t))
        if len(part.t) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(gradients, network, part)

    monkeypatch.setattr(GradientAccumulator, "losses", losses)
    trainer = Trainer(config(EIGHT | {"training.compile": True}))
    said = capsys.readouterr().out
    assert "going on with 4" in said and "does not work here" not in said
    trainer.train_step()
    assert sizes == [8, 8, 4, 4, 4]


def test_auto_cuts_a_batch_that_does_not_fit_and_says_so_in_the_first_line(config, monkeypatch, capsys):
    deep = EIGHT | {"model.num_layers": 8, "training.stage1_epochs": 1}  # of few blocks, recomputing saves nothing
    whole = train(config(deep, "whole"), quiet=True)
    assert "at once" not in capsys.readouterr().out and whole.gradients.micro_batch == MicroBatch(8, "none")
    needs = memory_plan.count_needs(network_of(whole.config, whole.spec), whole.spec, whole.bf16, True)
    for limit, chosen, said in (
        (needs("none").peak(7), MicroBatch(8, "selective"), ""),
        (needs("selective").peak(7), MicroBatch(8, "full"), ", blocks recomputed backwards"),
        (needs("full").peak(5), MicroBatch(4, "full"), ", 4 pictures at once, blocks recomputed backwards"),
    ):
        monkeypatch.setattr(trainer_module, "free_bytes", lambda device, limit=limit: limit / memory_plan.USABLE + 1)
        assert train(config(deep, f"{limit}"), quiet=True).gradients.micro_batch == chosen
        assert capsys.readouterr().out.splitlines()[0].endswith(f"in BF16{said}".replace("BF16", precision(whole)))


def precision(trainer: Trainer) -> str:
    return "BF16" if trainer.bf16 else "float32"


#################################################################################
#                                  A whole run                                  #
#################################################################################


@pytest.mark.parametrize("changes", [{}, {"training.coupling": "ot", "training.time_sampling": "logit_normal"}])
def test_two_runs_are_equal_bit_for_bit_and_another_seed_is_not(config, changes):
    first = train(config(changes, "a"), quiet=True)
    torch.manual_seed(99)
    second = train(config(changes, "b"), quiet=True)
    assert_same(state(first), state(second))
    other = train(config(changes | {"training.seed": 1}, "c"), quiet=True)
    assert not torch.equal(other.state.model.head.weight, first.state.model.head.weight)


def final(folder) -> dict:
    """The last checkpoint of a finished run of four epochs, as plain data."""
    done = torch.load(epoch_checkpoints(folder)[-1], weights_only=True)
    assert done["epoch"] == 4
    return done


@pytest.fixture
def whole(config, store):
    """A run of four epochs in one go; the function tells where an epoch ends."""
    return train(config(FOUR_EPOCHS, "whole"), quiet=True)


@pytest.mark.parametrize("stop_at", [1, 4, 6, 11])
def test_a_run_that_is_stopped_and_resumed_equals_one_in_one_go(config, store, whole, stop_at, capsys):
    assert whole.steps_per_epoch == 4
    started = Trainer(config(FOUR_EPOCHS))
    started.fit(stop=lambda: started.state.step == stop_at, quiet=True)
    assert "go on with --resume" in capsys.readouterr().out
    assert load_checkpoint(store / "run" / INTERRUPTED).step == stop_at
    torch.manual_seed(5)
    resumed = train(config(FOUR_EPOCHS), resume="newest", quiet=True)
    assert f"at step {stop_at}" in capsys.readouterr().out
    assert_same(state(resumed), state(whole))
    one, other = final(store / "run"), final(store / "whole")
    for part in ("model", "ema", "optimizer", "step", "latents"):
        assert_same(one[part], other[part], part)
    assert not (store / "run" / INTERRUPTED).exists()
    losses, expected = (
        {line["step"]: line["val_loss"] for line in read_metrics(store / name / "metrics.jsonl") if "val_loss" in line}
        for name in ("run", "whole")
    )
    assert losses == expected and sorted(losses) == [4, 8, 12, 16]


@pytest.mark.parametrize("given", ["newest", "stage1_epoch2.pt"])
def test_n_steps_a_kill_and_n_steps_equal_2n_and_no_step_is_logged_twice(config, store, whole, given):
    shutil.copytree(store / "whole", store / "run")  # as a kill in epoch 4 leaves it, its last checkpoint of epoch 2
    for epoch in (3, 4):
        (store / "run" / f"stage1_epoch{epoch}.pt").unlink()
    resume = given if given == "newest" else str(store / "run" / given)
    resumed = train(config(FOUR_EPOCHS), resume=resume, quiet=True)
    assert_same(state(resumed), state(whole))
    lines, expected = (read_metrics(store / name / "metrics.jsonl") for name in ("run", "whole"))
    assert [(line["step"], line.get("loss")) for line in lines] == [(li["step"], li.get("loss")) for li in expected]
    assert max(Counter((line["step"], "val_loss" in line) for line in lines).values()) == 1


def test_a_longer_run_at_a_constant_rate_goes_on_from_a_finished_one(config, store):
    constant = {"training.lr_schedule": "constant"}
    whole = train(config(FOUR_EPOCHS | constant, "whole"), quiet=True)
    train(config(constant | {"training.stage1_epochs": 2}), quiet=True)
    assert_same(state(train(config(FOUR_EPOCHS | constant), "newest", quiet=True)), state(whole))


def test_resuming_a_finished_run_changes_nothing(config, store, whole):
    before = final(store / "whole")
    again = train(config(FOUR_EPOCHS, "whole"), resume="newest", quiet=True)
    assert again.state.step == 16
    assert_same(state(again), state(whole))
    assert_same(final(store / "whole"), before)


def test_resume_without_a_checkpoint_starts_from_the_beginning(config, store, capsys):
    trainer = train(config(), resume="newest", quiet=True)
    assert trainer.state.step == 8
    assert "no checkpoint yet, starting from the beginning" in capsys.readouterr().out


def test_the_loss_falls_over_a_short_run(config, store):
    changes = {"training.stage1_epochs": 40, "training.learning_rate": 5e-3, "training.batch_size": 8} | NO_FILES
    changes |= {"training.anchor_strength": 0.0, "training.val_every_epochs": 100}
    train(config(changes), quiet=True)
    losses = [line["loss"] for line in read_metrics(store / "run" / "metrics.jsonl") if "loss" in line]
    first, last = np.mean(losses[:8]), np.mean(losses[-16:])
    assert 1.6 < first < 2.4, "v = 0 at start: the loss is the variance of the data plus that of the noise"
    assert last < 0.75 * first


#################################################################################
#                                What a run leaves                              #
#################################################################################


def test_metrics_have_the_promised_numbers(config, store, whole):
    lines = read_metrics(store / "whole" / "metrics.jsonl")
    logged = {line["step"]: line for line in lines if "lr" in line}
    assert sorted(logged) == list(range(1, 17))
    for step, line in logged.items():
        assert line["lr"] == pytest.approx(learning_rate(config(FOUR_EPOCHS).training, step - 1, 16))
        assert line["epoch"] == step / 4
        assert {"loss", "grad_norm", "samples_per_s", "memory_gb", "skipped_steps"} < line.keys()
        assert line["skipped_steps"] == 0 and line["samples_per_s"] > 0 and 0 < line["memory_gb"] < 64
        quarters = [line[f"loss_t{quarter}"] for quarter in range(4) if f"loss_t{quarter}" in line]
        assert min(quarters) - 1e-6 <= line["loss"] <= max(quarters) + 1e-6
    assert sorted(line["step"] for line in lines if "val_loss" in line) == [4, 8, 12, 16]
    assert list((store / "whole" / "tensorboard").glob("events*"))


def test_the_logged_loss_is_the_mean_since_the_last_line(config, store):
    train(config(run="every"), quiet=True)
    train(config({"training.log_every_steps": 4}, "fourth"), quiet=True)
    every, fourth = (
        [line["loss"] for line in read_metrics(store / name / "metrics.jsonl") if "loss" in line]
        for name in ("every", "fourth")
    )
    assert fourth == pytest.approx([np.mean(every[:4]), np.mean(every[4:])], rel=1e-5)


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (0, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_checkpoints_are_kept_and_0_keeps_all(config, store, keep, left):
    train(config({"training.keep_checkpoints": keep, "training.stage1_epochs": 5}), quiet=True)
    assert [path.name for path in epoch_checkpoints(store / "run")] == [f"stage1_epoch{n}.pt" for n in left]


def test_checkpoints_come_at_their_interval_and_at_the_end(config, store):
    train(config({"training.save_every_epochs": 3, "training.stage1_epochs": 7}), quiet=True)
    made = [(p.name, load_checkpoint(p).step) for p in epoch_checkpoints(store / "run")]
    assert made == [("stage1_epoch3.pt", 12), ("stage1_epoch6.pt", 24), ("stage1_epoch7.pt", 28)]
    assert not [p.name for p in (store / "run").iterdir() if p.name.startswith(".")]


def test_the_preview_opens_and_shows_held_out_pictures_and_every_style(config, store):
    trainer = train(config(), quiet=True)
    for epoch in (1, 2):
        with Image.open(store / "run" / f"preview_epoch{epoch}.png") as sheet:
            sheet.load()
            shown = np.asarray(sheet)
    rows = sum(min(3, sum(trainer.val.styles == style)) for style in range(2))
    assert shown.shape[1] == 6 + 3 * (16 + 6)
    head = shown.shape[0] - (6 + rows * (16 + 6))
    first = Image.open(store / "raw" / next(n for n in trainer.val.names if n.startswith("ink")).removesuffix(".pt"))
    tile = shown[head + 6 : head + 22, 6:22].astype(int)
    assert np.abs(tile - np.asarray(first).astype(int)).mean() < 8, (
        "column 1 is the picture itself, by way of the codec"
    )


def use_backend(monkeypatch, backend) -> None:
    """Module.compile with another backend than inductor, whose C++ would take half a minute to build."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend=backend, **options))
    torch.compiler.reset()


def test_a_compiled_training_leaves_plain_keys_and_nearly_the_same_weights(config, store, monkeypatch):
    short = {"training.stage1_epochs": 1, "training.use_amp": False, "training.micro_batch_size": 2}
    plain = train(config(short, "plain"), quiet=True)
    used = []

    def backend(graph, inputs):
        used.append(graph)
        return graph

    use_backend(monkeypatch, backend)
    train(config(short | {"training.compile": True}), quiet=True)
    assert used, "it did compile"
    saved = load_checkpoint(store / "run" / "stage1_epoch1.pt")
    assert list(saved.model) == list(saved.ema) == list(plain.state.model.state_dict())
    for name, value in plain.state.model.state_dict().items():
        torch.testing.assert_close(saved.model[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_where_nothing_compiles_a_warning_is_printed_and_the_run_is_the_plain_one(config, monkeypatch, capsys):
    plain = train(config(run="plain"), quiet=True)

    def backend(graph, inputs):
        raise RuntimeError("no compiler here\nand a long story")

    use_backend(monkeypatch, backend)
    fallen_back = train(config({"training.compile": True}), quiet=True)
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert "torch.compile does not work here" in warning and "going on without it" in warning
    assert_same(state(fallen_back), state(plain))


#################################################################################
#                                    Refusals                                   #
#################################################################################


def test_fewer_pictures_than_a_batch_are_one_line_that_says_what_to_do(config):
    with pytest.raises(UserError) as caught:
        Trainer(config({"training.batch_size": 500}))
    assert "training pictures, fewer than one batch of 500; add pictures or use --set training.batch_size=" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["stage1_epoch3.pt", INTERRUPTED])
def test_a_folder_that_holds_checkpoints_is_refused_without_resume(config, store, name):
    (store / "run").mkdir()
    (store / "run" / name).write_bytes(b"a checkpoint")
    with pytest.raises(UserError, match="holds the checkpoints of a run; go on with --resume"):
        Trainer(config())
    assert [path.name for path in (store / "run").iterdir()] == [name]


def test_a_missing_checkpoint_and_a_missing_store_are_one_line(config, store):
    with pytest.raises(UserError, match=r"none\.pt: no such checkpoint"):
        Trainer(config(), str(store / "none.pt"))
    with pytest.raises(UserError, match=r"no latent store here; run: python preprocess_latents\.py"):
        Trainer(config({"data.data_root": str(store / "none")}))


def test_a_diverged_network_costs_the_preview_and_not_the_run(config, capsys):
    trainer = Trainer(config())
    with torch.no_grad():
        trainer.state.ema.model.head.bias.fill_(math.nan)
    trainer.state.ema.update = lambda model, step: None
    trainer.fit(quiet=True)
    assert trainer.state.step == trainer.total_steps
    assert "no preview" in capsys.readouterr().out


def test_a_refused_run_leaves_alone_what_another_is_writing_and_a_resumed_one_clears_up(config):
    folder = train(config(), quiet=True).folder
    writing = folder / ".stage1_epoch9.isonext-tmp-123_0.pt"
    writing.write_bytes(b"half")
    with pytest.raises(UserError, match="--resume"):
        Trainer(config())
    assert writing.exists()
    Trainer(config(), resume="newest")
    assert not writing.exists()
