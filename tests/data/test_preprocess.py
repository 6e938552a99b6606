import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from helpers import ROOT, call
from isonext.config import config_to_dict
from isonext.data import images
from isonext.data import preprocess as preprocessing
from isonext.data.autoencoder import DctCodec, load_autoencoder
from isonext.data.dataset import load_split, open_store, own_store
from isonext.data.preprocess import preprocess
from isonext.data.splits import held_out
from isonext.data.store import read_meta
from isonext.errors import UserError
from isonext.utils.io import folder_lock
from preprocess_latents import build_parser, main

RNG = np.random.default_rng(1)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file below `folder`."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def entries(root: Path) -> dict[str, dict]:
    return {str(path.relative_to(root)): torch.load(path, weights_only=True) for path in sorted(root.rglob("*.pt"))}


def assert_same_store(one: Path, other: Path) -> None:
    """Every file, every tensor and meta.json are equal."""
    assert sorted(snapshot(one)) == sorted(snapshot(other))
    for (name, a), b in zip(entries(one).items(), entries(other).values(), strict=True):
        assert a["source"] == b["source"], name
        for part in ("latent", "flipped"):
            assert torch.equal(a[part], b[part]), name
    assert json.loads((one / "meta.json").read_text()) == json.loads((other / "meta.json").read_text())


#################################################################################
#                                What is stored                                 #
#################################################################################


def test_the_stored_latents_are_the_codecs_of_the_picture_and_of_its_mirror_image(store, cpu):
    codec = load_autoencoder("dct:f4c12", cpu)
    for name, entry in entries(store / "latents").items():
        picture = np.asarray(Image.open(store / "raw" / name.removesuffix(".pt"))) / 127.5 - 1
        for part, pixels in (("latent", picture), ("flipped", picture[:, ::-1])):
            expected = codec.encode(torch.tensor(pixels.transpose(2, 0, 1).copy(), dtype=torch.float32)[None])[0]
            torch.testing.assert_close(entry[part], expected, atol=1e-5, rtol=0)
            assert entry[part].dtype == torch.float32


def test_without_flip_no_mirror_image_is_stored_and_turning_it_on_adds_it(store, make_config, cpu):
    config = make_config(store, {"data.flip": False, "data.data_root": str(store / "plain")})
    preprocess(config, cpu, quiet=True)
    assert all("flipped" not in entry for entry in entries(store / "plain").values())
    report = preprocess(make_config(store, {"data.data_root": str(store / "plain")}), cpu, quiet=True)
    assert (report.encoded, report.kept) == (20, 0)
    assert_same_store(store / "plain", store / "latents")


def test_nested_pictures_and_names_that_differ_only_in_the_extension_are_all_stored(tmp_path, draw, make_config, cpu):
    names = ["a.png", "a.jpg", "a.jpeg", "a.png.png", "deep/a.png", "deep/er/a.bmp"]
    for number, name in enumerate(names):
        draw(tmp_path / "raw" / "ink" / name, seed=number)
    report = preprocess(make_config(tmp_path), cpu, quiet=True)
    assert report.encoded == len(names) and not report.skipped
    stored = entries(tmp_path / "latents")
    assert sorted(stored) == sorted(f"ink/{name}.pt" for name in names)
    assert len({entry["latent"].sum().item() for entry in stored.values()}) == len(names), "no two are alike"
    assert sorted(report.meta.split["train"] + report.meta.split["val"]) == sorted(stored)


def test_the_statistics_are_numpys_over_the_training_split_with_its_mirror_images(store):
    meta, stored = open_store(store / "latents"), entries(store / "latents")
    train = np.stack([stored[name][part].numpy() for name in meta.split["train"] for part in ("latent", "flipped")])
    values = train.astype(np.float64).transpose(1, 0, 2, 3).reshape(12, -1)
    np.testing.assert_allclose(meta.latents.mean, values.mean(1), atol=1e-9)
    np.testing.assert_allclose(meta.latents.std, values.std(1), rtol=1e-9)
    every = np.stack([entry["latent"].numpy() for entry in stored.values()])
    assert not np.allclose(meta.latents.mean, every.mean((0, 2, 3)), atol=1e-6), "held-out pictures do not count"


