"""How a run is getting on, from its log."""

import json
from pathlib import Path

import pytest

from isonext.app.progress import MOST_POINTS, look_at, losses_of
from isonext.app.runs import Run

LOG = [
    {"step": 10, "epoch": 1.0, "samples_per_s": 4.0, "loss": 1.0, "loss_t0": 2.0, "loss_t3": 0.5},
    {"step": 10, "val_loss": 1.5},
    {"step": 20, "epoch": 2.0, "samples_per_s": 5.0, "loss": 1.0, "loss_t0": 1.0},
    {"step": 20, "val_loss": 1.25, "val_style_success": 0.5, "val_ssim": 0.75, "val_score": 0.6},
]


def run_of(folder: Path, **record) -> Run:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    (folder / "app.json").write_text(json.dumps(record))
    return Run("a", folder, [])


def test_what_is_shown_of_a_run_at_rest(tmp_path):
    for epoch in (2, 10, 9):
        (tmp_path / f"preview_epoch{epoch}.png").write_bytes(b"")
    seen = look_at(run_of(tmp_path, epochs=6, batch=4, command="train"), None)
    assert seen.sentence == "**a**: not under way, step 20, epoch 2 of 6, 5 pictures/s"
    assert seen.losses == {
        "step": [10, 20, 10],
        "loss": [2.0, 1.0, 0.5],
        "t": ["0–0.25", "0–0.25", "0.75–1"],
    }
    assert [path.name for path in seen.previews] == ["preview_epoch10.png", "preview_epoch9.png", "preview_epoch2.png"]
    rows = seen.validation.splitlines()
    assert rows[0] == "| step | loss | style | SSIM | score |"
    assert rows[2:] == ["| 20 | 1.250 | 0.500 | 0.750 | 0.600 |", "| 10 | 1.500 |  |  |  |"]


def test_while_it_is_under_way_the_time_that_is_left_is_reckoned(tmp_path):
    import psutil

    mine = psutil.Process()
    run = run_of(tmp_path, epochs=6, batch=4, command="train", pid=mine.pid, created=mine.create_time())
    # 4 epochs of 10 steps of 4 pictures at 5 a second
    assert look_at(run, None).sentence == "**a**: training, step 20, epoch 2 of 6, 5 pictures/s, about 32 s left"
    chinese = {"accept-language": "zh-CN,zh;q=0.9"}
    assert look_at(run, chinese).sentence.startswith("**a**：训练中，第 20 步，第 2 轮 / 共 6 轮")


def test_a_run_that_has_written_nothing_yet(tmp_path):
    seen = look_at(Run("new", tmp_path, []), None)
    assert (seen.sentence, seen.validation, seen.previews) == ("**new**: not under way", "", [])


@pytest.mark.parametrize("count", [1, MOST_POINTS, MOST_POINTS + 1, 10 * MOST_POINTS + 7])
def test_long_curves_are_thinned_out_and_end_where_they_are(count):
    table = losses_of([{"step": step, "loss_t0": step / 2} for step in range(count)])
    assert min(count, MOST_POINTS // 2) <= len(table["step"]) <= MOST_POINTS
    assert table["step"][-1] == count - 1 and table["loss"][-1] == (count - 1) / 2
