"""inference.cfg_scale auto: measured at the end of a training, kept in its checkpoint, and used by the commands."""

import functools
import json

import pytest
import torch

import inference
from helpers import refused
from isonext.checkpoint import load_checkpoint
from isonext.config import InferenceConfig, config_from_dict
from isonext.errors import UserError
from isonext.evaluation import evaluator
from isonext.evaluation.metrics import train_style_classifier
from isonext.pipeline import front_line, transfer_settings
from isonext.training import validation
from isonext.training.trainer import Trainer
from isonext.training.validation import SCALES, TransferFigures, choose_scale

AUTO = {"inference.cfg_scale": "auto"}
FRONT = {"scale": 1.5, "ceiling": 0.96, "pictures": 32, "points": []}


def points(*successes: float) -> list[dict[str, float]]:
    return [
        {"cfg_scale": scale, "style_success": success, "ssim": 0.5}
        for scale, success in zip(SCALES, successes, strict=True)
    ]


@pytest.mark.parametrize(
    ("successes", "ceiling", "scale"),
    [
        ((0.5, 0.7, 0.95, 1.0, 1.0), 1.0, 2.0),
        ((0.5, 0.76, 0.7, 1.0, 1.0), 0.8, 1.5),  # 0.95 * 0.8 = 0.76
        ((0.99, 1.0, 1.0, 1.0, 1.0), 1.0, 1.0),
        ((0.1, 0.4, 0.6, 0.6, 0.5), 1.0, 2.0),  # none reaches it: the smallest of the best
    ],
)
def test_the_scale_is_the_smallest_that_reaches_0_95_of_the_ceiling(successes, ceiling, scale):
    assert SCALES == (1.0, 1.5, 2.0, 3.0, 4.0)
    assert choose_scale(points(*successes), ceiling) == scale


def test_the_key_takes_a_number_or_auto():
    assert config_from_dict({"inference": {"cfg_scale": "auto"}}).inference.cfg_scale == "auto"
    assert config_from_dict({"inference": {"cfg_scale": 3}}).inference.cfg_scale == 3.0
    with pytest.raises(UserError, match=r"cfg_scale = \"much\": must be a number from 0 to 100, or auto"):
        config_from_dict({"inference": {"cfg_scale": "much"}})


def test_settings_take_the_measured_scale_only_where_auto_asks_for_it():
    assert transfer_settings(InferenceConfig(cfg_scale="auto"), front=FRONT).cfg_scale == 1.5
    assert transfer_settings(InferenceConfig(cfg_scale=3.0), front=FRONT).cfg_scale == 3.0
    with pytest.raises(UserError, match=r"inference\.cfg_scale auto: the checkpoint has no measured front.*such as 2"):
        transfer_settings(InferenceConfig(cfg_scale="auto"), front={})
    line = front_line({**FRONT, "points": [{"cfg_scale": 1.5, "style_success": 0.92, "ssim": 0.43}]})
    assert line.startswith("cfg_scale auto: 1.5 (style success 0.92, SSIM 0.43 on 32 held-out pictures; ")
    assert line.endswith("the classifier's own accuracy 0.96)")


#################################################################################
#                                   Training                                    #
#################################################################################


@pytest.fixture
def run(store, make_config, monkeypatch):
    """A function: what the figures say at each scale -> a run of one epoch with `auto`."""
    asked = []

    def fit(successes: list[float]) -> tuple[Trainer, list[float]]:
        numbers = dict(zip(SCALES, successes, strict=True))

        def measure(self, scale=None):
            asked.append(scale)
            success = numbers[scale or 2.0]
            return {"val_style_success": success, "val_ssim": 1 - success / 2, "val_score": success}

        monkeypatch.setattr(TransferFigures, "__init__", lambda *_: None)
        monkeypatch.setattr(TransferFigures, "ceiling", 0.9, raising=False)
        monkeypatch.setattr(TransferFigures, "pictures", 12, raising=False)
        monkeypatch.setattr(TransferFigures, "measure", measure)
        monkeypatch.setattr(validation, "can_be_transferred", lambda val: True)
        trainer = Trainer(make_config(store, AUTO | {"training.stage1_epochs": 2}))
        trainer.fit(quiet=True)
        return trainer, asked

    return fit


