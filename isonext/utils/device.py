"""The device and its precision: which one, what it can do, what it is called."""

import contextlib
import ctypes
import getpass
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from isonext.errors import UserError, first_line, is_out_of_memory
from isonext.utils import distributed

Result = TypeVar("Result")


def pick_device(name: str) -> torch.device:
    """`auto` is the first of CUDA, Apple's MPS and the CPU that is there; a device that is not there is an error.

    Of several processes on a machine each takes a GPU of its own, as far as there are.
    """
    prepare_process()
    if distributed.world() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        device = torch.device("cuda", distributed.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)  # or each of them would also take some memory of the first
        return device
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it has no memory, and so no pictures")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = first_line(error)
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


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody has: a card's own, elsewhere the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def fitting(work: Callable[[], Result], smaller: Callable[[], Callable[[], None] | None]) -> Result:
    """What `work()` returns. Where memory runs out, `smaller()` says what makes it need less; that is done, and all of
    the work begins again. Where it says None, nothing is left to cut, and the error stands."""
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or (cut := smaller()) is None:
                raise
        # Only here, where the error is gone, does nothing hold on to the tensors of the attempt.
        cut()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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


def prepare_process() -> None:
    """What makes everything after it faster and changes no result: called once, before the first large tensor."""
    with contextlib.suppress(OSError, AttributeError):  # not the C library of Linux
        # It hands blocks of 32 MB and more back to the system at once, and a training step would get its activations
        # from there anew, page by page, at the price of much of its time on a CPU.
        library = ctypes.CDLL(None)
        library.mallopt(-4, 0)  # M_MMAP_MAX: no block is had from the system singly
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what is freed stays with the process
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a user whom the system has no entry of, as in containers: torch's compiler asks
        os.environ["LOGNAME"] = f"user{os.getuid()}"
    with contextlib.suppress(OSError, RuntimeError):  # the latter where there is no home
        # torch's own place for it is a folder that a restart of the machine empties.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "isonext", "compiled")
        cache.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def allow_tf32(enabled: bool) -> None:
    """TF32 for what is left in float32 on CUDA: 10 bits of mantissa, float32's range, several times the speed."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled
