"""Two processes on CPU (gloo) do what one does; where one of them fails, both end.

`launch` forks them; `launch_by` is for what is about the real launchers, one test for each of the two.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from benchmarks.kill_resume import SETTING
from helpers import CHECKPOINT, ROOT, call, draw_styles, launch, launch_by, start_ranks
from isonext.checkpoint import epoch_checkpoints, load_checkpoint
from isonext.data import preprocess as preprocessing
from isonext.data.dataset import open_store
from isonext.data.pt_store import PtStore
from isonext.errors import UserError
from isonext.inference import inputs
from isonext.training.log import read_metrics
from isonext.utils import cli, distributed

STEPS = 12
KILL = "os.kill(os.getpid(), 9)"
TRANSFER = ("--checkpoint", CHECKPOINT, "--source_style", "0", "--target_style", "1", "--num_steps", "2")


def faulty(path: Path, command: str, rank: int, module: str, name: str, call: int, fault: str) -> Path:
    """A script: the command, but in process `rank` the given call of `name` in `module` runs `fault` first."""
    path.write_text(f"""
import itertools, os, pkgutil, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
if os.environ["RANK"] == "{rank}":
    owner = pkgutil.resolve_name("{module}")
    calls, function = itertools.count(1), owner.{name}
    def faulty(*arguments):
        if next(calls) == {call}:
            {fault}
        return function(*arguments)
    owner.{name} = faulty
runpy.run_path({str(ROOT / command)!r}, run_name="__main__")
""")
    return path


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


#################################################################################
#                                    Training                                   #
#################################################################################


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A latent store, a run of one process in `alone` and the same of two in `together`, both in float32."""
    folder = tmp_path_factory.mktemp("training")
    draw_styles(folder / "raw_data", 24)
    training = {"stage1_epochs": 3, "val_every_epochs": 1, "use_amp": False, "learning_rate": 2e-3}
    setting = SETTING | {"training": SETTING["training"] | training}
    setting["data"] = {"image_size": 8, "val_fraction": 0.2, "flip": False}  # too small for the judge, which takes long
    (folder / "config.json").write_text(json.dumps(setting))
    for command in (["preprocess_latents.py"], ["train.py", "--set", "checkpoint.save_dir=alone"]):
        done = call(folder, *command)
        assert done.returncode == 0, done.stderr
    done = launch(folder, "train.py", "--set", "checkpoint.save_dir=together")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters") == 1 and "Grad strides" not in done.stderr
    return folder


def gap(one: Path, other: Path) -> float:
    """The largest difference between the weights and averaged weights of two runs' ends."""
    a, b = (load_checkpoint(epoch_checkpoints(path)[-1]) for path in (one, other))
    assert a.step == b.step == STEPS
    parts = ((a.model, b.model), (a.ema, b.ema))
    return max((x[name] - y[name]).abs().max().item() for x, y in parts for name in x)


# Two processes sum the gradient in another order, which changes some 2^-24 of it. AdamW passes that on relative to its
# step (2e-3 here), and magnifies it only where a gradient is itself near zero. So one per cent of a step bounds the
# difference after twelve (about 1e-6 is seen); with other noise, or half the batch, it would be whole steps.
ROUNDING = 2e-5


def test_two_processes_train_the_same_network_as_one(folder):
    assert 0 < gap(folder / "alone", folder / "together") < ROUNDING  # 0 would mean that there were not two


