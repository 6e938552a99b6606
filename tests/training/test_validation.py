"""The figures of a training run: what they are on networks whose transfers are known, and the best checkpoint."""

import json
import math

import pytest
import torch

from isonext.checkpoint import BEST, load_checkpoint
from isonext.data.autoencoder import load_autoencoder
from isonext.data.dataset import LatentSplit
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.flow.base import low_band
from isonext.flow.transfer import TransferSettings
from isonext.pipeline import Pipeline
from isonext.training import validation
from isonext.training.trainer import Trainer
from isonext.training.validation import TransferFigures, can_be_transferred, pick_by_style
from isonext.training.watching import MOST_TRANSFERRED

STYLES = ("dark", "light", "middle")
LEVELS = torch.tensor([-0.8, 0.8, 0.0])  # of grey, by which the styles differ and nothing else
CPU = torch.device("cpu")


def split(counts: tuple[int, ...], seed: int) -> LatentSplit:
    """Grey pictures with grain, 16 px, as latents of the exact codec dct:f4c48; statistics that change nothing."""
    codec = load_autoencoder("dct:f4c48", CPU)
    generator = torch.Generator().manual_seed(seed)
    styles = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    grain = 0.1 * torch.randn(len(styles), 1, 16, 16, generator=generator).expand(-1, 3, -1, -1)
    latents = codec.encode(LEVELS[styles].view(-1, 1, 1, 1) + grain)
    spec = LatentSpec("dct:f4c48", 4, 48, 16, list(STYLES), [0.0] * 48, [1.0] * 48)
    return LatentSplit(spec, latents[None].numpy(), styles, [str(number) for number in range(len(styles))])


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch):
    """These styles are told apart at a glance."""
    monkeypatch.setitem(validation.CLASSIFIER, "steps", 60)


class Shift(torch.nn.Module):
    """v that moves a style's grey to 0 at t = 0: the transfer changes the level, and keeps the grain as it is."""

    null_style = 3

    def __init__(self, levels: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels)
        flat = load_autoencoder("dct:f4c48", CPU).encode(torch.ones(1, 3, 4, 4))
        self.register_buffer("grey", flat)

    def forward(self, x, t, style):
        return self.levels[style].view(-1, 1, 1, 1) * self.grey.expand(len(x), -1, *x.shape[2:])


def measure(levels: torch.Tensor, counts=(8, 8, 8)) -> dict[str, float]:
    known, held = split((40, 40, 40), 0), split(counts, 1)
    pipeline = Pipeline(Shift(levels), load_autoencoder("dct:f4c48", CPU), known.spec, CPU, bf16=False)
    return TransferFigures(pipeline, known, held, TransferSettings(num_steps=2)).measure()


def test_a_perfect_transfer_has_the_style_and_its_score_is_by_the_formula():
    numbers = measure(LEVELS)
    assert numbers["val_style_success"] == 1
    assert numbers["val_score"] == math.sqrt(numbers["val_ssim"])
    assert 0 < numbers["val_ssim"] < 1  # SSIM also sees the mean, which has to change


def test_a_network_that_does_nothing_keeps_the_picture_and_scores_nothing():
    numbers = measure(torch.zeros(3))
    assert (numbers["val_style_success"], numbers["val_score"]) == (0, 0)
    assert numbers["val_ssim"] == pytest.approx(1, abs=1e-5)
    assert numbers["val_leakage"] > 0.9  # the picture's own level is still there


def test_leakage_is_less_where_the_structure_has_lost_the_style():
    assert measure(LEVELS)["val_leakage"] < 0.7 < measure(torch.zeros(3))["val_leakage"]


def test_too_few_pictures_for_a_probe_leave_the_leakage_out():
    assert "val_leakage" not in measure(LEVELS, (4, 8, 8))


@pytest.mark.parametrize(("counts", "answer"), [((1, 1, 1), True), ((0, 3, 3), False), ((0, 0, 0), False)])
def test_there_are_figures_only_where_every_style_has_held_out_pictures(counts, answer):
    assert can_be_transferred(split(counts, 0)) is answer


def test_the_handful_is_spread_over_styles_and_the_whole_split():
    picked = pick_by_style(split((100, 5, 3), 0), 4)
    assert [len(picked[style]) for style in STYLES] == [4, 3, 3]
    whole = split((100, 5, 3), 0)
    assert torch.equal(picked["dark"], whole.batch(torch.tensor([0, 25, 50, 75]))[0])
    assert MOST_TRANSFERRED >= 2 * 5  # two styles have enough for the probe


#################################################################################
#                              Of the averaged network                          #
#################################################################################


