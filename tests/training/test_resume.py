"""What a run may start from: what may change on the way, what may not, and the weights of another run."""

import dataclasses
import json

import pytest
import torch

from helpers import call, call_within, refused
from isonext.checkpoint import load_checkpoint
from isonext.config import config_to_dict
from isonext.data.preprocess import preprocess
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.training.resume import in_units_of, take_over
from isonext.training.trainer import Trainer


@pytest.fixture
def config(store, make_config):
    """A function: {"section.key": value} -> the config of a run on `store`, by name of its folder."""
    return lambda changes=None, run="run": make_config(
        store, {"checkpoint.save_dir": str(store / run)} | (changes or {})
    )


@pytest.fixture
def started(config) -> Trainer:
    """A run that was stopped after two steps."""
    trainer = Trainer(config())
    trainer.fit(stop=lambda: trainer.state.step == 2, quiet=True)
    return trainer


#################################################################################
#                               The same run again                              #
#################################################################################


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.num_layers", 2),
        ("model.hidden_dim", 32),
        ("model.kernel_size", 5),
        ("model.style_dim", 4),
        ("training.batch_size", 3),
        ("training.anchor_strength", 0.3),
        ("training.anchor_cells", 1),
    ],
)
def test_what_may_not_change_is_refused_by_name(config, started, key, value):
    with pytest.raises(UserError, match=rf"stage1_interrupted\.pt: was trained with {key} .*, not {value}: "):
        Trainer(config({key: value}), "newest")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.stage1_epochs", 9),
        ("training.save_every_epochs", 3),
        ("training.num_workers", 3),
        ("training.micro_batch_size", 2),
        ("training.learning_rate", 3e-4),
        ("training.gradient_checkpointing", True),
    ],
)
def test_what_may_change_changes_with_a_line(config, started, capsys, key, value):
    section, _, name = key.partition(".")
    before = getattr(getattr(config(), section), name)
    capsys.readouterr()
    resumed = Trainer(config({key: value}), "newest")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{key} is now {value}, was {before}"
    assert lines[1].startswith("resumed from ") and len(lines) == 2
    assert resumed.state.step == 2


def test_nothing_changed_is_no_line(config, started, capsys):
    capsys.readouterr()
    Trainer(config(), "newest")
    assert capsys.readouterr().out.count("\n") == 1
    counted = {"model.latent_channels": started.spec.channels, "model.num_styles": 2}  # said instead of counted
    Trainer(config(counted), "newest")
    assert capsys.readouterr().out.count("\n") == 1


def test_other_pictures_are_another_run(config, started, store, draw, make_config, cpu):
    for number in range(20, 30):
        draw(store / "raw" / "ink" / f"{number}.png", seed=number)
    preprocess(make_config(store), cpu, quiet=True)
    with pytest.raises(UserError, match=r"trained on other pictures than .*latents holds now; .*--init"):
        Trainer(config(), "newest")


def test_what_the_guard_remembers_goes_on(config, started):
    started.state.guard.skipped, started.state.guard.in_a_row = 3, 1
    started.save(started.folder / "stage1_interrupted.pt")
    resumed = Trainer(config(), "newest")
    assert resumed.state.guard.record == started.state.guard.record and len(resumed.state.guard.norms) == 2


def other_store(store, draw, make_config, cpu, kind: str) -> dict:
    """A store that a model of `store` does not fit, and the config that points to it."""
    changes = {"data.data_root": str(store / "other")}
    if kind == "styles":
        for number in range(5):
            draw(store / "raw" / "water" / f"{number}.png", seed=number)
    elif kind == "autoencoder":
        changes["autoencoder.name"] = "dct:f4c11"
    else:
        changes["data.image_size"] = 32
    preprocess(make_config(store, changes), cpu, quiet=True)
    return changes


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("styles", r"styles \['ink', 'oil'\], the store has \['ink', 'oil', 'water'\]"),
        ("autoencoder", "autoencoder dct:f4c12, the store has dct:f4c11"),
        ("image_size", "image_size 16, the store has 32"),
    ],
)
def test_resume_on_other_latents_is_refused_by_name(config, store, draw, make_config, cpu, kind, message):
    started = Trainer(config())
    started.fit(stop=lambda: started.state.step == 2, quiet=True)
    changes = other_store(store, draw, make_config, cpu, kind)
    with pytest.raises(UserError, match=message):
        Trainer(config(changes), "newest")


