"""Latents of other programs as a store: LightningDiT's layout, and train/val files with user ids."""

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isonext.checkpoint import load_checkpoint, network_of
from isonext.data.dataset import load_split, open_store
from isonext.data.external import find_store, survey
from isonext.data.shards import Rows
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.pipeline import load_codec
from isonext.training.memory_plan import print_plan
from isonext.training.trainer import Trainer


def rank(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def write(path, labels: list[int], first: float = 0.0, name="labels", dtype=torch.float32, shape=(2, 2, 2), flip=False):
    """A file of latents that are `first`, `first` + 1, ... in all of their cells; mirrored ones are the negative."""
    values = torch.arange(len(labels)) + first
    latents = values.view(-1, *[1] * len(shape)).expand(-1, *shape).to(dtype).contiguous()
    path.parent.mkdir(exist_ok=True)
    tensors = {"latents": latents, name: torch.tensor(labels, dtype=torch.int64)}
    save_file(tensors | ({"latents_flip": -latents} if flip else {}), path)


def write_statistics(root, mean: list[float], std: list[float]) -> None:
    values = {"mean": torch.tensor(mean)[None, :, None, None], "std": torch.tensor(std)[None, :, None, None]}
    torch.save(values, root / "latents_stats.pt")


@pytest.fixture
def config(tmp_path, make_config):
    return make_config(tmp_path, {"data.image_size": 8, "autoencoder.name": "dct:f4c2", "data.val_fraction": 0.25})


@pytest.fixture
def root(tmp_path):
    """LightningDiT's layout: two shards of two ranks, three classes, 24 latents."""
    folder = tmp_path / "latents"
    write(folder / "latents_rank00_shard000.safetensors", [0, 1, 2, 0] * 4, first=0.0, flip=True)
    write(folder / "latents_rank01_shard000.safetensors", [1, 2] * 4, first=16.0, flip=True)
    write_statistics(folder, [1.0, 3.0], [2.0, 4.0])
    return folder


#################################################################################
#                             LightningDiT's layout                             #
#################################################################################


def test_a_folder_of_shards_is_a_store_with_the_configs_autoencoder_and_the_files_statistics(root, config):
    meta = find_store(root, config)
    assert meta.latents == LatentSpec("dct:f4c2", 2, 4, 8, ["0", "1", "2"], mean=[1.0, 3.0], std=[2.0, 4.0])
    assert meta.flip and meta.complete and not (root / "meta.json").exists()
    labels = [0, 1, 2, 0] * 4 + [1, 2] * 4
    names = [f"{label}/{row}" for row, label in enumerate(labels)]
    held = [name for name in names if rank(name) < 0.25]
    assert held and meta.split == {"train": [name for name in names if name not in held], "val": held}
    for style in "012":
        counts = {part: sum(name[0] == style for name in names) for part, names in meta.split.items()}
        assert meta.counts[style] == counts


@pytest.mark.parametrize("limit", [None, 0])
def test_its_latents_are_standardised_and_mirrored(root, config, limit):
    meta = find_store(root, config)
    split = load_split(root, meta, "train", memory_limit=limit)
    assert isinstance(split.latents, Rows) == (limit == 0)
    place = len(split) - 1
    row, label = (int(part) for part in reversed(split.names[place].split("/")))
    x, style = split.batch(torch.tensor([place, place]), torch.tensor([False, True]))
    assert style.tolist() == [label, label]
    assert x[:, 0, 0, 0].tolist() == [(row - 1) / 2, (-row - 1) / 2]
    assert x[:, 1, 1, 1].tolist() == [(row - 3) / 4, (-row - 3) / 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path, config, dtype):
    write(tmp_path / "latents" / "a.safetensors", [0, 0], first=0.5, dtype=dtype)
    write_statistics(tmp_path / "latents", [0.0, 0.0], [1.0, 2.0])
    split = load_split(tmp_path / "latents", find_store(tmp_path / "latents", config), "train")
    x, _ = split.batch(torch.arange(len(split)))
    assert x.dtype == torch.float32 and x[:, 1, 0, 0].tolist() == [(int(n[2:]) + 0.5) / 2 for n in split.names]


def test_without_statistics_they_are_those_of_the_training_split_and_a_line_says_so(root, config, capsys):
    (root / "latents_stats.pt").unlink()
    meta = find_store(root, config)
    rows = np.array([int(name.split("/")[1]) for name in meta.split["train"]], np.float64)
    values = np.concatenate([rows, -rows])
    assert meta.latents.mean == [values.mean()] * 2
    np.testing.assert_allclose(meta.latents.std, [values.std()] * 2, rtol=1e-12)
    said = capsys.readouterr().out
    assert said == f"{root}: no latents_stats.pt; mean and deviation are computed from {len(rows)} training latents\n"


def test_statistics_of_a_very_large_split_are_of_rows_evenly_spaced_in_it(root, config, capsys, monkeypatch):
    (root / "latents_stats.pt").unlink()
    monkeypatch.setattr("isonext.data.external.ENOUGH", 5)
    config.data.val_fraction = 0.0
    config.data.flip = False
    meta = find_store(root, config)
    assert "computed from 5 training latents" in capsys.readouterr().out
    np.testing.assert_allclose(meta.latents.std, np.std([0, 5, 10, 15, 20, 0, -5, -10, -15, -20]), rtol=1e-12)


def test_a_class_with_one_latent_is_trained_on(tmp_path, config):
    config.data.val_fraction = 0.9
    write(tmp_path / "latents" / "a.safetensors", [0] * 10 + [1])
    meta = find_store(tmp_path / "latents", config)
    assert meta.counts["1"] == {"train": 1, "val": 0} and meta.counts["0"]["val"] > 0


#################################################################################
#                         train and val files, user ids                         #
#################################################################################


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "val"), ("latents_train", "latents_val"), ("train-00", "val-00"), ("Training", "Validation")],
)
def test_files_named_train_and_val_are_the_split_and_user_ids_count_from_1(tmp_path, config, train, val):
    ids = [1, 2, 10, 3, 4, 5, 6, 7, 8, 9]
    write(tmp_path / "latents" / f"{train}.safetensors", ids, name="user_ids")
    write(tmp_path / "latents" / f"{val}.safetensors", [10, 1], name="user_ids", first=50.0)
    root = tmp_path / "latents"
    meta = find_store(root, config)
    assert meta.latents.styles == [f"user{number}" for number in range(1, 11)]
    assert meta.split["train"][:3] == ["user1/0", "user2/1", "user10/2"] and meta.split["val"] == [
        "user10/10",
        "user1/11",
    ]
    assert meta.counts["user10"] == {"train": 1, "val": 1} and meta.counts["user2"] == {"train": 1, "val": 0}
    held = load_split(root, meta, "val")
    assert held.styles.tolist() == [9, 0] and held.latents[0, :, 0, 0, 0].tolist() == [50.0, 51.0]
    assert meta.latents.mean == [4.5, 4.5], "held-out latents do not count"


