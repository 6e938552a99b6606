"""The runs below a folder: their checkpoints, and what their logs say of them.

What a browser names is looked up here, in what the server finds, and is never a path.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from isonext.checkpoint import BEST
from isonext.errors import UserError
from isonext.training.folder import METRICS
from isonext.training.log import read_metrics
from isonext.utils.io import LOCK, natural_order

CHECKPOINT = re.compile(r"stage(\d+)_(?:epoch(\d+)|interrupted)\.pt")
RECORD = "app.json"  # of a training that the page has started, see trainings.py
MARKS = {METRICS, RECORD, LOCK}  # one of them is in the folder of a run without a checkpoint yet
DEPTH = 4  # folders below the root in which runs are looked for
MOST = 500  # runs that are listed
FIGURES = {"val_style_success": "style", "val_ssim": "SSIM", "val_loss": "loss"}


@dataclass(frozen=True)
class Run:
    """A folder that a training writes to, or has written to."""

    name: str  # of its folder below the root, with forward slashes; "." is the root itself
    folder: Path
    checkpoints: list[Path]  # the newest first

    @property
    def title(self) -> str:
        """Its name for people."""
        return self.folder.name or self.name if self.name == "." else self.name

    def label_of(self, checkpoint: Path, lines: list[dict]) -> str:
        """The checkpoint's name for people, with its validation figures if the log has any."""
        line = figures_of(checkpoint, lines)
        figures = ", ".join(f"{short} {line[name]:.2f}" for name, short in FIGURES.items() if name in line)
        name = value_of(self, checkpoint)
        return f"{name}  ({figures})" if figures else name


def value_of(run: Run, checkpoint: Path) -> str:
    """What the page calls a checkpoint."""
    return checkpoint.name if run.name == "." else f"{run.name}/{checkpoint.name}"


def find_runs(root: Path) -> list[Run]:
    """The folders at and below `root` with checkpoints, or where a training has begun, the one that changed last first.
    Links are not followed."""
    runs = []
    for place, folders, files in os.walk(root):
        folder = Path(place)
        depth = len(folder.relative_to(root).parts)
        folders[:] = [name for name in folders if not name.startswith(".") and depth < DEPTH]
        found = [name for name in files if CHECKPOINT.fullmatch(name) or name == BEST]
        if found or MARKS & set(files):
            checkpoints = sorted((folder / name for name in found), key=_newest_first)
            runs.append(Run(folder.relative_to(root).as_posix(), folder, checkpoints))
        if len(runs) == MOST:
            break
    return sorted(runs, key=lambda run: (-_changed(run.folder), natural_order(run.name)))


def list_checkpoints(root: Path) -> list[tuple[str, str]]:
    """(label, value) of every checkpoint below `root`."""
    choices = []
    for run in find_runs(root):
        lines = read_metrics(run.folder / METRICS)
        choices += [(run.label_of(path, lines), value_of(run, path)) for path in run.checkpoints]
    return choices


def find_checkpoint(root: Path, value: str) -> Path:
    """The checkpoint that the page calls `value`; UserError where there is none, or none any more."""
    for run in find_runs(root):
        for path in run.checkpoints:
            if value_of(run, path) == value:
                return path
    raise UserError(f"{str(value)[:80]}: no such checkpoint here, or no longer; choose one from the list")


def find_run(root: Path, name: str) -> Run:
    """The run of a name; UserError where there is none."""
    for run in find_runs(root):
        if run.name == name:
            return run
    raise UserError(f"{str(name)[:80]}: no such run here, or no longer; choose one from the list")


def figures_of(checkpoint: Path, lines: list[dict]) -> dict:
    """The last validation up to the checkpoint, or the best one for the best checkpoint; {} where there was none."""
    measured = [line for line in lines if "val_loss" in line]
    if checkpoint.name == BEST:
        return max(measured, key=lambda line: line.get("val_score", 0), default={})
    epoch = _epoch(checkpoint)
    reached = [line for line in measured if epoch is None or _epoch_at(line, lines) <= epoch + 1e-6]
    return reached[-1] if reached else {}


def _epoch_at(line: dict, lines: list[dict]) -> float:
    """The epoch of a validation, whose own line has none: that of the log's line of its step, or the last before."""
    return max((other["epoch"] for other in lines if "epoch" in other and other["step"] <= line["step"]), default=0.0)


def _epoch(checkpoint: Path) -> int | None:
    found = CHECKPOINT.fullmatch(checkpoint.name)
    return int(found[2]) if found and found[2] else None


def _newest_first(path: Path) -> tuple:
    """By stage and epoch; an interrupted one goes on from the epochs of its stage, and the best one comes last."""
    found, epoch = CHECKPOINT.fullmatch(path.name), _epoch(path)
    return found is None, -int(found[1]) if found else 0, epoch is not None, -(epoch or 0)


def _changed(folder: Path) -> float:
    """When a run last wrote a line or a file."""
    times = []
    for path in (folder, folder / METRICS):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times, default=0.0)
