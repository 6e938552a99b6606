"""What tests call: a tiny config, commands as users run them, and what a refusal looks like."""

import functools
import importlib
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fork_server import Forked, ForkServer
from isonext.utils import cli

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "model": {"hidden_dim": 16, "num_groups": 4, "num_layers": 1, "kernel_size": 3, "style_dim": 8, "time_dim": 8},
    "training": {
        "batch_size": 4,
        "stage1_epochs": 2,
        "warmup_steps": 2,
        "learning_rate": 1e-3,
        "compile": False,
        "num_workers": 0,
        "log_every_steps": 1,
        "save_every_epochs": 1,
        "val_every_epochs": 1,
    },
    "data": {"image_size": 16, "val_fraction": 0.2},
    "autoencoder": {"name": "dct"},
    "inference": {"num_steps": 2},
}


CHECKPOINT = "checkpoints/stage1_epoch4.pt"
STUDIO = {
    "model": {"hidden_dim": 16, "num_layers": 2, "num_groups": 4, "style_dim": 16, "time_dim": 16},
    "training": {
        "batch_size": 8,
        "learning_rate": 2e-3,
        "stage1_epochs": 4,
        "warmup_steps": 2,
        "num_workers": 2,
        "compile": False,
        "save_every_epochs": 2,
        "val_every_epochs": 2,
        "log_every_steps": 1,
    },
    "data": {"image_size": 32, "val_fraction": 0.2},
    "autoencoder": {"name": "dct:f4c12"},
    "inference": {"cfg_scale": 1.5, "cfg_interval": [0.0, 1.0]},  # so that evaluations are easy to count
}


def draw_styles(root: Path, count: int) -> None:
    """Style `warm` is reddish blobs, style `cold` bluish stripes."""
    generator = np.random.default_rng(0)
    for style, colour in (("cold", (40, 80, 220)), ("warm", (220, 80, 40))):
        (root / style).mkdir(parents=True)
        for number in range(count):
            grain = generator.integers(0, 60, (32, 32, 3))
            picture = np.clip(np.array(colour) * generator.uniform(0.5, 1) + grain, 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(root / style / f"{number:03}.png")


def environment(variables: dict[str, str]) -> dict[str, str]:
    """What commands run in. PYTHONPATH, since another checkout than this one may be installed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path} | variables


@functools.cache
def fork_server() -> ForkServer:
    return ForkServer(environment({}))


class Command:
    """`python ARGUMENTS` under way in `folder`, as a user would start it, and what it has written so far.

    Forked by the server, or, where `cold` is set or nothing can be forked, by a new interpreter. `beside` is another
    command, the files of which it writes to.
    """

    def __init__(
        self, folder: Path, *arguments: str | Path, cold: bool = False, beside: "Command | None" = None, **variables
    ) -> None:
        self.arguments = [str(ROOT / arguments[0]), *map(str, arguments[1:])]
        self.files = beside.files if beside else [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        out, err = (file.fileno() for file in self.files)
        self.process: Forked | subprocess.Popen
        if cold or sys.platform != "linux":
            self.process = subprocess.Popen(
                [sys.executable, *self.arguments], cwd=folder, env=environment(variables), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            )  # fmt: skip
        else:
            self.process = fork_server().start(self.arguments, folder, environment(variables), out, err)

    def finish(self, timeout: float = 240) -> subprocess.CompletedProcess:
        """Wait for the end. After `timeout` seconds, or an interrupt, kill it with all that it has started."""
        try:
            status = self.process.wait(timeout)
        except BaseException:
            os.killpg(self.process.pid, signal.SIGKILL)
            print(f"{self.arguments} had written:\n{self.stdout}{self.stderr}")
            raise
        return subprocess.CompletedProcess(self.arguments, status, self.stdout, self.stderr)

    @property
    def stdout(self) -> str:
        return self._written(0)

    @property
    def stderr(self) -> str:
        return self._written(1)

    def _written(self, number: int) -> str:
        file = self.files[number].fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode()


def call(folder: Path, *arguments: str | Path, cold: bool = False) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` in `folder` to its end."""
    return Command(folder, *arguments, cold=cold).finish()


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Status 2 and one line on stderr that has all the words."""
    status, _, err = result
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


def call_within(folder: Path, name: str, *arguments: str) -> tuple[int, str, str]:
    """The same without a new process, which takes seconds to import torch: (status, stdout, stderr)."""
    module, out, err = importlib.import_module(name), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(module.main, module.build_parser())
    return ended.value.code, out.getvalue(), err.getvalue()


def second_stage(path: Path, new: Path) -> Path:
    """A checkpoint of stage 2 beside one of stage 1, which is its teacher: a map of random weights, none of them 0."""
    import torch

    from isonext.checkpoint import load_checkpoint, network_of

    first = load_checkpoint(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = network_of(first.config, first.latents, 2)()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    first.teacher, weights = first.ema, network.state_dict()
    first.model = first.ema = weights
    first.optimizer = {"state": {}, "param_groups": []}
    first.config.inference.method, first.config.inference.num_steps = "map", 1
    first.save(new)
    return new


LAUNCHERS = {  # each with a port of its own, since other tests may be under way
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
}


def launch_by(launcher: str, folder: Path, script: str | Path, *flags: str | Path) -> subprocess.CompletedProcess:
    """Two processes by a launcher that users have."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, cwd=folder, env=environment({}), capture_output=True, text=True, timeout=120)


def start_ranks(folder: Path, script: str | Path, *flags: str | Path, share: bool = False) -> list[Command]:
    """Two forked processes with a launcher's variables; with `share` they write to the same files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks: list[Command] = []
    for rank in "01":
        beside = ranks[0] if share and ranks else None
        ranks.append(Command(folder, script, *flags, beside=beside, **common, RANK=rank, LOCAL_RANK=rank))
    return ranks


def launch(folder: Path, script: str | Path, *flags: str | Path, timeout: float = 120) -> subprocess.CompletedProcess:
    """Two processes, watched as torchrun does: where one fails the other gets a SIGTERM, the status is 1, and the last
    line on stderr reports who failed first."""
    ranks, end, failed = start_ranks(folder, script, *flags, share=True), time.monotonic() + timeout, []
    while not failed and any(rank.process.poll() is None for rank in ranks) and time.monotonic() < end:
        time.sleep(0.1)
        failed = [(number, rank.process.returncode) for number, rank in enumerate(ranks) if rank.process.poll()]
    if failed:
        for rank in ranks:
            rank.process.send_signal(signal.SIGTERM)
    done, _ = (rank.finish(max(0, end - time.monotonic())) for rank in ranks)
    report = "rank {} failed first, exitcode {}\n".format(*failed[0]) if failed else ""
    return subprocess.CompletedProcess(done.args, int(bool(failed)), ranks[0].stdout, ranks[0].stderr + report)
