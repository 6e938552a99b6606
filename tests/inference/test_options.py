"""Options by themselves: what is out of range or at odds is refused where they are made, by whoever makes them."""

import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from helpers import ROOT
from isonext.errors import UserError
from isonext.inference import options
from isonext.inference.options import (
    NetworkOptions,
    SampleOptions,
    SettingsOptions,
    TargetOptions,
    TransferOptions,
    check_range,
)

NETWORK, SETTINGS = NetworkOptions("net.pt"), SettingsOptions()


def transfer(targets: TargetOptions | None = None, **changes) -> TransferOptions:
    targets = targets or TargetOptions("monet")
    return TransferOptions(NETWORK, SETTINGS, targets, Path("a.png"), Path("b.png"), "photo", **changes)


def sampling(**changes) -> SampleOptions:
    return SampleOptions(NETWORK, SETTINGS, **{"output": Path("nowhere"), **changes})


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: NetworkOptions("net.pt", batch_size=0), "--batch_size 0: must be from 1 to 65536"),
        (lambda: SettingsOptions(strength=1.5), "--strength 1.5: must be from 0 to 1"),
        (lambda: SettingsOptions(strength=float("nan")), "--strength nan: must be from 0 to 1"),
        (lambda: SettingsOptions(seed=2**63), f"--seed {2**63}: must be from 0 to {2**63 - 1}"),
        (lambda: TargetOptions(frames=1), "--frames 1: must be from 2 to 10000"),
        (lambda: TargetOptions(frames=10_001), "--frames 10001: must be from 2 to 10000"),
        (lambda: transfer(size=0), "--size 0: must be from 1 to 16384"),
        (lambda: transfer(min_structure=-1.1), "--min_structure -1.1: must be from -1 to 1"),
        (
            lambda: transfer(TargetOptions("all"), compare=True),
            "--compare is for one target; the sheet of several shows the picture already",
        ),
        (
            lambda: transfer(TargetOptions(interpolate=("photo", "monet")), save_structure=Path("k.safetensors")),
            "--save_structure keeps one picture's way to one style; give one picture and one target",
        ),
        (lambda: sampling(num_samples=0), "--num_samples 0: must be 1 or more"),
        (lambda: sampling(num_samples_per_style=-2), "--num_samples_per_style -2: must be 1 or more"),
        (lambda: sampling(seed=-1), "--seed -1: must be 0 or more"),
        (lambda: sampling(output=Path(__file__)), f"--output {__file__}: is a file; give a folder"),
    ],
)
def test_what_is_out_of_range_or_at_odds_is_refused_in_one_line(make, line):
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == line


def test_a_folder_keeps_no_structure(tmp_path):
    with pytest.raises(UserError, match="give one picture and one target"):
        TransferOptions(
            NETWORK, SETTINGS, TargetOptions("monet"), tmp_path, Path("out"), "photo", save_structure=Path("k")
        )


def test_both_ends_of_a_range_are_in_it_and_a_flag_that_was_not_given_is():
    for value in (0, 1, 0.5, None):
        check_range("strength", value, 0, 1)
    check_range("size", 10**12, 1)
    with pytest.raises(UserError, match="--frames 3: must be from -1 to 0"):
        check_range("frames", 3, -1, 0)  # 0 is a limit as good as any


def test_options_are_not_written_into():
    kinds = [kind for kind in vars(options).values() if isinstance(kind, type) and kind.__module__ == options.__name__]
    assert len(kinds) == 7
    for kind in kinds:
        first = fields(kind)[0].name
        with pytest.raises(FrozenInstanceError):
            setattr(object.__new__(kind), first, None)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("inference", ["--input", "a.png", "--source_style", "photo", "--target_style", "monet", "--strength", "2"]),
        ("inference", ["--restore", "k.safetensors", "--compare"]),
        ("sample", ["--num_samples", "0"]),
    ],
)
def test_bad_flags_are_refused_before_torch_is_imported(command, flags):
    arguments = [f"{command}.py", "--checkpoint", "net.pt", "--output", "nowhere", *flags]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "\nerror: --" in done.stderr
    assert not re.search(r"\| +(torch|numpy|PIL)$", done.stderr, re.MULTILINE)
