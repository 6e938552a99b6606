"""The folder that a run writes to: whose it is, that one process at a time writes there, and its branches."""

import contextlib
import itertools
import json
import shutil
import uuid
from pathlib import Path

import torch
from torch import Tensor

from isonext.checkpoint import BEST, Checkpoint, epoch_checkpoints, epoch_of, interrupted, load_checkpoint
from isonext.config import Config
from isonext.errors import UserError
from isonext.utils.io import written_whole

RUN = "run.json"
METRICS = "metrics.jsonl"
STAGES = 1, 2  # each has a folder of its own

#################################################################################
#                                  Whose it is                                  #
#################################################################################


def folder_of(config: Config, stage: int) -> Path:
    """Where a stage's run writes to: stage 2 below stage 1, none of whose files it touches."""
    folder = Path(config.checkpoint.save_dir)
    return folder if stage == 1 else folder / "stage2"


def saved_epochs(folder: Path) -> list[Path]:
    return [path for stage in STAGES for path in epoch_checkpoints(folder, stage)]


def saved_between(folder: Path) -> list[Path]:
    """The checkpoints that are no epoch's."""
    paths = [folder / BEST, *(folder / interrupted(stage) for stage in STAGES)]
    return [path for path in paths if path.exists()]


def holds_checkpoints(folder: Path) -> bool:
    return bool(saved_epochs(folder) or saved_between(folder))


def new_run() -> str:
    """An id for a run that begins."""
    return uuid.uuid4().hex


def read_run(folder: Path) -> str:
    """The id of the run that writes to `folder`; "" where it is from before there were any."""
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: as good as none
        return ""
    return run if isinstance(run, str) else ""


def write_run(folder: Path, run: str) -> None:
    with written_whole(folder / RUN) as beside:
        beside.write_text(_line_of(run), encoding="utf-8")


def _line_of(run: str) -> str:
    """What RUN holds."""
    return json.dumps({"run": run}) + "\n"


def move_others_aside(folder: Path, run: str) -> list[Path]:
    """Give the log of another run, and a RUN that no run wrote, a numbered name. Returns the new names.

    Where there are checkpoints `identify` has found that they are `run`'s, and so is the log.
    """
    log, mark, holder, others = folder / METRICS, folder / RUN, read_run(folder), []
    if log.exists() and log.stat().st_size and holder != run and not holds_checkpoints(folder):
        others.append(log)
    if mark.exists() and mark.read_text(encoding="utf-8", errors="replace") != _line_of(holder):
        others.append(mark)
    return [path.rename(_free_name(path)) for path in others]


def _free_name(path: Path) -> Path:
    """NAME_before_1.SUFFIX, or the first number above that is not taken."""
    names = (path.with_stem(f"{path.stem}_before_{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def identify(folder: Path, path: Path, checkpoint: Checkpoint) -> str:
    """The id of the run that goes on in `folder` from the checkpoint at `path`; UserError in the folder of another.

    In a folder without checkpoints a new run begins, unless `path` itself lies there. A checkpoint without an id, from
    before there were any, goes on where it lies.
    """
    lies_there, holder = path.resolve().parent == folder.resolve(), read_run(folder)
    if not holds_checkpoints(folder):
        return (checkpoint.run if lies_there else "") or new_run()
    same = holder == checkpoint.run and holder != ""
    unknown = holder == "" or checkpoint.run == ""
    if not (same or (lies_there and unknown)):
        raise UserError(
            f"{folder}: holds the checkpoints of another run than {path}; give the folder of that one, or an empty "
            "one, with --set checkpoint.save_dir=FOLDER"
        )
    return holder or checkpoint.run or new_run()


#################################################################################
#                                    Branches                                   #
#################################################################################


def begin_run(folder: Path, run: str, chosen: Path | None, step: int, steps_per_epoch: int) -> None:
    """Make the folder this run's, which stands at `step`; tells what lies elsewhere now.

    `chosen` is the checkpoint that it was told to go on from; what was saved after that is another branch.
    """
    for other in move_others_aside(folder, run):
        print(f"what was there of another run now lies in {other}")
    write_run(folder, run)
    left = set_aside(folder, chosen, step, step // steps_per_epoch) if chosen else None
    if left:
        print(f"what was saved after step {step} now lies in {left}")


def set_aside(folder: Path, chosen: Path, step: int, epoch: int) -> Path | None:
    """Move what the run saved after `step` to a sub-folder, since it goes on from there on another branch.

    `chosen` is the checkpoint that it goes on from; it stays. Returns the sub-folder; None where nothing was later.
    The log goes along as a copy.
    """
    later = [path for path in saved_epochs(folder) if epoch_of(path) > epoch]
    later += [path.with_name(f"preview_epoch{epoch_of(path)}.png") for path in later]
    later += [path for path in saved_between(folder) if _is_later(path, step)]
    later = [path for path in later if path.exists() and path.resolve() != chosen.resolve()]
    if not later:
        return None
    taken = len(list(folder.glob(f"branch_after_step{step}_*")))
    target = folder / f"branch_after_step{step}_{taken + 1}"
    target.mkdir()
    if (folder / METRICS).exists():
        shutil.copy2(folder / METRICS, target)
    for path in later:
        path.rename(target / path.name)
    return target


def _is_later(path: Path, step: int) -> bool:
    """Whether the checkpoint has more steps; one that cannot be read counts as such."""
    try:
        return load_checkpoint(path).step > step
    except UserError:
        return True


#################################################################################
#                                  What is good                                 #
#################################################################################


def is_finite(*weights: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for part in weights for tensor in part.values())


def last_good(folder: Path) -> Path | None:
    """The newest epoch's checkpoint that can be read, is finite, and was not saved while steps were refused."""
    for path in reversed(saved_epochs(folder)):
        with contextlib.suppress(UserError):
            found = load_checkpoint(path)
            if not found.guard.get("in_a_row") and is_finite(found.model, found.ema):
                return path
    return None
