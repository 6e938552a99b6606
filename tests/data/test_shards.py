"""Latents in safetensors shards: what is written, how a store of them is brought up to date, and how rows are read."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from isonext.config import config_to_dict
from isonext.data import preprocess as preprocessing
from isonext.data import shard_store
from isonext.data.dataset import load_split, open_store
from isonext.data.preprocess import preprocess
from isonext.data.shard_store import ShardStore
from isonext.data.shards import Rows, read_alike, read_shard, shard_paths, write_shard
from isonext.data.store import LatentSpec, Row, StoreMeta, fingerprint
from isonext.errors import UserError
from preprocess_latents import build_parser, main

FIRST, SECOND, THIRD = (f"latents-{number:05}.safetensors" for number in range(3))


@pytest.fixture
def config(store, make_config, monkeypatch):
    """Of a store in `shards/` beside the one of single files, with 16 pictures a shard."""
    monkeypatch.setattr(shard_store, "SHARD_BYTES", 1)
    return make_config(store, {"data.format": "safetensors", "data.data_root": str(store / "shards")})


@pytest.fixture
def root(store, config, cpu):
    """A finished store of 20 pictures in two shards."""
    preprocess(config, cpu, quiet=True)
    return store / "shards"


def snapshot(root) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.glob("*.safetensors")}


def contents(root) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def assert_holds_what_single_files_hold(root, store, make_config, cpu) -> None:
    """Latents, styles and split are those of a `.pt` store that is made of the pictures now."""
    preprocess(make_config(store), cpu, quiet=True)
    metas = [open_store(path) for path in (root, store / "latents")]
    assert metas[0].split == metas[1].split and metas[0].counts == metas[1].counts
    for part in ("train", "val"):
        one, other = (load_split(path, meta, part) for path, meta in zip((root, store / "latents"), metas, strict=True))
        np.testing.assert_array_equal(one.latents, other.latents)
        assert torch.equal(one.styles, other.styles) and one.digest == other.digest
    for name in ("mean", "std"):
        np.testing.assert_allclose(*(getattr(meta.latents, name) for meta in metas), rtol=1e-9, atol=1e-12)


#################################################################################
#                                What is written                                #
#################################################################################


def test_shards_hold_the_latents_of_the_single_files_in_another_form(root, store, make_config, cpu):
    assert sorted(path.name for path in root.iterdir()) == [FIRST, SECOND, "meta.json"]
    assert_holds_what_single_files_hold(root, store, make_config, cpu)


def test_a_shard_has_lightningdits_tensors_and_names_its_pictures(root, store):
    entries = [f"{style}/{number}.png.pt" for style in ("ink", "oil") for number in range(10)]
    for name, part in ((FIRST, entries[:16]), (SECOND, entries[16:])):
        tensors = load_file(root / name)
        assert sorted(tensors) == ["labels", "latents", "latents_flip"]
        assert tensors["labels"].dtype == torch.int64
        assert tensors["labels"].tolist() == [int(entry.startswith("oil")) for entry in part]
        with safe_open(root / name, "pt") as file:
            pictures = json.loads(file.metadata()["pictures"])
        assert pictures == {entry: fingerprint(store / "raw" / entry.removesuffix(".pt")) for entry in part}
        for row, entry in enumerate(part):
            single = torch.load(store / "latents" / entry, weights_only=True)
            assert torch.equal(tensors["latents"][row], single["latent"])
            assert torch.equal(tensors["latents_flip"][row], single["flipped"])


def test_without_flip_there_are_no_mirrored_latents_and_turning_it_on_encodes_again(store, config, cpu):
    config.data.flip = False
    preprocess(config, cpu, quiet=True)
    assert sorted(load_file(store / "shards" / FIRST)) == ["labels", "latents"]
    config.data.flip = True
    assert preprocess(config, cpu, quiet=True).encoded == 20
    before = snapshot(store / "shards")
    config.data.flip = False
    assert preprocess(config, cpu, quiet=True).encoded == 0
    assert snapshot(store / "shards") == before
    assert len(load_split(store / "shards", open_store(store / "shards"), "train").latents) == 1


def test_turning_flip_off_mixes_old_shards_with_new_ones(root, store, draw, config, cpu):
    config.data.flip = False
    draw(store / "raw" / "ink" / "new.png", seed=5)
    assert preprocess(config, cpu, quiet=True).encoded == 1
    meta = open_store(root)
    assert load_split(root, meta, "train").latents.shape[:2] == (1, len(meta.split["train"]))


def shard_store_of(root, styles: list[str], channels=4, factor=8, size=512, flip=True) -> ShardStore:
    spec = LatentSpec("none", channels, factor, size, styles)
    return ShardStore(root, StoreMeta(spec, flip, layout="safetensors"))


def test_a_shard_is_bounded_in_bytes_and_of_whole_batches(tmp_path):
    (tmp_path / FIRST).touch()
    store = shard_store_of(tmp_path, ["a"])
    plan = store.plan(5000, 16)
    assert store.meta.picture_bytes == 131072  # 4 x 64 x 64 float32, twice
    assert (plan.length, plan.length * 131072) == (512, 2**26)
    assert plan.shards[:2] == [SECOND, THIRD] and len(plan.shards) == 10
    assert shard_store_of(tmp_path, ["a"], channels=2**25).plan(1, 16).length == 16
    assert shard_store_of(tmp_path, ["a"], channels=1, size=16).plan(0, 16).shards == []


def test_the_command_takes_the_format(store, make_config, monkeypatch, capsys):
    (store / "c.json").write_text(json.dumps(config_to_dict(make_config(store))))
    flags = ["--format", "safetensors", "--set", f"data.data_root={store / 'other'}", "--device", "cpu"]
    assert main(build_parser().parse_args(["--config", str(store / "c.json"), *flags])) == 0
    assert "20 encoded, 0 kept, 0 removed" in capsys.readouterr().out
    assert [path.name for path in shard_paths(store / "other")] == [FIRST]


#################################################################################
#                                 Running again                                 #
#################################################################################


def test_a_rerun_changes_nothing(root, config, cpu):
    before = snapshot(root)
    meta = (root / "meta.json").read_bytes()
    report = preprocess(config, cpu, quiet=True)
    assert (report.encoded, report.kept, report.removed) == (0, 20, 0)
    assert snapshot(root) == before and (root / "meta.json").read_bytes() == meta


def test_added_removed_and_changed_pictures_are_the_only_work(root, store, draw, config, make_config, cpu):
    before = snapshot(root)
    (store / "raw" / "ink" / "3.png").unlink()
    draw(store / "raw" / "ink" / "4.png", seed=777)
    draw(store / "raw" / "oil" / "new" / "10.png", seed=778)
    report = preprocess(config, cpu, quiet=True)
    assert (report.encoded, report.kept, report.removed) == (2, 18, 1)
    assert sorted(snapshot(root)) == [FIRST, SECOND, THIRD] and snapshot(root)[SECOND] == before[SECOND]
    assert len(read_shard(root / FIRST)) == 14
    assert list(read_shard(root / THIRD).pictures) == ["ink/4.png.pt", "oil/new/10.png.pt"]
    assert_holds_what_single_files_hold(root, store, make_config, cpu)


def test_a_shard_left_empty_goes_and_its_number_is_free(root, store, config, cpu):
    for number in (6, 7, 8, 9):
        (store / "raw" / "oil" / f"{number}.png").unlink()
    preprocess(config, cpu, quiet=True)
    assert sorted(snapshot(root)) == [FIRST]
    (store / "raw" / "oil" / "6.png").write_bytes((store / "raw" / "oil" / "5.png").read_bytes())
    preprocess(config, cpu, quiet=True)
    assert list(read_shard(root / SECOND).pictures) == ["oil/6.png.pt"]


def test_a_run_that_ended_midway_goes_on_and_keeps_its_finished_shards(root, store, config, cpu, monkeypatch):
    config.data.data_root = str(store / "killed")
    write = shard_store.write_shard

    def fail(path, *arguments):
        if path.name == SECOND:
            raise OSError("killed")
        write(path, *arguments)

    monkeypatch.setattr(shard_store, "write_shard", fail)
    with pytest.raises(OSError, match="killed"):
        preprocess(config, cpu, quiet=True)
    finished = snapshot(store / "killed")
    assert list(finished) == [FIRST]
    with pytest.raises(UserError, match="not finished"):
        open_store(store / "killed")
    monkeypatch.undo()
    monkeypatch.setattr(shard_store, "SHARD_BYTES", 1)
    report = preprocess(config, cpu, quiet=True)
    assert (report.encoded, report.kept) == (4, 16)
    assert snapshot(store / "killed")[FIRST] == finished[FIRST], "not written again"
    assert contents(store / "killed") == contents(root)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"x" * 99], ids=range(3))
def test_a_damaged_shard_is_encoded_again(root, config, cpu, damage):
    before = snapshot(root)
    (root / SECOND).write_bytes(damage(before[SECOND][0]))
    with pytest.raises(
        UserError, match=rf"{SECOND}: damaged, or no safetensors file .*run preprocess_latents.py again"
    ):
        load_split(root, open_store(root), "train")
    report = preprocess(config, cpu, quiet=True)
    assert (report.encoded, report.kept) == (4, 16)
    assert snapshot(root)[FIRST] == before[FIRST] and snapshot(root)[SECOND][0] == before[SECOND][0]


def test_a_row_of_before_that_is_no_number_is_encoded_again(root, config, cpu):
    before = snapshot(root)
    shard = read_shard(root / SECOND)
    rows = list(shard_store._rows_of(shard, open_store(root)))
    rows[2].latent = torch.full_like(rows[2].latent, torch.nan)
    write_shard(root / SECOND, rows, ["ink", "oil"])
    report = preprocess(config, cpu, quiet=True)
    assert (report.encoded, report.kept) == (1, 19) and snapshot(root)[FIRST] == before[FIRST]
    assert all(
        row.is_finite for path in shard_paths(root) for row in shard_store._rows_of(read_shard(path), open_store(root))
    )


def test_a_damaged_shard_that_meta_does_not_name_is_refused_and_stays(root, config, cpu):
    """As one that a user put there, or of a store of before names were written."""
    (root / THIRD).write_bytes(b"mine")
    with pytest.raises(UserError, match=rf"{THIRD}: damaged, and meta\.json does not say .*; delete it"):
        preprocess(config, cpu, quiet=True)
    assert (root / THIRD).read_bytes() == b"mine"


def test_another_programs_shard_under_a_name_of_ours_is_refused_and_stays(root, config, cpu):
    save_file({"latents": torch.ones(1, 12, 4, 4), "labels": torch.tensor([0])}, root / THIRD)
    before = contents(root)
    with pytest.raises(UserError, match=rf"{THIRD}: is another program's"):
        preprocess(config, cpu, quiet=True)
    assert contents(root) == before


def test_bad_pictures_are_skipped_and_take_no_row(root, store, config, cpu):
    (store / "raw" / "oil" / "7.png").write_text("no picture")
    for _ in range(2):
        report = preprocess(config, cpu, quiet=True)
        assert len(report.skipped) == 1 and (report.encoded, report.kept) == (0, 19)
        assert sorted(snapshot(root)) == [FIRST, SECOND]
        assert list(read_shard(root / SECOND).pictures) == [f"oil/{number}.png.pt" for number in (6, 8, 9)]


def test_several_processes_write_the_shards_of_one(root, store, config, cpu, monkeypatch):
    todo = [(f"{path.parent.name}/{path.name}.pt", path) for path in sorted((store / "raw").rglob("*.png"))]
    other = shard_store_of(store / "two", ["ink", "oil"], channels=12, factor=4, size=16)
    work, codec = preprocessing.Work(other, todo, other.plan(20, 16), 0), preprocessing.load_autoencoder("dct", cpu)
    for number in ("1", "0"):
        for name, value in {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        done = preprocessing.encode(work, codec, config, cpu, True)
        assert list(done) == [entry for entry, _ in (todo[16:] if number == "1" else todo[:16])]
        assert len(shard_paths(store / "two")) == 2 - int(number)
    assert contents(store / "two") == {name: data for name, data in contents(root).items() if name != "meta.json"}


#################################################################################
#                                    Refusals                                   #
#################################################################################


def test_a_store_of_one_format_is_not_continued_in_the_other(root, store, config, make_config, cpu):
    before = contents(root)
    config.data.format = "pt"
    with pytest.raises(UserError, match=r"the store has format safetensors, not pt; use another data\.data_root"):
        preprocess(config, cpu, quiet=True)
    with pytest.raises(UserError, match="the store has format pt, not safetensors"):
        preprocess(make_config(store, {"data.format": "safetensors"}), cpu, quiet=True)
    assert contents(root) == before


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_another_programs_latents_are_never_written_over(store, config, cpu, form):
    save_file({"latents": torch.ones(1, 12, 4, 4), "labels": torch.tensor([0])}, store / "raw" / FIRST)
    config.data.data_root, config.data.format = str(store / "foreign"), form
    shutil.copytree(store / "raw", store / "foreign", ignore=lambda *_: ["ink", "oil"])
    before = contents(store / "foreign")
    with pytest.raises(UserError, match=rf"{FIRST}: is another program's; use another data\.data_root"):
        preprocess(config, cpu, quiet=True)
    assert contents(store / "foreign") == before


def test_other_safetensors_files_in_a_store_of_ours_are_left_alone(root, config, cpu):
    save_file({"weights": torch.ones(3)}, root / "adapter.safetensors")
    assert preprocess(config, cpu, quiet=True).kept == 20
    assert (root / "adapter.safetensors").exists() and len(load_split(root, open_store(root), "train")) > 0


def test_a_vanished_style_folder_is_refused(root, store, config, cpu):
    before = contents(root)
    shutil.rmtree(store / "raw" / "oil")
    with pytest.raises(UserError, match="style folder oil has vanished; put it back, or delete"):
        preprocess(config, cpu, quiet=True)
    assert contents(root) == before


def test_a_missing_shard_and_one_of_another_size_are_one_line(root):
    meta = open_store(root)
    meta.latents.channels = 4
    with pytest.raises(UserError, match=r"do not match meta\.json; run preprocess_latents\.py again"):
        load_split(root, meta, "train")
    (root / SECOND).unlink()
    with pytest.raises(UserError, match=r"the shards lack 'oil/\d.png.pt'; run preprocess_latents\.py again"):
        load_split(root, open_store(root), "train")
    (root / FIRST).unlink()
    with pytest.raises(UserError, match=r"the shards lack .*; run preprocess_latents\.py again"):
        load_split(root, open_store(root), "train")


LATENTS, TWO = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"latents": LATENTS}, "holds latents; a shard has `latents`, and `labels` or `user_ids`"),
        ({"labels": TWO, "x": TWO}, "holds labels, x; a shard has"),
        ({"latents": LATENTS, "labels": torch.tensor([0, 1, 1])}, "3 labels, but 2 latents"),
        ({"latents": LATENTS, "labels": torch.tensor([0, -1])}, "labels has a -1; they count from 0"),
        ({"latents": LATENTS, "user_ids": torch.tensor([0, 1])}, "user_ids has a 0; they count from 1"),
        (
            {"latents": LATENTS, "labels": torch.zeros(2)},
            r"labels of torch.float32, shape \(2,\); they must be integers",
        ),
        ({"latents": LATENTS, "labels": TWO[:, None]}, r"labels of torch.int64, shape \(2, 1\)"),
        ({"latents": LATENTS.double(), "labels": TWO}, "latents of torch.float64; they must be float32, float16 or"),
        ({"latents": LATENTS[:, :, 0, 0], "labels": TWO}, r"latents of shape \(2, 3\); it must be \(n, C, h, w\)"),
        (
            {"latents": LATENTS, "latents_flip": LATENTS[:1], "labels": TWO},
            r"latents_flip of shape \(1, 3, 4, 4\), but",
        ),
    ],
)
def test_what_is_no_shard_says_why(tmp_path, tensors, message):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"a\.safetensors: {message}"):
        read_shard(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"latents": LATENTS[:, :, :2, :2], "labels": TWO}, r"shape \(3, 2, 2\), but \(3, 4, 4\) in a\.safetensors"),
        ({"latents": LATENTS.half(), "labels": TWO}, r"dtype torch\.float16, but torch\.float32 in a"),
        ({"latents": LATENTS, "user_ids": TWO + 1}, "labels called user_ids, but labels in a"),
        ({"latents": LATENTS, "latents_flip": LATENTS + 1, "labels": TWO}, "copies 2, but 1 in a"),
    ],
)
def test_shards_that_cannot_be_mixed_are_named(tmp_path, other, message):
    for name, tensors in (("a", {"latents": LATENTS, "labels": TWO}), ("b", other)):
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=rf"b\.safetensors: {message}.*; they must be alike"):
        read_alike(shard_paths(tmp_path))


#################################################################################
#                                  Reading rows                                 #
#################################################################################


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_found_across_shards_and_come_as_float32(tmp_path, dtype):
    for name, values in (("s2", [0.5, 1.5]), ("s10", [2.5, 3.5, 4.5])):  # in natural order
        latents = torch.tensor(values, dtype=dtype)[:, None, None].expand(-1, 2, 3).contiguous()
        tensors = {"latents": latents, "latents_flip": -latents, "labels": torch.zeros(len(values), dtype=torch.int32)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    rows = Rows(read_alike(shard_paths(tmp_path)), np.array([4, 0, 1, 2]), copies=2)
    assert rows.shape == (2, 4, 2, 3) and len(rows) == 2
    picked = rows[np.array([0, 1, 1, 0]), np.array([0, 0, 2, 3])]
    assert picked.dtype == np.float32 and picked.shape == (4, 2, 3)
    assert picked[:, 1, 2].tolist() == [4.5, -4.5, -1.5, 2.5]
    assert rows.loaded()[:, :, 0, 0].tolist() == [[4.5, 0.5, 1.5, 2.5], [-4.5, -0.5, -1.5, -2.5]]
    assert rows[np.array([], int), np.array([], int)].shape == (0, 2, 3)
    parts = list(rows.parts(size=3))
    assert [(copy, part.start, part.stop, len(x)) for copy, part, x in parts] == [
        (0, 0, 3, 3), (0, 3, 4, 1), (1, 0, 3, 3), (1, 3, 4, 1)
    ]  # fmt: skip


def test_a_large_store_is_trained_on_from_the_disk_with_the_same_bits(root):
    meta = open_store(root)
    inside, mapped = load_split(root, meta, "train"), load_split(root, meta, "train", memory_limit=0)
    assert isinstance(inside.latents, np.ndarray) and isinstance(mapped.latents, Rows)
    assert mapped.latents.shape == inside.latents.shape and not list(root.glob("packed*"))
    index, mirrored = torch.randperm(len(inside)), torch.arange(len(inside)) % 2 == 0
    for a, b in zip(inside.batch(index, mirrored), mapped.batch(index, mirrored), strict=True):
        assert torch.equal(a, b)


def test_opening_shards_reads_none_of_their_latents(tmp_path):
    psutil = pytest.importorskip("psutil")
    latents = torch.empty(2**14, 4, 16, 16)  # 64 MiB
    save_file(
        {"latents": latents.fill_(1.0), "labels": torch.zeros(2**14, dtype=torch.int64)}, tmp_path / "a.safetensors"
    )
    del latents
    before = psutil.Process().memory_info().rss
    rows = Rows([read_shard(tmp_path / "a.safetensors")], np.arange(2**14), 1)
    assert rows[np.zeros(2, int), np.array([0, 2**14 - 1])].sum() == 2 * 4 * 16 * 16
    assert psutil.Process().memory_info().rss - before < 2**24


def test_taking_stock_keeps_a_row_once(tmp_path):
    pictures = {f"ink/{name}.pt": tmp_path / name for name in "ab"}
    for picture in pictures.values():
        picture.write_text("a picture")
    rows = [
        Row(entry, fingerprint(picture), torch.full((2, 1, 1), value), None)
        for (entry, picture), value in zip(pictures.items(), (1.0, 2.0), strict=True)
    ]
    write_shard(tmp_path / FIRST, rows[:1], ["ink"])
    write_shard(tmp_path / SECOND, rows, ["ink"])  # a again, as after a restored backup
    store = shard_store_of(tmp_path, ["ink"], channels=2, factor=8, size=8, flip=False)
    assert store.take_stock(pictures) == (0, {"ink/a.pt", "ink/b.pt"})
    assert [list(read_shard(path).pictures) for path in shard_paths(tmp_path)] == [["ink/a.pt"], ["ink/b.pt"]]
    assert load_file(tmp_path / SECOND)["latents"].flatten().tolist() == [2.0, 2.0]
