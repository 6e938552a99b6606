"""How a command ends: when its reader goes away, and when it is terminated."""

import signal
import subprocess
import sys

import pytest

from helpers import ROOT, Command, environment

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
