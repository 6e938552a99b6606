"""Shared by the tests: drawn pictures, a tiny config, a tiny latent store, and a folder with a trained checkpoint."""

import functools
import getpass
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test waits for a network
if worker := os.environ.get(
    "PYTEST_XDIST_WORKER"
):  # torch may load a compiled kernel that another process still writes
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/isonext_tests_{getpass.getuser()}_{worker}"

import numpy as np
import pytest
import torch
from PIL import Image

import cli
from config import Config, config_from_dict
from preprocessing import preprocess

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "model": {"hidden_dim": 16, "num_groups": 4, "num_layers": 1, "kernel_size": 3, "style_dim": 8, "time_dim": 8},
    "training": {
        "batch_size": 4,
        "stage1_epochs": 2,
        "warmup_steps": 2,
        "learning_rate": 1e-3,
        "compile": False,
        "num_workers": 0,
        "log_every_steps": 1,
        "save_every_epochs": 1,
        "val_every_epochs": 1,
    },
    "data": {"image_size": 16, "val_fraction": 0.2},
    "autoencoder": {"name": "dct"},
    "inference": {"num_steps": 2},
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors are quickest on one thread, and sums then have one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cpu():
    return torch.device("cpu")


@pytest.fixture(scope="session")
def make_config():
    """A function: (folder that holds raw/, latents/ and run/, {"section.key": value}) -> Config."""

    def make(root: Path, overrides: dict | None = None) -> Config:
        tree = {section: dict(values) for section, values in TINY.items()}
        tree["data"] |= {"raw_data_root": str(root / "raw"), "data_root": str(root / "latents")}
        tree["checkpoint"] = {"save_dir": str(root / "run")}
        for name, value in (overrides or {}).items():
            section, _, entry = name.partition(".")
            tree[section][entry] = value
        return config_from_dict(tree)

    return make


@pytest.fixture(scope="session")
def draw():
    """A function that writes drawn pictures (smooth colour waves, no two alike) and returns their pixels."""

    def draw_one(path: Path, seed: int, width: int = 16, height: int = 16) -> np.ndarray:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width][..., None] / 16
        waves = np.sin(rng.uniform(1, 6, 3) * x + rng.uniform(0, 6, 3)) + np.cos(rng.uniform(1, 6, 3) * y)
        pixels = (127.5 + 60 * waves).clip(0, 255).astype(np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return pixels

    return draw_one


@pytest.fixture(scope="session")
def _template(tmp_path_factory, draw, make_config, cpu) -> Path:
    root = tmp_path_factory.mktemp("template")
    for number, style in enumerate(("ink", "oil")):
        for picture in range(10):
            draw(root / "raw" / style / f"{picture}.png", seed=100 * number + picture)
    preprocess(make_config(root), cpu, quiet=True)
    return root


@pytest.fixture
def store(_template, tmp_path) -> Path:
    """A folder of this test's own with raw/ (2 styles of 10 pictures, 16 px) and the finished latents/ of them."""
    shutil.copytree(_template, tmp_path / "store")
    return tmp_path / "store"


#################################################################################
#                              Commands, as users run them                      #
#################################################################################

CHECKPOINT = "checkpoints/stage1_epoch4.pt"
STUDIO = {
    "model": {"hidden_dim": 16, "num_layers": 2, "num_groups": 4, "style_dim": 16, "time_dim": 16},
    "training": {
        "batch_size": 8,
        "learning_rate": 2e-3,
        "stage1_epochs": 4,
        "warmup_steps": 2,
        "num_workers": 2,
        "compile": False,
        "save_every_epochs": 2,
        "val_every_epochs": 2,
        "log_every_steps": 1,
    },
    "data": {"image_size": 32, "val_fraction": 0.2},
    "autoencoder": {"name": "dct:f4c12"},
    "inference": {"cfg_scale": 1.5, "cfg_interval": [0.0, 1.0]},  # so that evaluations are easy to count
}


def draw_styles(root: Path, count: int) -> None:
    """Style `warm` is reddish blobs, style `cold` bluish stripes."""
    generator = np.random.default_rng(0)
    for style, colour in (("cold", (40, 80, 220)), ("warm", (220, 80, 40))):
        (root / style).mkdir(parents=True)
        for number in range(count):
            grain = generator.integers(0, 60, (32, 32, 3))
            picture = np.clip(np.array(colour) * generator.uniform(0.5, 1) + grain, 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(root / style / f"{number:03}.png")


def call(folder: Path, *arguments: str, **extra) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` in `folder` as a user would."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = (str(ROOT / arguments[0]), *arguments[1:])
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=240, **extra
    )


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Status 2 and one line on stderr that has all the words."""
    status, _, err = result
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


@pytest.fixture(scope="session")
def studio(tmp_path_factory) -> Path:
    """A folder in which a user has preprocessed and trained, by the commands."""
    folder = tmp_path_factory.mktemp("studio")
    draw_styles(folder / "raw_data", 16)
    (folder / "config.json").write_text("// a tiny setting\n" + json.dumps(STUDIO))
    for command in ("preprocess_latents.py", "train.py"):
        done = call(folder, command)
        assert done.returncode == 0, done.stderr
    return folder


def call_within(folder: Path, name: str, *arguments: str) -> tuple[int, str, str]:
    """The same without a new process, which takes seconds to import torch: (status, stdout, stderr)."""
    module, out, err = importlib.import_module(name), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(module.main, module.build_parser())
    return ended.value.code, out.getvalue(), err.getvalue()


@pytest.fixture
def within(studio, monkeypatch):
    """Run a command inside the studio without a new process: returns (status, stdout, stderr)."""
    monkeypatch.chdir(studio)
    return functools.partial(call_within, studio)
