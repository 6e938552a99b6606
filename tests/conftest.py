"""Shared by the tests: drawn pictures, a tiny config, and a tiny latent store that is encoded once."""

import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test waits for a network

import numpy as np
import pytest
import torch
from PIL import Image

from config import Config, config_from_dict
from preprocess_latents import preprocess

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
