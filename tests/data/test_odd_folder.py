"""A folder of everything that real folders hold, through all commands, with the outcome of every file."""

import io
import json
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import picture_files as files
from helpers import TINY, call, draw_styles
from isonext.data import images
from isonext.data.autoencoder import load_autoencoder

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes, and other names, here"),
    pytest.mark.filterwarnings("ignore"),  # of Pillow, which says much of damaged files
]
RNG = np.random.default_rng(5)
STORED = RNG.integers(0, 256, (8, 16, 3), np.uint8)
TURNED, GREEN = np.rot90(STORED, -1), np.full((16, 16, 3), (60, 200, 60), np.uint8)
GREY = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (8, 1))
ADOBE = files.rgb_profile(files.ADOBE, files.gamma_curve(files.ADOBE_GAMMA))
GREEN_OF_ADOBE = np.full((16, 16, 3), (0, 201, 37))
LOSSLESS = {"png": {}, "webp": {"lossless": True}, "jpeg": {"quality": 100, "subsampling": 0}}
LONG, NOT_UTF8 = f"{'é' * 125}a.png", os.fsdecode(b"caf\xe9.png")
Outcome = np.ndarray | str  # the pixels that are seen, or words of the line
PNG = files.encoded(STORED, "PNG")


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values)[..., None], 3, -1)


def upright() -> dict[str, tuple[bytes, Outcome]]:
    """Turned by EXIF data that are odd in every way."""
    found: dict[str, tuple[bytes, Outcome]] = {}
    for odd, entry in files.ODD_ENTRIES.items():
        exif = files.exif(files.ORIENTATION, entry)
        for kind, options in LOSSLESS.items():
            found[f"turned_{odd}_{kind}.{kind}"] = files.encoded(STORED, kind, exif=exif, **options), TURNED
        if odd != "ImageLength-rational":  # that says something else in a TIFF
            found[f"turned_{odd}_tif.tif"] = files.tiff(STORED, files.ORIENTATION, entry, bits=8), TURNED
    cut = files.chunk(b"eXIf", files.exif(files.ORIENTATION, files.ODD_ENTRIES["XResolution-byte"])[6:-9])
    return found | {"turned_cut.png": (files.png_with(PNG, cut), TURNED)}


def coloured() -> dict[str, tuple[bytes, Outcome]]:
    """Converted by profiles, or read without one of no use."""
    found: dict[str, tuple[bytes, Outcome]] = {
        f"adobe_{kind}.{kind}": (files.encoded(GREEN, kind, icc_profile=ADOBE, **options), GREEN_OF_ADOBE)
        for kind, options in (LOSSLESS | {"tiff": {}}).items()
    }
    p3 = files.rgb_profile(files.DISPLAY_P3, files.srgb_curve())
    linear = files.srgb_of(files.linear_of_srgb(STORED) @ files.DISPLAY_P3.T)
    found["p3.png"] = files.encoded(STORED, "PNG", icc_profile=p3), linear
    light = files.srgb_of(grey(GREY / 255) * files.SRGB.sum(1))
    found["linear_grey.png"] = files.encoded(GREY, "PNG", icc_profile=files.grey_profile(1.0)), light
    corners = np.zeros((2, 2, 2, 2, 3))
    corners[...] = (0, 128, 128)
    corners[0, 0, 0, 0] = corners[1, 0, 0, 0] = (255, 128, 128)  # a press whose cyan is paper
    cyan, press = Image.new("CMYK", (16, 16), (255, 0, 0, 0)), files.cmyk_profile(corners)
    for kind in ("jpeg", "tiff"):
        found[f"press_{kind}.{kind}"] = files.encoded(cyan, kind, icc_profile=press), np.full((16, 16, 3), 255)
    for name, profile in (("text", b"no profile"), ("cut", ADOBE[:200]), ("grey", files.grey_profile(1.0))):
        found[f"useless_{name}.tif"] = files.encoded(STORED, "TIFF", icc_profile=profile), STORED
    return found


