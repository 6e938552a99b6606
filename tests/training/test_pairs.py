"""Stage 2: the teacher's pairs, what a step draws of them, and a run from stage 1 on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import TINY, call_within, refused
from isonext.checkpoint import load_checkpoint, network_of
from isonext.config import TrainingConfig, config_from_dict, config_to_dict
from isonext.data.dataset import LatentSplit
from isonext.data.store import LatentSpec, read_meta
from isonext.errors import UserError
from isonext.pipeline import settled
from isonext.training import validation
from isonext.training.log import read_metrics
from isonext.training.memory_plan import count_needs, print_plan
from isonext.training.pairs import AT_ONCE, FILE, Pairs, choose_all, draw_pairs
from isonext.training.trainer import Trainer, train
from model import count_parameters

SHORT = {"training.stage2_epochs": 4, "training.stage2_pairs": 12, "training.stage1_epochs": 1}
TRAINING = TrainingConfig(batch_size=4, stage2_pairs=100)


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch):
    monkeypatch.setitem(validation.CLASSIFIER, "steps", 12)


@pytest.fixture
def config(store, make_config):
    return lambda changes=None: make_config(store, SHORT | (changes or {}))


@pytest.fixture
def first(config) -> str:
    """A checkpoint of stage 1."""
    return str(train(config(), quiet=True).folder / "stage1_epoch1.pt")


def split_of(*counts: int) -> LatentSplit:
    """Pictures of 1 x 2 x 2 latents that are all n, mirrored ones all -n - 1."""
    number = torch.arange(sum(counts)).float()
    latents = torch.stack([number, -number - 1])[:, :, None, None, None].expand(2, -1, 1, 2, 2).numpy()
    spec = LatentSpec("dct", 1, 8, 16, [str(style) for style in range(len(counts))], [0.0], [1.0])
    styles = torch.cat([torch.full((count,), style) for style, count in enumerate(counts)])
    return LatentSplit(spec, latents, styles, [str(style) for style in styles.tolist()])


def made(*counts: int) -> Pairs:
    """Chosen pairs whose results are 1000 + their number."""
    pairs = choose_all(split_of(*counts), split_of(*counts), TRAINING)["train"]
    pairs.result = (1000 + torch.arange(len(pairs)))[:, None, None, None].expand(-1, 1, 2, 2).half()
    return pairs


#################################################################################
#                                What is drawn                                  #
#################################################################################


def test_pairs_are_of_all_styles_as_many_of_all_pictures_in_turn_and_never_to_the_own_style():
    chosen = choose_all(split_of(10, 5, 20), split_of(3, 0, 2), TRAINING)
    pairs, source = chosen["train"], chosen["train"].split.styles[chosen["train"].picture]
    assert source.bincount().tolist() == [34, 33, 33]
    of_first = pairs.picture[source == 0]
    assert sorted(of_first[:10].tolist()) == list(range(10)) and of_first.bincount(minlength=10).max() == 4
    assert (pairs.target != source).all() and len(set(zip(source.tolist(), pairs.target.tolist(), strict=True))) == 6
    assert 0.3 < pairs.mirrored.float().mean() < 0.7
    low, high = TRAINING.stage2_scales
    assert pairs.scale.unique().numel() == 4 and low <= pairs.scale.min() <= pairs.scale.max() <= high
    assert (pairs.scale[:AT_ONCE] == pairs.scale[0]).all()
    assert sorted(chosen["val"].picture.tolist()) == [0, 1, 2, 3, 4]


def test_a_batch_has_the_values_of_its_pairs():
    pairs = made(10, 20)
    identity = torch.tensor([False, True, False])
    batch = pairs.batch(torch.tensor([4, 5, 6]), torch.tensor([0.0, 0.5, 1.0]), identity)
    for row, number in enumerate((4, 5, 6)):
        picture = pairs.picture[number].item()
        latent = -picture - 1 if pairs.mirrored[number] else picture
        assert (batch.x0[row] == latent).all()
        assert (batch.x1[row] == (latent if number == 5 else 1000 + number)).all()
        assert batch.style.source[row] == (picture >= 10)
        assert (batch.style.target[row] == batch.style.source[row]) == (number == 5)
        assert batch.style.scale[row] == pairs.scale[number]
    assert batch.t.tolist() == [0.0, 0.5, 1.0]


def test_a_draw_is_a_function_of_seed_and_step_and_a_row_is_the_same_whoever_draws_it():
    pairs = made(10, 20)
    one, same, other = (draw_pairs(pairs, TRAINING, step) for step in (3, 3, 4))
    seed = draw_pairs(pairs, replace(TRAINING, seed=1), 3)
    assert torch.equal(one.x1, same.x1) and torch.equal(one.t, same.t)
    assert not torch.equal(one.x1, other.x1) and not torch.equal(one.x1, seed.x1)
    part = draw_pairs(pairs, TRAINING, 3, slice(1, None, 2))
    assert torch.equal(part.x1, one.x1[1::2]) and torch.equal(part.style.target, one.style.target[1::2])
    epoch = [draw_pairs(pairs, TRAINING, step) for step in range(25)]
    results = torch.cat([batch.x1[batch.style.source != batch.style.target] for batch in epoch])
    assert len(results[:, 0, 0, 0].unique()) == len(results)  # each pair once an epoch


def test_shares_of_times_and_of_identities():
    pairs = made(10, 20)
    batches = [draw_pairs(pairs, TRAINING, step) for step in range(1000)]
    t = torch.cat([batch.t for batch in batches])
    assert abs((t == 0).float().mean() - 0.4) < 0.03 and abs((t == 1).float().mean() - 0.2) < 0.03
    between = t[(t > 0) & (t < 1)]
    assert abs(between.mean() - 0.5) < 0.03 and between.min() < 0.02 and between.max() > 0.98
    equal = torch.cat([batch.style.source == batch.style.target for batch in batches])
    assert abs(equal.float().mean() - 0.1) < 0.02


def test_one_style_has_no_transfers():
    with pytest.raises(UserError, match="between styles, and this store has one"):
        choose_all(split_of(10), split_of(3), TRAINING)


#################################################################################
#                                   The run                                     #
#################################################################################


def test_results_are_the_teachers_transfers(config, first):
    trainer = Trainer(config(), init=first, stage=2)
    pairs = choose_all(trainer.train, trainer.val, trainer.config.training)["train"]
    results = load_file(trainer.folder / FILE)["train"]
    teacher = trainer._make_teacher()
    x0, source = pairs.sources(slice(0, 12))
    settings = replace(trainer.validation.settings, method="alf", num_steps=2, cfg_scale=pairs.scale[0].item())
    expected = teacher.transfer(x0, source, pairs.target, settings).latents
    assert torch.equal(results, expected.half())


def test_stage_2_learns_by_absolute_errors(config, first):
    trainer = Trainer(config({"training.use_amp": False}), init=first, stage=2)
    batch = trainer.samples.held_out(2)
    middle = batch.x0.lerp(batch.x1, batch.t.view(-1, 1, 1, 1))
    with torch.no_grad():
        errors = trainer.state.ema.model(middle, batch.t, batch.style) - (batch.x1 - batch.x0)
        losses = trainer.validation.losses(batch)
    torch.testing.assert_close(losses, errors.abs().mean((1, 2, 3)), rtol=1e-5, atol=0)


def test_stage_2_begins_as_stage_1_under_the_target_style_and_leaves_its_files_alone(config, first, store):
    before = {path: path.read_bytes() for path in (store / "run").rglob("*") if path.is_file()}
    trainer = Trainer(config(), init=first, stage=2)
    teacher = load_checkpoint(first).ema
    for network in (trainer.state.model, trainer.state.ema.model):
        weights = network.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in teacher.items())
        assert not weights["source.weight"].any() and not weights["guidance.weight"].any()
    trainer.fit(quiet=True)
    assert {path: path.read_bytes() for path in before} == before
    done = load_checkpoint(trainer.folder / "stage2_epoch4.pt")
    assert (done.stage, done.step, done.config.inference.method, done.config.inference.num_steps) == (2, 12, "map", 1)
    assert all(torch.equal(done.teacher[name], tensor) for name, tensor in teacher.items())
    assert (trainer.folder / "preview_epoch4.png").exists() and done.config.inference.cfg_scale == "auto"
    last = [line for line in read_metrics(trainer.folder / "metrics.jsonl") if "val_loss" in line][-1]
    assert {"val_style_success", "val_ssim"} <= last.keys() and "val_leakage" not in last


def test_stopped_and_resumed_is_the_run_left_in_peace(config, first, store):
    place = {"checkpoint.save_dir": str(store / "whole")}
    whole = train(config(place), init=first, stage=2, quiet=True)
    stopped = Trainer(config(), init=first, stage=2)
    stopped.fit(stop=lambda: stopped.state.step == 5, quiet=True)
    kept = (stopped.folder / FILE).read_bytes()
    assert (stopped.folder / "stage2_interrupted.pt").exists()
    resumed = train(config(), "newest", stage=2, quiet=True)
    assert (resumed.folder / FILE).read_bytes() == kept
    for one, other in ((whole.state.model, resumed.state.model), (whole.state.ema.model, resumed.state.ema.model)):
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    losses = [[line.get("loss") for line in read_metrics(run.folder / "metrics.jsonl")] for run in (whole, resumed)]
    assert losses[0] == losses[1] and not (resumed.folder / "stage2_interrupted.pt").exists()


@pytest.mark.parametrize("damage", ["cut", "nan", "steps", "weights"])
def test_a_file_that_does_not_fit_is_made_anew(config, first, damage, capsys):
    path = Trainer(config(), init=first, stage=2).folder / FILE
    good, tensors = path.read_bytes(), load_file(path)
    if damage == "cut":
        path.write_bytes(good[:-1])
    elif damage == "nan":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors["train"][0, 0, 0, 0] = torch.nan
        save_file(tensors, path, metadata)
    elif damage == "weights":
        teacher = load_checkpoint(first)
        teacher.ema["stem.bias"] += 0.1
        teacher.save(Path(first))
    capsys.readouterr()
    Trainer(config({"inference.num_steps": 3} if damage == "steps" else {}), init=first, stage=2)
    line, other = capsys.readouterr().out.splitlines()[1], damage in ("steps", "weights")
    assert line.startswith(f"{path} {'is of another teacher' if other else 'is damaged'}")
    assert line.endswith("its pairs are made anew") and (path.read_bytes() == good) == (not other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inference.method": "map"}, "its teacher needs another, such as alf"),
        ({"inference.cfg_scale": 5.0}, r"cfg_scale = 5: stage 2 is taught scales from 1 to 4"),
        ({"training.stage2_pairs": 3}, "3 pairs, fewer than one batch of 4"),
        ({"model.num_layers": 2}, "weights missing"),
    ],
)
def test_what_stage_2_cannot_begin_with_is_refused(config, first, store, changes, message):
    with pytest.raises(UserError, match=message):
        Trainer(config(changes), init=first, stage=2)
    assert not (store / "run/stage2/stage2_epoch1.pt").exists()


def test_other_styles_and_other_stages_are_refused(config, first, store):
    trainer = Trainer(config(), init=first, stage=2)
    trainer.fit(stop=lambda: trainer.state.step == 1, quiet=True)
    second = str(trainer.folder / "stage2_interrupted.pt")
    elsewhere = {"checkpoint.save_dir": str(store / "elsewhere")}
    for stage in (1, 2):
        with pytest.raises(UserError, match="is of stage 2, and --init takes the weights of stage 1"):
            Trainer(config(elsewhere), init=second, stage=stage)
    with pytest.raises(UserError, match="is of stage 2, this run of stage 1"):
        Trainer(config(elsewhere), second)
    with pytest.raises(UserError, match="is of stage 1, this run of stage 2"):
        Trainer(config(elsewhere), first, stage=2)
    with pytest.raises(UserError, match="no checkpoint of stage 2 yet; start with --stage 2 --init"):
        Trainer(config(elsewhere), "newest", stage=2)
    with pytest.raises(UserError, match=r"was trained with training.stage2_pairs 12, not 16: epochs would not line up"):
        Trainer(config({"training.stage2_pairs": 16}), "newest", stage=2)
    with pytest.raises(UserError, match="holds the checkpoints of a run; go on with --resume"):
        Trainer(config(), init=first, stage=2)
    renamed = load_checkpoint(first)
    renamed.latents = replace(renamed.latents, styles=["ink", "water"])
    renamed.save(store / "renamed.pt")
    with pytest.raises(UserError, match="its styles are ink, water, those of the store ink, oil; stage 2 takes those"):
        Trainer(config(elsewhere), init=str(store / "renamed.pt"), stage=2)


def test_a_front_is_measured_within_the_scales_that_were_taught(config, first):
    changes = {"inference.cfg_scale": "auto", "training.stage2_scales": [1.2, 2.5], "training.stage2_epochs": 1}
    trainer = train(config(changes), init=first, stage=2, quiet=True)
    front = load_checkpoint(trainer.folder / "stage2_epoch1.pt").front
    assert [point["cfg_scale"] for point in front["points"]] == [1.2, 1.5, 2.0, 2.5]


def test_the_last_epoch_chooses_the_scale_of_the_map_and_its_teacher_keeps_the_usual_one(config, first):
    changes = {"inference.cfg_scale": 3.0, "training.stage2_epochs": 2, "training.save_every_epochs": 1}
    folder = train(config(changes), init=first, stage=2, quiet=True).folder
    halfway, last = (load_checkpoint(folder / f"stage2_epoch{epoch}.pt") for epoch in (1, 2))
    assert halfway.config.inference.cfg_scale == 3.0 and not halfway.front
    assert last.config.inference.cfg_scale == "auto" and 3 <= last.front["scale"] <= 4
    assert [point["cfg_scale"] for point in last.front["points"]] == [3.0, 4.0]  # none below that of the config
    legs = settled(config_to_dict(last.config), (), {"method": "alf"}).inference
    assert (legs.cfg_scale, legs.num_steps) == (2.0, 20)


def test_without_held_out_pictures_the_scale_of_the_map_stays_as_given(config, first, monkeypatch):
    monkeypatch.setattr("isonext.training.trainer.can_be_transferred", lambda val: False)
    folder = train(config({"training.stage2_epochs": 1}), init=first, stage=2, quiet=True).folder
    last = load_checkpoint(folder / "stage2_epoch1.pt")
    assert last.config.inference.cfg_scale == 2.0 and not last.front


def test_the_plan_of_stage_2_counts_its_weights(store, config, capsys):
    print_plan(config(), 8, stage=2)
    second, spec = capsys.readouterr().out, read_meta(store / "latents").latents
    network = network_of(config(), spec)()
    more = 2 * 8 + 8 * 8  # a row a style beside the target's, and the matrix of guidance
    assert count_needs(network_of(config(), spec, 2), spec, True, True)("none").parameters == (
        count_parameters(network) + more
    )
    assert f"{(count_parameters(network) + more) / 1e6:.2f} M" in second


def test_a_dit_has_no_stage_2(store, first):
    tree = {section: dict(values) for section, values in TINY.items()}
    tree["model"] = {"type": "dit", "hidden_dim": 16, "num_heads": 2, "num_layers": 1, "time_dim": 8}
    tree["data"] |= {"data_root": str(store / "latents")}
    tree["checkpoint"] = {"save_dir": str(store / "run")}
    with pytest.raises(UserError, match=r"stage 2 is for model\.type isonext"):
        Trainer(config_from_dict(tree), init=first, stage=2)


#################################################################################
#                                 The command                                   #
#################################################################################


def test_from_stage_1_to_stage_2_by_commands(studio):
    flags = ("--stage", "2", "--set", "training.stage2_pairs=64", "--set", "training.stage2_epochs=12")
    refused(call_within(studio, "train", *flags), "--stage 2 begins with a trained stage 1", "--init")
    status, _, err = call_within(studio, "train", *flags, "--init", "checkpoints/stage1_epoch4.pt")
    assert status == 0, err
    folder = studio / "checkpoints/stage2"
    assert load_checkpoint(folder / "stage2_epoch12.pt").step == 96
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-24:]) < 0.8 * sum(losses[:24]), losses
    picture = ("--input", "raw_data/cold/000.png", "--source_style", "cold", "--target_style", "warm")
    output = ("--output", "warm.png", "--certify")
    status, out, err = call_within(studio, "inference", "--checkpoint", folder / "stage2_epoch12.pt", *picture, *output)
    assert status == 0 and (studio / "warm.png").exists() and "(0 of 768 elements differ)" in out, out + err
