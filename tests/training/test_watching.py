"""How many pictures a run looks at: from operations alone, within the budget, and the constants made once."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isonext.config import TrainingConfig
from isonext.data.autoencoder import DctCodec
from isonext.flow.transfer import TransferSettings
from isonext.models.cost import call_flops
from isonext.training import trainer as trainer_module
from isonext.training import validation, watching
from isonext.training.trainer import Trainer
from isonext.training.watching import Operations, WatchPlan, count_losses, plan_watching, sheet_operations

TRAINING = TrainingConfig(val_every_epochs=5, save_every_epochs=10)
# 35 steps an epoch of 1.2e11 operations: 175 steps between validations have 2.1e13, 0.015 of that is 3.15e11.
PHOTO = Operations(
    step=120_000_000_000, evaluation=10**9, decoding=10**9, inversion=22, generation=37
)  # 6e10 a transfer


def test_numbers_by_hand():
    plan = plan_watching(TRAINING, 35, 2, 57, PHOTO)
    # A transfer costs 6e10, so 5.25 fit between two validations, and the 32 that are wanted at every seventh.
    # A sheet of 2 styles costs (22 + 2 x 37 + 3) x 2 = 1.98e11 a row; 0.006 of 350 steps is 2.52e11.
    assert plan == WatchPlan(transferred=32, every=7, rows=1, previewed=2)
    short = plan_watching(TRAINING, 10, 2, 57, PHOTO)  # 1.5 fit, 12 at every eighth; a row costs 2.75 times its room
    assert short == WatchPlan(transferred=12, every=8, rows=1, previewed=2, previews_every=3)
    assert sheet_operations(1, 2, PHOTO) == 198 * 10**9
    assert count_losses(TRAINING, 35, 57, PHOTO.step, PHOTO.evaluation) == 57
    assert count_losses(TRAINING, 35, 500, PHOTO.step, PHOTO.evaluation) == 63  # 0.003 of 2.1e13


def test_a_long_run_has_all_and_a_short_one_of_a_tiny_network_too():
    for cost, steps in ((PHOTO, 2000), (Operations(10**7, 10**4, 10**4, 22, 37), 4)):
        assert plan_watching(TRAINING, steps, 2, 57, cost) == WatchPlan(32, 1, 3, 2)
        assert count_losses(TRAINING, steps, 600, cost.step, cost.evaluation) == 512


def test_of_many_styles_fewer_are_shown_where_all_would_cost_too_much():
    wide = plan_watching(TRAINING, 35, 10, 200, PHOTO)
    assert (wide.rows, wide.previewed) == (1, 2)
    assert wide.previews_every == 1  # 1.98e11 of 2.52e11
    assert plan_watching(TRAINING, 10**5, 10, 200, PHOTO).previewed == 8


@given(
    steps=st.integers(1, 5000), step=st.integers(10**6, 10**14), evaluation=st.integers(10**3, 10**11),
    decoding=st.integers(10**3, 10**13), styles=st.integers(2, 12), held=st.integers(2, 4000),
    every=st.integers(1, 20),
)  # fmt: skip
def test_a_plan_stays_within_its_share_unless_it_is_the_least_there_is(
    steps, step, evaluation, decoding, styles, held, every
):
    training = TrainingConfig(val_every_epochs=every, save_every_epochs=every)
    cost = Operations(step, evaluation, decoding, 22, 37)
    plan = plan_watching(training, steps, styles, held, cost)
    spent = steps * every * step
    least = plan.every == watching.MOST_APART and plan.transferred <= 2 * styles
    assert (
        least or plan.transferred * cost.transfer / plan.every <= max(watching.FREE, watching.FIGURES * spent) * 1.001
    )
    sheet = sheet_operations(plan.rows, plan.previewed, cost)
    assert plan.previews_every == 8 or sheet / plan.previews_every <= 1.001 * max(
        watching.FREE, watching.PREVIEWS * spent
    )
    assert 0 < plan.transferred <= min(held, watching.MOST_TRANSFERRED)
    losses = count_losses(training, steps, held, step, evaluation)
    assert losses <= min(held, 16) or losses * evaluation <= max(watching.FREE, watching.LOSSES * spent)


def test_a_longer_run_has_the_figures_that_it_had():
    longer = dataclasses.replace(TRAINING, stage1_epochs=1000)
    assert plan_watching(longer, 35, 2, 57, PHOTO) == plan_watching(TRAINING, 35, 2, 57, PHOTO)


def test_figures_come_at_their_validations_and_at_the_last_one():
    plan = WatchPlan(16, 3, 1, 2, previews_every=2)
    due = [epoch for epoch in (5, 10, 15, 20, 25, 30, 32) if plan.has_figures(TRAINING, epoch, last=epoch == 32)]
    assert due == [15, 30, 32]
    assert [epoch for epoch in (10, 20, 30, 32) if plan.has_preview(TRAINING, epoch, last=epoch == 32)] == [20, 32]


@pytest.mark.parametrize(
    ("settings", "legs"),
    [
        (TransferSettings(num_steps=4), (5, 5)),  # alf: a step each, and the velocity it starts from
        (TransferSettings("euler", 4), (4, 4)),
        (TransferSettings("rk4", 4, cfg_scale=2.0), (16, 32)),
        (TransferSettings("flowedit", 4), (0, 8)),
    ],
)
def test_evaluations_of_a_transfer_by_hand(settings, legs):
    assert watching.transfer_evaluations(settings) == legs


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_of_a_call_are_those_of_its_products_wherever_its_weights_are(device):
    layer = torch.nn.Conv2d(3, 5, 3, padding=1, device=device)
    assert call_flops(layer, (2, 3, 8, 8), torch.device(device)) == 2 * 2 * 5 * 3 * 9 * 64


def test_operations_of_a_decoder_are_counted_without_its_work():
    assert call_flops(DctCodec("dct:f4c12").decode, (1, 12, 2**10, 2**10), torch.device("cpu")) > 2**28


#################################################################################
#                                    A run                                      #
#################################################################################


def test_the_autoencoder_the_classifier_and_the_held_out_pictures_are_made_once_a_run(store, make_config, monkeypatch):
    made = {"codec": 0, "classifier": 0, "decoded": []}
    real_codec, real_classifier = trainer_module.load_codec, validation.train_style_classifier

    def codec(*arguments):
        made["codec"] += 1
        return real_codec(*arguments)

    def classifier(*arguments, **options):
        made["classifier"] += 1
        return real_classifier(*arguments, **options | {"steps": 5})

    monkeypatch.setattr(trainer_module, "load_codec", codec)
    monkeypatch.setattr(validation, "train_style_classifier", classifier)
    run = Trainer(make_config(store, {"training.stage1_epochs": 1}))
    first = run.validation.validate(4, 1, last=False)
    decode = run.validation.pipeline.codec.decode
    monkeypatch.setattr(
        run.validation.pipeline.codec, "decode", lambda x: made["decoded"].append(len(x)) or decode(x), raising=False
    )
    assert run.validation.validate(4, 2, last=True) == first, "nothing was trained: the very same figures"
    assert made["decoded"] == [len(part) for part in run.validation.figures.held], "transfers, and nothing else"
    run.validation.save_preview(store / "preview.png", 1, last=False)
    assert (made["codec"], made["classifier"]) == (1, 1)


def test_the_classifier_learns_from_small_windows_of_the_pictures(store, make_config, monkeypatch):
    seen = []
    monkeypatch.setattr(validation, "WINDOW", 12)
    monkeypatch.setattr(validation, "MIN_CELLS", 1)
    real = validation.train_style_classifier
    monkeypatch.setattr(
        validation, "train_style_classifier",
        lambda pixels, labels, count, **options: seen.append(pixels) or real(pixels, labels, count, steps=2),
    )  # fmt: skip
    run = Trainer(make_config(store))
    run.validation.validate(4, 1, last=True)
    (pixels,) = seen
    assert pixels.shape == (len(run.train), 3, 12, 12)
    latents = run.train.batch((run.train.styles == 0).nonzero().flatten()[:1])[0]
    whole = run.validation.pipeline.decode(latents, 16, 16)[0].clamp(-1, 1)
    windows = [whole[:, y : y + 12, x : x + 12] for y in (0, 4) for x in (0, 4)]
    assert min((pixels[0] - window).abs().max() for window in windows) < 1e-5, "a window of whole latent cells"