def deep() -> dict[str, tuple[bytes, Outcome]]:
    """Of other depths, with their one white, or refused."""
    values = GREY.astype(np.uint16) * 257 + 200
    key = files.chunk(b"tRNS", struct.pack(">H", values[0, 3]))
    keyed = np.where(values == values[0, 3], 255, values // 256)
    rgb_key = files.chunk(b"tRNS", struct.pack(">3H", *[values[0, 3]] * 3))
    ramp = np.linspace(0, 1.0000001, 128, dtype=np.float32).reshape(8, 16)
    found: dict[str, tuple[bytes, Outcome]] = {
        "grey16.png": (files.png(values), grey(values // 256)),
        "rgb16.png": (files.png(grey(values)), grey(values // 256)),
        "keyed16.png": (files.png(values, key), grey(keyed)),
        "rgb_keyed16.png": (files.png(grey(values), rgb_key), grey(keyed)),
        "white_is_zero.tif": (files.tiff(values, bits=16, white_is_zero=True), grey(255 - values // 256)),
        "bits12.tif": (files.twelve_bits(values // 16), grey(values // 256)),
        "float.tif": (files.tiff(ramp, bits=32), grey(np.rint(np.clip(ramp, 0, 1) * 255))),
    }
    for name, value in (("255", 255), ("inf", np.inf), ("nan", np.nan)):
        odd = ramp.copy()
        odd[2, 3] = value
        found[f"float_{name}.tif"] = files.tiff(odd, bits=32), "its float values go from"
    for dtype in (np.uint32, np.int32):
        found[f"{dtype.__name__}.tif"] = files.tiff(GREY.astype(dtype), bits=32), "32-bit integers"
    return found


def usual() -> dict[str, tuple[bytes, Outcome]]:
    """Other suffixes, metadata, names and shapes, which take nothing from the pixels."""
    jpeg, profile = (
        files.encoded(GREEN, "JPEG", quality=100),
        files.chunk(b"iCCP", b"a\0\0" + files.text_chunk(2**21)[16:-4]),
    )
    found: dict[str, tuple[bytes, Outcome]] = {
        "a.jfif": (jpeg, GREEN),
        "b.JPE": (jpeg, GREEN),
        "c.gif": (files.encoded(GREEN, "GIF"), GREEN),
        "d.jp2": (files.encoded(GREEN, "JPEG2000"), GREEN),
        "e.dib": (files.encoded(STORED, "BMP"), STORED),
        "f.apng": (PNG, STORED),
        "gif_in_truth.png": (files.encoded(GREEN, "GIF"), GREEN),
        "text_before.png": (files.png_with(PNG, files.text_chunk(3 * 2**20)), STORED),
        "text_behind.png": (files.png_with(PNG, files.text_chunk(3 * 2**20), behind=True), STORED),
        "large_profile.png": (files.png_with(PNG, profile), STORED),
        "one.png": (files.encoded(STORED[:1, :1], "PNG"), STORED[:1, :1]),
        "strip.png": (files.encoded(GREEN[:1].repeat(300, 1), "PNG"), GREEN[:1].repeat(300, 1)),
        "alpha.png": (files.encoded(Image.new("LA", (9, 9), (0, 51)), "PNG"), np.full((9, 9, 3), 204)),
        "cmyk.jpg": (files.encoded(Image.new("CMYK", (16, 16)), "JPEG"), np.full((16, 16, 3), 255)),
        NOT_UTF8: (PNG, STORED),
    }
    return found | (
        {"g.avif": (files.encoded(GREEN, "AVIF", quality=100), GREEN)} if ".avif" in images.READABLE else {}
    )


def bad() -> dict[str, tuple[bytes, Outcome]]:
    """No pictures, broken ones, and those that would never end."""
    noise = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    header = struct.pack(">IIBBBBB", 13000, 13000, 16, 0, 0, 0, 0)
    found: dict[str, tuple[bytes, Outcome]] = {
        "empty.png": (b"", "not a picture"),
        os.fsdecode(b"b\xe9d.png"): (b"", "not a picture"),
        "text.jpg": (b"hello, I am a text", "not a picture"),
        "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"),
        "tga.png": (files.encoded(STORED, "TGA"), "not a picture"),
        "spider.tif": (files.encoded(Image.new("F", (16, 16)), "SPIDER"), "not a picture"),
        "cut_jpeg.jpg": (files.encoded(noise, "JPEG")[:900], "cannot be read"),
        "cut_png.png": (files.encoded(noise, "PNG")[:900], "cannot be read"),
        "cut_tiff.tif": (files.encoded(noise, "TIFF")[:900], ""),
        "cut_webp.webp": (files.encoded(noise, "WEBP")[:900], ""),
        "cut_gif.gif": (files.encoded(noise, "GIF")[:900], ""),
        "cut_jp2.jp2": (files.encoded(noise, "JPEG2000")[:900], ""),
        "huge.png": (PNG[:8] + files.chunk(b"IHDR", header) + PNG[33:], "13000 x 13000 pixels"),
        "scans.jpg": (files.jpeg_with_scans(2000, 1500), "pixels in 1510 scans"),
    }
    if ".avif" in images.READABLE:
        found["cut_avif.jpg"] = files.encoded(noise, "AVIF")[:-20], ""
    return found


def write_folder(root: Path) -> dict[str, Outcome]:
    """raw/odd, and beside it raw/plain of sound pictures; returns the outcome of every file of `odd` by its name."""
    draw_styles(root / "drawn", 6)
    (root / "raw").mkdir()
    (root / "drawn" / "cold").rename(root / "raw" / "plain")
    odd, elsewhere = root / "raw" / "odd", root / "elsewhere"
    outcomes: dict[str, Outcome] = {}
    for folder in (odd, elsewhere, odd / "folder.png"):
        folder.mkdir()
    for name, (content, outcome) in (upright() | coloured() | deep() | usual() | bad()).items():
        (odd / name).write_bytes(content)
        outcomes[name] = outcome
    for place, name in ((elsewhere / "x.png", "linked/x.png"), (odd / "folder.png" / "y.png", "folder.png/y.png")):
        place.write_bytes(PNG)
        outcomes[name] = STORED
    (odd / LONG).write_bytes(PNG)
    (odd / "linked").symlink_to(elsewhere)
    (odd / "gone.png").symlink_to(root / "nowhere.png")
    (odd / "self.png").symlink_to("self.png")
    os.mkfifo(odd / "pipe.png")
    outcomes |= {"gone.png": "no such picture", "self.png": "", "pipe.png": "not a file"}
    for name in ("notes.txt", "more.TXT", "work.psd", ".hidden.png", "README"):
        (odd / name).write_text("no picture")
    return outcomes


def finished(done: subprocess.CompletedProcess, status: int) -> str:
    """The stdout of a command that ended with `status` and without a traceback."""
    assert done.returncode == status and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stdout


def check_skipped(out: str, folder: str, outcomes: dict[str, Outcome]) -> None:
    """One line for each bad picture of a folder, with its reason, and none for a good one."""
    lines = [line for line in out.splitlines() if line.startswith("skipped: ")]
    for name, outcome in outcomes.items():
        shown = name.encode(errors="backslashreplace").decode()
        mine = [line for line in lines if line.startswith(f"skipped: {folder}/{shown}: ")]
        if isinstance(outcome, str):
            assert mine and all(outcome in line for line in mine), (name, lines)
        else:
            assert not mine, mine


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, dict[str, Outcome]]:
    """The folder and the outcomes; a config, too."""
    root = tmp_path_factory.mktemp("odd")
    outcomes = write_folder(root)
    tree = {section: dict(values) for section, values in TINY.items()}
    tree["data"] |= {"raw_data_root": "raw", "data_root": "latents", "val_fraction": 0.0}
    tree["checkpoint"] = {"save_dir": "run"}
    tree["training"] |= {"stage1_epochs": 1}
    (root / "config.json").write_text(json.dumps(tree))
    return root, outcomes


def test_there_are_many_of_them(chain):
    names = chain[1]
    assert len(names) >= 80 and sum(isinstance(outcome, str) for outcome in names.values()) >= 20


def test_every_good_picture_is_seen_as_it_should_be(chain):
    root, outcomes = chain
    for name, expected in outcomes.items():
        if isinstance(expected, np.ndarray):
            seen = np.asarray(images.open_picture(root / "raw" / "odd" / name)).astype(int)
            kind = Path(name).suffix.lower()
            atol = 8 if kind in (".jpg", ".jpeg", ".jpe", ".jfif", ".avif") else 2
            np.testing.assert_allclose(seen, expected, atol=atol, err_msg=name)


def test_they_go_through_all_commands_or_are_named_and_skipped(chain):
    root, outcomes = chain
    out = finished(call(root, "preprocess_latents.py", "--device", "cpu"), 1)
    good = {name for name, outcome in outcomes.items() if not isinstance(outcome, str)}
    check_skipped(out, "raw/odd", outcomes | {LONG: "its name is longer than 252 bytes"})
    assert out.splitlines()[-1] == "left out by suffix: 2 .txt, 1 .psd, 1 without a suffix"
    split = json.loads((root / "latents" / "meta.json").read_text())["split"]
    stored = {name[4:-3] for name in split["train"] + split["val"] if name.startswith("odd/")}
    assert stored == good
    codec = load_autoencoder("dct", torch.device("cpu"))
    for name in sorted(good)[::7]:
        picture = images.square(images.open_picture(root / "raw" / "odd" / name), 16)
        latent = torch.load(root / "latents" / "odd" / f"{name}.pt", weights_only=True)["latent"]
        torch.testing.assert_close(latent, codec.encode(images.to_pixels(images.to_bytes(picture))[None])[0])

    finished(call(root, "train.py"), 0)

    flags = ("--checkpoint", "run/stage1_epoch1.pt", "--device", "cpu")
    to_plain = (*flags, "--source_style", "odd", "--target_style", "plain", "--num_steps", "1")
    out = finished(call(root, "inference.py", *to_plain, "--input", "raw/odd", "--output", "out"), 1)
    check_skipped(out, "raw/odd", outcomes | {LONG: STORED})
    assert f"{len(good) + 1} made" in out and out.splitlines()[-1].startswith("left out by suffix: 2 .txt")
    for name in good:
        result = root / "out" / (name if Path(name).suffix.lower() in images.SUFFIXES else f"{name}.png")
        with Image.open(result) as written:
            assert written.size == outcomes[name].shape[1::-1], name
            assert written.format == "BMP" or written.info["icc_profile"], name
    again = finished(call(root, "inference.py", *to_plain, "--input", "raw/odd", "--output", "out"), 1)
    assert f"0 made, {len(good) + 1} were there already" in again

    done = call(root, "inference.py", *to_plain, "--input", "raw/odd/strip.png", "--output", "x.png", "--size", "16000")
    assert "by enlarging" in done.stderr and finished(done, 2) == ""
    done = call(root, "inference.py", *to_plain, "--input", "raw/odd/script.png", "--output", "x.png")
    assert done.stderr == "error: raw/odd/script.png: not a picture\n" and finished(done, 2) == ""

    out = finished(call(root, "evaluate.py", *flags, "--data", "raw", "--quick", "--set", "inference.num_steps=1"), 1)
    check_skipped(out, "raw/odd", outcomes | {LONG: STORED})
    assert (root / "report" / "report.md").exists()

    finished(call(root, "sample.py", *flags, "--output", "samples", "--num_samples", "4", "--num_steps", "1"), 0)
    with Image.open(io.BytesIO((root / "samples" / "sample_00001.png").read_bytes())) as written:
        assert written.size == (16, 16) and written.info["icc_profile"]


def test_a_loop_of_links_is_one_line_in_every_command(chain):
    root, _ = chain
    (root / "raw" / "plain" / "up").symlink_to("..")
    try:
        done = call(root, "preprocess_latents.py", "--device", "cpu")
    finally:
        (root / "raw" / "plain" / "up").unlink()
    assert finished(done, 2) == "" and "by a link; remove the link" in done.stderr and done.stderr.count("\n") == 1
