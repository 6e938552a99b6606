"""Files as they come: turned upright by damaged metadata too, no decoder but those promised, nothing endless."""

import os
import re
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

import picture_files as files
from helpers import ROOT
from isonext.data import decode, images

RNG = np.random.default_rng(4)
STORED = RNG.integers(0, 256, (8, 16, 3), np.uint8)
pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow, which says much of damaged files
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}


def read(tmp_path, content: bytes, name: str = "a.png") -> np.ndarray:
    (tmp_path / name).write_bytes(content)
    seen = np.asarray(images.open_picture(tmp_path / name))
    assert images.picture_size(tmp_path / name) in (None, (seen.shape[1], seen.shape[0]))
    return seen


#################################################################################
#                                   Orientation                                 #
#################################################################################


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("odd", files.ODD_ENTRIES)
def test_a_picture_is_turned_upright_whatever_else_its_exif_holds(tmp_path, odd, kind):
    exif = files.exif(files.ORIENTATION, files.ODD_ENTRIES[odd])
    seen = read(tmp_path, files.encoded(STORED, kind, exif=exif, **LOSSLESS[kind])).astype(int)
    np.testing.assert_allclose(seen, np.rot90(STORED, -1), atol=8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("odd", [odd for odd in files.ODD_ENTRIES if odd != "ImageLength-rational"])
def test_a_tiff_is_turned_upright_whatever_else_it_holds(tmp_path, odd):
    content = files.tiff(STORED, files.ORIENTATION, files.ODD_ENTRIES[odd], bits=8)
    np.testing.assert_array_equal(read(tmp_path, content), np.rot90(STORED, -1))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, value):
    exif = files.exif((0x0112, 3, 1, struct.pack("<H", value)))
    np.testing.assert_array_equal(read(tmp_path, files.encoded(STORED, "PNG", exif=exif)), STORED)


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_cut_exif_data_turn_the_picture_if_they_still_say_so_and_never_more(tmp_path, cut):
    exif = files.exif(files.ORIENTATION, (0x011A, 5, 1, struct.pack("<II", 72, 1)))[6:]
    plain = files.encoded(STORED, "PNG")
    seen = read(tmp_path, files.png_with(plain, files.chunk(b"eXIf", exif[: len(exif) - cut])))
    expected = np.rot90(STORED, -1) if seen.shape == (16, 8, 3) else STORED
    np.testing.assert_array_equal(seen, expected)
    assert cut or seen.shape == (16, 8, 3)


#################################################################################
#                              Content decides                                  #
#################################################################################

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX", "PPM", "ICO", "SGI", "IM", "DDS", "BLP", "SPIDER", "MSP", "XBM"])
def test_a_format_that_no_suffix_promises_is_not_decoded_under_any_name(tmp_path, kind, monkeypatch):
    mode = {"MSP": "1", "XBM": "1", "BLP": "P", "SPIDER": "F"}.get(kind, "RGB")
    content = EPS if kind == "EPS" else files.encoded(Image.new(mode, (16, 16)), kind)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program is started"))
    for name in ("a.png", f"a.{kind.lower()}"):
        with pytest.raises(images.BadPicture, match=f"{name}: not a picture"):
            read(tmp_path, content, name)
        assert images.picture_size(tmp_path / name) is None


@pytest.mark.parametrize("suffix", images.READABLE)
def test_what_a_suffix_promises_is_read_under_that_name_and_any_other(tmp_path, suffix):
    kind = images.READABLE[suffix]
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}, "AVIF": {"quality": 100}}.get(kind, {})
    colour = Image.new("RGB", (16, 16), (200, 120, 40))
    for name in (f"a{suffix}", f"a{suffix.upper()}", "a.png", "a"):
        seen = read(tmp_path, files.encoded(colour, kind, **options), name).astype(int)
        assert seen.shape == (16, 16, 3) and np.abs(seen - (200, 120, 40)).max() <= 4


@pytest.mark.parametrize("page", ["docs/data.md", "docs/data_zh.md"])
def test_the_table_of_accepted_pictures_is_true(page):
    """Its first column holds all suffixes that are read; the plugin for HEIF need not be installed."""
    text = (ROOT / page).read_text(encoding="utf-8")
    table = text[text.index("`.jpg`") :].partition("\n\n")[0]
    rows = [row.split("|")[1:] for row in ("| " + table).splitlines()]
    promised = [suffix for row in rows for suffix in re.findall(r"`(\.\w+)`", row[0])]
    assert sorted(promised) == sorted(decode.PROMISED)
    written = [suffix for row in rows for suffix in re.findall(r"`(\.\w+)`", row[1])]
    assert set(written) - {".avif"} == set(images.SUFFIXES) - {".avif"}
    for limit in (decode.MOST_PIXELS, decode.MOST_PIXELS_JPEG2000, decode.MOST_SCANNED_PIXELS, images.MOST_ENLARGED):
        assert str(limit) in text


#################################################################################
#                              Nothing endless                                  #
#################################################################################


def huge(kind: str, width: int, height: int) -> bytes:
    """A picture of few bytes whose header promises so many pixels."""
    small = files.encoded(Image.new("L", (16, 16)), kind)
    if kind == "PNG":
        header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
        return small[:8] + files.chunk(b"IHDR", header) + small[8 + 25 :]
    if kind == "JPEG":
        place = small.index(b"\xff\xc0") + 5
        return small[:place] + struct.pack(">HH", height, width) + small[place + 4 :]
    place = small.index(b"ihdr") + 4
    siz = small.index(b"\xff\x51") + 6
    small = small[:place] + struct.pack(">II", height, width) + small[place + 8 :]
    sides = struct.pack(">IIIIII", width, height, 0, 0, width, height)
    return small[:siz] + sides + small[siz + 24 :]


