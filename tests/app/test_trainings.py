"""Trainings as processes of their own: started, found again, stopped; what is no process is none."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from isonext.app.recipes import Training
from isonext.app.studio import Studio
from isonext.app.trainings import LOG, TAIL, job_of, read_tail, start, stop, under_way
from isonext.config import Config
from isonext.errors import UserError
from isonext.utils.io import LOCK, folder_lock

WAITS = "import signal, sys, time\nsignal.signal(15, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
WAITS += "print('waiting', flush=True)\ntime.sleep(60)\n"


def scripts(tmp_path: Path, preprocess: str, train: str) -> Training:
    """A training whose commands are these programs."""
    for name, text in (("preprocess.py", preprocess), ("train.py", train)):
        (tmp_path / name).write_text(text)
    folder = tmp_path / "runs" / "a"
    return Training("a", folder, Config(), [str(tmp_path / "preprocess.py"), "1"], [str(tmp_path / "train.py"), "2"])


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_both_commands_run_one_after_the_other_and_what_they_print_is_kept(tmp_path):
    start(scripts(tmp_path, "import sys; print('one', sys.argv[1])", "import sys; print('two', sys.argv[1])"))
    wait_for(lambda: "two" in read_tail(tmp_path / "runs" / "a"))
    assert read_tail(tmp_path / "runs" / "a") == "one 1\ntwo 2\n"
    wait_for(lambda: job_of(tmp_path / "runs" / "a").command == "train")
    wait_for(lambda: under_way(tmp_path / "runs") is None)


@pytest.mark.parametrize(("status", "goes_on"), [(0, True), (1, True), (2, False), (143, False)])
def test_training_follows_a_preprocessing_that_skipped_pictures_and_not_one_that_failed(tmp_path, status, goes_on):
    start(scripts(tmp_path, f"raise SystemExit({status})", "print('two')"))
    wait_for(lambda: job_of(tmp_path / "runs" / "a").command == ("train" if goes_on else "preprocess"))
    wait_for(lambda: not job_of(tmp_path / "runs" / "a").under_way)
    time.sleep(0.1)
    assert (read_tail(tmp_path / "runs" / "a") == "two\n") == goes_on


def test_a_training_is_found_again_by_its_folder_and_stopped_and_has_the_device(tmp_path):
    folder = tmp_path / "runs" / "a"
    start(scripts(tmp_path, "", WAITS))
    wait_for(lambda: "waiting" in read_tail(folder))
    process = job_of(folder).process
    assert os.getsid(process.pid) == process.pid, "a session of its own, which no Ctrl-C of the server's reaches"
    assert under_way(tmp_path / "runs").name == "a"
    studio = Studio(tmp_path / "runs", tmp_path / "results", "cpu")
    with pytest.raises(UserError, match=r"^a: is being trained and has the device; stop it"):
        studio.do(lambda: pytest.fail("it works beside a training"))
    stop(folder)
    wait_for(lambda: not job_of(folder).under_way)
    assert read_tail(folder).endswith("saved\n")
    assert studio.do(lambda: 7) == 7


def test_a_preprocessing_that_is_stopped_is_not_followed_by_a_training(tmp_path):
    folder = tmp_path / "runs" / "a"
    start(scripts(tmp_path, WAITS, "print('two')"))
    wait_for(lambda: "waiting" in read_tail(folder))
    assert job_of(folder).command == "preprocess"
    stop(folder)
    wait_for(lambda: not job_of(folder).under_way)
    time.sleep(0.1)
    assert "two" not in read_tail(folder)


def test_a_training_outlives_the_server(tmp_path):
    training = scripts(tmp_path, "", WAITS)
    server = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from isonext.app.recipes import Training
from isonext.app.trainings import read_tail, start
from isonext.config import Config
folder = Path({str(training.folder)!r})
start(Training("a", folder, Config(), {training.preprocess!r}, {training.train!r}))
while "waiting" not in read_tail(folder):
    time.sleep(0.02)
"""
    subprocess.run([sys.executable, "-c", server], check=True, timeout=60)
    folder = training.folder
    job = job_of(folder)
    assert job.process and job.command == "train"
    stop(folder)
    wait_for(lambda: not job_of(folder).under_way)


@pytest.mark.parametrize(
    "record",
    ["", "[]", "{", '{"pid": "1"}', '{"pid": -1}', '{"pid": 1e300}', '{"pid": 99999999999999}', '{"pid": true}'],
)
def test_a_record_that_is_no_process_is_none(tmp_path, record):
    (tmp_path / "app.json").write_text(record)
    assert not job_of(tmp_path).under_way
    stop(tmp_path)


def test_another_program_that_has_the_number_by_now_is_left_alone(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        record = {"pid": other.pid, "created": psutil.Process(other.pid).create_time() - 5, "command": "train"}
        (tmp_path / "app.json").write_text(json.dumps(record))
        assert job_of(tmp_path).process is None
        stop(tmp_path)
        assert other.poll() is None
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()


def test_a_training_that_was_started_elsewhere_is_seen_by_its_lock_and_not_stopped(tmp_path):
    with folder_lock(tmp_path / "b"):
        seen = subprocess.run(
            [sys.executable, "-c", LOOK, str(tmp_path / "b")], capture_output=True, text=True, timeout=60
        )
    assert seen.stdout == "True this training was not started here: press Ctrl-C where it was\n", seen.stderr


LOOK = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from isonext.app.trainings import job_of, stop
folder = Path(sys.argv[1])
try:
    stop(folder)
except Exception as error:
    print(job_of(folder).under_way, error)
"""


def test_a_lock_that_a_kill_left_behind_locks_nobody_out(tmp_path):
    (tmp_path / LOCK).touch()
    assert not job_of(tmp_path).under_way


def test_of_a_long_log_the_end_is_shown_from_the_start_of_a_line(tmp_path):
    (tmp_path / LOG).write_text("".join(f"line {number}\n" for number in range(1000)))
    tail = read_tail(tmp_path)
    assert tail.endswith("line 999\n") and tail.startswith("line ") and TAIL - 10 < len(tail) <= TAIL
    assert read_tail(tmp_path / "nowhere") == ""
