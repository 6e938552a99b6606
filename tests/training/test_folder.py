"""The folder of a run: whose it is, its lock, its branches, and what is kept when a run diverges."""

import shutil
import signal

import pytest
import torch

from helpers import Command
from isonext.checkpoint import BEST, INTERRUPTED, epoch_checkpoints, load_checkpoint
from isonext.errors import UserError
from isonext.training.folder import RUN, last_good, read_run
from isonext.training.log import read_metrics
from isonext.training.trainer import Trainer, join_processes, train
from isonext.utils.distributed import folder_lock

KEPT = {"training.keep_checkpoints": 2, "training.val_every_epochs": 100, "training.lr_schedule": "constant"}


@pytest.fixture(autouse=True)
def no_sheets(monkeypatch):
    monkeypatch.setattr("isonext.training.validation.Validation.save_preview", lambda *_: None)
    monkeypatch.setattr("isonext.training.validation.can_be_transferred", lambda val: False)


@pytest.fixture
def config(store, make_config):
    """A function: {"section.key": value} -> the config of a run on `store`, by name of its folder."""
    return lambda changes=None, run="run": make_config(
        store, KEPT | {"checkpoint.save_dir": str(store / run)} | (changes or {})
    )


def names(folder) -> list[str]:
    return [path.name for path in epoch_checkpoints(folder)]


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


#################################################################################
#                                    Branches                                   #
#################################################################################


def test_an_earlier_checkpoint_begins_a_branch_and_what_came_after_it_is_set_aside(config, store, capsys):
    run = train(config({"training.stage1_epochs": 5, "training.keep_checkpoints": 0}), quiet=True).folder
    shutil.copy(run / "stage1_epoch5.pt", run / BEST)
    left = {name: (run / name).read_bytes() for name in ("stage1_epoch4.pt", "stage1_epoch5.pt", BEST, "metrics.jsonl")}
    other = {"training.stage1_epochs": 4, "training.learning_rate": 2e-3}
    branch = Trainer(config(other), str(run / "stage1_epoch3.pt"))
    branch.fit(stop=lambda: branch.state.step == 12, quiet=True)  # killed before it saves an epoch
    aside = run / "branch_after_step12_1"
    assert f"what was saved after step 12 now lies in {aside}" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == left
    assert load_checkpoint(run / INTERRUPTED).step == 12 and not (run / BEST).exists()
    gone_on = train(config(other), "newest", quiet=True)
    assert names(run) == ["stage1_epoch3.pt", "stage1_epoch4.pt"]  # two are kept: of this branch
    ours = load_checkpoint(run / "stage1_epoch4.pt")
    assert ours.config.training.learning_rate == 2e-3
    assert torch.equal(ours.model["head.weight"], gone_on.state.model.head.weight)


def test_a_checkpoint_in_no_list_of_epochs_is_gone_on_from_after_a_kill(config, store):
    run = train(config(), quiet=True).folder
    (run / "stage1_epoch1.pt").rename(run / "mine.pt")
    branch = Trainer(config(), str(run / "mine.pt"))
    branch._begin()
    assert names(run) == [] and (run / "mine.pt").exists()
    assert Trainer(config(), "newest").state.step == 4


#################################################################################
#                                  Whose it is                                  #
#################################################################################


def test_a_folder_of_another_run_is_refused_and_left_as_it_is(config, store):
    a, b = (train(config(run=name), quiet=True).folder for name in "ab")
    assert read_run(a) == load_checkpoint(a / "stage1_epoch2.pt").run != read_run(b)
    before = contents(b)
    with pytest.raises(UserError, match=r"b: holds the checkpoints of another run than .*a.stage1_epoch2\.pt; give"):
        train(config({"training.stage1_epochs": 3}, "b"), str(a / "stage1_epoch2.pt"), quiet=True)
    shutil.copy(a / "stage1_epoch2.pt", b / "stage1_epoch7.pt")  # a file that strayed there
    with pytest.raises(UserError, match="holds the checkpoints of another run"):
        Trainer(config(run="b"), "newest")
    (b / "stage1_epoch7.pt").unlink()
    assert contents(b) == before
    shutil.copy(b / "stage1_epoch1.pt", store / "backup.pt")
    assert Trainer(config(run="b"), str(store / "backup.pt")).run == read_run(b)  # the same run, from elsewhere
    assert Trainer(config(run="c"), str(a / "stage1_epoch2.pt")).run not in ("", read_run(a))  # a new one


