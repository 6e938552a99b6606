"""Shared by the tests: drawn pictures, a tiny config, a tiny latent store, and a folder with a trained checkpoint."""

import functools
import getpass
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test waits for a network
if worker := os.environ.get(
    "PYTEST_XDIST_WORKER"
):  # torch may load a compiled kernel that another process still writes
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/isonext_tests_{getpass.getuser()}_{worker}"

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from helpers import STUDIO, TINY, call, call_within, draw_styles
from isonext.config import Config, config_from_dict
from isonext.data import autoencoder
from isonext.data.preprocess import preprocess


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first, or the last one would keep a single worker busy."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors are quickest on one thread, and sums then have one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def float32_autoencoders():
    """Autoencoders on a CPU compute in float32, as on one without BF16: what is tested is not which CPU runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "has_bf16", lambda device: device.type != "cpu")
        yield


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


@pytest.fixture(scope="session")
def studio(tmp_path_factory) -> Path:
    """A folder in which a user has preprocessed and trained, by the commands: once for all workers, a copy for each."""
    base = tmp_path_factory.getbasetemp()
    trained = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    with FileLock(trained.with_suffix(".lock")):
        if not trained.exists():
            building = tmp_path_factory.mktemp("building")
            draw_styles(building / "raw_data", 16)
            (building / "config.json").write_text("// a tiny setting\n" + json.dumps(STUDIO))
            for command in ("preprocess_latents.py", "train.py"):
                done = call(building, command)
                assert done.returncode == 0, done.stderr
            building.rename(trained)
    return shutil.copytree(trained, base / "studio")


@pytest.fixture
def within(studio, monkeypatch):
    """Run a command inside the studio without a new process: returns (status, stdout, stderr)."""
    monkeypatch.chdir(studio)
    return functools.partial(call_within, studio)