def test_a_train_file_alone_is_split_by_hashes(tmp_path, config):
    write(tmp_path / "latents" / "train.safetensors", [1] * 40, name="user_ids")
    meta = find_store(tmp_path / "latents", config)
    assert meta.split["val"] == [f"user1/{row}" for row in range(40) if rank(f"user1/{row}") < 0.25] != []


#################################################################################
#                                    Refusals                                   #
#################################################################################


def refused(root, config, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_split(root, find_store(root, config), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "name", "message"),
    [
        (
            [0, 2, 5],
            "labels",
            "3 labels have no latent, the first is 1, though there are labels up to 5; number them from 0",
        ),
        ([2, 3], "user_ids", "1 labels have no latent, the first is 1, though .* up to 3; number them from 1"),
        ([0, -1], "labels", r"a\.safetensors: labels has a -1; they count from 0"),
        ([], "labels", "its files hold no latents"),
    ],
)
def test_labels_that_cannot_be_used_say_why(tmp_path, config, labels, name, message):
    write(tmp_path / "latents" / "a.safetensors", labels, name=name)
    refused(tmp_path / "latents", config, message)


def test_a_cut_shard_and_one_of_another_shape_are_named(root, config):
    path = root / "latents_rank01_shard000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refused(root, config, r"rank01_shard000\.safetensors: damaged, or no safetensors file")
    write(path, [1, 2], shape=(2, 4, 4), flip=True)
    refused(root, config, r"rank01_shard000\.safetensors: shape \(2, 4, 4\), but \(2, 2, 2\) in latents_rank00")


def test_names_of_files_must_all_say_or_none(tmp_path, config):
    for name in ("train", "val", "interval"):
        write(tmp_path / "latents" / f"{name}.safetensors", [0, 0])
    refused(tmp_path / "latents", config, r"interval\.safetensors: says neither train nor val")


def test_a_class_that_is_only_held_out_is_named(tmp_path, config):
    write(tmp_path / "latents" / "train.safetensors", [1, 2], name="user_ids")
    write(tmp_path / "latents" / "val.safetensors", [3], name="user_ids")
    refused(tmp_path / "latents", config, "all latents of label user3 are held out")


