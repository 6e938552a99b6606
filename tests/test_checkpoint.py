import dataclasses

import pytest
import torch

from helpers import second_stage
from isonext import __version__
from isonext.checkpoint import (
    INTERRUPTED,
    Checkpoint,
    build_model,
    epoch_checkpoints,
    epoch_of,
    interrupted,
    load_checkpoint,
    load_map,
    load_model,
    load_weights,
    network_of,
    newest_checkpoint,
)
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.flow.base import Base
from isonext.training.state import EMA

BASE = Base(0.8, 2, *(torch.ones(shape) for shape in ((2, 12), (2, 12), (2, 3, 12, 2, 2))))
SPEC = LatentSpec("dct:f4c12", 12, 4, 16, ["ink", "oil"], mean=[0.5] * 12, std=[2.0] * 12)


@pytest.fixture
def config(make_config, tmp_path):
    return make_config(tmp_path)


@pytest.fixture
def checkpoint(config) -> Checkpoint:
    """A checkpoint after one step of AdamW, its average unlike its weights."""
    torch.manual_seed(0)
    model = build_model(config, SPEC)
    ema = EMA(model, 0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    (model(torch.randn(2, 12, 4, 4), torch.rand(2), torch.tensor([0, 2])) - 1).square().sum().backward()
    optimizer.step()
    ema.update(model, 0)
    return Checkpoint(
        config,
        SPEC,
        BASE,
        "digest",
        {"norms": [1.5], "skipped": 2, "in_a_row": 0},
        7,
        3,
        model.state_dict(),
        ema.model.state_dict(),
        optimizer.state_dict(),
    )


def flat(tree, name: str = "") -> dict:
    """Nested dicts and lists -> {path: leaf}."""
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {path: leaf for key, value in pairs for path, leaf in flat(value, f"{name}/{key}").items()}
    return {name: tree}


def assert_same(one, other) -> None:
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        equal = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert equal, name


#################################################################################
#                                  Save and load                                #
#################################################################################


def test_a_checkpoint_comes_back_as_it_was_saved(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "a.pt")
    back = load_checkpoint(tmp_path / "a.pt")
    assert (back.config, back.latents, back.step, back.epoch) == (checkpoint.config, checkpoint.latents, 7, 3)
    for part in ("model", "ema", "optimizer"):
        assert_same(getattr(back, part), getattr(checkpoint, part))
    assert_same(dataclasses.asdict(back.base), dataclasses.asdict(BASE))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_checkpoint_is_data_that_loads_with_weights_only(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "a.pt")
    tree = torch.load(tmp_path / "a.pt", weights_only=True)
    assert tree["latents"] == dataclasses.asdict(SPEC)
    assert tree["config"]["model"]["hidden_dim"] == 16
    assert (tree["format"], tree["step"], tree["epoch"]) == (2, 7, 3)


def test_a_checkpoint_of_the_first_format_starts_from_white_noise(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "a.pt")
    tree = torch.load(tmp_path / "a.pt", weights_only=True)
    del tree["base"], tree["store"], tree["guard"], tree["version"]
    del tree["config"]["training"]["anchor_strength"]
    torch.save(tree | {"format": 1}, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert (loaded.store, loaded.guard, loaded.version) == ("", {}, "")
    assert loaded.base.strength == loaded.config.training.anchor_strength == 0
    assert_same(loaded.model, checkpoint.model)


def test_the_network_of_a_checkpoint_is_the_averaged_one(checkpoint, tmp_path, cpu):
    model = load_model(checkpoint, tmp_path / "a.pt", cpu)
    assert_same(dict(model.state_dict()), dict(checkpoint.ema))
    assert not torch.equal(model.head.weight, checkpoint.model["head.weight"])
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_checkpoint_says_which_version_wrote_it_and_one_of_before_loads(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "a.pt")
    tree = torch.load(tmp_path / "a.pt", weights_only=True)
    assert tree["version"] == load_checkpoint(tmp_path / "a.pt").version == __version__ != ""
    del tree["version"]
    torch.save(tree, tmp_path / "a.pt")
    before = load_checkpoint(tmp_path / "a.pt")
    assert before.version == "" and before.step == checkpoint.step
    for part in ("model", "ema", "optimizer"):
        assert_same(getattr(before, part), getattr(checkpoint, part))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(format=99), "checkpoint format 99, this program reads 2"),
        (lambda tree: tree.pop("format"), "not a checkpoint of train.py"),
        (lambda tree: tree.pop("ema"), "entries missing or unknown: ema"),
        (lambda tree: tree.update(extra=1), "entries missing or unknown: extra"),
        (lambda tree: tree["config"]["model"].update(hiden=1), "unknown key model.hiden"),
    ],
)
def test_a_checkpoint_of_another_form_is_refused_in_one_line(checkpoint, tmp_path, change, message):
    path = tmp_path / "a.pt"
    checkpoint.save(path)
    tree = torch.load(path, weights_only=True)
    change(tree)
    torch.save(tree, path)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")