def edit_store(store, **changes) -> None:
    tree = json.loads((store / "latents/meta.json").read_text())
    tree["latents"] |= changes
    (store / "latents/meta.json").write_text(json.dumps(tree))


def test_an_autoencoder_that_moved_is_no_other_and_replaced_weights_are(config, started, store):
    edit_store(store, autoencoder="elsewhere/vae")
    assert Trainer(config(), "newest").spec.autoencoder == "elsewhere/vae", "where it lies now"
    edit_store(store, autoencoder="dct:f4c12", autoencoder_digest="0" * 64)
    words = (
        r"stage1_interrupted\.pt: was trained on latents of autoencoder dct:f4c12 \(sha256 \w{12}\), the store has dct"
    )
    with pytest.raises(UserError, match=words):
        Trainer(config(), "newest")
    with pytest.raises(UserError, match=r"is of latents of autoencoder dct:f4c12 \(sha256"):
        Trainer(config(run="fine"), init=str(started.folder / "stage1_interrupted.pt"))


def test_an_autoencoder_that_is_named_takes_the_place_of_the_stores_and_is_checked(config, store):
    edit_store(store, autoencoder="gone/vae")
    with pytest.raises(UserError, match=r"latents: trained on 12-channel latents, autoencoder dct:f4c11 gives 11"):
        Trainer(config(), autoencoder="dct:f4c11")
    trainer = Trainer(config(), autoencoder="dct")
    assert trainer.spec.autoencoder == trainer.train.spec.autoencoder == "dct:f4c12"
    assert trainer.validation.make_pipeline().codec.channels == 12
    edit_store(store, autoencoder_digest="0" * 64)
    with pytest.raises(UserError, match=r"the autoencoder gone/vae \(sha256 0{12}\), but dct"):
        Trainer(config(), autoencoder="dct")


def test_train_hands_on_the_autoencoder_of_set_alone(store, make_config):
    """A config of another autoencoder than the store's is fine: preprocessing may have been told by --set."""
    (store / "c.json").write_text(json.dumps(config_to_dict(make_config(store, {"autoencoder.name": "some/vae"}))))
    flags = ("--config", "c.json", "--set", "training.stage1_epochs=1")
    refused(call_within(store, "train", *flags, "--set", "autoencoder.name=dct:f4c11"), "12-channel latents", "f4c11")
    assert not (store / "run").exists()


#################################################################################
#                            The weights of another run                         #
#################################################################################


@pytest.fixture
def three_styles(store, draw, make_config, cpu) -> dict:
    """The config changes of a store of three styles, of which `oil` and `ink` are known; `aqua` comes first."""
    changes = {"data.raw_data_root": str(store / "raw3"), "data.data_root": str(store / "latents3")}
    for number, style in enumerate(("ink", "aqua", "oil")):
        for picture in range(8):
            draw(store / "raw3" / style / f"{picture}.png", seed=1000 * number + picture)
    preprocess(make_config(store, changes), cpu, quiet=True)
    return changes


def test_known_styles_keep_their_velocity_and_new_ones_are_new(config, started, three_styles, capsys):
    old, path = started, str(started.folder / "stage1_interrupted.pt")
    capsys.readouterr()
    new = Trainer(config(three_styles, "fine"), init=path)
    assert "step 2; styles kept: ink, oil; new: aqua" in capsys.readouterr().out
    assert (new.state.step, new.state.guard.record["norms"]) == (0, [])
    x, t = torch.randn(2, new.spec.channels, 4, 4), torch.tensor([0.3, 0.8])
    for ours, theirs in ((new.state.model, old.state.model), (new.state.ema.model, old.state.ema.model)):
        for style in ("ink", "oil", None):  # None is the null style
            a, b = (
                torch.full((2,), len(run.spec.styles) if style is None else run.spec.styles.index(style))
                for run in (new, old)
            )
            with torch.no_grad():
                assert torch.equal(ours.eval()(x, t, a), theirs.eval()(x, t, b))
        aqua = ours.style.weight[new.spec.styles.index("aqua")]
        assert not any(torch.equal(aqua, row) for row in theirs.style.weight)
    assert (new.spec.mean, new.spec.std) == (old.spec.mean, old.spec.std)  # the network's units
    assert new.train.spec == new.val.spec == new.spec
    assert new.base.mean.shape[0] == 3
    new.fit(quiet=True)
    assert load_checkpoint(new.folder / "stage1_epoch2.pt").latents == new.spec


