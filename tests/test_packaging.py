"""`pip install .` gives all that `from isonext import FlowStylePipeline` needs, and no command."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from helpers import CHECKPOINT, ROOT, call_within, environment

OF_A_WHEEL = ("isonext", "model.py", "pyproject.toml")
FIVE_LINES = """
from isonext import FlowStylePipeline
pipeline = FlowStylePipeline.from_pretrained("model_of_wheel", device="cpu")
result = pipeline("raw_data/cold/003.png", source="cold", target="warm", num_steps=2)
result.save("of_wheel.png")
import isonext, model; print(isonext.__file__, model.__file__)
"""


def test_every_folder_of_the_library_is_a_package():
    folders = {path.parent for path in ROOT.glob("isonext/**/*.py")}
    assert len(folders) > 8 and all((folder / "__init__.py").exists() for folder in folders)


def test_importing_the_library_imports_nothing_that_takes_long():
    code = "import sys, isonext; print(isonext.__version__, 'torch' in sys.modules, 'PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment({}), capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["False", "False"], done.stderr


@pytest.mark.slow
def test_a_wheel_makes_the_picture_of_the_repository(studio, within, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in OF_A_WHEEL:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if "setuptools>=77" in built.stderr:
        pytest.skip("no network, from which pip has what builds a wheel")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        archive.extractall(tmp_path / "site")
    library = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("isonext/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == library | {"model.py"}
    assert "Requires-Dist: torch<2.13,>=2.11" in metadata and "Requires-Dist: safetensors" in metadata

    assert call_within(studio, "export", "--checkpoint", CHECKPOINT, "--output", "model_of_wheel")[0] == 0
    own = environment({}) | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", FIVE_LINES], cwd=studio, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(Path(path).is_relative_to(tmp_path / "site") for path in done.stdout.split())
    flags = ("--input", "raw_data/cold/003.png", "--output", "by_command.png", "--num_steps", "2")
    styles = ("--source_style", "cold", "--target_style", "warm")
    assert within("inference", "--checkpoint", CHECKPOINT, *flags, *styles, "--device", "cpu")[0] == 0
    by_wheel, by_command = (Image.open(studio / name).tobytes() for name in ("of_wheel.png", "by_command.png"))
    assert by_wheel == by_command
