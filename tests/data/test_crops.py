"""Random crops beside the centre square: where they lie, how both layouts hold them, how they are drawn."""

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from isonext.config import TrainingConfig
from isonext.data import images
from isonext.data.autoencoder import load_autoencoder
from isonext.data.dataset import LatentSplit, load_split, open_store, store_of
from isonext.data.preprocess import preprocess
from isonext.data.shards import Rows
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.flow.base import Base
from isonext.training.batches import draw_batch

LAYOUTS = ("pt", "safetensors")


def shares(name: str, number: int) -> list[float]:
    """The three numbers from 0 to 1 that are a crop's size, column and row, by hand."""
    digest = hashlib.sha256(f"{name}/{number}".encode()).digest()
    return [int.from_bytes(digest[start : start + 8], "big") / 2**64 for start in (0, 8, 16)]


#################################################################################
#                                  Where they lie                               #
#################################################################################


def test_a_crop_is_the_square_by_hand():
    ramp = np.zeros((100, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200), np.arange(100)[:, None]  # red is the column, green the row
    crop = np.asarray(images.random_square(Image.fromarray(ramp), 64, "ink/a.png.pt", 3)).astype(float)
    size, column, row = shares("ink/a.png.pt", 3)
    side = 100 * (0.6 + 0.4 * size)
    left, top = column * (200 - side), row * (100 - side)
    assert crop[..., 0].mean() == pytest.approx(left + side / 2 - 0.5, abs=0.5)
    assert crop[..., 1].mean() == pytest.approx(top + side / 2 - 0.5, abs=0.5)
    assert crop[32, -1, 0] - crop[32, 0, 0] == pytest.approx(side * 63 / 64, abs=2)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), name=st.text(max_size=5), number=st.integers(0, 9))
def test_a_crop_lies_inside_the_picture_and_has_0_6_to_1_of_its_short_side(width, height, name, number):
    left, top, right, bottom = images.random_box((width, height), name, number)
    assert left >= 0 and top >= 0 and right <= width + 1e-6 and bottom <= height + 1e-6
    assert right - left == pytest.approx(bottom - top)
    assert (right - left) / min(width, height) + 1e-9 >= 0.6 and right - left <= min(width, height) + 1e-6


def test_sizes_and_places_are_uniform():
    boxes = np.array([images.random_box((300, 100), "a", number) for number in range(2000)])
    side = boxes[:, 2] - boxes[:, 0]
    for values in ((side - 60) / 40, boxes[:, 0] / (300 - side), boxes[:, 1] / (100 - side)):
        assert abs(values.mean() - 0.5) < 0.03 and abs(values.var() - 1 / 12) < 0.01


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (3, 40)])
def test_a_picture_smaller_than_the_squares_is_enlarged(size):
    crop = images.random_square(Image.new("RGB", size, "red"), 32, "a", 0)
    assert crop.size == (32, 32) and np.asarray(crop)[16, 16].tolist() == [255, 0, 0]


#################################################################################
#                                   The store                                   #
#################################################################################


def entry_of(root, name: str) -> dict:
    return torch.load(root / name, weights_only=True)


@pytest.fixture
def made(store, make_config, cpu):
    """A function: crops, other config keys -> the folder of a store with so many, brought in line, and its report."""

    def make(crops: int, form: str = "pt", **changes):
        root = store / f"crops_{form}"
        keys = {"data.crops": crops, "data.data_root": str(root), "data.format": form}
        report = preprocess(make_config(store, keys | {f"data.{key}": value for key, value in changes.items()}), cpu)
        return root, report

    return make


def test_latents_are_the_codecs_of_each_crop_and_of_its_mirror_image(made, store, cpu):
    root, _ = made(2)
    codec = load_autoencoder("dct:f4c12", cpu)
    for name in ("ink/3.png.pt", "oil/7.png.pt"):
        entry, picture = entry_of(root, name), Image.open(store / "raw" / name.removesuffix(".pt"))
        assert entry["crops"].shape == entry["crops_flipped"].shape == (2, 12, 4, 4)
        for number in range(2):
            pixels = images.to_pixels(images.to_bytes(images.random_square(picture, 16, name, number)))[None]
            torch.testing.assert_close(entry["crops"][number], codec.encode(pixels)[0], atol=1e-5, rtol=0)
            mirrored = codec.encode(pixels.flip(-1))[0]
            torch.testing.assert_close(entry["crops_flipped"][number], mirrored, atol=1e-5, rtol=0)
        assert torch.equal(entry["latent"], entry_of(store / "latents", name)["latent"])


def test_both_layouts_hold_the_same_and_a_split_has_every_copy_in_order(made):
    (root, _), (shards, _) = (made(2, form) for form in LAYOUTS)
    meta = open_store(root)
    assert meta.crops == 2 and meta.split == open_store(shards).split
    one, other = (load_split(path, open_store(path), "train") for path in (root, shards))
    np.testing.assert_array_equal(one.latents, other.latents)
    assert one.latents.shape[0] == 6 and one.crops == 2 and one.digest == other.digest
    entry = entry_of(root, one.names[4])
    wanted = [entry["latent"], entry["flipped"]]
    wanted += [entry[part][number] for number in range(2) for part in ("crops", "crops_flipped")]
    np.testing.assert_array_equal(one.latents[:, 4], torch.stack(wanted).numpy())
    for path in (root, shards):
        mapped = load_split(path, open_store(path), "train", memory_limit=0)
        assert isinstance(mapped.latents, np.memmap | Rows)
        index, crop = torch.tensor([4, 0, 2]), torch.tensor([2, 0, 1])
        mirrored = torch.tensor([True, True, False])
        assert torch.equal(mapped.batch(index, mirrored, crop)[0], one.batch(index, mirrored, crop)[0])
    expected = one.spec.standardise(torch.stack([entry["crops_flipped"][1]]))
    assert torch.equal(one.batch(torch.tensor([4]), torch.tensor([True]), torch.tensor([2]))[0], expected)