def test_the_counts_are_those_of_the_split_and_every_style_has_some_of_both(store):
    meta = open_store(store / "latents")
    for style in ("ink", "oil"):
        counts = {part: sum(name.startswith(f"{style}/") for name in meta.split[part]) for part in ("train", "val")}
        assert meta.counts[style] == counts
        assert counts["val"] >= 1 and counts["train"] + counts["val"] == 10
    assert not set(meta.split["train"]) & set(meta.split["val"])


def test_a_channel_that_is_constant_keeps_its_scale(tmp_path, make_config, cpu):
    for number in range(3):
        (tmp_path / "raw" / "ink").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (100, 100, 100)).save(tmp_path / "raw" / "ink" / f"{number}.png")
    meta = preprocess(make_config(tmp_path), cpu, quiet=True).meta
    assert meta.latents.std == [1.0] * 12
    assert meta.latents.mean[0] == pytest.approx(4 * (100 / 127.5 - 1), abs=1e-6)  # orthonormal: 4 x 4 pixels, one mean


@pytest.mark.parametrize(("flags", "batches"), [([], [16, 4]), (["--batch_size", "7"], [7, 7, 6])])
def test_no_more_pictures_than_asked_for_are_encoded_at_once(store, make_config, monkeypatch, flags, batches):
    config, seen, real = make_config(store, {"data.data_root": str(store / "new")}), [], DctCodec.encode
    (store / "config.json").write_text(json.dumps(config_to_dict(config)))
    monkeypatch.setattr(DctCodec, "encode", lambda codec, pixels: seen.append(len(pixels)) or real(codec, pixels))
    assert main(build_parser().parse_args(["--config", str(store / "config.json"), "--device", "cpu", *flags])) == 0
    assert seen == [count for count in batches for _ in range(2)], "each batch, and its mirror images"
    with pytest.raises(UserError, match=r"--batch_size 0: must be 1 or more"):
        main(build_parser().parse_args(["--batch_size", "0"]))


#################################################################################
#                                 Running again                                 #
#################################################################################


def test_a_rerun_changes_nothing(store, make_config, cpu):
    before = snapshot(store / "latents")
    report = preprocess(make_config(store), cpu, quiet=True)
    after = snapshot(store / "latents")
    assert (report.encoded, report.kept, report.removed, report.skipped) == (0, 20, 0, [])
    assert {name: content for name, (content, _) in after.items()} == {n: content for n, (content, _) in before.items()}
    assert all(after[name] == before[name] for name in before if name.endswith(".pt")), "not even written again"


def test_added_removed_and_changed_pictures_are_the_only_work(store, draw, make_config, cpu):
    before = snapshot(store / "latents")
    (store / "raw" / "ink" / "3.png").unlink()
    draw(store / "raw" / "oil" / "4.png", seed=777)
    draw(store / "raw" / "oil" / "new" / "10.png", seed=778)
    report = preprocess(make_config(store), cpu, quiet=True)
    assert (report.encoded, report.kept, report.removed) == (2, 18, 1)
    after = snapshot(store / "latents")
    assert set(before) ^ set(after) == {"ink/3.png.pt", "oil/new/10.png.pt"}
    assert {n for n in before if n in after and before[n] != after[n]} == {"oil/4.png.pt", "meta.json"}
    preprocess(make_config(store, {"data.data_root": str(store / "fresh")}), cpu, quiet=True)
    assert_same_store(store / "latents", store / "fresh")


def test_added_pictures_move_none_from_validation_to_training(store, draw, make_config, cpu):
    before = open_store(store / "latents").split
    for number in range(10, 40):
        draw(store / "raw" / "ink" / f"{number}.png", seed=number + 500)
    after = preprocess(make_config(store), cpu, quiet=True).meta.split
    assert set(before["val"]) <= set(after["val"]) and set(before["train"]) <= set(after["train"])
    assert len(after["train"]) + len(after["val"]) == 50


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"hello"],
    ids=["half", "empty", "text"],
)
def test_a_damaged_entry_is_encoded_again(store, make_config, cpu, damage):
    path = store / "latents" / "oil" / "7.png.pt"
    whole = torch.load(path, weights_only=True)
    path.write_bytes(damage(path.read_bytes()))
    report = preprocess(make_config(store), cpu, quiet=True)
    assert (report.encoded, report.kept) == (1, 19)
    assert torch.equal(torch.load(path, weights_only=True)["latent"], whole["latent"])