def moments(tree: dict) -> dict:
    return tree["optimizer"]["state"][0]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda tree: tree.update(log=None), r"checkpoint\.log = null"),
        (lambda tree: tree.update(log=[]), r"checkpoint\.log = \[\]"),
        (lambda tree: tree.update(log={"clipped": 0}), r"checkpoint\.log = .*sums"),
        (lambda tree: tree["log"].update(sums=torch.zeros(3)), r"checkpoint\.log\.sums = .*of shape \(2, 4\)"),
        (lambda tree: tree["log"].update(sums=torch.full((2, 4), -1.0)), r"checkpoint\.log\.sums = .*0 or more"),
        (lambda tree: tree["log"].update(sums=torch.full((2, 4), torch.inf)), r"checkpoint\.log\.sums = .*finite"),
        (lambda tree: tree["log"].update(clipped="x"), r'checkpoint\.log\.clipped = "x"'),
        (lambda tree: tree["log"].update(clipped=-1), r"checkpoint\.log\.clipped = -1"),
        (lambda tree: tree.update(run={}), r"checkpoint\.run = {}"),
        (lambda tree: tree.update(run=torch.zeros(1)), r'checkpoint\.run = "Tensor"'),
        (lambda tree: moments(tree)["step"].fill_(-5), r"optimizer\.state\[0\]\.step = .*0 or more"),
        (lambda tree: moments(tree)["exp_avg_sq"].sub_(1), r"optimizer\.state\[0\]\.exp_avg_sq = .*0 or more"),
    ],
)
def test_an_entry_that_no_run_could_have_written_is_refused_by_its_place(checkpoint, tmp_path, change, place):
    path = tmp_path / "a.pt"
    dataclasses.replace(checkpoint, log={"sums": torch.ones(2, 4), "clipped": 3}, run="ab").save(path)
    tree = torch.load(path, weights_only=True)
    change(tree)
    torch.save(tree, path)
    with pytest.raises(UserError, match=rf"a\.pt: damaged \(.*{place}"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"latent": torch.zeros(1, 2, 2)}, torch.zeros(3), "text"])
