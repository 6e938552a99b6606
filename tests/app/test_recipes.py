"""What may be trained from the page: the folders and configs that are listed, and the commands that come of them."""

import json
from pathlib import Path

import pytest

from helpers import ROOT
from isonext.app.recipes import Recipe, arguments, list_configs, list_folders, plan_training
from isonext.errors import UserError

RUNS, PICTURES = Path("checkpoints"), Path("raw_data")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with two configs, two styles, and a data set of two more."""
    monkeypatch.chdir(tmp_path)
    for name in ("photo", "ink", "pets/cat", "pets/dog", ".hidden/a", "ink/deep"):
        (PICTURES / name).mkdir(parents=True)
    Path("config.json").write_text('{"training": {"stage1_epochs": 7}} // a comment')
    Path("configs").mkdir()
    data = {"raw_data_root": "raw_data/pets", "data_root": "latents/p"}
    Path("configs/own.json").write_text(json.dumps({"data": data, "checkpoint": {"save_dir": "checkpoints/deep/p"}}))
    return tmp_path


def test_folders_of_folders_are_listed_the_root_first_where_some_hold_pictures_alone(place):
    assert list_configs() == ["config.json", "configs/own.json"]
    assert list_folders(PICTURES) == [("raw_data", "."), ("raw_data/ink", "ink"), ("raw_data/pets", "pets")]
    (PICTURES / "photo" / "deep").mkdir()
    assert [value for _, value in list_folders(PICTURES)] == ["ink", "pets", "photo", "."]
    assert list_folders(Path("nowhere")) == [] and list_folders(PICTURES / "photo" / "deep") == []


def test_a_config_of_the_folder_keeps_its_places_and_needs_no_flags(place):
    training = plan_training(Recipe(".", "config.json"), PICTURES, RUNS)
    assert training.commands.splitlines()[1].endswith("/train.py --config config.json")
    assert (training.name, training.folder) == (".", RUNS)
    own = plan_training(Recipe("pets", "configs/own.json"), PICTURES, RUNS)
    assert (own.name, own.folder) == ("deep/p", Path("checkpoints/deep/p"))
    assert own.train[1:] == ["--config", "configs/own.json"]


def test_another_folder_gets_places_after_its_name_and_the_configs(place):
    training = plan_training(Recipe("pets", "config.json", epochs=3, size=64, batch=8, dct=True), PICTURES, RUNS)
    flags = ["data.raw_data_root=raw_data/pets", "data.data_root=latents/pets", "checkpoint.save_dir=checkpoints/pets"]
    flags += ["training.stage1_epochs=3", "data.image_size=64", "training.batch_size=8", "autoencoder.name=dct"]
    typed = [part for flag in flags for part in ("--set", flag)]
    assert training.train == [str(ROOT / "train.py"), "--config", "config.json", *typed]
    assert training.preprocess == [str(ROOT / "preprocess_latents.py"), *training.train[1:]]
    assert arguments(training.train)[1:] == training.train
    other = plan_training(Recipe("ink", "configs/own.json"), PICTURES, RUNS)
    assert other.name == "ink_own" and other.config.data.data_root == "latents/ink_own"


def test_a_config_whose_runs_lie_elsewhere_writes_below_the_runs_of_the_page(place):
    training = plan_training(Recipe("pets", "configs/own.json"), PICTURES, Path("elsewhere"))
    assert training.folder == Path("elsewhere/pets_own")


def test_the_commands_are_what_a_person_would_type_quoted(place, monkeypatch):
    (PICTURES / "my pets" / "cat").mkdir(parents=True)
    training = plan_training(Recipe("my pets", "config.json"), PICTURES, RUNS)
    assert "--set 'data.raw_data_root=raw_data/my pets'" in training.commands
    monkeypatch.chdir(ROOT)
    assert training.commands.startswith("python preprocess_latents.py --config config.json")


@pytest.mark.parametrize("name", ["stage1_epoch2.pt", "stage1_interrupted.pt", "best.pt"])
def test_a_run_that_has_begun_is_gone_on_with(place, name):
    (RUNS / "pets").mkdir(parents=True)
    recipe = Recipe("pets", "config.json")
    assert "--resume" not in plan_training(recipe, PICTURES, RUNS).train
    (RUNS / "pets" / name).write_bytes(b"")
    training = plan_training(recipe, PICTURES, RUNS)
    assert training.train[-1] == "--resume" and "--resume" not in training.preprocess


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pictures": "../outside"}, "no such folder of pictures here"),
        ({"pictures": "/etc"}, "no such folder of pictures here"),
        ({"pictures": "photo"}, "no such folder of pictures here"),
        ({"pictures": ["."]}, "no such folder of pictures here"),
        ({"pictures": None}, "no such folder of pictures here"),
        ({"config": "/etc/passwd"}, "no such config here"),
        ({"config": "configs/../config.json"}, "no such config here"),
        ({"config": "--debug"}, "no such config here"),
        ({"epochs": -1}, "training.stage1_epochs"),
        ({"size": 4}, "data.image_size"),
        ({"batch": 10**7}, "training.batch_size"),
    ],
)
def test_what_is_not_listed_or_out_of_range_is_one_sentence(place, change, words):
    with pytest.raises(UserError) as error:
        plan_training(Recipe(**({"pictures": ".", "config": "config.json"} | change)), PICTURES, RUNS)
    assert words in str(error.value) and "\n" not in str(error.value)
