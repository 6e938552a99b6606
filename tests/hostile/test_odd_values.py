"""Values that no machine can serve, and names that would leave the output: one line at once."""

import json
import time

import pytest
import torch

from helpers import CHECKPOINT, ROOT, call, refused
from isonext.data.store import LatentSpec
from isonext.data.style_folders import find_styles
from isonext.errors import UserError
from isonext.inference.plan import Target
from isonext.utils.device import pick_device
from isonext.utils.schema import placed

TRANSFER = ("--checkpoint", CHECKPOINT, "--source_style", "0", "--target_style", "1")
PICTURE = ("--input", "raw_data/cold/000.png", "--output", "out.png")


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("inference", (*TRANSFER, *PICTURE, "--size", "100000"), ["--size 100000", "from 1 to 16384"]),
        ("inference", (*TRANSFER, *PICTURE, "--num_steps", 10**9), ["num_steps", "from 1 to 10000"]),
        ("inference", (*TRANSFER, *PICTURE, "--noise_samples", 10**9), ["noise_samples", "from 1 to 1000"]),
        ("inference", (*TRANSFER, *PICTURE, "--device", "meta"), ["--device meta", "--device cpu"]),
        ("inference", (*TRANSFER, *PICTURE, "--batch_size", 10**12), ["--batch_size", "65536"]),
        ("inference", (*TRANSFER[:4], "--target_style", "9" * 45_000, *PICTURE), ["style '999", "0 = cold"]),
        ("sample", ("--checkpoint", CHECKPOINT, "--output", "o", "--num_samples", 10**12), ["at most 1000000"]),
        ("sample", ("--checkpoint", CHECKPOINT, "--output", "o", "--num_samples_per_style", 10**9), ["at most"]),
        ("train", ("--set", "training.learning_rate=1e300"), ["learning_rate", "from 0 to 1000"]),
        ("train", ("--set", "model.num_layers=10000000"), ["num_layers", "from 1 to 1000"]),
        ("train", ("--plan", "--set", "model.hidden_dim=1000000000000"), ["hidden_dim", "from 8 to 65536"]),
        ("train", ("--plan", "--set", "training.batch_size=1000000000000"), ["batch_size", "to 1000000"]),
        (
            "train",
            ("--set", "model.hidden_dim=65536", "--set", "model.num_layers=40", "--set", "checkpoint.save_dir=huge"),
            ["GiB are free", "lower model.hidden_dim"],
        ),
        ("train", ("--plan", "--vram", "1e300"), ["--vram 1e+300", "at most 100000"]),
        ("train", ("--set", 'data.data_root="a\\u0000b"'), ["data.data_root", "must be a text"]),
        ("train", ("--set", 'checkpoint.save_dir="\\ud800"'), ["checkpoint.save_dir", "must be a text"]),
    ],
    ids=lambda value: None if isinstance(value, tuple | list) else value,
)
def test_a_value_that_no_machine_can_serve_is_one_line_at_once(within, command, flags, words):
    started = time.monotonic()
    result = within(command, *flags)
    refused(result, *words)
    assert len(result[2]) < 1000 and time.monotonic() - started < 20


def test_the_meta_device_is_none():
    with pytest.raises(UserError, match="--device meta cannot be used here"):
        pick_device("meta")


#################################################################################
#                           Names that become paths                             #
#################################################################################

OUTSIDE = ["../outside", "/tmp/outside", "..", "a/b", "a\\b", "a\0b", "a\nb", ".hidden", "", "x" * 256, "\ud800"]


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_a_style_of_a_checkpoint_never_leaves_the_output(studio, within, tmp_path, name):
    tree = torch.load(studio / CHECKPOINT, weights_only=True)
    tree["latents"]["styles"][1] = name
    torch.save(tree, tmp_path / "bad.pt")
    before = sorted(studio.rglob("*"))
    bad = ("--checkpoint", tmp_path / "bad.pt")
    refused(within("sample", *bad, "--output", "samples", "--num_steps", "1"), "bad.pt: damaged", "latents.styles[1]")
    flags = ("--source_style", "0", "--target_style", "all", "--num_steps", "1", *PICTURE)
    refused(within("inference", *bad, *flags), "bad.pt: damaged", "latents.styles[1]")
    assert sorted(studio.rglob("*")) == before


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", "a\0b", "x" * 250], ids=ascii)
def test_a_path_is_checked_once_more_where_it_is_made(tmp_path, name):
    with pytest.raises(UserError, match="cannot be the name of a file"):
        Target(name, name, 1).path(tmp_path / "result.png")


@pytest.mark.parametrize("name", ["öl", "油画", "a b", "a.b", "x" * 255, "👩\u200d🎨"])
def test_an_ordinary_name_is_a_path_in_its_folder(tmp_path, name):
    assert placed(tmp_path, name).parent == tmp_path and placed(tmp_path, name).name == name


def test_a_style_folder_of_two_lines_is_refused_before_its_name_is_stored(tmp_path, draw):
    draw(tmp_path / "ink" / "a.png", seed=1)
    draw(tmp_path / "two\nlines" / "a.png", seed=2)
    with pytest.raises(UserError, match=r'"two\\nlines".*rename it') as caught:
        find_styles(tmp_path, None)
    assert "\n" not in str(caught.value)


def test_a_number_of_many_digits_is_no_style():
    spec = LatentSpec("dct", 12, 4, 16, ["ink"])
    with pytest.raises(UserError, match="does not exist") as caught:
        spec.style_id("0" * 45_000)
    assert len(str(caught.value)) < 300


#################################################################################
#                              A disk without room                              #
#################################################################################

SMALL_DISK = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("layout", ["pt", "safetensors"])
def test_a_full_disk_in_preprocessing_is_one_line(studio, tmp_path, layout):
    pytest.importorskip("resource")
    (tmp_path / "small_disk.py").write_text(SMALL_DISK.format(script=str(ROOT / "preprocess_latents.py")))
    config = json.loads((studio / "config.json").read_text().partition("\n")[2])
    config["data"] |= {"data_root": str(tmp_path / "latents"), "raw_data_root": str(studio / "raw_data")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ("--format", layout, "--set", "training.num_workers=0")
    done = call(tmp_path, tmp_path / "small_disk.py", *flags)
    refused((done.returncode, done.stdout, done.stderr), "could not be written", "make room", "latents")
    assert not list((tmp_path / "latents").rglob("*.tmp*"))