@pytest.mark.parametrize("form", LAYOUTS)
def test_held_out_pictures_come_without_crops_and_all_of_a_picture_lies_on_one_side(made, form):
    root, _ = made(3, form)
    meta = open_store(root)
    train, val = (load_split(root, meta, split) for split in ("train", "val"))
    assert (train.latents.shape[0], val.latents.shape[0], train.crops, val.crops) == (8, 2, 3, 0)
    assert not set(train.names) & set(val.names) and len(train.names) + len(val.names) == 20
    values = np.concatenate([part.numpy() for part in store_of(root, meta).latents(meta.split["train"])])
    assert len(values) == 8 * len(train)
    flat = values.astype(np.float64).transpose(1, 0, 2, 3).reshape(12, -1)
    np.testing.assert_allclose(meta.latents.mean, flat.mean(1), atol=1e-9)
    np.testing.assert_allclose(meta.latents.std, flat.std(1), rtol=1e-9)


@pytest.mark.parametrize("form", LAYOUTS)
def test_another_number_of_crops_brings_the_store_in_line(made, form):
    root, report = made(0, form)
    plain = load_split(root, open_store(root), "train")
    assert report.encoded == 20 and (plain.crops, len(plain.latents)) == (0, 2)
    root, report = made(2, form)
    two = load_split(root, open_store(root), "train")
    assert (report.encoded, report.kept) == (20, 0)
    np.testing.assert_array_equal(two.latents[:2], plain.latents)
    assert made(2, form)[1].kept == 20
    root, report = made(1, form)  # what is there holds the first crop already
    one = load_split(root, open_store(root), "train")
    assert (report.encoded, report.kept) == (0, 20)
    np.testing.assert_array_equal(one.latents, two.latents[:4])
    root, report = made(1, form, flip=False)
    unflipped = load_split(root, open_store(root), "train")
    assert report.encoded == 0
    np.testing.assert_array_equal(unflipped.latents, two.latents[[0, 2]])
    assert len({split.digest for split in (plain, two, one, unflipped)}) == 4


def test_a_packed_split_of_mirror_images_is_not_taken_for_one_of_crops(made):
    made(1)
    root, _ = made(1, flip=False)
    crops = np.array(load_split(root, open_store(root), "train", memory_limit=0).latents)
    root, _ = made(0, flip=True)
    mirrored = np.array(load_split(root, open_store(root), "train", memory_limit=0).latents)
    assert crops.shape == mirrored.shape and not np.array_equal(crops, mirrored)


def test_a_crop_does_not_depend_on_the_order_or_the_company_of_its_picture(made, store):
    root, _ = made(2)
    before = entry_of(root, "oil/7.png.pt")
    (store / "raw" / "oil" / "7.png").touch()
    for number in (0, 1, 2):
        (store / "raw" / "ink" / f"{number}.png").unlink()
    assert made(2)[1].encoded == 1
    assert torch.equal(entry_of(root, "oil/7.png.pt")["crops"], before["crops"])


def test_a_store_of_before_there_were_crops_is_kept(store, make_config, cpu):
    path = store / "latents" / "meta.json"
    tree = json.loads(path.read_text())
    del tree["crops"]
    path.write_text(json.dumps(tree))
    assert open_store(store / "latents").crops == 0
    assert preprocess(make_config(store), cpu, quiet=True).kept == 20


def test_a_file_that_lacks_its_crops_is_named(made):
    root, _ = made(2)
    meta = open_store(root)
    name = meta.split["train"][1]
    entry = entry_of(root, name)
    torch.save(entry | {"crops": entry["crops"][:1]}, root / name)
    with pytest.raises(UserError, match=rf"{name}: does not match meta\.json"):
        load_split(root, meta, "train")


#################################################################################
#                                    Draws                                      #
#################################################################################


def cropped_split(crops: int, flip: bool) -> LatentSplit:
    """Of 8 pictures; a latent's one number is its copy's."""
    copies = (1 + flip) * (1 + crops)
    latents = np.broadcast_to(np.arange(copies, dtype=np.float32)[:, None, None, None, None], (copies, 8, 1, 1, 1))
    spec = LatentSpec("dct:f4c1", 1, 4, 4, ["a", "b"], mean=[0.0], std=[1.0])
    return LatentSplit(spec, latents, torch.arange(8) % 2, [f"a/{n}" for n in range(8)], crops)


@pytest.mark.parametrize(("crops", "flip"), [(0, True), (2, True), (3, False)])
def test_every_copy_is_drawn_as_often_as_any_other(crops, flip):
    split, training = cropped_split(crops, flip), TrainingConfig(batch_size=8)
    drawn = torch.cat([draw_batch(split, Base(), training, step, 2).x1.flatten() for step in range(500)])
    counts, copies = drawn.int().bincount(), len(split.latents)
    assert len(counts) == copies
    expected = len(drawn) / copies
    assert (counts - expected).abs().max() < 4 * expected**0.5


def test_a_process_draws_the_copies_of_its_own_rows():
    split, training = cropped_split(3, True), TrainingConfig(batch_size=8)
    whole = draw_batch(split, Base(), training, 5, 2)
    part = draw_batch(split, Base(), training, 5, 2, slice(1, None, 2))
    assert torch.equal(part.x1, whole.x1[1::2]) and torch.equal(part.x0, whole.x0[1::2])
