"""Commands in processes of their own without the seconds that importing torch takes.

One server a pytest process imports the libraries that the commands use, and forks itself for each command. The fork has
the working directory, environment, arguments, files and sys.path[0] that `python script.py ...` would have, imports
the project's own modules anew, and ends as an interpreter ends. The server has run no parallel region and has one
thread, which makes a fork of it safe. What differs from `python`: OMP_NUM_THREADS, HF_HUB_OFFLINE and PYTHONHASHSEED
are those of the server; each command leads a session of its own.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

LIBRARIES = (  # of other people: a module of ours in the server would be stale, and found where python finds it not
    *("numpy", "scipy.optimize", "scipy.stats", "PIL.Image", "PIL.ImageDraw", "matplotlib.pyplot", "psutil", "tqdm"),
    *("torch", "torch._dynamo", "torch.distributed", "torch.profiler", "torch.utils.checkpoint", "torch.utils.data"),
    *("torch.utils.tensorboard", "accelerate", "safetensors.torch"),
)
FILES_OF_A_REQUEST = 3  # stdout, stderr, and where the status goes
LONGEST_REQUEST = 2**17  # bytes: an environment and arguments


class Forked:
    """A command under way: what the tests use of subprocess.Popen."""

    def __init__(self, status: int) -> None:
        self._status, self.returncode = os.fdopen(status, "rb", buffering=0), None
        self.pid = int(self._line(None))

    def _line(self, timeout: float | None) -> bytes | None:
        if not select.select([self._status], [], [], timeout)[0]:
            return None
        line = self._status.readline()
        assert line, "the fork server is gone"
        return line

    def poll(self) -> int | None:
        """The exit status, minus the signal that ended the process, or None while it runs."""
        if self.returncode is None and (line := self._line(0)):
            self.returncode = int(line)
            self._status.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            select.select([self._status], [], [], timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The server, as its clients see it. It ends when the socket is closed, if only by the end of this process."""

    def __init__(self, env: dict[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        atexit.register(self.close)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, arguments: list[str], cwd: Path, env: dict[str, str], out: int, err: int) -> Forked:
        """`python ARGUMENTS`, the first of which is a script's path, with these descriptors as stdout and stderr."""
        ours, theirs = os.pipe()
        request = json.dumps({"arguments": arguments, "cwd": str(cwd), "env": env}).encode()
        socket.send_fds(self._socket, [request], [out, err, theirs])
        os.close(theirs)
        return Forked(ours)


#################################################################################
#                                 In the server                                 #
#################################################################################


def serve(requests: socket.socket) -> list[str]:
    """Fork for each request until the clients are gone; returns in the forks alone, with their arguments."""
    for name in LIBRARIES:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads after the imports: a fork would lose them and keep their locks"
    gc.collect()
    gc.freeze()  # a collection in a fork would otherwise copy all pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of pytest is for the tests
    while True:
        reap(os.WNOHANG)
        request, files, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, FILES_OF_A_REQUEST)
        if not request:
            reap(0)
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            return watch(files.pop(), files, **json.loads(request))
        for file in files:
            os.close(file)


def reap(options: int) -> None:
    """Let the watchers go that have ended, or with 0 all of them; their CPU time then counts as pytest's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def watch(status: int, files: list[int], **request) -> list[str]:
    """Fork the command, tell its pid, and when it has ended its exit status; returns in the command alone."""
    if (pid := os.fork()) == 0:
        os.close(status)
        return become(files, **request)
    os.write(status, b"%d\n" % pid)
    _, ended = os.waitpid(pid, 0)
    os.write(status, b"%d\n" % os.waitstatus_to_exitcode(ended))
    os._exit(0)


def become(files: list[int], arguments: list[str], cwd: str, env: dict[str, str]) -> list[str]:
    """Take on what a process gets from the one that starts it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    sys.modules["numpy"].random.seed()  # as in a new process: torch has a fixed seed, and random renews its own
    sys.path[0] = os.path.dirname(arguments[0])
    return arguments


if __name__ == "__main__":
    sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_path(sys.argv[0], run_name="__main__")