def test_worker_processes_make_the_same_store(store, make_config, cpu):
    config = make_config(store, {"data.data_root": str(store / "other"), "training.num_workers": 2})
    preprocess(config, cpu, quiet=True)
    assert_same_store(store / "other", store / "latents")


def test_a_new_style_comes_behind_the_old_ones(store, draw, make_config, cpu):
    for number in range(3):
        draw(store / "raw" / "Acryl10" / f"{number}.png", seed=number)
        draw(store / "raw" / "acryl2" / f"{number}.png", seed=number + 5)
    report = preprocess(make_config(store), cpu, quiet=True)
    assert report.meta.latents.styles == ["ink", "oil", "acryl2", "Acryl10"]
    assert (report.encoded, report.kept) == (6, 20)


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import preprocess_latents as command
from isonext.utils.cli import run

real = os.replace
points = [lambda n, metas: n == 1, lambda n, metas: n == 2, lambda n, metas: n == 8, lambda n, metas: metas == 2]
for point in points:  # each attempt goes on where the one before was killed
    child = os.fork()
    if not child:
        calls = []
        def replace(beside, path):
            calls.append(os.path.basename(path))
            if point(len(calls), calls.count("meta.json")):
                os.truncate(beside, os.path.getsize(beside) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            real(beside, path)
        os.replace = replace
        run(command.main, command.build_parser())
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it ended before it was killed"
"""


@pytest.mark.slow
def test_after_kills_in_the_middle_a_rerun_equals_an_uninterrupted_run(store, make_config, cpu):
    config = make_config(store, {"data.data_root": str(store / "killed")})
    (store / "c.json").write_text(json.dumps(config_to_dict(config)))
    (store / "kill.py").write_text(KILLED.format(root=str(ROOT)))
    done = call(store, store / "kill.py", "--config", "c.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    with pytest.raises(UserError, match="not finished"):
        open_store(store / "killed")
    left = [path.name for path in (store / "killed").rglob("*.png.pt") if not path.name.startswith(".")]
    assert len(left) == 20, "the last kill came before meta.json alone"
    report = preprocess(config, cpu, quiet=True)
    assert (report.encoded, report.kept) == (0, 20)
    for leftover in (store / "killed").glob(".meta.isonext-tmp-*"):
        leftover.unlink()
    assert_same_store(store / "killed", store / "latents")


#################################################################################
#                                  Bad pictures                                 #
#################################################################################


def odd_pictures(folder: Path) -> list[str]:
    """Unusual pictures, all of them sound; their names."""
    folder.mkdir(parents=True)
    colour = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), np.uint8))
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(RNG.integers(0, 65536, (20, 30)).astype(np.uint16)).save(folder / "grey16.png")
    colour.quantize(16).save(folder / "palette.png", transparency=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(folder / "exif.jpg", exif=exif)
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    Image.new("RGB", (10000, 10), "red").save(folder / "strip.png")
    colour.convert("RGBA").save(folder / "alpha.webp")
    Image.new("LA", (9, 9), (7, 9)).save(folder / "la.png")
    return sorted(path.name for path in folder.iterdir())


def bad_pictures(folder: Path) -> list[str]:
    whole = folder / "whole.jpg"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(whole)
    (folder / "cut.jpg").write_bytes(whole.read_bytes()[:700])
    whole.unlink()
    (folder / "zero.png").touch()
    (folder / "text.png").write_text("no picture")
    return ["cut.jpg", "text.png", "zero.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_skipped_by_name_and_odd_ones_go_through(tmp_path, draw, make_config, cpu, workers):
    good = odd_pictures(tmp_path / "raw" / "ink")
    bad = bad_pictures(tmp_path / "raw" / "ink")
    report = preprocess(make_config(tmp_path, {"training.num_workers": workers}), cpu, quiet=True)
    assert report.encoded == len(good)
    assert sorted(line.split(": ")[0] for line in report.skipped) == [str(tmp_path / "raw" / "ink" / n) for n in bad]
    assert not any("\n" in line for line in report.skipped)
    assert sorted(entries(tmp_path / "latents")) == [f"ink/{name}.pt" for name in good]
    red = load_autoencoder("dct", cpu).encode(torch.tensor([1.0, -1, -1])[:, None, None].expand(1, 3, 16, 16))[0]
    for name in ("one", "strip"):
        torch.testing.assert_close(entries(tmp_path / "latents")[f"ink/{name}.png.pt"]["latent"], red)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
@pytest.mark.parametrize("layout", ["pt", "safetensors"])
def test_names_that_are_not_utf8_go_through_and_one_too_long_for_an_entry_is_that_picture_s_line(
    tmp_path, draw, make_config, cpu, layout
):
    long, odd = f"{'é' * 125}a.png", os.fsdecode(b"caf\xe9.png")
    for number, name in enumerate([long, odd, "plain.png", "other.png"]):
        draw(tmp_path / "raw" / "ink" / name, seed=number)
    assert len(os.fsencode(long)) == 255
    for _ in range(2):
        report = preprocess(make_config(tmp_path, {"data.format": layout}), cpu, quiet=True)
        why = "its name is longer than 252 bytes; shorten it, or use --format safetensors"
        lines = [f"{tmp_path / 'raw' / 'ink' / long}: {why}"] if layout == "pt" else []
        assert report.skipped == lines
        assert report.encoded + report.kept == 4 - len(lines)
    meta = open_store(tmp_path / "latents")
    names = meta.split
    assert f"ink/{odd}.pt" in names["train"] + names["val"]
    assert len(own_store(tmp_path / "latents", meta).load("train", 2**30)[0]) == len(names["train"])


def test_a_split_by_names_that_are_utf8_is_what_it_was():
    names = [f"ink/{number}é.png" for number in range(40)]
    by_hand = {n for n in names if int(hashlib.sha256(n.encode()).hexdigest()[:8], 16) / 2**32 < 0.3}
    assert held_out(names, 0.3) == by_hand


def test_whatever_one_picture_raises_is_its_line(tmp_path, draw, make_config, cpu, monkeypatch):
    for number in range(4):
        draw(tmp_path / "raw" / "ink" / f"{number}.png", seed=number)
    real = images.square

    def square(picture, size):
        if picture.getpixel((0, 0)) == first:
            raise MemoryError
        return real(picture, size)

    first = Image.open(tmp_path / "raw" / "ink" / "2.png").getpixel((0, 0))
    monkeypatch.setattr(images, "square", square)
    report = preprocess(make_config(tmp_path), cpu, quiet=True)
    assert report.skipped == [f"{tmp_path / 'raw' / 'ink' / '2.png'}: cannot be read (MemoryError)"]


def test_what_was_left_out_is_the_last_line(store, make_config, capsys):
    (store / "c.json").write_text(json.dumps(config_to_dict(make_config(store))))
    for name in ("ink/a.txt", "ink/b.txt", "oil/c.psd"):
        (store / "raw" / name).touch()
    assert main(build_parser().parse_args(["--config", str(store / "c.json"), "--device", "cpu"])) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "left out by suffix: 2 .txt, 1 .psd"


def test_the_command_ends_with_status_1_after_a_bad_picture_and_0_without(store, make_config, capsys):
    (store / "c.json").write_text(json.dumps(config_to_dict(make_config(store))))
    args = build_parser().parse_args(["--config", str(store / "c.json"), "--device", "cpu"])
    assert main(args) == 0
    (store / "raw" / "ink" / "text.png").write_text("no picture")
    capsys.readouterr()
    assert main(args) == 1
    shown = capsys.readouterr().out
    assert f"skipped: {store / 'raw' / 'ink' / 'text.png'}: not a picture" in shown
    assert "0 encoded, 20 kept, 0 removed" in shown


def test_a_picture_that_turned_bad_leaves_the_store(store, make_config, cpu):
    (store / "raw" / "ink" / "5.png").write_text("no longer a picture")
    report = preprocess(make_config(store), cpu, quiet=True)
    assert len(report.skipped) == 1 and report.kept == 19
    assert "ink/5.png.pt" not in report.meta.split["train"] + report.meta.split["val"]
    assert not (store / "latents" / "ink" / "5.png.pt").exists()


#################################################################################
#                                    Refusals                                   #
#################################################################################


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder.name": "dct:f4c16"}, "autoencoder dct:f4c12, not dct:f4c16"),
        ({"data.image_size": 32}, "size 16, not 32"),
        ({"data.image_size": 18}, "18: must be a multiple of 4"),
        ({"data.num_classes": 3}, r"2 folders \(ink, oil\), but data.num_classes = 3"),
        ({"data.raw_data_root": "no-such-folder"}, "no-such-folder: no such folder"),
        ({"autoencoder.name": "dct:f4c999"}, "dct:f4c999"),
    ],
)
def test_what_does_not_fit_the_store_is_refused_and_the_store_is_untouched(store, make_config, cpu, changes, message):
    before = snapshot(store / "latents")
    with pytest.raises(UserError, match=message):
        preprocess(make_config(store, changes), cpu, quiet=True)
    assert snapshot(store / "latents") == before


def test_a_vanished_style_folder_is_refused_and_the_store_is_untouched(store, make_config, cpu):
    before = snapshot(store / "latents")
    shutil.rmtree(store / "raw" / "oil")
    with pytest.raises(UserError, match="style folder oil has vanished; put it back, or delete"):
        preprocess(make_config(store), cpu, quiet=True)
    assert snapshot(store / "latents") == before


def test_an_empty_style_is_named_and_the_store_is_untouched(store, make_config, cpu):
    before = snapshot(store / "latents")
    (store / "raw" / "water").mkdir()
    (store / "raw" / "water" / "notes.txt").write_text("no pictures yet")
    with pytest.raises(UserError, match=r"raw/water: holds no pictures \(\.jpg"):
        preprocess(make_config(store), cpu, quiet=True)
    assert snapshot(store / "latents") == before


def test_a_folder_without_styles_is_named(tmp_path, make_config, cpu):
    (tmp_path / "raw").mkdir()
    with pytest.raises(UserError, match="raw: holds no folders"):
        preprocess(make_config(tmp_path), cpu, quiet=True)


def test_a_style_of_broken_pictures_only_is_named_and_the_store_is_not_complete(tmp_path, draw, make_config, cpu):
    for number in range(4):
        draw(tmp_path / "raw" / "ink" / f"{number}.png", seed=number)
    (tmp_path / "raw" / "oil").mkdir()
    bad_pictures(tmp_path / "raw" / "oil")
    with pytest.raises(UserError, match="oil: no picture of this style can be read"):
        preprocess(make_config(tmp_path), cpu, quiet=True)
    meta = read_meta(tmp_path / "latents")
    assert meta is None or not meta.complete


def test_hidden_folders_are_no_styles(store, make_config, cpu):
    (store / "raw" / ".thumbnails").mkdir()
    assert preprocess(make_config(store), cpu, quiet=True).kept == 20


def test_an_unfinished_file_of_a_killed_run_is_cleared_away(store, make_config, cpu):
    leftover = store / "latents" / "ink" / f".1.png.isonext-tmp-{os.getpid() + 1}_0.pt"
    leftover.write_bytes(b"half")
    preprocess(make_config(store), cpu, quiet=True)
    assert not leftover.exists()


#################################################################################
#                            What is not this program's                         #
#################################################################################

THEIRS = (".todo.tmpl", ".notes.tmp3.txt", ".a.isonext-tmp-.png", "packed-train-mine.npy", "ink/weights/mynet.pt")


def put(root: Path, *names: str) -> dict[str, bytes]:
    """Files of a user's at `root`, and what they hold."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(f"content {number}".encode())
    return {name: (root / name).read_bytes() for name in names}


def held(root: Path, names: dict[str, bytes]) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in names if (root / name).exists()}


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("where", ["raw", "other"])
def test_a_folder_that_is_not_empty_and_no_store_is_refused_and_keeps_its_files(store, make_config, cpu, where, form):
    why = (
        "lies in data.raw_data_root"
        if where == "raw"
        else r"is no latent store and not empty \(ink\); give data\.data_root"
    )
    put(store / where, ".todo.tmpl", "ink/weights/mynet.pt")
    before = snapshot(store / where)
    config = make_config(store, {"data.data_root": str(store / where), "data.format": form})
    with pytest.raises(UserError, match=rf"{where}: {why}"):
        preprocess(config, cpu, quiet=True)
    assert snapshot(store / where) == before