def test_the_held_out_loss_is_that_of_the_averaged_network_by_hand(store, make_config):
    run = Trainer(make_config(store, {"training.use_amp": False}))
    raw, averaged, validation = run.state.model, run.state.ema.model, run.validation
    at_start = validation.held_out_loss(4)  # the mean of (x1 - x0)^2, since v is 0
    assert validation.held_out_loss(1) == pytest.approx(at_start, rel=1e-6), "noise and times are each picture's own"

    def loss(network: torch.nn.Module, v: float) -> float:
        torch.nn.init.constant_(network.head.bias, v)
        return validation.held_out_loss(4)

    # The mean of (x1 - x0 - v)^2, and of (x1 - x0 + v)^2: together twice that of (x1 - x0)^2 and v^2.
    assert loss(averaged, 0.5) + loss(averaged, -0.5) == pytest.approx(2 * (at_start + 0.25), rel=1e-5)
    assert loss(averaged, 0.5) != loss(averaged, -0.5)
    assert loss(averaged, 0.0) == loss(raw, 3.0) == at_start, "the weights that are trained have no say"


def test_the_held_out_loss_is_at_even_times_from_the_base_of_training(store, make_config):
    run = Trainer(make_config(store, {"training.anchor_strength": 0.8, "training.anchor_cells": 2}))
    seen = []
    run.validation.losses = lambda batch: seen.append(batch) or torch.ones(len(batch.t))
    assert run.validation.held_out_loss(1) == 1
    assert [time for batch in seen for time in batch.t.tolist()] == [0.25, 0.75]
    x0, x1, style = (torch.cat([getattr(batch, name) for batch in seen]) for name in ("x0", "x1", "style"))
    assert sorted(style.tolist()) == [0, 1]
    # The low band of x0 is 0.8 of the picture's own and 0.6 of noise, and that of white noise has nothing of it.
    expected = run.base.x0(torch.zeros_like(x1), x1, style)
    low, own = (low_band(each, 2) for each in (x0, expected))
    assert torch.corrcoef(torch.stack([low.flatten(), own.flatten()]))[0, 1] > 0.6


def test_figures_and_preview_are_of_the_averaged_network(store, make_config, monkeypatch):
    run, seen = Trainer(make_config(store)), []
    monkeypatch.setattr(validation, "can_be_transferred", lambda val: True)
    monkeypatch.setattr(TransferFigures, "__init__", lambda self, pipeline, *_: seen.append(pipeline.model))
    monkeypatch.setattr(TransferFigures, "measure", lambda _: {})
    monkeypatch.setattr(validation, "draw_preview", lambda pipeline, *_: seen.append(pipeline.model))
    monkeypatch.setattr(validation.images, "save_picture", lambda *_: None)
    run.validation.validate(4, 1, last=False)
    run.validation.save_preview(store / "preview.png", 1, last=False)
    assert len(seen) == 2 and all(network is run.state.ema.model for network in seen)


#################################################################################
#                               The best checkpoint                             #
#################################################################################


@pytest.fixture
def scored(store, make_config, monkeypatch):
    """A run of five epochs, validated after each, whose scores are the numbers given."""

    def fit(scores: list[float], epochs: int, resume: str | None = None) -> Trainer:
        left = iter(scores)
        monkeypatch.setattr(TransferFigures, "__init__", lambda *_: None)
        monkeypatch.setattr(TransferFigures, "measure", lambda _: {"val_score": next(left)})
        monkeypatch.setattr(validation, "can_be_transferred", lambda val: True)
        changes = {"checkpoint.save_dir": str(store / "run"), "training.val_every_epochs": 1}
        changes |= {"training.stage1_epochs": epochs, "training.lr_schedule": "constant"}
        run = Trainer(make_config(store, changes), resume)
        run.fit(quiet=True)
        return run

    return fit


def best_epoch(store) -> int:
    return load_checkpoint(store / "run" / BEST).epoch


def test_the_best_of_all_validations_is_kept(scored, store):
    scored([0.2, 0.5, 0.4, 0.5, 0.1], 5)
    assert best_epoch(store) == 2
    lines = [json.loads(line) for line in (store / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["val_score"] for line in lines if "val_score" in line] == [0.2, 0.5, 0.4, 0.5, 0.1]


def test_a_resumed_run_must_beat_the_best_of_before(scored, store):
    scored([0.2, 0.5], 2)
    scored([0.4, 0.3], 4, resume="newest")
    assert best_epoch(store) == 2
    scored([0.6], 5, resume="newest")
    assert best_epoch(store) == 5


def test_nothing_is_called_best_that_has_not_the_style_at_all(scored, store):
    scored([0.0, 0.0], 2)
    assert not (store / "run" / BEST).exists()


def test_a_folder_that_holds_only_the_best_is_not_trained_over(scored, store):
    scored([0.2], 1)
    for path in (store / "run").glob("stage1_epoch*.pt"):
        path.unlink()
    with pytest.raises(UserError, match="holds the checkpoints of a run"):
        scored([0.1], 1)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_a_preview_for_which_there_is_no_memory_is_left_out(capsys, error):
    with validation.dispensable("preview"):
        raise error
    assert capsys.readouterr().out.startswith("warning: no preview: ")
    with pytest.raises(RuntimeError, match="a fault"), validation.dispensable("preview"):
        raise RuntimeError("a fault")
