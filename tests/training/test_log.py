"""The log survives damage: a line costs itself and no other."""

import json

import pytest
from PIL import Image

from isonext.training.log import Logbook, plot_losses, read_metrics

LINES = [{"step": step, "loss": 1 / step} for step in range(1, 12)]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 6, "lo\xff\xfes": 1}',
        b'{"step": 6, "loss"',
        b"[6]",
        b"null",
        b"7",
        b'{"loss": 1}',
        b'{"step": "six"}',
        b'{"step": true}',
        b"[" * 100000,
    ],
)
def test_a_damaged_line_costs_itself_alone_and_is_told(tmp_path, capsys, damage):
    path, texts = tmp_path / "metrics.jsonl", [json.dumps(line).encode() for line in LINES]
    texts[5] = damage
    path.write_bytes(b"\n".join(texts) + b"\n")
    assert read_metrics(path) == LINES[:5] + LINES[6:]
    assert capsys.readouterr().err == f"warning: {path}: 1 damaged lines are left out\n"
    Logbook(tmp_path, 9).close()
    assert read_metrics(path) == LINES[:5] + LINES[6:9]


def test_a_last_line_that_was_cut_off_is_no_damage_and_what_is_no_number_is_not_plotted(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(LINES[0] | {"val_loss": "low"}) + "\n" + json.dumps(LINES[1])[:9])
    assert read_metrics(path) == LINES[:1] and capsys.readouterr().err == ""
    plot_losses(path, tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").width > 100
    assert read_metrics(tmp_path / "none.jsonl") == []