def test_hidden_files_alone_may_stay_in_the_folder_of_a_new_store(store, make_config, cpu):
    theirs = put(store / "new", ".gitkeep", ".notes.tmp3.txt")
    assert preprocess(make_config(store, {"data.data_root": str(store / "new")}), cpu, quiet=True).encoded == 20
    assert held(store / "new", theirs) == theirs


def test_files_of_others_in_a_store_survive_all_that_it_does(store, draw, make_config, cpu):
    root, theirs = store / "latents", put(store / "latents", *THEIRS)
    (store / "raw" / "ink" / "3.png").unlink()
    (store / "raw" / "ink" / "5.png").write_text("no picture")
    draw(store / "raw" / "oil" / "4.png", seed=777)
    report = preprocess(make_config(store), cpu, quiet=True)
    assert (report.encoded, report.kept, report.removed, len(report.skipped)) == (1, 17, 1, 1)
    load_split(root, open_store(root), "train", memory_limit=0)
    assert held(root, theirs) == theirs
    assert not (root / "ink" / "3.png.pt").exists() and not (root / "ink" / "5.png.pt").exists()


@pytest.mark.parametrize("readable", [True, False])
def test_a_file_of_others_under_an_entrys_name_is_refused_before_any_work(store, draw, make_config, cpu, readable):
    theirs = store / "latents" / "ink" / "new.png.pt"
    theirs.write_bytes(b"mine")
    draw(store / "raw" / "ink" / "new.png", seed=5)
    if not readable:
        (store / "raw" / "ink" / "new.png").write_text("no picture")
    before = snapshot(store / "latents")
    with pytest.raises(UserError, match=r"new\.png\.pt: is there, and meta\.json does not say that this program wrote"):
        preprocess(make_config(store), cpu, quiet=True)
    assert snapshot(store / "latents") == before


