"""Commands on a meter: what they and their children use, and their end when it is used up."""

import sys
import time

import psutil
import pytest

from isonext.utils.meter import run_metered

TICK = 0.02  # s: what the system counts CPU time in, for two processes
BUSY = "import time\nwhile time.process_time() < {}: pass\n"


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_cpu_time_counts_a_child_that_has_ended_and_no_sleep(tmp_path):
    child = f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-S', '-c', {BUSY.format(0.4)!r}])\n"
    used, status = run_metered(python(child + "time.sleep(0.5)\nsys.exit(3)"), tmp_path / "log", 60, on_gpu=False)
    assert status == 3
    assert 0.4 - TICK <= used < 0.4 + 0.3  # two starts of Python


def test_a_child_at_work_is_stopped_too_when_the_time_of_both_is_used_up(tmp_path):
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', {BUSY.format(60)!r}])\n"
    found: list[psutil.Process] = []
    others = psutil.Process().children()  # of the tests

    def watch(used: float) -> None:
        own = [process for process in psutil.Process().children() if process not in others]
        found[:] = [each for process in own for each in (process, *process.children(recursive=True))] or found

    used, status = run_metered(python(child), tmp_path / "log", 0.5, on_gpu=False, watch=watch)
    assert status is None and 0.5 <= used < 0.5 + 0.4
    assert len(found) >= 2
    _, left = psutil.wait_procs(found, timeout=5)
    assert not left


def test_a_signal_that_is_heeded_lets_it_save_and_the_log_goes_on(tmp_path):
    (tmp_path / "log").write_text("before\n")
    code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))\n" + BUSY
    told: list[float] = []
    used, status = run_metered(
        python(code.format(60)), tmp_path / "log", 0.3, on_gpu=False, graceful=True, watch=told.append
    )
    assert status is None and used < 0.3 + 0.4
    assert (tmp_path / "log").read_text() == "before\nsaved\n"
    assert told == sorted(told) and told[-1] <= used and len(told) > 1


def test_the_clock_counts_on_a_gpu_and_a_gpu_is_seen_there_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    code = "import os, time\ntime.sleep(0.5)\nprint(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    used, _ = run_metered(python(code), tmp_path / "gpu", 60, on_gpu=True)
    assert 0.5 <= used < 2 and (tmp_path / "gpu").read_text() == "'1'\n"
    used, _ = run_metered(python(code), tmp_path / "cpu", 60, on_gpu=False)
    assert used < 0.3 and (tmp_path / "cpu").read_text() == "''\n"


def test_an_interrupt_ends_the_command(tmp_path):
    def interrupt(used: float) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_metered(python("import time\ntime.sleep(60)"), tmp_path / "log", 60, on_gpu=False, watch=interrupt)
    assert time.monotonic() - started < 5