def test_only_the_first_process_writes(folder):
    alone, together = (
        {path.name for path in (folder / name).iterdir()} | {len(list((folder / name / "tensorboard").iterdir()))}
        for name in ("alone", "together")
    )
    assert alone == together and not any(str(name).startswith(".") for name in together)
    one, two = (read_metrics(folder / name / "metrics.jsonl") for name in ("alone", "together"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "val_loss", "loss_t0", "grad_norm"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-4)


@pytest.mark.slow
def test_accelerate_launches_the_same_run_and_goes_on_with_what_one_process_began(folder):
    flags = ("--resume", "alone/stage1_epoch2.pt", "--set", "checkpoint.save_dir=from_one")
    done = launch_by("accelerate", folder, "train.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed from alone/stage1_epoch2.pt at step 8") == 1
    assert 0 < gap(folder / "alone", folder / "from_one") < ROUNDING


def test_one_process_goes_on_with_what_two_began(folder):
    done = call(folder, "train.py", "--resume", "together/stage1_epoch2.pt", "--set", "checkpoint.save_dir=from_two")
    assert done.returncode == 0, done.stderr
    assert 0 < gap(folder / "together", folder / "from_two") < ROUNDING


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_resuming_gives_the_same_bits(folder, tmp_path):
    flags = ("--set", "checkpoint.save_dir=killed")
    script = faulty(tmp_path / "kill.py", "train.py", 1, "isonext.training.trainer:Trainer", "train_step", 9, KILL)
    started = time.perf_counter()
    done = launch_by("torchrun", folder, script, *flags)
    assert done.returncode != 0 and time.perf_counter() - started < 60
    (line,) = errors(done)
    assert "process 0 of 2 lost the others" in line and "--resume" in line
    assert "exitcode: -9" in done.stderr and "train_step" not in done.stderr  # no traceback of ours
    assert [path.name for path in epoch_checkpoints(folder / "killed")] == ["stage1_epoch1.pt", "stage1_epoch2.pt"]
    assert not list((folder / "killed").glob(".*")) and not (folder / "killed/stage1_interrupted.pt").exists()

    # One process says that it has no memory: then both map the packed file that the first one writes.
    fault = "import types; return types.SimpleNamespace(available=0)"
    script = faulty(tmp_path / "poor.py", "train.py", 0, "psutil", "virtual_memory", 1, fault)
    done = launch(folder, script, *flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "latents").glob("packed-train-*.npy"))) == 1
    assert gap(folder / "together", folder / "killed") == 0


@pytest.mark.slow
def test_what_fails_in_one_process_ends_the_other_even_without_a_launchers_help(folder, tmp_path):
    full = "raise OSError(28, 'No space left on device')"
    script = faulty(tmp_path / "full.py", "train.py", 0, "isonext.checkpoint:Checkpoint", "save", 1, full)
    pair = start_ranks(folder, script, "--set", "checkpoint.save_dir=full")
    first, second = (rank.finish(timeout=120) for rank in pair)
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.startswith("error: full/")
    assert "could not be written (No space left on device)" in first.stderr
    assert second.stdout == "" and second.stderr.count("\n") == 1
    assert second.stderr.startswith("error: process 1 of 2 lost the others")
    assert "parameters" in first.stdout and not list((folder / "full").glob("*.pt"))


#################################################################################
#                                 Preprocessing                                 #
#################################################################################


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_two_processes_write_the_same_store_as_one_even_after_a_kill(studio, tmp_path):
    draw_styles(tmp_path / "raw_data", 20)  # three batches: two for the first process, one for the second
    (tmp_path / "raw_data/cold/007.png").write_bytes(b"no picture")
    (tmp_path / "raw_data/warm/018.png").write_bytes(b"no picture either")
    (tmp_path / "config.json").write_bytes((studio / "config.json").read_bytes())
    one = call(tmp_path, "preprocess_latents.py", "--set", "data.data_root=one")
    assert one.returncode == 1, one.stderr

    flags = ("--set", "data.data_root=two")
    script = faulty(tmp_path / "kill.py", "preprocess_latents.py", 1, "isonext.data.pt_store", "write_latent", 5, KILL)
    killed = launch(tmp_path, script, *flags)
    assert killed.returncode != 0 and "rank 1 failed first, exitcode -9" in killed.stderr
    assert '"complete": false' in (tmp_path / "two/meta.json").read_text()

    two = launch(tmp_path, "preprocess_latents.py", *flags)
    assert (
        two.returncode != 0 and "rank 0 failed first, exitcode 1" in two.stderr and not errors(two)
    )  # a picture was skipped
    kept = int(two.stdout.partition(" kept")[0].rpartition(" ")[2])  # of four threads three were at work when it died
    assert 1 <= kept < 38 and f"two: {38 - kept} encoded" in two.stdout
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    skipped = [line for line in one.stdout.splitlines() if "skipped" in line]
    assert len(skipped) == 3 and [line for line in two.stdout.splitlines() if "skipped" in line] == skipped


@pytest.fixture
def as_rank(monkeypatch):
    """A function that makes this process one of two, as far as the launcher's variables go."""

    def become(number: int) -> None:
        for name, value in {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))

    return become


def test_the_shares_of_preprocessing_are_whole_batches_and_everything_once(store, make_config, cpu, as_rank, tmp_path):
    todo = [(f"{path.parent.name}/{path.name}.pt", path) for path in sorted((store / "raw").rglob("*.png"))]
    codec, shares = preprocessing.load_autoencoder("dct", cpu), []
    target = PtStore(tmp_path, open_store(store / "latents"))
    work = preprocessing.Work(target, todo, target.plan(len(todo), preprocessing.BATCH), 0)
    for number in (0, 1):
        as_rank(number)
        shares.append(list(preprocessing.encode(work, codec, make_config(store), cpu, True)))
    entries = [entry for entry, _ in todo]
    assert shares == [entries[:16], entries[16:]]


