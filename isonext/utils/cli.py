"""What every command shares: the one-line error, the common flags, how it ends. Imports nothing that takes long."""

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from isonext.errors import UserError, first_line, is_out_of_memory
from isonext.utils.distributed import rank, world

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
    """Parse, call `main`, end the process: 0 done, 1 done in part, a check failed, or an error that nobody foresaw,
    2 bad input, 3 a certificate that was asked for does not hold, 130 interrupted, 143 terminated."""
    args = parser.parse_args()
    if rank():  # of several processes the first one speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a log file tells as it goes, not at the end
        # A style's or a picture's name may have letters that a log in ASCII has not.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        sys.stdout = _Heedless(sys.stdout)  # type: ignore[assignment]
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Heedless(sys.stderr)  # type: ignore[assignment]
    with _termination():
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
    for name, value in vars(args).items():
        if "\0" in str(value):
            return 2, f"error: --{name}: holds a NUL character, which no name has"
    try:
        status = main(args) or 0
        sys.stdout.flush()
        return status, ""
    except (UserError, OSError, FloatingPointError) as error:
        if args.debug:
            raise
        return 2, f"error: {' '.join(str(error).splitlines())}"  # a name in it may have a line's end
    except Exception as error:
        if args.debug:
            raise
        if not is_out_of_memory(error):
            return 1, f"error: {type(error).__name__}: {first_line(error)}; --debug shows more"
        return 2, (
            "error: the device is out of memory; for training try --set training.gradient_checkpointing=true and the "
            "flags that train.py --plan gives, or a smaller model; for pictures a smaller --batch_size or --size"
        )
    except Terminated:
        return 143, "terminated"
    except KeyboardInterrupt:
        return 130, "interrupted"


class _Heedless:
    """A stream whose reader (head, less) may go away: the work goes on to its end, and what it says is lost."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._heedless(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._heedless(self.stream.flush)

    def _heedless(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except BrokenPipeError:  # what is buffered, and what comes, goes nowhere
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


class Terminated(KeyboardInterrupt):
    """SIGTERM came: as at Ctrl-C, what was half-written is cleared away."""


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated`. Not with several processes: the launcher ends those that wait for one that
    has gone, and Python would not look at a signal meanwhile."""

    def terminate(_signum, _frame) -> None:
        raise Terminated

    if world() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


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
