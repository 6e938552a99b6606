"""Files appear whole or not at all, and what is read back is data, never code; work in threads beside the network."""

import contextlib
import glob
import hashlib
import itertools
import os
import pickle
import re
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from isonext.errors import UserError, WriteError, first_line

THREADS = 4  # that read and write pictures
LOCK = ".isonext.lock"
MARK = ".isonext-tmp-"  # in the name of every file under way, and in no name that a user or another program gives
_COUNT = itertools.count()


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yields a path beside the target to write to; only when the block succeeds does it take the target's name.

    It is hidden and keeps the suffix (`.name.isonext-tmp-123_0.png`), so that writers which look at the suffix work and
    no reader of the folder takes an unfinished file for a finished one. A disk that is full, or cannot be
    written to, is a WriteError.
    """
    path = Path(path)
    writer = f"{os.getpid()}_{next(_COUNT)}"  # names that begin alike may be written at once
    short = os.fsencode(path.stem)[:64].decode(errors="ignore")  # names may be 255 bytes long
    beside = path.with_name(f".{short}{MARK}{writer}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except Exception as error:
        if isinstance(error, UserError) or (reason := _why_unwritten(error)) is None:
            raise
        raise WriteError(path, reason, getattr(error, "errno", None)) from error
    finally:
        with contextlib.suppress(OSError):  # where its folder could not be made there is none
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """`written_whole` for a folder of files: yields one beside it, which takes its name when the block succeeds.

    What a killed one left beside goes first. UserError where something is there already.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()) or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path}: is there already, and nothing is written over it; give another folder")
    path = path.absolute()
    beside = path.with_name(f".{path.name}{MARK}{os.getpid()}_{next(_COUNT)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}{MARK}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir()
        yield beside
        for name in beside.iterdir():
            with open(name, "rb+") as file:
                os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()  # it is empty
        os.rename(beside, path)
    except Exception as error:
        if isinstance(error, UserError) or (reason := _why_unwritten(error)) is None:
            raise
        raise WriteError(path, reason, getattr(error, "errno", None)) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _why_unwritten(error: Exception) -> str | None:
    """The reason where an error comes from the disk and not from what was to be written; libraries wrap it."""
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    if isinstance(error, SafetensorError):
        return first_line(error)
    if "inline_container" in str(error):  # torch's writer, which may know no more than that bytes are missing
        return getattr(error.__context__, "strerror", None) or "the disk may be full"
    return None


def check_output(folder: Path, *names: str) -> None:
    """UserError where files, of these names, cannot be written to `folder`, before the work for them is done; makes
    nothing."""
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder}: is a link that leads nowhere; give another folder for the output")
    for name in names:
        if (folder / name).is_dir():
            raise UserError(f"{folder / name}: is a folder, where a file is to be written; give another folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{folder}: {there} is a file; give a folder for the output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {there} may not be written to; give another folder for the output")


def refuse_inside(folder: str, key: str, root: str, root_key: str) -> None:
    """UserError where a folder of the config lies in another one, whose folders would be taken for styles."""
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root)):
        raise UserError(f"{key} = {folder}: lies in {root_key} = {root}, whose folders are styles; choose another one")


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed `written_whole` left in `folder`, known by its mark; what others left there stays."""
    for leftover in folder.glob(f".*{MARK}*"):
        own = re.fullmatch(rf"\..*{re.escape(MARK)}\d+_\d+(\.[^.]*)?", leftover.name, re.DOTALL)
        if own and not leftover.is_dir():  # a folder is another command's
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_lock(folder: str | Path, timeout_s: float = 0) -> Iterator[None]:
    """Within, `folder` is this process's alone to write to; a UserError where it is another one's for `timeout_s` more.

    The system lets go of the lock when a process ends, however it does. A folder that was made for the lock alone goes
    with it.
    """
    folder = Path(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout_s)
        while not path.exists():  # the one before deleted it just after it was opened here: it locks nobody else out
            lock.release()
            lock.acquire(timeout=timeout_s)
    except Timeout:
        raise UserError(
            f"{folder}: is in use by another run of this program; wait for its end, or give another folder"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes it by itself, on release
            path.unlink()
        lock.release()
        if new:
            with contextlib.suppress(OSError):  # something was written to it
                folder.rmdir()


def load_data(path: str | Path, what: str, foreign: bool = False) -> Any:
    """`torch.load` that runs no code from the file and checks its checksums; `what` names the file's kind in errors.

    torch writes a CRC-32 of every part, but does not look at it when reading: a flipped bit would become a weight.
    A `foreign` file, one of another program, may be in the format that torch had before 1.6, which has no checksums.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a {what}")
    if not path.exists():
        raise UserError(f"{path}: no such {what}")
    if not path.is_file():
        raise UserError(f"{path}: not a {what}, but a pipe or a device")
    try:
        if not (foreign and _is_of_old_format(path)):
            _check_sums(path, what)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        advice = "; if you trust it, save its state_dict alone and give that file" if foreign else ""
        raise UserError(f"{path}: not a {what}: it holds more than plain data, and was not run{advice}") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # in a damaged file zipfile, pickle and torch may stumble over anything
        reason = first_line(error).partition(". ")[0]
        raise UserError(f"{path}: damaged, or not a {what} ({reason})") from None


def _check_sums(path: Path, what: str) -> None:
    if not zipfile.is_zipfile(path):  # torch's format; false for a file that was cut off, too
        raise UserError(f"{path}: damaged, or not a {what}")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()  # torch packs nothing: what says it is larger than the file would never end
        if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > path.stat().st_size:
            raise UserError(f"{path}: not a {what}: it is a packed archive, which torch does not write")
        broken = archive.testzip()
    if broken:
        raise UserError(f"{path}: damaged: the checksum of its part {broken} does not match")


def _is_of_old_format(path: Path) -> bool:
    """Whether the file begins as torch.save's did before 1.6: with a number, pickled."""
    start = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    with open(path, "rb") as file:
        return file.read(len(start)) == start


def file_sha256(path: str | Path) -> str:
    seal = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            seal.update(block)
    return seal.hexdigest()


def natural_order(name: str) -> tuple:
    """Sort key under which user2 comes before user10; upper and lower case are told apart only at the end."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d+)", name.lower())
    ], name


#################################################################################
#                             Beside the network                                #
#################################################################################


def ahead(work: Callable[[Any], Any], items: Iterable, count: int) -> Iterator:
    """`map(work, items)` in threads, `count` results ahead and no more."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def in_background(at_once: int) -> Iterator[Callable[..., None]]:
    """Yields `submit(function, *arguments)`, which waits only while `at_once` calls are unfinished.

    What a call raises is raised at a later `submit`, or at the end.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[Future] = deque()

        def submit(function: Callable, *arguments: Any) -> None:
            waiting.append(pool.submit(function, *arguments))
            while len(waiting) > at_once or (waiting and waiting[0].done()):
                waiting.popleft().result()

        yield submit
        while waiting:
            waiting.popleft().result()