def test_another_file_of_torch_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: not a checkpoint of train\.py"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused_in_one_line(checkpoint, tmp_path, share):
    path = tmp_path / "a.pt"
    checkpoint.save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"a\.pt: .*checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("head.bias"), "1 weights .*head.bias"),
        (lambda w: w.update({"head.extra": torch.zeros(1)}), "1 weights .*head.extra"),
        (lambda w: w.update({"head.bias": torch.zeros(13)}), "1 weights .*head.bias"),
        (lambda w: [w.update({f"_orig_mod.{name}": w.pop(name)}) for name in list(w)], "weights missing, extra"),
    ],
)
def test_a_missing_an_extra_and_a_misshapen_weight_are_named_and_nothing_is_loaded(config, checkpoint, change, named):
    model = build_model(config, SPEC)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = dict(checkpoint.model)
    change(weights)
    with pytest.raises(UserError, match=f"there.pt: .*{named}"):
        load_weights(model, weights, "there.pt")
    assert_same(dict(model.state_dict()), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.latent_channels": 4}, "model.latent_channels = 4, but the latents have 12"),
        ({"model.num_styles": 3}, "model.num_styles = 3, but the latents have 2"),
        ({"data.num_classes": 5}, "data.num_classes = 5, but the latents have 2 styles"),
    ],
)
def test_a_count_that_disagrees_with_the_latents_is_an_error(make_config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build_model(make_config(tmp_path, changes), SPEC)


def test_counts_come_from_the_latents_or_agree_with_them(make_config, tmp_path):
    agreeing = {"model.latent_channels": 12, "model.num_styles": 2, "data.num_classes": 2}
    for changes in ({}, agreeing):
        model = build_model(make_config(tmp_path, changes), SPEC)
        assert model.stem.weight.shape == (16, 12, 3, 3)
        assert model.null_style == 2 and model.style.weight.shape == (3, 8)


#################################################################################
#                                   The newest                                  #
#################################################################################


def save_at(checkpoint: Checkpoint, path, step: int) -> None:
    dataclasses.replace(checkpoint, step=step).save(path)


def test_epochs_are_ordered_by_number_and_other_files_are_passed_by(tmp_path):
    others = ["stage1_epochX.pt", "stage1_epoch3.pt.bak", ".stage1_epoch8.isonext-tmp-5_0.pt", "stage1_epoch4.png"]
    for name in ["stage1_epoch10.pt", "stage1_epoch9.pt", "stage1_epoch100.pt", *others]:
        (tmp_path / name).touch()
    assert [path.name for path in epoch_checkpoints(tmp_path)] == [f"stage1_epoch{n}.pt" for n in (9, 10, 100)]


@pytest.mark.parametrize(("interrupted_at", "expected"), [(50, "stage1_epoch10.pt"), (105, INTERRUPTED)])
def test_the_newest_is_the_one_with_the_most_steps(checkpoint, tmp_path, interrupted_at, expected):
    for epoch in (9, 10):
        save_at(checkpoint, tmp_path / f"stage1_epoch{epoch}.pt", 10 * epoch)
    save_at(checkpoint, tmp_path / INTERRUPTED, interrupted_at)
    path, found = newest_checkpoint(tmp_path)
    assert path.name == expected
    assert found.step == max(100, interrupted_at)


def test_a_damaged_newest_is_passed_over_with_a_warning(checkpoint, tmp_path, capsys):
    for epoch in (8, 9):
        save_at(checkpoint, tmp_path / f"stage1_epoch{epoch}.pt", 10 * epoch)
    whole = (tmp_path / "stage1_epoch9.pt").read_bytes()
    (tmp_path / "stage1_epoch10.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / INTERRUPTED).write_bytes(b"")
    path, found = newest_checkpoint(tmp_path)
    assert (path.name, found.step) == ("stage1_epoch9.pt", 90)
    warnings = capsys.readouterr().err.splitlines()
    assert [line.startswith("warning: passed over ") for line in warnings] == [True, True]
    assert "stage1_epoch10.pt" in "".join(warnings)


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "none") is None


def test_a_folder_of_damaged_checkpoints_is_no_fresh_start(tmp_path):
    (tmp_path / "stage1_epoch3.pt").write_bytes(b"cut")
    with pytest.raises(UserError, match="none of its 1 checkpoints can be read"):
        newest_checkpoint(tmp_path)


#################################################################################
#                                    Stage 2                                    #
#################################################################################


@pytest.fixture
def second(checkpoint, tmp_path):
    """A checkpoint of stage 2, and its path."""
    checkpoint.save(tmp_path / "stage1_epoch3.pt")
    path = second_stage(tmp_path / "stage1_epoch3.pt", tmp_path / "stage2_epoch1.pt")
    return load_checkpoint(path), path


def test_a_checkpoint_of_stage_2_holds_its_teacher_and_a_map(checkpoint, second, cpu):
    two, path = second
    assert (checkpoint.stage, two.stage) == (1, 2)
    assert_same(two.teacher, checkpoint.ema)
    assert_same(load_model(two, path, cpu).state_dict(), checkpoint.ema)
    assert_same(load_map(two, path, cpu).state_dict(), two.ema)
    assert load_map(checkpoint, path, cpu) is None
    assert not two.can_resume and checkpoint.can_resume  # as the helper made it


def test_the_weights_of_both_networks_of_stage_2_are_checked(second, tmp_path):
    two, _ = second
    lacking = {name: value for name, value in two.teacher.items() if name != "head.bias"}
    dataclasses.replace(two, teacher=lacking).save(tmp_path / "a.pt")
    dataclasses.replace(two, ema=two.teacher).save(tmp_path / "b.pt")
    dataclasses.replace(two, teacher={}).save(tmp_path / "c.pt")
    for name, missing in (("a", "head.bias"), ("b", "guidance.weight"), ("c", "guidance.weight")):
        with pytest.raises(UserError, match=missing):
            load_checkpoint(tmp_path / f"{name}.pt")


def test_a_dit_has_no_second_stage(make_config, tmp_path):
    config = make_config(tmp_path)
    config.model = dataclasses.replace(config.model, type="dit", num_heads=2, patch_size=2)
    with pytest.raises(UserError, match=r"stage 2 is for model\.type isonext"):
        network_of(config, SPEC, 2)


def test_each_stage_has_files_and_a_newest_of_its_own(second, checkpoint, tmp_path):
    two, path = second
    dataclasses.replace(two, step=8).save(tmp_path / interrupted(2))
    assert interrupted(2) == "stage2_interrupted.pt" and interrupted(1) == INTERRUPTED
    assert [found.name for found in epoch_checkpoints(tmp_path)] == ["stage1_epoch3.pt"]
    assert epoch_checkpoints(tmp_path, 2) == [path] and epoch_of(path) == 1
    assert newest_checkpoint(tmp_path, 2)[0].name == "stage2_interrupted.pt"
    assert newest_checkpoint(tmp_path)[0].name == "stage1_epoch3.pt"
