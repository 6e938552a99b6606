"""Training survives: a kill at any moment, and a disk without room."""

import json
import sys

import pytest
import torch

from benchmarks.kill_resume import prepare
from helpers import ROOT, call, refused
from isonext.checkpoint import epoch_checkpoints, load_checkpoint


@pytest.mark.slow
def test_killed_and_resumed_is_the_run_left_in_peace():
    # The short form of `python benchmarks/kill_resume.py`, which kills 30 times.
    done = call(ROOT, "benchmarks/kill_resume.py", "--kills", "2", "--epochs", "20", "--longest", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["kills"], figures["steps"]) == (2, 160)
    assert set(figures["differing"]) == {"step", "model", "ema", "optimizer", "guard", "log"}
    assert not any(figures["differing"].values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files is POSIX's")
def test_a_full_disk_is_one_line_and_training_goes_on_after_room_is_made(tmp_path):
    prepare(tmp_path, epochs=4)
    one_epoch = ("--set", "training.lr_schedule=constant", "--set", "training.stage1_epochs=1")
    assert call(tmp_path, "train.py", *one_epoch).returncode == 0
    good = tmp_path / "checkpoints/stage1_epoch1.pt"
    before, size = good.read_bytes(), good.stat().st_size

    script = tmp_path / "small_disk.py"
    script.write_text(f"""
import resource, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
    flags = ("--resume", "--set", "training.lr_schedule=constant")
    full = call(tmp_path, script, *flags)
    refused(
        (full.returncode, full.stdout, full.stderr),
        "stage1_epoch2.pt",
        "could not be written",
        str(good.name),
        "--resume",
    )
    assert [path.name for path in epoch_checkpoints(tmp_path / "checkpoints")] == ["stage1_epoch1.pt"]
    assert not list((tmp_path / "checkpoints").glob(".*")) and good.read_bytes() == before

    assert call(tmp_path, "train.py", *flags).returncode == 0
    assert call(tmp_path, "train.py", *flags[1:], "--set", "checkpoint.save_dir=whole").returncode == 0
    one, other = (load_checkpoint(tmp_path / name / "stage1_epoch4.pt").model for name in ("checkpoints", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)
