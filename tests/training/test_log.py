"""The log survives damage: a line costs itself and no other."""

import contextlib
import json
import sys

import pytest
from PIL import Image

from isonext.errors import WriteError
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


@contextlib.contextmanager
def no_file_above(size: int):
    """Within, the system refuses to write a byte past `size` to any file, as a full disk does."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files is POSIX's")
@pytest.mark.parametrize(
    ("name", "size", "file"),
    [("a" * 4000, 3000, "metrics.jsonl"), ("a", 400, "tensorboard"), ("a", 0, "(tensorboard|metrics)")],
)
def test_a_disk_without_room_is_one_error_that_names_the_file_and_no_traceback_of_a_thread(
    tmp_path, monkeypatch, name, size, file
):
    said = []
    monkeypatch.setattr("threading.excepthook", lambda args: said.append(args.thread.name))
    with (
        no_file_above(size),
        pytest.raises(WriteError, match=rf"^{tmp_path / file}.*: could not be written \(") as caught,
    ):
        book = Logbook(tmp_path, 0)
        for step in range(1, 13):
            book.write(step, {name: 1.0})
        book.close()
    assert "too large" in caught.value.strerror and said == []