def test_the_average_of_another_run_is_not_thrown_away_by_the_warm_up_of_a_new_one(config, started, three_styles):
    # At a rate of zero the weights stay those of the other run, and so its average moves as slowly as it did there.
    path = str(started.folder / "stage1_interrupted.pt")
    new = Trainer(config(three_styles | {"training.learning_rate": 0.0}, "fine"), init=path)
    before = [parameter.clone() for parameter in new.state.ema.model.parameters()]
    with torch.no_grad():
        for parameter in new.state.model.parameters():
            parameter += 1.0
    new.state.ema.update(new.state.model, step=0)
    decay = min(new.state.ema.decay, (1 + started.state.step) / (10 + started.state.step))  # not 1 / 10
    for now, then, own in zip(new.state.ema.model.parameters(), before, new.state.model.parameters(), strict=True):
        torch.testing.assert_close(now, then + (1 - decay) * (own - then))
    new.save(new.folder / "stage1_epoch1.pt")
    assert load_checkpoint(new.folder / "stage1_epoch1.pt").ema_head_start == started.state.step
    again = Trainer(config(three_styles, "fine"), resume=str(new.folder / "stage1_epoch1.pt"))
    assert again.state.ema.head_start == started.state.step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.num_layers": 2}, "weights missing"),
        ({"model.style_dim": 4}, "has embeddings of 8 numbers, the config of 4"),
    ],
)
def test_weights_that_do_not_fit_are_refused(config, started, change, message):
    with pytest.raises(UserError, match=message):
        Trainer(config(change, "fine"), init=str(started.folder / "stage1_interrupted.pt"))


def test_weights_of_other_latents_are_refused(started):
    spec = started.spec
    other = load_checkpoint(started.folder / "stage1_interrupted.pt")
    for change, message in (
        ({"autoencoder": "dct:f8", "autoencoder_digest": "0"}, "autoencoder dct:f4c12, the store has dct:f8"),
        ({"channels": 3}, "channels 12, the store has 3"),
    ):
        with pytest.raises(UserError, match=f"a.pt: is of latents of {message}"):
            in_units_of(dataclasses.replace(spec, **change), other, "a.pt")


def test_a_run_with_no_style_in_common_keeps_the_null_style_alone(started):
    other = load_checkpoint(started.folder / "stage1_interrupted.pt")
    spec = dataclasses.replace(started.spec, styles=["x", "y", "z"])
    networks = (fresh(started, 3), fresh(started, 3))
    assert "styles kept: none; new: x, y, z" in take_over(networks, other, "a.pt", spec)
    assert torch.equal(networks[1].style.weight[3], other.ema["style.weight"][2])


def fresh(trainer: Trainer, styles: int) -> torch.nn.Module:
    from isonext.checkpoint import build_model

    spec = LatentSpec(**dataclasses.asdict(trainer.spec) | {"styles": [str(n) for n in range(styles)]})
    return build_model(trainer.config, spec)


def test_the_flags_exclude_each_other_and_a_missing_file_is_one_line(studio):
    done = call(studio, "train.py", "--resume", "--init", "a.pt")
    assert done.returncode == 2 and "not allowed with" in done.stderr
    done = call(studio, "train.py", "--init", "none.pt", "--set", "checkpoint.save_dir=elsewhere")
    refused((done.returncode, done.stdout, done.stderr), "none.pt", "no such checkpoint")