@pytest.mark.parametrize(
    ("kind", "width", "height", "most"),
    [
        ("PNG", 13000, 13000, 2**27),
        ("PNG", 2**27 + 1, 1, 2**27),
        ("JPEG", 12000, 12000, 2**27),
        ("JPEG2000", 8000, 8000, 2**25),
        ("PNG", 2**31 - 1, 2**31 - 1, None),  # Pillow's own limit comes first
    ],
)
def test_too_many_pixels_are_refused_before_one_is_decoded(tmp_path, kind, width, height, most, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it is decoded"))
    words = rf"has {width} x {height} pixels, of this format at most {most} are decoded" if most else "exceeds limit"
    with pytest.raises(images.BadPicture, match=words):
        read(tmp_path, huge(kind, width, height))


def test_a_deep_picture_of_many_pixels_takes_a_small_multiple_of_their_number(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    side = 1500
    (tmp_path / "a.png").write_bytes(files.png(np.zeros((side, side), np.uint16)))
    tracemalloc.start()
    images.open_picture(tmp_path / "a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * side**2, "numpy held more than a few bytes a pixel"


def test_a_jpeg_that_asks_for_scan_after_scan_is_refused_at_once_and_an_honest_one_is_read(tmp_path):
    started = time.perf_counter()
    with pytest.raises(images.BadPicture, match="2000 x 2000 pixels in 2010 scans, at most 2147483648 pixels are"):
        read(tmp_path, files.jpeg_with_scans(2000, 2000))
    assert time.perf_counter() - started < 1
    assert read(tmp_path, files.jpeg_with_scans(200, 2000)).shape == (200, 200, 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert images.picture_size(tmp_path / "a.png") is None
    with pytest.raises(images.BadPicture, match=r"a\.png: not a file"):
        images.open_picture(tmp_path / "a.png")


#################################################################################
#                          Whatever a decoder raises                            #
#################################################################################


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("length", [2**20 + 1, 3 * 2**20])
def test_a_png_is_read_however_much_text_it_holds(tmp_path, length, behind):
    profile = files.rgb_profile(files.ADOBE, files.gamma_curve(files.ADOBE_GAMMA))
    green = files.encoded(Image.new("RGB", (4, 4), (60, 200, 60)), "PNG", icc_profile=profile)
    seen = read(tmp_path, files.png_with(green, files.text_chunk(length), behind=behind))
    assert np.abs(seen[0, 0].astype(int) - (0, 201, 37)).max() <= 2, "its profile is still used"


def test_a_png_is_read_with_many_texts_and_stays_upright(tmp_path):
    whole = files.encoded(STORED, "PNG", exif=files.exif(files.ORIENTATION))
    content = files.png_with(whole, *[files.text_chunk(2**20)] * 65)
    np.testing.assert_array_equal(read(tmp_path, content), np.rot90(STORED, -1))


def test_a_png_with_an_odd_profile_chunk_is_read(tmp_path):
    for data in (b"name\0\x07" + zlib.compress(b"profile"), b"name\0"):
        content = files.png_with(files.encoded(STORED, "PNG"), files.chunk(b"iCCP", data))
        np.testing.assert_array_equal(read(tmp_path, content), STORED)


@pytest.mark.parametrize(
    "error",
    [
        TypeError,
        struct.error,
        RuntimeError,
        SyntaxError,
        MemoryError,
        RecursionError,
        KeyError,
        AssertionError,
        OSError,
    ],
)
@pytest.mark.parametrize("where", ["open", "load"])
def test_whatever_a_decoder_raises_is_one_line_with_the_path(tmp_path, monkeypatch, error, where):
    def fail(*_, **__):
        raise error("the decoder\nfell over")

    path = tmp_path / "a.png"
    path.write_bytes(files.encoded(STORED, "PNG"))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile" + (".load" if where == "load" else "._open"), fail)
    with pytest.raises(images.BadPicture) as caught:
        images.open_picture(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_file_name_of_two_lines_is_still_told_in_one(tmp_path):
    with pytest.raises(images.BadPicture, match=r"a\\nb\.png: no such picture"):
        images.open_picture(tmp_path / "a\nb.png")


@pytest.mark.skipif(".avif" not in images.READABLE, reason="this Pillow has no AVIF")
def test_damaged_avif_under_another_name_is_a_line(tmp_path):
    whole = files.encoded(RNG.integers(0, 256, (64, 64, 3), np.uint8), "AVIF")
    for cut in (len(whole) // 2, len(whole) - 20):
        with pytest.raises(images.BadPicture, match=r"a\.jpg: "):
            read(tmp_path, whole[:cut], "a.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000"])
def test_flipped_and_cut_bytes_never_raise_anything_else(tmp_path, kind):
    whole = files.encoded(STORED, kind, **({"exif": files.exif(files.ORIENTATION)} if kind in LOSSLESS else {}))
    for number in range(60):
        data = bytearray(whole[: RNG.integers(1, len(whole) + 1)] if number % 3 == 0 else whole)
        for place in RNG.integers(0, len(data), 1 + number % 4):
            data[place] = RNG.integers(256)
        (tmp_path / "a.jpg").write_bytes(data)
        try:
            assert images.open_picture(tmp_path / "a.jpg").mode == "RGB"
        except images.BadPicture as error:
            assert "\n" not in str(error)
        images.picture_size(tmp_path / "a.jpg")
