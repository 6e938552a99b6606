"""What every command shares: the one-line error, the common flags, how it ends. Imports nothing that takes long."""

import argparse
import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from isonext.errors import UserError
from isonext.utils.distributed import rank

GRACE_S = 3.0  # the launchers look at their processes every tenth of a second


def new_parser(description: str, config: bool = True) -> argparse.ArgumentParser:
    """An argparse parser with the flags that every command has; `--set` where the command reads a config."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if config:
        parser.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="override one config key, e.g. --set training.learning_rate=1e-5 (may be repeated)",
        )
    return parser


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def run(main: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser) -> None:
    """Parse, call `main`, end the process: 0 done, 1 done in part or a check failed, 2 bad input,
    3 a certificate that was asked for does not hold, 130 interrupted."""
    args = parser.parse_args()
    if rank():  # of several processes the first one speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a log file tells as it goes, not at the end
        sys.stdout.reconfigure(line_buffering=True)
    status, message = _outcome(main, args)
    if status and rank():
        # The launcher ends all processes as soon as one has failed. What is wrong everywhere is then said once, by
        # the first one, and nothing cuts it off; what is wrong in this process alone is said a moment later.
        time.sleep(GRACE_S)
        message = message and f"{message} (process {rank()})"
    if message:
        print(message, file=sys.stderr)
    sys.exit(status)


def _outcome(main: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> tuple[int, str]:
    """The exit status, and the line for stderr if there is one."""
    try:
        status = main(args) or 0
        sys.stdout.flush()
        return status, ""
    except BrokenPipeError:  # the reader (head, less) went away: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, ""
    except (UserError, OSError, FloatingPointError) as error:
        if args.debug:
            raise
        return 2, f"error: {error}"
    except Exception as error:
        if args.debug or type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for a --help
            raise
        return 2, (
            "error: the device is out of memory; for training try --set training.gradient_checkpointing=true and the "
            "flags that train.py --plan gives, or a smaller model; for pictures a smaller --batch_size or --size"
        )
    except KeyboardInterrupt:
        return 130, "interrupted"


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Within, SIGINT and SIGTERM only set a flag, and the loop ends cleanly: the yielded function returns the exit
    status, 130 or 143, once one came, and 0 before.

    A second signal falls through to Python's own handling, so that a stuck process can still be ended.
    """
    received = []
    previous: dict[int, Any] = {}

    def remember(signum, _frame) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.signal(signum, remember)
    try:
        yield lambda: 128 + received[0] if received else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