#################################################################################
#                                Folders of pictures                            #
#################################################################################


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Eleven pictures of three sizes and two broken ones, the one of which has a sound header."""
    folder = tmp_path_factory.mktemp("pictures")
    sizes = [(32, 32)] * 5 + [(24, 40)] * 2 + [(32, 32)] * 3 + [(16, 16)]
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / "02a.png").write_bytes((folder / "02.png").read_bytes()[:900])
    (folder / "09a.png").write_bytes(b"no picture")
    return folder


def test_two_processes_make_the_same_folder_as_one(studio, within, pictures, tmp_path):
    flags = (*TRANSFER, "--input", pictures, "--batch_size", "2", "--certify")
    status, out, err = within("inference", *flags, "--output", tmp_path / "one")
    assert status == 1, err
    done = launch(studio, "inference.py", *flags, "--output", tmp_path / "two")
    assert done.returncode != 0 and "rank 0 failed first, exitcode 1" in done.stderr and not errors(done)
    assert "11 made" in done.stdout and contents(tmp_path / "one") == contents(tmp_path / "two")
    said, alone = (
        [line for line in text.splitlines() if line.startswith(("certificate", "skipped", "cold"))]
        for text in (done.stdout, out)
    )
    assert said == alone and len(said) == 4  # the plan, two skipped, one certificate

    status, again, _ = within("inference", *flags, "--output", tmp_path / "two")
    assert status == 1 and "0 made, 11 were there already" in again


def test_the_shares_of_a_folder_are_whole_batches_and_everything_once(pictures, tmp_path, as_rank, monkeypatch):
    class Plain:
        compiled = False

        def check_size(self, path, size):
            pass

        def encode(self, pixels):
            return pixels

    jobs, skipped = inputs.find_jobs(pictures, tmp_path / "out"), []

    def batches() -> list[list[str]]:
        planned = inputs.plan_batches(jobs, None, 2)
        return [
            [job.source.stem for job in one.jobs] for one in inputs.load_batches(planned, Plain(), None, 2, skipped)
        ]

    whole = batches()
    # of one size together; 02a, whose header is sound, is cut off
    assert whole == [["00", "01"], ["02"], ["03", "04"], ["07", "08"], ["09"], ["05", "06"], ["10"]]
    bad, skipped = sorted(skipped), []
    shares = []
    for number in (0, 1):
        as_rank(number)
        shares.append(batches())
    assert shares == [whole[0::2], whole[1::2]] and sorted(skipped) == bad and len(bad) == 2


#################################################################################
#                             One speaks for all                                #
#################################################################################


def test_one_picture_is_refused_once(studio):
    done = launch(studio, "inference.py", *TRANSFER, "--input", "raw_data/cold/001.png", "--output", "refused.png")
    assert done.returncode != 0 and not (studio / "refused.png").exists()
    (line,) = errors(done)
    assert "one picture is the work of one process" in line and "(process" not in line


def test_another_process_than_the_first_is_silent_but_for_an_error_after_a_while(capsys, as_rank, monkeypatch):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which `run` replaces
    as_rank(1)

    def fail(_):
        print("something")
        raise UserError("there is nothing on this disk")

    with pytest.raises(SystemExit) as ended:
        cli.run(fail, cli.new_parser(""))
    assert ended.value.code == 2 and waited == [cli.GRACE_S]
    assert capsys.readouterr() == ("", "error: there is nothing on this disk (process 1)\n")


def test_a_command_alone_sets_up_no_group_even_where_a_cluster_has_set_variables(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # without LOCAL_RANK it is not a launcher's
    monkeypatch.setenv("RANK", "1")
    assert (distributed.world(), distributed.local_world(), distributed.is_main()) == (1, 1, True)
    assert distributed.gather("a") == ["a"] and distributed.from_main("a") == "a"
    with distributed.in_turn(), distributed.peers_needed():
        distributed.refuse_several("this")
    assert not dist.is_initialized()


def test_an_error_that_is_not_of_the_exchange_stays_what_it_is(as_rank):
    as_rank(0)
    with pytest.raises(RuntimeError, match="size mismatch"), distributed.peers_needed():
        raise RuntimeError("size mismatch")
    for error in (dist.DistBackendError("NCCL"), RuntimeError("[gloo/transport/tcp/pair.cc:1] closed")):
        with pytest.raises(UserError, match="process 0 of 2 lost the others"), distributed.peers_needed():
            raise error
