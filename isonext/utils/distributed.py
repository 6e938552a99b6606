"""One command as several processes, started by torchrun or accelerate launch: which one this is, what they exchange.

A command started by `python` is alone: then nothing here does anything, and torch.distributed is not even set up.
It is imported where it is needed, since that takes seconds.
"""

import atexit
import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from isonext.errors import UserError

# How long one process waits for the others. It is no watch for dead ones: those close their connections, and the
# launcher ends the job. It must cover whatever rank 0 does alone, and the slowest process's share of a large folder.
PATIENCE = timedelta(days=1)


def rank() -> int:
    """This process's number among those that torchrun or accelerate launch started for the command; 0 when alone."""
    return int(os.environ.get("RANK", 0)) if "LOCAL_RANK" in os.environ else 0


def world() -> int:
    """How many processes do this command's work."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_main() -> bool:
    return rank() == 0


def folder_lock(folder: str | Path) -> contextlib.AbstractContextManager[None]:
    """That of io.py, held by the first process for all of them."""
    if not is_main():
        return contextlib.nullcontext()
    from isonext.utils import io  # imports torch

    return io.folder_lock(folder)


def local_rank() -> int:
    """This process's number on its own machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world() -> int:
    """How many of the processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def gather(part: Any) -> list[Any]:
    """Every process's `part` by rank, on all of them. None goes on before all have come here."""
    if world() == 1:
        return [part]
    import torch.distributed as dist

    parts: list[Any] = [None] * world()
    with peers_needed():
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
            atexit.register(dist.destroy_process_group)  # its threads must end before the interpreter does
        dist.all_gather_object(parts, part)
    return parts


def from_main(part: Any) -> Any:
    """Rank 0's `part`, on all of them."""
    return gather(part if is_main() else None)[0]


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Within, rank 0 goes first, then one process of each other machine, then the rest: what the first one makes on a
    shared disk, or each machine's first on a disk of its own, the others find."""
    turn = 0 if is_main() else 1 if local_rank() == 0 else 2
    for _ in range(turn):
        gather(None)
    yield
    for _ in range(2 - turn):
        gather(None)


@contextlib.contextmanager
def peers_needed() -> Iterator[None]:
    """Within, a failed exchange with the other processes is one line."""
    try:
        yield
    except RuntimeError as error:  # NCCL's errors and the store's have a type of their own, gloo's have not
        import torch.distributed as dist

        if world() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError(
            f"process {rank()} of {world()} lost the others: one of them was killed or failed, see its message or the "
            "launcher's report; run the same command again (train.py: with --resume) to go on"
        ) from None


def refuse_several(work: str) -> None:
    """UserError where several processes were started for what one does."""
    if world() > 1:
        raise UserError(f"{work} is the work of one process: start it by python, not by torchrun or accelerate launch")
