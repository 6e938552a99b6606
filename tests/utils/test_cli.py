"""How a command ends: whatever it meets is one line, and the status says what kind it was."""

import argparse
import io
import signal
import subprocess
import sys

import pytest
import torch

from helpers import ROOT, Command, environment
from isonext.errors import UserError
from isonext.utils import cli


def ended(monkeypatch, error: BaseException | None, *flags: str) -> int:
    """The exit status of a command that raises `error`."""

    def main(args: argparse.Namespace) -> int:
        if error:
            raise error
        print("style öl", "name \udcff")
        return 0

    monkeypatch.setattr(sys, "argv", ["command", *flags])
    with pytest.raises(SystemExit) as caught:
        cli.run(main, cli.new_parser("a command"))
    return caught.value.code


UNFORESEEN = [
    ValueError("odd\nand more"),
    KeyError("style"),
    RuntimeError("kernel"),
    RecursionError(),
    AssertionError(),
]


@pytest.mark.parametrize("error", UNFORESEEN, ids=lambda error: type(error).__name__)
def test_what_nobody_foresaw_is_one_line_with_its_name_and_status_1(monkeypatch, capsys, error):
    assert ended(monkeypatch, error) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: {type(error).__name__}") and line.endswith("; --debug shows more\n")
    assert line.count("\n") == 1 and "Traceback" not in line


@pytest.mark.parametrize("error", [*UNFORESEEN, UserError("x"), MemoryError()], ids=lambda error: type(error).__name__)
def test_debug_lets_it_through(monkeypatch, error):
    with pytest.raises(type(error)):
        ended(monkeypatch, error, "--debug")


def no_memory() -> list[Exception]:
    errors: list[Exception] = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
    for shape in ((2**45,), (2**40, 2**40)):  # more than a machine has, and more than one can count
        try:
            torch.empty(shape)
        except RuntimeError as error:
            errors.append(error)
    assert len(errors) == 4
    return errors


@pytest.mark.parametrize("error", no_memory(), ids=str)
def test_memory_that_cannot_be_had_is_one_line_on_a_cpu_as_on_a_card(monkeypatch, capsys, error):
    assert ended(monkeypatch, error) == 2
    line = capsys.readouterr().err
    assert "out of memory" in line and "smaller --batch_size or --size" in line and line.count("\n") == 1


def test_a_nul_in_a_flag_is_bad_input(monkeypatch, capsys):
    assert ended(monkeypatch, None, "--set", "a=b") == 0
    monkeypatch.setattr(sys, "argv", ["command", "--output", "a\0b"])
    parser = cli.new_parser("a command")
    parser.add_argument("--output")
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda args: 0, parser)
    assert caught.value.code == 2 and "--output: holds a NUL" in capsys.readouterr().err


def test_the_line_stays_one_where_a_name_has_two(monkeypatch, capsys):
    assert ended(monkeypatch, UserError("a\nb.png: no such picture")) == 2
    assert capsys.readouterr().err == "error: a b.png: no such picture\n"


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", b"style \\xf6l name \\udcff\n"), ("utf-8", b"style \xc3\xb6l name \\udcff\n")]
)
def test_a_name_that_stdout_has_no_letters_for_is_printed_with_escapes(monkeypatch, encoding, printed):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert ended(monkeypatch, None) == 0
    assert stdout.buffer.getvalue() == printed


#################################################################################
#                      A reader that goes away, and termination                 #
#################################################################################

WORKS = """
import sys, pathlib, time
from isonext.utils.cli import new_parser, run
from isonext.utils.io import written_whole

def main(args):
{body}

run(main, new_parser("A command.", config=False))
"""


def script(folder, body: str):
    path = folder / "works.py"
    path.write_text(WORKS.format(body="\n".join(f"    {line}" for line in body.splitlines())))
    return path


@pytest.mark.parametrize("redirected", ["", "2>&1"])
def test_a_reader_that_goes_away_does_not_end_the_work_and_the_status_is_that_of_the_work(tmp_path, redirected):
    body = """for number in range(3):
    print("line", number)
    print("bar", number, file=sys.stderr)
    time.sleep(0.1)
pathlib.Path("done").write_text("all")
return 1"""
    command = f"({sys.executable} {script(tmp_path, body)} {redirected}; echo $? > status) | head -0"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment({}), timeout=60, stderr=subprocess.DEVNULL)
    assert (tmp_path / "done").read_text() == "all" and (tmp_path / "status").read_text() == "1\n"


def test_sigterm_ends_with_143_and_leaves_no_unfinished_file(tmp_path):
    body = """with written_whole("entry.bin") as beside:
    beside.write_bytes(b"half")
    print("writing")
    time.sleep(60)"""
    path = script(tmp_path, body)
    running = Command(tmp_path, path, PYTHONPATH=str(ROOT))
    while "writing" not in running.stdout and running.process.poll() is None:
        pass
    running.process.send_signal(signal.SIGTERM)
    done = running.finish(20)
    assert (done.returncode, done.stderr) == (143, "terminated\n")
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["works.py"]
