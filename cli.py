"""What every command shares: the one-line error, the common flags, and the choice of device and precision."""

import argparse
import contextlib
import io
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator

import torch


class UserError(Exception):
    """Bad input. Its one line says what was wrong, where, and what to do; the command exits with status 2."""


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
    if isinstance(sys.stdout, io.TextIOWrapper):  # a log file tells as it goes, not at the end
        sys.stdout.reconfigure(line_buffering=True)
    try:
        status = main(args) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) went away: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (UserError, OSError, FloatingPointError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except torch.OutOfMemoryError:
        if args.debug:
            raise
        print(
            "error: the device is out of memory; for training try --set training.gradient_checkpointing=true, then "
            "--set training.micro_batch_size=16; for pictures a smaller --batch_size or --size",
            file=sys.stderr,
        )
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, SIGINT and SIGTERM only set a flag, which the yielded function reads: the loop ends cleanly.

    A second signal falls through to Python's own handling, so that a stuck process can still be ended.
    """
    received = []
    previous = {}

    def remember(signum, _frame) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.signal(signum, remember)
    try:
        yield lambda: bool(received)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def pick_device(name: str) -> torch.device:
    """`auto` is the first of CUDA, Apple's MPS and the CPU that is there; a device that is not there is an error."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu") from None
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for BF16; without them it is emulated, and far slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """BF16 autocast for the network alone; the state of the flow, its path and its loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def device_name(device: torch.device) -> str:
    """What a figure was measured on, or bits were made on: a CPU's sums depend on its threads and instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {capability}"
    return device.type


@contextlib.contextmanager
def deterministic(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Within, CUDA takes only kernels that give the same bits for the same input; a CPU's do so anyway."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if enabled and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def allow_tf32(enabled: bool) -> None:
    """TF32 for what is left in float32 on CUDA: 10 bits of mantissa, float32's range, several times the speed."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled
