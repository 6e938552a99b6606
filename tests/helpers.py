"""What tests call: a tiny config, commands as users run them, and what a refusal looks like."""

import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isonext.utils import cli

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


def call_within(folder: Path, name: str, *arguments: str) -> tuple[int, str, str]:
    """The same without a new process, which takes seconds to import torch: (status, stdout, stderr)."""
    module, out, err = importlib.import_module(name), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(module.main, module.build_parser())
    return ended.value.code, out.getvalue(), err.getvalue()


LAUNCHERS = {  # each with a port of its own, since other tests may be under way
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
}


def launch(folder: Path, script: str | Path, *flags: str, launcher: str = "torchrun") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(ROOT / script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