def test_a_checkpoint_from_before_there_were_ids_goes_on_where_it_lies_and_nowhere_else(config, store):
    train(config(run="b"), quiet=True)
    a = train(config(run="a"), quiet=True).folder
    for path in epoch_checkpoints(a):
        tree = torch.load(path, weights_only=True)
        del tree["run"], tree["log"]
        torch.save(tree, path)
    (a / RUN).unlink()
    with pytest.raises(UserError, match="holds the checkpoints of another run"):
        Trainer(config(run="b"), str(a / "stage1_epoch2.pt"))
    resumed = train(config({"training.stage1_epochs": 3}, "a"), "newest", quiet=True)
    assert load_checkpoint(a / "stage1_epoch3.pt").run == resumed.run == read_run(a) != ""


def test_a_log_that_is_there_before_a_run_begins_is_moved_aside_and_said(config, store, capsys):
    killed = Trainer(config())  # before its first checkpoint
    killed.fit(stop=lambda: killed.state.step == 3, quiet=True)
    run = killed.folder
    (run / INTERRUPTED).unlink()
    first, second = (run / "metrics.jsonl").read_bytes(), b"a user's notes\n"
    capsys.readouterr()
    train(config(), quiet=True)
    assert (run / "metrics_before_1.jsonl").read_bytes() == first != b""
    out = capsys.readouterr().out
    assert out.count("metrics_before_1.jsonl") == 1 and not (run / "run_before_1.json").exists()
    for path in epoch_checkpoints(run):
        path.rename(store / path.name)
    (run / "metrics.jsonl").write_bytes(second)
    (run / RUN).write_bytes(b'{"run": "of a user", "miles": 7}')
    train(config(), str(store / "stage1_epoch1.pt"), quiet=True)
    assert (run / "metrics_before_1.jsonl").read_bytes() == first
    assert (run / "metrics_before_2.jsonl").read_bytes() == second
    assert (run / "run_before_1.json").read_bytes() == b'{"run": "of a user", "miles": 7}'
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == [5, 6, 7, 8]
    before = contents(run)["metrics.jsonl"]
    train(config(), "newest", quiet=True)  # a run that goes on keeps its own log where it is
    assert contents(run)["metrics.jsonl"] == before and not (run / "metrics_before_3.jsonl").exists()


