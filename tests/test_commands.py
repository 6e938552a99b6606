"""The commands as a user runs them: a real chain of subprocesses once, then every way to get them wrong."""

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import CHECKPOINT, ROOT, STUDIO, Command, call, draw_styles, refused
from isonext.data.autoencoder import load_autoencoder
from isonext.evaluation import evaluator
from isonext.evaluation.metrics import train_style_classifier
from isonext.flow.transfer import METHODS

TRANSFER = ("--checkpoint", CHECKPOINT, "--source_style", "0", "--target_style", "1", "--num_steps", "2")


#################################################################################
#                                  The main path                                #
#################################################################################


def test_the_chain_leaves_what_it_promises(studio):
    meta = json.loads((studio / "latents/meta.json").read_text())
    assert meta["latents"]["styles"] == ["cold", "warm"]
    assert meta["counts"]["cold"]["train"] + meta["counts"]["cold"]["val"] == 16
    assert sorted(path.name for path in (studio / "checkpoints").glob("stage1_*.pt")) == [
        "stage1_epoch2.pt",
        CHECKPOINT[12:],
    ]
    assert Image.open(studio / "checkpoints/preview_epoch4.png").width > 96
    lines = [json.loads(line) for line in (studio / "checkpoints/metrics.jsonl").read_text().splitlines()]
    logged = {name for line in lines for name in line}
    assert logged >= {"loss", "loss_t0", "loss_t3", "lr", "grad_norm", "samples_per_s", "memory_gb", "val_loss"}
    assert logged >= {"clipped", "skipped_steps", "val_style_success", "val_ssim", "val_score"}


def test_inference_as_in_the_readme_writes_the_picture_and_says_what_it_did(studio):
    Image.new("RGB", (50, 37), (40, 90, 200)).save(studio / "test.jpg")
    flags = "--input test.jpg --source_style 0 --target_style 1 --output result.png --num_steps 20 --cfg_scale 2.0"
    done = call(studio, "inference.py", "--checkpoint", CHECKPOINT, *flags.split(), "--method", "euler", "--compare")
    assert done.returncode == 0, done.stderr
    assert "cold -> warm: euler, 20 steps a leg, source guidance 2" in done.stdout
    assert "60 network evaluations" in done.stdout  # 20 to invert, 2 x 20 to generate under guidance
    assert Image.open(studio / "result.png").size == (50, 37)
    assert Image.open(studio / "result_compare.png").width > 100


def test_help_of_every_command_names_its_flags():
    for name, flag in (
        ("preprocess_latents.py", "--target_size"),
        ("train.py", "--resume"),
        ("inference.py", "--cfg_scale"),
        ("evaluate.py", "--pairs"),
        ("test_model.py", "--device"),
        ("demo.py", "--config"),
        ("export.py", "--opset"),
    ):
        done = call(ROOT, name, "--help", cold=True)
        assert done.returncode == 0 and flag in done.stdout, done.stderr