def test_a_store_inside_the_pictures_would_be_a_style_and_is_refused(store, make_config, cpu):
    (store / "link").symlink_to(store / "raw")
    for place in ("raw", "raw/lat", "link/lat"):
        with pytest.raises(UserError, match=r"data\.data_root = .*: lies in data\.raw_data_root"):
            preprocess(make_config(store, {"data.data_root": str(store / place)}), cpu, quiet=True)
    assert not (store / "raw" / "lat").exists()


def test_a_latent_in_a_shard_that_is_no_number_is_named_and_encoded_again(store, make_config, cpu):
    config = make_config(store, {"data.format": "safetensors", "data.data_root": str(store / "shards")})
    preprocess(config, cpu, quiet=True)
    path = store / "shards" / "latents-00000.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    names = list(json.loads(metadata["pictures"]))
    meta = read_meta(store / "shards")
    broken = next(number for number, name in enumerate(names) if name in meta.split["train"])
    tensors["latents"][broken, 0, 1, 1] = torch.nan
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=rf"the latent of {re.escape(names[broken])} has numbers that are none"):
        load_split(store / "shards", meta, "train")
    report = preprocess(config, cpu, quiet=True)
    assert (report.encoded, report.kept) == (1, 19)
    assert np.isfinite(load_split(store / "shards", read_meta(store / "shards"), "train").latents[:]).all()


