import dataclasses
import hashlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isonext.data.dataset import load_split, open_store
from isonext.data.preprocess import preprocess
from isonext.data.pt_store import read_latent, write_latent
from isonext.data.splits import held_out
from isonext.data.store import LatentSpec, StoreMeta, fingerprint, read_meta
from isonext.errors import UserError
from isonext.utils.io import folder_lock


def make_spec(**changes) -> LatentSpec:
    spec = LatentSpec("dct:f4c2", 2, 4, 16, ["ink", "oil", "2024"], mean=[1.0, -2.0], std=[0.5, 4.0])
    return dataclasses.replace(spec, **changes)


#################################################################################
#                                  LatentSpec                                   #
#################################################################################


def test_standardise_takes_the_mean_away_and_divides_by_the_deviation_of_each_channel():
    raw = torch.tensor([[[[2.0]], [[6.0]]], [[[1.0]], [[-2.0]]]])  # (2, 2, 1, 1)
    standard = make_spec().standardise(raw)
    assert standard.flatten().tolist() == [2.0, 2.0, 0.0, 0.0]
    assert make_spec().restore(standard).flatten().tolist() == raw.flatten().tolist()


@pytest.mark.parametrize("space", [(3,), (3, 2), (3, 2, 2)])
def test_latents_of_any_dimensions_are_standardised_by_channel(space):
    raw = torch.tensor([[1.0, -2.0], [2.0, 6.0]]).view(2, 2, *[1] * len(space)).expand(2, 2, *space)
    standard = make_spec().standardise(raw)
    assert standard.shape == raw.shape
    assert standard.flatten(2)[:, :, -1].tolist() == [[0.0, 0.0], [2.0, 2.0]]
    assert torch.equal(make_spec().restore(standard), raw)


@settings(deadline=None)
@given(
    mean=st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3),
    std=st.lists(st.floats(2**-6, 64, width=32), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
)
def test_restore_is_the_inverse_of_standardise(mean, std, seed):
    spec = make_spec(channels=3, mean=mean, std=std)
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(spec.standardise(spec.restore(x)), x, rtol=0, atol=2e-2 if min(std) < 0.1 else 2e-3)
    raw = spec.restore(x)
    torch.testing.assert_close(spec.restore(spec.standardise(raw)), raw, rtol=1e-5, atol=1e-4)
    assert spec.standardise(raw).dtype == torch.float32


@pytest.mark.parametrize(("style", "number"), [("ink", 0), ("oil", 1), ("0", 0), ("1", 1), ("2", 2), ("2024", 2)])
def test_a_style_is_given_by_name_or_by_id(style, number):
    assert make_spec().style_id(style) == number


def test_a_name_goes_before_an_id():
    assert make_spec(styles=["ink", "0"]).style_id("0") == 1


@pytest.mark.parametrize("style", ["water", "3", "-1", "", "1.0", "Ink"])
def test_an_unknown_style_lists_the_known_ones(style):
    with pytest.raises(UserError, match="0 = ink, 1 = oil, 2 = 2024") as caught:
        make_spec().style_id(style)
    assert repr(style) in str(caught.value)


#################################################################################
#                                 The split                                     #
#################################################################################