def test_a_second_training_in_one_folder_is_one_line_and_a_killed_one_leaves_no_lock(store, tmp_path):
    script = tmp_path / "holds.py"
    script.write_text(
        "import time, pathlib\nfrom isonext.utils.distributed import folder_lock\n"
        f"with folder_lock(pathlib.Path({str(store / 'run')!r})):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = Command(store, script, cold=True)
    while "held" not in holder.stdout and holder.process.poll() is None:
        pass
    with (
        pytest.raises(UserError, match=r"run: is in use by another run of this program; wait .*give another folder"),
        folder_lock(store / "run"),
    ):
        pass
    holder.process.send_signal(signal.SIGKILL)
    holder.finish(20)
    with folder_lock(store / "run"):
        pass


def test_a_training_holds_the_lock_until_it_ends(config, store, monkeypatch):
    real = Trainer.fit

    def fit(self, *arguments):
        with pytest.raises(UserError, match="is in use by another run"), folder_lock(self.folder):
            pass
        real(self, *arguments)

    monkeypatch.setattr(Trainer, "fit", fit)
    train(config({"training.stage1_epochs": 1}), quiet=True)
    with folder_lock(store / "run"):
        pass


#################################################################################
#                                   Divergence                                  #
#################################################################################


def refuse_steps(trainer, monkeypatch, first: int = 0) -> None:
    """From step `first` on the gradient is no number."""
    real = trainer.gradients.compute

    def compute(step):
        sums = real(step)
        if step >= first:
            trainer.state.model.head.bias.grad.fill_(torch.nan)
        return sums

    monkeypatch.setattr(trainer.gradients, "compute", compute)


def test_while_steps_are_refused_nothing_is_saved_nor_deleted_and_the_last_good_one_is_named(
    config, monkeypatch, capsys
):
    run = train(config(), quiet=True).folder
    before = {name: (run / name).read_bytes() for name in names(run)}
    broken = Trainer(config({"training.stage1_epochs": 9}), "newest")
    refuse_steps(broken, monkeypatch)
    with pytest.raises(UserError, match=r"the last good checkpoint is .*stage1_epoch2\.pt: resume with a lower"):
        broken.fit(quiet=True)
    assert {name: (run / name).read_bytes() for name in names(run)} == before
    assert "warning: epoch 3 is not saved: the last 4 steps were refused; " in capsys.readouterr().out


def test_a_run_whose_last_steps_are_refused_ends_without_its_last_epoch_and_with_status_1(config, monkeypatch, capsys):
    run = train(config(), quiet=True).folder
    before = {name: (run / name).read_bytes() for name in names(run)}
    broken = Trainer(config({"training.stage1_epochs": 3}), "newest")
    refuse_steps(broken, monkeypatch, first=10)  # of 8 to 11
    broken.fit(quiet=True)
    assert broken.finished and broken.stopped == 1
    assert {name: (run / name).read_bytes() for name in names(run)} == before and not (run / INTERRUPTED).exists()
    said = capsys.readouterr().out
    assert "epoch 3 is not saved: the last 2 steps were refused; the last good checkpoint is " in said
    assert f"{run / 'stage1_epoch2.pt'}: resume with a lower --set training.learning_rate" in said
    again = train(config({"training.stage1_epochs": 3}), "newest", quiet=True)
    assert again.stopped == 0 and names(run)[-1] == "stage1_epoch3.pt"


def test_weights_that_are_not_finite_are_never_saved_and_never_called_good(config, capsys):
    run = train(config(), quiet=True).folder
    broken = Trainer(config({"training.stage1_epochs": 3}), "newest")
    with torch.no_grad():
        broken.state.ema.model.head.bias.fill_(torch.nan)
    broken.save(run / "stage1_epoch3.pt")
    assert last_good(run) == run / "stage1_epoch2.pt"
    (run / "stage1_epoch3.pt").write_bytes(b"cut")
    assert last_good(run) == run / "stage1_epoch2.pt"
    (run / "stage1_epoch3.pt").unlink()
    broken.fit(stop=lambda: 143, quiet=True)
    assert not (run / INTERRUPTED).exists() and "were not saved; the last good" in capsys.readouterr().out
    broken.fit(quiet=True)
    assert names(run) == ["stage1_epoch1.pt", "stage1_epoch2.pt"]


#################################################################################
#                             The log, and the length                           #
#################################################################################


def test_a_line_of_the_log_counts_the_steps_before_a_kill_too(config, store):
    changes = {"training.log_every_steps": 3, "training.stage1_epochs": 3, "training.grad_clip": 1e-3}
    train(config(changes, "whole"), quiet=True)
    halved = Trainer(config(changes, "halved"))
    halved.fit(stop=lambda: halved.state.step == 4, quiet=True)
    train(config(changes, "halved"), "newest", quiet=True)
    one, other = (
        [
            (line["step"], line["loss"], line["clipped"])
            for line in read_metrics(store / name / "metrics.jsonl")
            if "loss" in line
        ]
        for name in ("whole", "halved")
    )
    assert one == other and [step for step, *_ in one] == [3, 6, 9, 12] and one[1][2] == 1


def test_fewer_epochs_than_are_done_is_one_line(config):
    train(config(), quiet=True)
    with pytest.raises(
        UserError, match=r"stage1_epoch2\.pt: has done 2 epochs, more than training\.stage1_epochs = 1; raise"
    ):
        Trainer(config({"training.stage1_epochs": 1}), "newest")


def test_more_epochs_say_how_far_they_lift_the_rate(config, capsys):
    cosine = {"training.lr_schedule": "cosine"}
    train(config(cosine), quiet=True)
    capsys.readouterr()
    Trainer(config(cosine | {"training.stage1_epochs": 4}), "newest")
    # Step 7 of 8, of 16: 1e-3 (1 + cos(pi 5/6)) / 2 and 1e-3 (1 + cos(pi 5/14)) / 2
    assert "the learning rate goes on at 0.00072 and not at 6.7e-05: 4 epochs instead of 2" in capsys.readouterr().out
    Trainer(config({"training.stage1_epochs": 4}), "newest")
    assert "goes on at" not in capsys.readouterr().out


def test_a_launchers_variables_change_neither_gradients_nor_compilation(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    accelerator = join_processes()
    assert accelerator.gradient_accumulation_steps == 1
    weight = torch.nn.Parameter(torch.ones(()))
    accelerator.backward(3 * weight)
    assert weight.grad == 3
    assert str(accelerator.state.dynamo_plugin.backend.value) == "NO"


def test_the_gradients_lie_in_ddps_buckets_and_not_beside_them():
    assert join_processes().ddp_handler.gradient_as_bucket_view  # else a copy that no estimate counts


@pytest.mark.parametrize("place", ["raw/run", "latents", "latents/run"])
def test_a_run_inside_the_pictures_or_the_store_is_refused(config, store, place):
    with pytest.raises(UserError, match=r"checkpoint\.save_dir = .*: lies in data\."):
        train(config({}, place), quiet=True)
    assert not (store / "raw" / "run").exists() and not (store / "latents" / "run").exists()