def test_what_a_stopped_run_wrote_goes_with_its_picture(store, make_config, cpu, monkeypatch):
    config = make_config(store, {"data.data_root": str(store / "stopped")})
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "_complete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess(config, cpu, quiet=True)
    (store / "raw" / "ink" / "3.png").unlink()
    report = preprocess(config, cpu, quiet=True)
    assert (report.encoded, report.kept, report.removed) == (0, 19, 1)
    assert not (store / "stopped" / "ink" / "3.png.pt").exists()
    assert read_meta(store / "stopped").written == []


def test_a_second_run_in_one_store_is_one_line_and_changes_nothing(store, make_config, cpu):
    before = snapshot(store / "latents")
    with (
        folder_lock(store / "latents"),
        pytest.raises(UserError, match=r"latents: is in use by another run of this program; wait"),
    ):
        preprocess(make_config(store), cpu, quiet=True)
    assert snapshot(store / "latents") == before
    assert preprocess(make_config(store), cpu, quiet=True).kept == 20


#################################################################################
#                     The autoencoder is told by its weights                    #
#################################################################################


def edit_spec(root: Path, **changes) -> None:
    """Change entries of meta.json's latents; None takes one out."""
    tree = json.loads((root / "meta.json").read_text())
    spec = tree["latents"] | changes
    tree["latents"] = {name: value for name, value in spec.items() if value is not None}
    (root / "meta.json").write_text(json.dumps(tree, indent=1))


