"""Commands on a meter: each runs until its end, or until its time is used up."""

import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from tqdm import tqdm

POLL_S = 0.2
BAR = "{desc} {percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s used, {elapsed}"


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process and of all that it started, those that have ended included."""
    total = sum(process.cpu_times()[:4])  # the last two are of the children that it waited for
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += sum(child.cpu_times()[:4])
    return total


def end_tree(process: psutil.Process) -> None:
    """Kill a process and all that it started."""
    for one in (*process.children(recursive=True), process):
        with suppress(psutil.NoSuchProcess):
            one.kill()


def run_metered(
    command: list[str],
    log: Path,  # takes what it says, after what it holds
    limit_s: float,
    on_gpu: bool,  # by the clock, for a GPU's time; else by the CPU time, and no GPU is seen
    folder: Path | None = None,  # to run it in
    graceful: bool = False,  # SIGTERM when the time is used up, and what it does then counts; else it is killed
    watch: Callable[[float], None] = lambda used: None,  # is told the seconds used, again and again
) -> tuple[float, int | None]:
    """The seconds that it used, and its exit status; None where it was stopped."""
    started, stopped, used = time.monotonic(), False, 0.0
    bar = tqdm(total=limit_s, desc=log.stem, bar_format=BAR, disable=limit_s == math.inf or None)
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    # What a run compiles is a cost of its own: it finds no kernels of another one.
    with bar, open(log, "ab") as out, tempfile.TemporaryDirectory() as kernels:
        environment = os.environ | hidden | {"PYTHONDONTWRITEBYTECODE": "1", "TORCHINDUCTOR_CACHE_DIR": kernels}
        process = psutil.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            while True:
                ended = process.status() == psutil.STATUS_ZOMBIE  # its times can be read until it is waited for
                # What a killed one started is no longer known to be its.
                used = max(used, time.monotonic() - started if on_gpu else cpu_seconds(process))
                if ended:
                    status = process.wait()
                    return used, None if stopped else status
                bar.update(used - bar.n)
                watch(used)
                if used >= limit_s and not stopped:
                    stopped = True
                    process.terminate() if graceful else end_tree(process)
                time.sleep(POLL_S)
        finally:
            if process.is_running():  # this process was interrupted
                end_tree(process)
