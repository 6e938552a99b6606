"""Trainings started from the page: processes of their own that outlive it, found again by a file in their folder."""

import json
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from isonext.app.recipes import Training, arguments
from isonext.app.runs import RECORD, Run, find_runs
from isonext.errors import UserError
from isonext.utils.io import LOCK, written_whole

LOG = "app.log"  # in a run's folder, beside RECORD, which names the process: what it has printed
TAIL = 4096  # bytes of the log that are shown
SLACK_S = 2.0  # between two readings of when a process began: the machine's clock may be set meanwhile
GOES_ON = (0, 1)  # exit statuses of preprocessing after which training makes sense: 1, some pictures were skipped


@dataclass(frozen=True)
class Job:
    """The process that works on a run, or the last that did."""

    command: str = ""  # preprocess or train; "" where the page has not started any
    process: psutil.Process | None = None  # while it is under way
    locked: bool = False  # somebody writes to the run's folder
    epochs: int = 0  # and pictures a step, of the training; 0 where nobody knows
    batch: int = 0

    @property
    def under_way(self) -> bool:
        return self.process is not None or self.locked


def job_of(folder: Path) -> Job:
    """Who is at work on a run. A process number that another program has by now is none."""
    record = _read(folder / RECORD)
    process = None
    if isinstance(record.get("pid"), int):
        try:
            found = psutil.Process(record["pid"])
            same = abs(found.create_time() - record["created"]) < SLACK_S
            if same and found.status() != psutil.STATUS_ZOMBIE:
                process = found
        except (psutil.Error, ValueError, OverflowError, KeyError, TypeError):
            pass
    epochs, batch = (found if isinstance(found := record.get(name), int) else 0 for name in ("epochs", "batch"))
    return Job(str(record.get("command", "")), process, _is_locked(folder), epochs, batch)


def under_way(runs: Path) -> Run | None:
    """A run below `runs` that somebody works on."""
    return next((run for run in find_runs(runs) if job_of(run.folder).under_way), None)


def start(training: Training) -> None:
    """Preprocess, then train, in a session of their own."""
    training.folder.mkdir(parents=True, exist_ok=True)
    (training.folder / LOG).write_text("", encoding="utf-8")
    first = _launch(training, "preprocess", training.preprocess)
    threading.Thread(target=_go_on, args=(training, first), daemon=True).start()


def stop(folder: Path) -> None:
    """Ask a run's process to save and end; UserError where the page has not started it."""
    job = job_of(folder)
    if job.process:
        job.process.terminate()  # train.py saves first
    elif job.locked:
        raise UserError("this training was not started here: press Ctrl-C where it was")


def read_tail(folder: Path) -> str:
    """The end of what a run's commands have printed, from the start of a line."""
    try:
        with open(folder / LOG, "rb") as file:
            file.seek(0, 2)
            size = file.tell()
            file.seek(max(0, size - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return text if size <= TAIL else text.partition("\n")[2]


def _go_on(training: Training, first: subprocess.Popen) -> None:
    """Wait for the preprocessing, and train where it has not failed or been stopped."""
    if first.wait() in GOES_ON:
        _launch(training, "train", training.train).wait()  # so that the system forgets it when it ends


def _launch(training: Training, command: str, part: list[str]) -> subprocess.Popen:
    with open(training.folder / LOG, "ab") as log:
        process = subprocess.Popen(
            arguments(part), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    record: dict[str, Any] = {"command": command, "pid": process.pid}
    record["created"] = psutil.Process(process.pid).create_time()
    record |= {"epochs": training.config.training.stage1_epochs, "batch": training.config.training.batch_size}
    with written_whole(training.folder / RECORD) as beside:
        beside.write_text(json.dumps(record), encoding="utf-8")
    return process


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none, or none that can be read: the lock still says the truth
        return {}
    return record if isinstance(record, dict) else {}


def _is_locked(folder: Path) -> bool:
    """Whether another process holds the folder's lock; a file that a kill left behind locks nobody out."""
    path = folder / LOCK
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