def test_replaced_weights_are_refused_and_the_store_is_untouched(store, make_config, cpu):
    edit_spec(store / "latents", autoencoder_digest="0" * 64)
    before = snapshot(store / "latents")
    with pytest.raises(
        UserError, match=r"latents: the store has autoencoder dct:f4c12 \(sha256 0{12}\), not dct:f4c12"
    ):
        preprocess(make_config(store), cpu, quiet=True)
    assert snapshot(store / "latents") == before


def test_an_autoencoder_that_moved_is_the_same_and_the_store_says_where_it_is_now(store, make_config, cpu):
    edit_spec(store / "latents", autoencoder=str(store / "gone"))
    assert preprocess(make_config(store), cpu, quiet=True).kept == 20
    assert read_meta(store / "latents").latents.autoencoder == "dct:f4c12"


def test_a_store_without_a_digest_goes_by_the_path_and_stays_without(store, make_config, cpu):
    edit_spec(store / "latents", autoencoder_digest=None)
    assert preprocess(make_config(store), cpu, quiet=True).kept == 20
    assert read_meta(store / "latents").latents.autoencoder_digest == ""
    edit_spec(store / "latents", autoencoder="dct:f4c11")
    with pytest.raises(UserError, match=r"has autoencoder dct:f4c11, not dct:f4c12"):
        preprocess(make_config(store), cpu, quiet=True)


#################################################################################
#                          Latents that are no numbers                          #
#################################################################################


class Overflowing(DctCodec):
    """Of a picture whose corner is bright it makes an infinity: in the mirrored latent alone, if that is a left one."""

    def encode(self, pixels):
        latents = super().encode(pixels)
        latents[:, 3, 0, -1] += torch.where(pixels[:, :, 0, -1].amin(1) > 0.99, torch.inf, 0.0)
        return latents


@pytest.fixture
def overflowing(monkeypatch):
    monkeypatch.setattr(preprocessing, "load_autoencoder", lambda name, device: Overflowing(name))


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("corner", [(0, 15), (0, 0)], ids=["plain", "mirrored"])
def test_a_picture_that_the_autoencoder_makes_no_numbers_of_is_named_and_skipped(
    store, make_config, cpu, overflowing, form, corner
):
    path = store / "raw" / "ink" / "3.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[corner] = 255
    Image.fromarray(pixels).save(path)
    config = make_config(store, {"data.data_root": str(store / "new"), "data.format": form})
    report = preprocess(config, cpu, quiet=True)
    assert report.skipped == [f"{path}: the autoencoder dct:f4c12 makes no finite numbers of it"]
    assert report.encoded == 19
    meta = open_store(store / "new")
    assert np.isfinite([meta.latents.mean, meta.latents.std]).all()
    assert "ink/3.png.pt" not in meta.split["train"] + meta.split["val"]


def test_an_autoencoder_that_makes_no_numbers_at_all_is_named(store, make_config, cpu, monkeypatch):
    monkeypatch.setattr(DctCodec, "encode", lambda self, pixels: torch.full((len(pixels), 12, 4, 4), torch.nan))
    with pytest.raises(UserError, match=r"ink: no picture .*0\.png: the autoencoder dct:f4c12 makes no finite numbers"):
        preprocess(make_config(store, {"data.data_root": str(store / "new")}), cpu, quiet=True)
    assert not read_meta(store / "new").complete


def test_latents_of_before_that_are_no_numbers_are_encoded_again(store, make_config, cpu):
    path = store / "latents" / "oil" / "7.png.pt"
    entry = torch.load(path, weights_only=True)
    whole = entry["latent"].clone()
    entry["latent"][0, 0, 0] = torch.nan
    torch.save(entry, path)
    report = preprocess(make_config(store), cpu, quiet=True)
    assert (report.encoded, report.kept) == (1, 19)
    assert torch.equal(torch.load(path, weights_only=True)["latent"], whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_store_whose_statistics_are_no_numbers_is_refused(store, name, value):
    edit_spec(store / "latents", **{name: [1.0] * 11 + [value]})
    with pytest.raises(
        UserError, match=rf"meta.json: damaged \(latents.{name}\[11\] = (NaN|Infinity): must be a number"
    ):
        open_store(store / "latents")