def imported_by(folder: Path, *arguments: str) -> set[str]:
    """The top-level modules that a command imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = (line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:"))
    return {line.partition(".")[0] for line in lines}


@pytest.mark.parametrize(
    "name", ("preprocess_latents", "train", "inference", "evaluate", "sample", "test_model", "demo", "export")
)
def test_help_imports_nothing_that_takes_long(name):
    found = imported_by(ROOT, f"{name}.py", "--help")
    assert "argparse" in found and not found & {"torch", "numpy", "scipy", "PIL", "diffusers", "accelerate"}


@pytest.mark.slow
def test_a_transfer_with_the_builtin_codec_does_without_diffusers(studio):
    flags = [*TRANSFER, "--input", "raw_data/cold/003.png", "--output", "out/light.png"]
    found = imported_by(studio, str(ROOT / "inference.py"), *flags)
    assert "torch" in found and not found & {"diffusers", "transformers", "huggingface_hub"}


@pytest.mark.slow
def test_sigterm_saves_and_resume_goes_on_to_the_same_weights(tmp_path):
    data = STUDIO["data"] | {"image_size": 8}  # too small for the judge, which takes long
    (tmp_path / "config.json").write_text(json.dumps(STUDIO | {"data": data}))
    draw_styles(tmp_path / "raw_data", 16)
    assert call(tmp_path, "preprocess_latents.py").returncode == 0
    flags = ["--set", "training.stage1_epochs=60", "--set", "training.save_every_epochs=60"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    done = call(tmp_path, "train.py", *flags, "--set", f"checkpoint.save_dir={whole}")
    assert done.returncode == 0, done.stderr
    running = Command(tmp_path, "train.py", *flags, "--set", f"checkpoint.save_dir={halved}")
    metrics = halved / "metrics.jsonl"
    while running.process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        time.sleep(0.02)
    running.process.send_signal(signal.SIGTERM)
    assert running.finish(60).returncode == 143
    assert (halved / "stage1_interrupted.pt").exists()
    done = call(tmp_path, "train.py", *flags, "--set", f"checkpoint.save_dir={halved}", "--resume")
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    a, b = (torch.load(folder / "stage1_epoch60.pt", weights_only=True) for folder in (whole, halved))
    assert all(torch.equal(a["ema"][name], b["ema"][name]) for name in a["ema"])
    assert not (halved / "stage1_interrupted.pt").exists()


def test_a_folder_is_transferred_once_and_a_bad_picture_is_skipped_by_name(studio, within):
    album = studio / "album"
    (album / "deep").mkdir(parents=True)
    for name, size in (("a.png", (32, 32)), ("b.jpg", (32, 32)), ("deep/c.png", (40, 20)), ("d.webp", (9, 9))):
        Image.new("RGB", size, (30, 60, 200)).save(album / name)
    (album / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    status, out, _ = within("inference", *TRANSFER, "--input", "album", "--output", "made")
    assert status == 1 and "4 made" in out and "skipped: album/broken.jpg" in out
    sizes = {
        path.relative_to(studio / "made").as_posix(): Image.open(path).size
        for path in (studio / "made").rglob("*.*")
        if path.name != "transfers.json"
    }
    assert sizes == {"a.png": (32, 32), "b.jpg": (32, 32), "deep/c.png": (40, 20), "d.webp": (9, 9)}
    times = {name: (studio / "made" / name).stat().st_mtime_ns for name in sizes}
    status, out, _ = within("inference", *TRANSFER, "--input", "album", "--output", "made")
    assert "0 made, 4 were there already" in out
    assert times == {name: (studio / "made" / name).stat().st_mtime_ns for name in sizes}


def test_a_stored_latent_gives_the_transfer_of_its_picture(studio, within):
    within("inference", *TRANSFER, "--input", "raw_data/cold/003.png", "--output", "from_picture.png")
    within("inference", *TRANSFER, "--input", "latents/cold/003.png.pt", "--output", "from_latent.png")
    assert np.array_equal(*(np.array(Image.open(studio / f"from_{name}.png")) for name in ("picture", "latent")))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "map"])
def test_every_method_transfers(studio, within, method):
    status, out, _ = within(
        "inference", *TRANSFER, "--input", "raw_data/cold/003.png", "--output", "m.png", "--method", method
    )
    per_leg = {"euler": 2, "midpoint": 4, "heun": 4, "rk4": 8, "alf": 3, "flowedit": 2}[method]
    assert status == 0 and f"{3 * per_leg} network evaluations" in out  # guided: the second leg costs twice


def test_same_style_returns_the_picture_and_strength_zero_too(studio, within):
    source = np.array(Image.open(studio / "raw_data/cold/004.png")).astype(int)
    same = [*TRANSFER[:5], "0", "--num_steps", "4", "--input", "raw_data/cold/004.png", "--output", "same.png"]
    within("inference", *same)
    within("inference", *TRANSFER, "--input", "raw_data/cold/004.png", "--output", "zero.png", "--strength", "0")
    codec = load_autoencoder("dct:f4c12", torch.device("cpu"))
    pixels = torch.from_numpy(source).permute(2, 0, 1)[None] / 127.5 - 1
    rebuilt = ((codec.decode(codec.encode(pixels))[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    for name in ("same.png", "zero.png"):
        assert np.abs(np.array(Image.open(studio / name)) - rebuilt).max() <= 1  # rounding to 8 bits


def test_styles_by_name_and_a_size(studio, within):
    status, out, _ = within(
        "inference", "--checkpoint", CHECKPOINT, "--source_style", "warm", "--target_style", "cold", "--num_steps", "1",
        "--input", "raw_data/warm/001.png", "--output", "named.png", "--size", "48",
    )  # fmt: skip
    assert status == 0 and "warm -> cold" in out
    assert Image.open(studio / "named.png").size == (48, 48)


def test_evaluate_reports_figures_sheets_and_an_exact_round_trip(studio, within, monkeypatch):
    # The styles are red and blue: a classifier is sure of them early.
    monkeypatch.setattr(evaluator, "train_style_classifier", functools.partial(train_style_classifier, steps=60))
    status, out, err = within(
        "evaluate", "--checkpoint", CHECKPOINT, "--data", "raw_data", "--pairs", "--limit", "4", "--output", "report"
    )
    assert status == 0, err
    figures = json.loads((studio / "report/metrics.json").read_text())
    assert figures["classifier_accuracy"]["mean"] == 1.0
    (result,) = figures["results"]
    assert result["settings"]["method"] == "alf" and result["settings"]["cfg_scale"] == 1.5
    assert [(pair["source"], pair["target"]) for pair in result["directions"]] == [("cold", "warm"), ("warm", "cold")]
    for pair in result["directions"]:
        assert pair["round_trip_differing"] == 0 and pair["round_trip_elements"] == 4 * 12 * 8 * 8
    assert Image.open(studio / "report/cold_to_warm.png").width > 300
    assert "| cold -> warm (4) |" in out


#################################################################################
#                                   Bad input                                   #
#################################################################################


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input", "nowhere.png"], ["nowhere.png", "no such file"]),
        (["--input", "config.json"], ["config.json", "not a picture"]),
        (["--input", "checkpoints/stage1_epoch2.pt"], ["not a latent of the store"]),
        (["--input", "latents"], ["holds no pictures"]),
        (["--output", "x.xyz"], ["x.xyz", ".png"]),
        (["--output", "raw_data"], ["is a folder"]),
        (["--output", "raw_data/cold/001.png"], ["overwritten"]),
        (["--checkpoint", "nowhere.pt"], ["nowhere.pt", "no such checkpoint"]),
        (["--checkpoint", "config.json"], ["config.json", "not a checkpoint"]),
        (["--checkpoint", "latents/cold/003.png.pt"], ["not a checkpoint"]),
        (["--source_style", "7"], ["'7'", "0 = cold, 1 = warm"]),
        (["--target_style", "hot"], ["'hot'", "0 = cold, 1 = warm"]),
        (["--strength", "1.5"], ["--strength", "0 to 1"]),
        (["--num_steps", "0"], ["num_steps", "from 1 to 10000"]),
        (["--cfg_scale", "nan"], ["cfg_scale", "a number"]),
        (["--cfg_interval", "0.9", "0.1"], ["cfg_interval"]),
        (["--batch_size", "0"], ["--batch_size", "from 1 to 65536"]),
        (["--size", "-4"], ["--size"]),
        (["--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["--device", "toaster"], ["toaster", "--device cpu"]),
        (["--set", "inference.methd=alf"], ["inference.methd", "inference.method"]),
        (["--set", "nonsense"], ["section.key=value"]),
    ],
)
def test_inference_refuses_in_one_line(within, flags, words):
    base = [*TRANSFER, "--input", "raw_data/cold/001.png", "--output", "refused.png"]
    refused(within("inference", *base, *flags), *words)
    assert not Path("refused.png").exists()


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("preprocess_latents", ["--config", "nowhere.json"], ["nowhere.json", "no such config"]),
        ("preprocess_latents", ["--target_size", "64"], ["size 32, not 64"]),
        ("preprocess_latents", ["--target_size", "30"], ["multiple of 4"]),
        ("preprocess_latents", ["--set", "autoencoder.name=dct:f8c16"], ["dct:f4c12"]),
        ("preprocess_latents", ["--set", "autoencoder.name=some/where"], ["some/where", "dct"]),
        ("preprocess_latents", ["--set", "data.raw_data_root=nowhere"], ["nowhere", "no such folder"]),
        ("preprocess_latents", ["--set", "data.num_classes=3"], ["2 folders", "num_classes = 3"]),
        ("train", [], ["--resume"]),
        ("train", ["--set", "data.data_root=nowhere", "--set", "checkpoint.save_dir=new"], ["preprocess_latents.py"]),
        ("train", ["--set", "training.batch_size=999", "--set", "checkpoint.save_dir=new"], ["999", "batch_size="]),
        ("train", ["--set", "model.num_styles=3", "--set", "checkpoint.save_dir=new"], ["num_styles = 3", "2"]),
        (
            "train",
            ["--set", "model.latent_channels=4", "--set", "checkpoint.save_dir=new"],
            ["latent_channels = 4", "12"],
        ),
        ("train", ["--resume", "nowhere.pt"], ["nowhere.pt"]),
        ("train", ["--resume", "--set", "model.hidden_dim=32"], ["weights", "shape"]),
        ("train", ["--set", "training.learning_rat=1"], ["training.learning_rat", "training.learning_rate"]),
        ("evaluate", ["--checkpoint", CHECKPOINT, "--data", "nowhere"], ["nowhere", "cold"]),
        ("evaluate", ["--checkpoint", "nowhere.pt", "--data", "raw_data"], ["nowhere.pt"]),
    ],
)
def test_the_other_commands_refuse_in_one_line(within, command, flags, words):
    refused(within(command, *flags), *words)


def test_guiding_against_a_null_style_that_was_never_trained_is_refused(studio, within):
    tree = torch.load(studio / CHECKPOINT, weights_only=True)
    tree["config"]["training"]["label_drop_prob"] = 0.0
    torch.save(tree, studio / "no_null.pt")
    flags = ["--checkpoint", "no_null.pt", "--input", "raw_data/cold/001.png", "--output", "null.png"]
    refused(within("inference", *TRANSFER, *flags, "--guidance", "null", "--cfg_scale", "2"), "label_drop_prob 0")
    assert within("inference", *TRANSFER, *flags, "--guidance", "null", "--cfg_scale", "1")[0] == 0
    assert within("inference", *TRANSFER, *flags, "--guidance", "source", "--cfg_scale", "2")[0] == 0


def test_debug_shows_the_traceback(studio):
    done = call(studio, "train.py", "--config", "nowhere.json", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr
    done = call(studio, "train.py", "--config", "nowhere.json")
    assert done.returncode == 2 and "Traceback" not in done.stderr
