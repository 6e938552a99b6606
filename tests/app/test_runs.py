"""The runs below a folder: which checkpoints are listed, in which order, with which figures, and what is no name."""

import json
from pathlib import Path

import pytest

from isonext.app.runs import find_checkpoint, find_run, find_runs, list_checkpoints
from isonext.errors import UserError

LINES = [
    {"step": 4, "epoch": 1.0, "loss": 2.0},
    {"step": 4, "val_loss": 1.5, "val_style_success": 0.5, "val_ssim": 0.8, "val_score": 0.6},
    {"step": 8, "epoch": 2.0, "loss": 1.0},
    {"step": 8, "val_loss": 1.2, "val_style_success": 0.25, "val_ssim": 0.9, "val_score": 0.5},
]


def make_run(folder: Path, *names: str, lines: list[dict] = LINES) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_checkpoints_are_listed_newest_first_with_the_validation_of_their_epoch(tmp_path):
    make_run(
        tmp_path / "a", "stage1_epoch1.pt", "stage1_epoch2.pt", "stage1_interrupted.pt", "best.pt", "stage2_epoch1.pt"
    )
    assert list_checkpoints(tmp_path) == [
        ("a/stage2_epoch1.pt  (style 0.50, SSIM 0.80, loss 1.50)", "a/stage2_epoch1.pt"),
        ("a/stage1_interrupted.pt  (style 0.25, SSIM 0.90, loss 1.20)", "a/stage1_interrupted.pt"),
        ("a/stage1_epoch2.pt  (style 0.25, SSIM 0.90, loss 1.20)", "a/stage1_epoch2.pt"),
        ("a/stage1_epoch1.pt  (style 0.50, SSIM 0.80, loss 1.50)", "a/stage1_epoch1.pt"),
        ("a/best.pt  (style 0.50, SSIM 0.80, loss 1.50)", "a/best.pt"),  # of the best score
    ]


def test_a_run_in_the_root_itself_one_that_has_only_begun_and_no_others(tmp_path):
    make_run(tmp_path / "runs", "stage1_epoch1.pt", "notes.pt", lines=[])
    make_run(tmp_path / "runs" / "new", lines=[])
    make_run(tmp_path / "runs" / ".hidden", "stage1_epoch1.pt")
    make_run(tmp_path / "outside", "stage1_epoch1.pt")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "runs" / "empty").mkdir()
    assert {run.name: [path.name for path in run.checkpoints] for run in find_runs(tmp_path / "runs")} == {
        ".": ["stage1_epoch1.pt"],
        "new": [],
    }
    assert list_checkpoints(tmp_path / "runs") == [("stage1_epoch1.pt", "stage1_epoch1.pt")]
    assert find_run(tmp_path / "runs", "new").folder == tmp_path / "runs" / "new"


def test_no_folder_is_no_run(tmp_path):
    assert find_runs(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "name",
    ["../outside/stage1_epoch1.pt", "/etc/passwd", "a/../a/stage1_epoch1.pt", "a", "", None, "a/notes.txt", "a\0"],
)
def test_what_is_not_listed_is_not_found(tmp_path, name):
    make_run(tmp_path / "runs" / "a", "stage1_epoch1.pt", "notes.txt")
    make_run(tmp_path / "outside", "stage1_epoch1.pt")
    assert find_checkpoint(tmp_path / "runs", "a/stage1_epoch1.pt") == tmp_path / "runs" / "a" / "stage1_epoch1.pt"
    with pytest.raises(UserError, match="no such checkpoint here"):
        find_checkpoint(tmp_path / "runs", name)
    with pytest.raises(UserError, match="no such run here"):
        find_run(tmp_path / "runs", f"{name}x")


def test_a_checkpoint_that_was_deleted_while_listed_is_a_sentence(tmp_path):
    make_run(tmp_path / "a", "stage1_epoch1.pt")
    (_, value), *_ = list_checkpoints(tmp_path)
    (tmp_path / value).unlink()
    with pytest.raises(UserError, match=r"a/stage1_epoch1.pt: no such checkpoint here, or no longer; choose one"):
        find_checkpoint(tmp_path, value)