def test_the_last_checkpoint_has_the_front_and_earlier_ones_have_none(run, store, capsys):
    _, asked = run([0.5, 0.86, 0.88, 0.9, 0.9])
    assert asked == [None, None, *SCALES], "validations at one scale, the front once"
    front = load_checkpoint(store / "run" / "stage1_epoch2.pt").front
    assert front["scale"] == 1.5 and (front["ceiling"], front["pictures"]) == (0.9, 12)
    assert [(p["cfg_scale"], p["style_success"]) for p in front["points"]] == list(
        zip(SCALES, [0.5, 0.86, 0.88, 0.9, 0.9], strict=True)
    )
    assert load_checkpoint(store / "run" / "stage1_epoch1.pt").front == {}
    assert "cfg_scale auto: 1.5 (style success 0.86, SSIM 0.57 on 12 held-out pictures" in capsys.readouterr().out


def test_a_checkpoint_of_before_there_was_a_front_has_none(run, store):
    run([1.0] * 5)
    path = store / "run" / "stage1_epoch2.pt"
    tree = torch.load(path, weights_only=True)
    assert tree["front"]["scale"] == 1.0
    del tree["front"]
    torch.save(tree, path)
    assert load_checkpoint(path).front == {}


def test_auto_without_held_out_pictures_is_refused_before_the_first_step(store, make_config):
    path = store / "latents" / "meta.json"
    tree = json.loads(path.read_text())
    tree["split"] = {"train": tree["split"]["train"] + tree["split"]["val"], "val": []}
    tree["counts"] = {style: {"train": sum(counts.values()), "val": 0} for style, counts in tree["counts"].items()}
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"inference\.cfg_scale auto: is measured on held-out pictures of two styles"):
        Trainer(make_config(store, AUTO))


#################################################################################
#                                  The commands                                 #
#################################################################################


def test_the_flag_takes_auto_and_refuses_what_is_no_number(capsys):
    need = [
        "--checkpoint",
        "a.pt",
        "--input",
        "a.png",
        "--output",
        "b.png",
        "--source_style",
        "a",
        "--target_style",
        "b",
    ]
    parse = inference.build_parser().parse_args
    assert parse([*need, "--cfg_scale", "auto"]).cfg_scale == "auto"
    assert parse([*need, "--cfg_scale", "1.5"]).cfg_scale == 1.5
    with pytest.raises(SystemExit):
        parse([*need, "--cfg_scale", "more"])
    assert "must be a number or auto" in capsys.readouterr().err


def test_inference_and_evaluate_take_it_print_it_and_say_what_to_give_where_there_is_none(studio, within, monkeypatch):
    monkeypatch.setattr(evaluator, "train_style_classifier", functools.partial(train_style_classifier, steps=12))
    plain = "checkpoints/stage1_epoch4.pt"
    tree = torch.load(studio / plain, weights_only=True) | {"front": FRONT}
    torch.save(tree, studio / "measured.pt")
    transfer = [
        "--input",
        "raw_data/warm/000.png",
        "--source_style",
        "warm",
        "--target_style",
        "cold",
        "--num_steps",
        "2",
    ]
    status, out, err = within(
        "inference", "--checkpoint", "measured.pt", *transfer, "--output", "o.png", "--cfg_scale", "auto"
    )
    assert status == 0, err
    assert "cfg_scale auto: 1.5" in out and "source guidance 1.5" in out
    refused(
        within("inference", "--checkpoint", plain, *transfer, "--output", "p.png", "--cfg_scale", "auto"),
        "cfg_scale auto", "no measured front", "such as 2",
    )  # fmt: skip
    measure = ["--quick", "--limit", "2", "--output", "report", "--set", "inference.num_steps=2"]
    status, out, err = within("evaluate", "--checkpoint", "measured.pt", *measure, "--set", "inference.cfg_scale=auto")
    assert status == 0, err
    assert "cfg_scale auto: 1.5" in out
    assert json.loads((studio / "report/metrics.json").read_text())["results"][0]["settings"]["cfg_scale"] == 1.5
    refused(
        within("evaluate", "--checkpoint", plain, *measure, "--set", "inference.cfg_scale=auto"), "no measured front"
    )
    refused(
        within("sample", "--checkpoint", "measured.pt", "--output", "s", "--set", "inference.cfg_scale=auto"),
        "cfg_scale auto", "transfers alone", "such as 2",
    )  # fmt: skip