def rank(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def test_the_held_out_part_is_chosen_by_the_hash_of_the_name():
    names = [f"ink/{number}.png.pt" for number in range(2000)]
    chosen = held_out(names, 0.05)
    assert chosen == {name for name in names if rank(name) < 0.05}
    assert 70 <= len(chosen) <= 130
    assert held_out(reversed(names), 0.05) == chosen


NAMES = st.sets(st.text(max_size=8), min_size=1, max_size=20)


@settings(deadline=None)
@given(names=NAMES, fraction=st.floats(0, 1))
def test_the_name_of_the_highest_hash_is_always_trained_on(names, fraction):
    chosen = held_out(names, fraction)
    assert max(names, key=rank) not in chosen
    assert chosen == {name for name in names if rank(name) < fraction} - {max(names, key=rank)}


@settings(deadline=None)
@given(old=NAMES, new=NAMES, fraction=st.floats(0, 1))
def test_no_picture_moves_from_validation_to_training_when_others_come(old, new, fraction):
    assert held_out(old, fraction) <= held_out(old | new, fraction)


#################################################################################
#                                   One entry                                   #
#################################################################################


@pytest.mark.parametrize("mirrored", [True, False])
def test_an_entry_comes_back_as_it_was_written(tmp_path, mirrored):
    latent, flipped = torch.randn(500, 3, 4, 4)[:2]  # of a large batch
    write_latent(tmp_path / "a" / "b.png.pt", latent, flipped if mirrored else None, [12, 34])
    entry = read_latent(tmp_path / "a" / "b.png.pt")
    assert torch.equal(entry.pop("latent"), latent)
    assert not mirrored or torch.equal(entry.pop("flipped"), flipped)
    assert entry == {"source": [12, 34]}
    size = (tmp_path / "a" / "b.png.pt").stat().st_size
    assert size < 4000, "a slice of a batch is stored without the rest of the batch"


@pytest.mark.parametrize("content", [[1], {"latent": [1.0]}, {"latent": torch.zeros(4)}, {"x": torch.zeros(1, 2, 2)}])
def test_what_is_no_entry_of_the_store_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: not a latent of the store"):
        read_latent(tmp_path / "a.pt")


#################################################################################
#                                Opening a store                                #
#################################################################################


def test_meta_comes_back_as_it_was_written(tmp_path):
    counts = {style: {"train": int(style == "ink"), "val": 0} for style in ("ink", "oil", "2024")}
    meta = StoreMeta(make_spec(), True, {"train": ["ink/a.png.pt"], "val": []}, counts, True)
    meta.write(tmp_path)
    assert read_meta(tmp_path) == meta


def test_a_finished_store_opens(store):
    meta = open_store(store / "latents")
    assert meta.complete and meta.latents.styles == ["ink", "oil"]
    assert (meta.latents.autoencoder, meta.latents.channels, meta.latents.factor) == ("dct:f4c12", 12, 4)


def test_no_store_says_which_command_makes_one(tmp_path):
    with pytest.raises(UserError, match=r"no latent store here; run: python preprocess_latents\.py"):
        open_store(tmp_path / "none")


def edit_meta(root, **changes):
    tree = json.loads((root / "meta.json").read_text())
    (root / "meta.json").write_text(json.dumps(tree | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complete": False}, r"not finished; run python preprocess_latents\.py again"),
        ({"format": 99}, "store format 99, this program reads 1"),
        ({"latents": {"nonsense": 1}}, r"meta\.json: damaged"),
        ({"more": 1}, r"meta\.json: damaged"),
        (
            {
                "counts": {"ink": {"train": 0, "val": 0}, "oil": {"train": 1, "val": 0}},
                "split": {"train": ["oil/1.png.pt"], "val": []},
            },
            "ink: .*no training picture",
        ),
        ({"counts": {"ink": {"train": 7, "val": 0}}}, r"meta\.json: damaged .*counts\[ink\]"),
    ],
)
def test_a_store_that_cannot_be_used_says_why(store, changes, message):
    edit_meta(store / "latents", **changes)
    with pytest.raises(UserError, match=message):
        open_store(store / "latents")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"x"', "{}", '{"format": 1}'])
def test_a_damaged_meta_is_one_line(store, content):
    (store / "latents" / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json: damaged .*run preprocess_latents\.py again"):
        open_store(store / "latents")


def test_a_vanished_style_folder_is_named(store):
    shutil.rmtree(store / "latents" / "oil")
    with pytest.raises(UserError, match="oil: this style's folder has vanished"):
        open_store(store / "latents")


#################################################################################
#                               The training data                               #
#################################################################################


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_holds_the_entries_of_meta_in_order_with_their_styles(store, split):
    root = store / "latents"
    meta = open_store(root)
    loaded = load_split(root, meta, split)
    assert loaded.names == meta.split[split] and len(loaded) == len(meta.split[split]) > 0
    for number, name in enumerate(loaded.names):
        entry = torch.load(root / name, weights_only=True)
        np.testing.assert_array_equal(loaded.latents[0, number], entry["latent"].numpy())
        np.testing.assert_array_equal(loaded.latents[1, number], entry["flipped"].numpy())
        assert meta.latents.styles[loaded.styles[number]] == name.split("/")[0]


def test_a_batch_is_standardised_and_mirrored_where_asked(store):
    root = store / "latents"
    loaded = load_split(root, open_store(root), "train")
    index, mirrored = torch.tensor([3, 0, 9, 3]), torch.tensor([False, True, True, True])
    x1, style = loaded.batch(index, mirrored)
    mean, std = (np.array(values)[:, None, None] for values in (loaded.spec.mean, loaded.spec.std))
    for row, (number, copy) in enumerate(zip(index, mirrored, strict=True)):
        expected = (loaded.latents[int(copy), int(number)] - mean) / std
        np.testing.assert_allclose(x1[row].numpy(), expected, atol=1e-5)
    assert style.tolist() == loaded.styles[index].tolist()
    assert torch.equal(loaded.batch(index)[0], loaded.batch(index, torch.zeros(4, dtype=torch.bool))[0])
    every = loaded.spec.standardise(torch.from_numpy(loaded.latents).flatten(0, 1)).double()
    torch.testing.assert_close(every.mean((0, 2, 3)), torch.zeros(12).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(every.std((0, 2, 3), correction=0), torch.ones(12).double(), atol=1e-4, rtol=0)


def test_memory_mapped_latents_equal_those_in_memory_bit_for_bit_and_are_packed_once(store):
    root = store / "latents"
    meta = open_store(root)
    inside, mapped = load_split(root, meta, "train"), load_split(root, meta, "train", memory_limit=0)
    assert isinstance(mapped.latents, np.memmap) and not isinstance(inside.latents, np.memmap)
    np.testing.assert_array_equal(mapped.latents, inside.latents)
    index, mirrored = torch.randperm(len(inside)), torch.rand(len(inside)) < 0.5
    for a, b in zip(inside.batch(index, mirrored), mapped.batch(index, mirrored), strict=True):
        assert torch.equal(a, b)
    (packed,) = root.glob("packed-train-*")
    before = packed.stat().st_mtime_ns
    load_split(root, meta, "train", memory_limit=0)
    assert packed.stat().st_mtime_ns == before


def test_a_run_waits_for_another_one_that_packs(store):
    root = store / "latents"
    meta, packing = open_store(root), folder_lock(root)
    packing.__enter__()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(load_split, root, meta, "train", 0)
        time.sleep(0.2)
        assert not waiting.done() and not list(root.glob("packed-*"))
        packing.__exit__(None, None, None)
        assert isinstance(waiting.result(30).latents, np.memmap)


def test_a_changed_entry_makes_the_pack_anew(store, draw, make_config, cpu):
    root = store / "latents"
    meta = open_store(root)
    before = load_split(root, meta, "train", memory_limit=0)
    changed = before.names[0]
    draw(store / "raw" / changed.removesuffix(".pt"), seed=999)
    assert preprocess(make_config(store), cpu, quiet=True).encoded == 1
    meta = open_store(root)
    after = load_split(root, meta, "train", memory_limit=0)
    assert len(list(root.glob("packed-train-*"))) == 1
    np.testing.assert_array_equal(after.latents, load_split(root, meta, "train").latents)
    assert not np.array_equal(after.latents[:, 0], before.latents[:, 0])
    np.testing.assert_array_equal(after.latents[:, 1:], before.latents[:, 1:])


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize(
    "entry", [{"latent": torch.zeros(12, 4, 4)}, {"latent": torch.zeros(3, 4, 4), "flipped": torch.zeros(3, 4, 4)}]
)
def test_an_entry_that_does_not_match_meta_is_named_and_leaves_no_pack(store, entry, limit):
    root = store / "latents"
    meta = open_store(root)
    torch.save(entry, root / meta.split["train"][2])
    with pytest.raises(UserError, match=rf"{meta.split['train'][2]}: does not match meta\.json"):
        load_split(root, meta, "train", memory_limit=limit)
    assert not list(root.glob("*packed*"))


def test_the_fingerprint_of_a_file_changes_with_its_size_and_its_time(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"12345")
    status = path.stat()
    assert fingerprint(path) == [5, status.st_mtime_ns]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("vae", "a"), ("moved/vae", "a"), True),
        (("vae", "a"), ("vae", "b"), False),
        (("vae", ""), ("./vae/", "b"), True),
        (("vae", ""), ("{cwd}/vae", ""), True),
        (("vae", "a"), ("other", ""), False),
    ],
)
def test_an_autoencoder_is_known_by_its_digest_or_where_there_is_none_by_its_path(
    tmp_path, monkeypatch, one, other, same
):
    monkeypatch.chdir(tmp_path)
    a, b = (
        dataclasses.replace(make_spec(), autoencoder=name.format(cwd=tmp_path), autoencoder_digest=digest)
        for name, digest in (one, other)
    )
    assert a.has_autoencoder_of(b) is b.has_autoencoder_of(a) is same
