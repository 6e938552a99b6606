"""A forked command is what `python script.py ...` is, and a pair of them is watched as torchrun watches."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT, Command, call, launch, start_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every command is a new interpreter")
SCRIPT = """
import atexit, os, signal, sys, threading, time
atexit.register(print, "the end")
print("argv", sys.argv, "path", sys.path[:2], "in", os.getcwd(), __name__, __file__)
print("terminals", [file.isatty() for file in (sys.stdin, sys.stdout, sys.stderr)], "input", sys.stdin.read())
print("variables", os.environ["RANK"], sorted(os.environ.items()))
print("ours", [name for name in sys.modules if name.split(".")[0] in ("isonext", "model", "helpers", "conftest")])
print("signals", [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)])
print("interrupt", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
print("threads", threading.active_count())
print("files", sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1], "session", os.getsid(0) == os.getpid())
import isonext.errors
print("from", isonext.errors.__file__)
def dive(): raise RuntimeError("deep down")
print("to stderr", file=sys.stderr, flush=True)
ends = {"exit": lambda: sys.exit(7), "message": lambda: sys.exit("gone"), "raise": dive, "fall off": lambda: None,
        "kill": lambda: (sys.stdout.flush(), os.kill(os.getpid(), signal.SIGKILL)),
        "thread": lambda: threading.Thread(target=lambda: (time.sleep(0.1), print("a thread ended"))).start()}
ends[sys.argv[1]]()
"""
WAIT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
if os.environ.get("RANK") == "1": sys.exit(5)
time.sleep(60)
"""


@pytest.fixture
def script(tmp_path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


@pytest.mark.parametrize(
    ("end", "status"), [("exit", 7), ("message", 1), ("raise", 1), ("fall off", 0), ("kill", -9), ("thread", 0)]
)
def test_it_runs_and_ends_as_in_a_new_interpreter(script, tmp_path, end, status):
    (tmp_path / "there").mkdir()
    warm, cold = (
        Command(tmp_path / "there", script, end, "öl", cold=cold, RANK="3").finish(60) for cold in (False, True)
    )
    assert warm.returncode == cold.returncode == status
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background, and then in what it starts
        cold.stdout = cold.stdout.replace("interrupt False", "interrupt True")
    assert warm.stdout == cold.stdout and f"from {ROOT}/isonext/errors.py" in warm.stdout
    assert warm.stderr.splitlines()[0] == "to stderr" and warm.stderr.splitlines()[-1] == cold.stderr.splitlines()[-1]
    assert ("Traceback" in warm.stderr) == ("Traceback" in cold.stderr) == (end == "raise")


def test_two_commands_differ_in_what_is_drawn_without_a_seed(tmp_path):
    (tmp_path / "draw.py").write_text("import random, numpy; print(random.random()); print(numpy.random.rand())")
    one, two = (call(tmp_path, tmp_path / "draw.py").stdout.splitlines() for _ in range(2))
    assert not set(one) & set(two)


def gone(pid: int) -> bool:
    """Whether a process has ended, if nobody has fetched its status yet."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_signal_reaches_it_and_the_time_limit_takes_its_children_along(tmp_path, capsys):
    (tmp_path / "wait.py").write_text(WAIT)
    running = Command(tmp_path, tmp_path / "wait.py")
    wait_until(lambda: running.stdout)
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGTERM)
    assert running.finish(30).returncode == -signal.SIGTERM == running.process.poll()
    os.kill(int(running.stdout), signal.SIGKILL)

    running = Command(tmp_path, tmp_path / "wait.py")
    wait_until(lambda: running.stdout)
    with pytest.raises(subprocess.TimeoutExpired):
        running.finish(0.1)
    assert running.process.wait(30) == -signal.SIGKILL and running.stdout in capsys.readouterr().out
    wait_until(lambda: gone(int(running.stdout)))


def test_where_one_rank_fails_the_other_is_ended_and_the_report_says_who_was_first(tmp_path):
    (tmp_path / "wait.py").write_text(WAIT)
    done = launch(tmp_path, tmp_path / "wait.py", timeout=30)
    assert done.returncode == 1 and done.stderr == "rank 1 failed first, exitcode 5\n"
    children = [int(line) for line in done.stdout.splitlines()]
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    assert len(children) == 2


def test_ranks_have_a_launchers_variables_and_each_its_own_number(tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    (tmp_path / "tell.py").write_text(f"import os; print(*[os.environ[name] for name in {names}])")
    first, second = (rank.finish(30).stdout.split() for rank in start_ranks(tmp_path, tmp_path / "tell.py"))
    assert first[:5] == ["0", "0", "2", "2", "127.0.0.1"] and second[:5] == ["1", "1", *first[2:5]]
    assert first[5] == second[5]
    done = launch(tmp_path, tmp_path / "tell.py")
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 2