def test_sizes_that_do_not_fit_are_named(tmp_path, root, config):
    config.data.image_size = 9
    refused(root, config, r"data\.image_size = 9: the latents at .* have 2 cells a side")
    write(tmp_path / "wide" / "a.safetensors", [0], shape=(2, 2, 4))
    refused(tmp_path / "wide", config, "latents of 2 x 4 cells; they must be square")
    write(tmp_path / "series" / "a.safetensors", [0], shape=(2, 8))
    refused(tmp_path / "series", config, "latents of 8 cells; they must be square")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, r"of shape \(1, 2, 1, 1\)"),
        ({"mean": torch.zeros(1, 2, 1, 1)}, "must be a dict of `mean` and `std`"),
        ([1.0], "must be a dict of `mean` and `std`"),
        ({"mean": torch.zeros(2), "std": torch.tensor([1.0, 0.0])}, "std above 0; delete it"),
        ({"mean": torch.tensor([0, torch.nan]), "std": torch.ones(2)}, "of finite numbers"),
    ],
)
def test_a_bad_file_of_statistics_is_named(root, config, content, message):
    torch.save(content, root / "latents_stats.pt")
    refused(root, config, rf"latents_stats\.pt: .*{message}")


def test_a_damaged_file_of_statistics_and_latents_that_are_not_finite_are_named(root, config):
    (root / "latents_stats.pt").write_bytes(b"half")
    refused(root, config, r"latents_stats\.pt: damaged, or not a file of latent statistics")
    (root / "latents_stats.pt").unlink()
    write(root / "latents_rank00_shard000.safetensors", [0, 1, 2, 0], first=torch.inf, flip=True)
    refused(root, config, "its latents are not all finite numbers")


def test_other_channels_or_classes_than_the_configs_are_refused(root, config):
    spec = find_store(root, config).latents
    config.model.latent_channels = 32
    with pytest.raises(UserError, match=r"model\.latent_channels = 32, but the latents have 2; leave the key out"):
        network_of(config, spec)
    config.model.latent_channels, config.data.num_classes = None, 10
    with pytest.raises(UserError, match=r"data\.num_classes = 10, but the latents have 3 styles"):
        network_of(config, spec)


def test_an_autoencoder_of_another_cell_size_says_what_to_set(root, config, cpu):
    config.autoencoder.name = "dct:f8c2"
    with pytest.raises(UserError, match=r"of 4 pixels a cell, autoencoder dct:f8c2 has 8: data\.image_size was not"):
        load_codec(find_store(root, config).latents, cpu, "x.pt")
    config.data.image_size = 16
    assert load_codec(find_store(root, config).latents, cpu, "x.pt").factor == 8


def test_a_store_of_ours_and_no_store_are_open_stores_affair(store, make_config, tmp_path):
    config = make_config(store)
    assert find_store(store / "latents", config) == open_store(store / "latents")
    assert survey(tmp_path / "none", config) is None
    with pytest.raises(UserError, match=r"no latent store here; run: python preprocess_latents\.py"):
        find_store(tmp_path / "none", config)


def test_where_pictures_are_needed_another_programs_latents_are_refused(root):
    with pytest.raises(
        UserError, match="latents of another program, which name no pictures; give pictures with --data"
    ):
        open_store(root)


#################################################################################
#                              Planned and trained on                           #
#################################################################################


def test_the_plan_counts_them(root, config, capsys):
    print_plan(config, 8)
    out = capsys.readouterr().out
    assert f"latents 2 x 2 x 2 of 3 styles, from {root}\n" in out and ", 48 with mirrored ones\n" in out


def test_a_run_trains_on_them_and_resumes_only_on_the_same(root, config, capsys):
    config.training.anchor_cells = 1
    run = Trainer(config)
    run.fit(quiet=True)
    path = run.folder / "stage1_epoch1.pt"
    saved = load_checkpoint(path)
    assert saved.latents.styles == ["0", "1", "2"] and saved.latents.mean == [1.0, 3.0]
    assert run.state.step == 2 * (len(run.train) // 4)
    assert torch.isfinite(run.state.model.state_dict()["style.weight"]).all()
    again = Trainer(config, resume=str(path))
    again.fit(quiet=True)
    for name, weight in run.state.model.state_dict().items():
        assert torch.equal(weight, again.state.model.state_dict()[name]), name
    write(root / "latents_rank02_shard000.safetensors", [0, 1, 2] * 3, flip=True)
    with pytest.raises(UserError, match="was trained on other pictures"):
        Trainer(config, resume=str(path))
