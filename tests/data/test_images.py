import io
import math
import struct
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from isonext.data import images
from isonext.errors import UserError

RNG = np.random.default_rng(0)


def read(picture: Image.Image, path, **options) -> np.ndarray:
    """What open_picture makes of a picture saved at `path`: (H, W, 3) uint8."""
    picture.save(path, **options)
    opened = images.open_picture(path)
    assert opened.mode == "RGB"
    return np.asarray(opened)


#################################################################################
#                                     Opening                                   #
#################################################################################

UPRIGHT = {  # what the viewer sees, given what is stored: EXIF 2.32, tag 0x0112
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_is_turned_upright_by_its_exif_tag(tmp_path, orientation, suffix):
    stored = RNG.integers(0, 256, (5, 7, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = read(Image.fromarray(stored), tmp_path / f"a.{suffix}", exif=exif)
    np.testing.assert_array_equal(seen, UPRIGHT[orientation](stored))
    assert images.picture_size(tmp_path / f"a.{suffix}") == (seen.shape[1], seen.shape[0])


def test_what_is_no_picture_has_no_size(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    assert images.picture_size(tmp_path / "text.png") is None and images.picture_size(tmp_path / "gone.png") is None
    whole = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (50, 70, 3), np.uint8)).save(whole, "png")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:2000])
    assert images.picture_size(tmp_path / "cut.png") == (70, 50)  # the header is enough: nothing is decoded


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 51), (244, 224, 204)),  # 0.2 c + 0.8 * 255
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (100, 51), (224, 224, 224)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
    ],
)
def test_transparency_is_laid_on_white_and_grey_becomes_rgb(tmp_path, mode, colour, expected):
    seen = read(Image.new(mode, (3, 2), colour), tmp_path / "a.png")
    np.testing.assert_allclose(seen.astype(int), np.broadcast_to(expected, (2, 3, 3)), atol=1)


@pytest.mark.parametrize("transparent", [0, b"\x00\xff\x33"])
def test_a_palette_keeps_its_colours_and_its_transparency(tmp_path, transparent):
    picture = Image.new("P", (3, 1))
    picture.putpalette([10, 20, 30, 200, 150, 100, 0, 0, 0])
    picture.putdata([0, 1, 2])
    seen = read(picture, tmp_path / "a.png", transparency=transparent)[0]
    third = (0, 0, 0) if transparent == 0 else (204, 204, 204)
    np.testing.assert_allclose(seen.astype(int), [(255, 255, 255), (200, 150, 100), third], atol=1)


def test_the_transparent_colour_of_an_rgb_png_becomes_white(tmp_path):
    stored = np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8)
    seen = read(Image.fromarray(stored), tmp_path / "a.png", transparency=(9, 8, 7))
    np.testing.assert_array_equal(seen, [[[255, 255, 255], [1, 2, 3]]])


@pytest.mark.parametrize(
    ("ink", "expected"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 0, 0), (255, 0, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_cmyk_becomes_rgb(tmp_path, ink, expected, suffix):
    seen = read(Image.new("CMYK", (8, 8), ink), tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(seen.astype(int), np.broadcast_to(expected, (8, 8, 3)), atol=2)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    seen = read(Image.fromarray(values * 257), tmp_path / f"a.{suffix}")  # 65535 = 255 * 257
    np.testing.assert_array_equal(seen, np.repeat(values[..., None], 3, axis=2))
    between = np.array([[0, 32767, 32896, 65535]], np.uint16)
    assert read(Image.fromarray(between), tmp_path / f"b.{suffix}")[0, :, 0].tolist() == [0, 127, 128, 255]


def test_float_grey_in_unit_range_is_scaled(tmp_path):
    seen = read(Image.fromarray(np.array([[0.0, 0.2, 1.0]], np.float32)), tmp_path / "a.tiff")
    assert seen[0, :, 1].tolist() == [0, 51, 255]


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow has no WebP")
def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ((250, 10, 20), (0, 0, 255)))
    seen = read(first, tmp_path / "a.webp", save_all=True, append_images=[second], lossless=True)
    np.testing.assert_array_equal(seen, np.asarray(first))
    seen = read(first, tmp_path / "a.png", save_all=True, append_images=[second])
    np.testing.assert_array_equal(seen, np.asarray(first))


def bytes_of(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, I am a text", bytes_of("JPEG")[:900], bytes_of("PNG")[:900], bytes_of("TIFF")[:900]],
    ids=["zero", "text", "cut-jpeg", "cut-png", "cut-tiff"],
)
def test_a_broken_picture_is_one_line_with_its_path(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(images.BadPicture) as caught:
            images.open_picture(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_picture_and_a_folder_are_bad_pictures(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(images.BadPicture, match=str(path)):
            images.open_picture(path)


#################################################################################
#                                     Shape                                     #
#################################################################################


def test_the_centre_square_is_cut_out():
    wide = RNG.integers(0, 256, (16, 24, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(images.square(Image.fromarray(wide), 16)), wide[:, 4:20])
    tall = wide.transpose(1, 0, 2)
    np.testing.assert_array_equal(np.asarray(images.square(Image.fromarray(tall), 16)), tall[4:20])


def test_a_square_is_resized_as_lanczos_does():
    picture = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), np.uint8))
    expected = picture.crop((10, 0, 50, 40)).resize((16, 16), Image.Resampling.LANCZOS)
    inner = (slice(2, -2), slice(2, -2))  # at its border the box sees the picture beyond it
    difference = np.asarray(images.square(picture, 16)).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference[inner]).max() <= 1


def test_one_pixel_fills_the_square():
    made = np.asarray(images.square(Image.new("RGB", (1, 1), (3, 140, 250)), 32))
    np.testing.assert_array_equal(made, np.broadcast_to((3, 140, 250), (32, 32, 3)).astype(np.uint8))


@pytest.mark.parametrize("turned", [False, True])
def test_a_10000_by_10_strip_is_squared_quickly_from_its_middle(turned):
    strip = np.zeros((10, 10000, 3), np.uint8)
    strip[:, 4990:5010] = (255, 60, 20)
    strip = strip.transpose(1, 0, 2) if turned else strip
    started = time.perf_counter()
    made = np.asarray(images.square(Image.fromarray(np.ascontiguousarray(strip)), 32))
    assert time.perf_counter() - started < 1
    np.testing.assert_array_equal(made, np.broadcast_to((255, 60, 20), (32, 32, 3)).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((40, 20), 10, (20, 10)),
        ((20, 40), 10, (10, 20)),
        ((7, 7), 3, (3, 3)),
        ((30, 20), 7, (10, 7)),  # 10.5 rounds to the even
        ((10, 1000), 5, (5, 500)),
        ((1, 1), 32, (32, 32)),
    ],
)
def test_the_short_side_gets_the_size_and_the_colour_stays(size, short, expected):
    made = images.resize_short_side(Image.new("RGB", size, (5, 90, 200)), short)
    assert made.size == expected
    assert made.getcolors() == [(expected[0] * expected[1], (5, 90, 200))]


@settings(deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), factor=st.integers(1, 16))
def test_padding_repeats_the_last_row_and_column_up_to_the_multiple(height, width, factor):
    pixels = torch.arange(2 * 3 * height * width, dtype=torch.float32).view(2, 3, height, width)
    down, right = math.ceil(height / factor) * factor - height, math.ceil(width / factor) * factor - width
    expected = np.pad(pixels.numpy(), ((0, 0), (0, 0), (0, down), (0, right)), mode="edge")
    np.testing.assert_array_equal(images.pad_to_multiple(pixels, factor).numpy(), expected)


#################################################################################
#                                     Pixels                                    #
#################################################################################


def test_all_256_values_survive_the_round_trip():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    stored = np.stack([values, values[::-1], values.T], axis=-1)
    tensor = images.to_bytes(Image.fromarray(stored))
    np.testing.assert_array_equal(tensor.numpy(), stored.transpose(2, 0, 1))
    pixels = images.to_pixels(tensor)
    np.testing.assert_allclose(pixels.numpy(), stored.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    np.testing.assert_array_equal(np.asarray(images.to_picture(pixels)), stored)


def test_pixels_outside_the_range_are_clipped_and_others_rounded():
    pixels = torch.tensor([-9.0, -1.0, 0.0, 0.5, 1.0, 9.0]).view(1, 1, 6).expand(3, 1, 6)
    assert np.asarray(images.to_picture(pixels))[0, :, 2].tolist() == [0, 0, 128, 191, 255, 255]  # 127.5, 191.25


#################################################################################
#                                     Files                                     #
#################################################################################


def test_pictures_are_found_in_any_case_nested_sorted_and_hidden_ones_are_not(tmp_path):
    names = ["b.PNG", "a.jpg", "sub/c.Jpeg", "sub/deeper/d.TIF", "z.webp", "e.bmp", "f.tiff"]
    others = [".hidden.png", ".folder/x.png", "sub/.folder/y.jpg", "notes.txt", "png", "a.jpg.txt"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.as_posix() for path in images.find_pictures(tmp_path)]
    assert found == ["a.jpg", "b.PNG", "e.bmp", "f.tiff", "sub/c.Jpeg", "sub/deeper/d.TIF", "z.webp"]


def linked(tmp_path, name: str, target) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).symlink_to(target)


def test_linked_folders_and_files_are_followed_and_a_dead_link_is_not_passed_over(tmp_path):
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    for name in ("elsewhere/a.png", "elsewhere/deep/b.gif", "folder/c.jpg"):
        (tmp_path / name).touch()
    linked(tmp_path, "folder/more", tmp_path / "elsewhere")
    linked(tmp_path, "folder/d.png", tmp_path / "elsewhere/a.png")
    linked(tmp_path, "folder/gone.png", tmp_path / "nowhere.png")
    found = [path.as_posix() for path in images.find_pictures(tmp_path / "folder")]
    assert found == ["c.jpg", "d.png", "gone.png", "more/a.png", "more/deep/b.gif"]
    with pytest.raises(images.BadPicture, match=r"gone\.png: no such picture"):
        images.open_picture(tmp_path / "folder/gone.png")


@pytest.mark.parametrize(("name", "target"), [("self", "."), ("deep/up", ".."), ("deep/again", "../other")])
def test_links_in_a_circle_and_to_a_folder_that_is_there_already_are_one_line(tmp_path, name, target):
    for folder in ("deep", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").touch()
    linked(tmp_path, name, target)
    with pytest.raises(UserError, match=r"is the same folder as .*, by a link; remove the link") as caught:
        images.find_pictures(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_link_to_itself_is_a_picture_that_cannot_be_read(tmp_path):
    linked(tmp_path, "a.png", "a.png")
    assert images.find_pictures(tmp_path) == [Path("a.png")]
    with pytest.raises(images.BadPicture, match=r"a\.png: "):
        images.open_picture(tmp_path / "a.png")


def test_other_files_are_counted_by_suffix_and_told_in_one_line(tmp_path):
    names = ["a.png", "b.txt", "c.TXT", "sub/d.txt", "sub/e.heic2", "README", ".hidden.txt", ".git/x.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    left_out = Counter()
    images.find_pictures(tmp_path, left_out)
    assert left_out == {".txt": 3, ".heic2": 1, "": 1}
    line = images.left_out_line(left_out)
    assert line.startswith("left out by suffix: 3 .txt, ") and "1 .heic2" in line and "1 without a suffix" in line
    many = images.left_out_line(Counter({f".{number}": 2 for number in range(1000)} | {".heic": 5}))
    assert many.startswith("left out by suffix: 5 .heic, 2 .") and "1986 others; .heic wants pip install" in many


@pytest.mark.parametrize(("suffix", "most"), [(".jpg", 65500), (".jfif", 65500), (".webp", 16383)])
def test_a_side_too_long_for_the_format_is_refused_before_it_is_written(tmp_path, suffix, most):
    images.save_picture(Image.new("RGB", (most, 1)), tmp_path / f"most{suffix}")
    for size in ((most + 1, 1), (1, most + 1)):
        with pytest.raises(UserError, match=rf"a{suffix}: would have {size[0]} x {size[1]} pixels.* at most {most} a"):
            images.refuse_unwritable(tmp_path / f"a{suffix}", size)
        with pytest.raises(UserError, match="would have"):
            images.save_picture(Image.new("RGB", size), tmp_path / f"a{suffix}")
    images.refuse_unwritable(tmp_path / "a.png", (most + 1, 1))


@pytest.mark.parametrize(("size", "short"), [((1, 5000), 512), ((5000, 1), 512), ((64, 64), 100000)])
def test_enlarging_beyond_bounds_is_refused_and_reducing_is_not(size, short):
    with pytest.raises(ValueError, match="by enlarging"):
        images.refuse_enlarged(size, short)
    images.refuse_enlarged((20000, 10000), 9000)
    images.refuse_enlarged((1, 100), 512)


@pytest.mark.parametrize("size", [(20, 30), (300, 10)])
@pytest.mark.parametrize("count", [1, 2, 8, 9, 20])
def test_the_size_of_a_strip_is_known_before_it_is_made(count, size):
    made = images.strip([Image.new("RGB", size)] * count, ["n"] * count) if count > 1 else Image.new("RGB", size)
    assert images.strip_size(size, count) == made.size


@pytest.mark.parametrize("error", [struct.error("bad"), OSError("encoder error -2"), RuntimeError(""), MemoryError()])
def test_whatever_an_encoder_raises_is_one_line_with_the_path(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("PIL.Image.Image.save", fail)
    with pytest.raises(UserError, match=r"a\.png: cannot be written \("):
        images.save_picture(Image.new("RGB", (2, 2)), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".gif", ".txt", ""])
def test_an_unknown_suffix_is_an_error_that_names_the_known_ones(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    with pytest.raises(UserError, match=r"written as one of \.jpg .*\.png") as caught:
        images.save_picture(Image.new("RGB", (2, 2)), path)
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".webp"])
def test_a_saved_picture_comes_back_and_nothing_lies_beside_it(tmp_path, suffix):
    stored = np.full((16, 16, 3), (200, 120, 40), np.uint8)
    images.save_picture(Image.fromarray(stored), tmp_path / "new" / f"out{suffix}")
    seen = np.asarray(images.open_picture(tmp_path / "new" / f"out{suffix}")).astype(int)
    np.testing.assert_allclose(seen, stored, atol=3 if suffix in (".jpg", ".jpeg", ".webp") else 0)
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize(("zoom", "gap", "titles"), [(1, 6, ()), (3, 4, ()), (2, 5, ("left", "right"))])
def test_every_pixel_of_a_contact_sheet_lands_in_its_place(zoom, gap, titles):
    tiles = RNG.integers(0, 200, (3, 2, 8, 12, 3), np.uint8)  # rows, columns, H, W, RGB
    rows = [[Image.fromarray(tile) for tile in row] for row in tiles]
    sheet = np.asarray(images.contact_sheet(rows, titles, zoom, gap))
    width, height = 12 * zoom, 8 * zoom
    head = sheet.shape[0] - (gap + 3 * (height + gap))
    assert (head > 0) == bool(titles)
    assert sheet.shape[1] == gap + 2 * (width + gap)
    rest = sheet.copy()
    for y in range(3):
        for x in range(2):
            top, left = head + gap + y * (height + gap), gap + x * (width + gap)
            place = (slice(top, top + height), slice(left, left + width))
            np.testing.assert_array_equal(sheet[place], tiles[y, x].repeat(zoom, 0).repeat(zoom, 1))
            rest[place] = 255
    assert (rest[head + gap :] == 255).all(), "gaps are white"
    if titles:
        assert (rest[: head + gap] < 128).any(), "the titles are written"
    else:
        assert (rest == 255).all()


def test_a_short_row_leaves_its_place_white():
    black = Image.new("RGB", (4, 4))
    sheet = np.asarray(images.contact_sheet([[black, black], [black]], gap=1))
    assert sheet.shape == (11, 11, 3)
    assert (sheet[6:10, 6:10] == 255).all() and (sheet[6:10, 1:5] == 0).all()


@pytest.mark.parametrize(("count", "across"), [(1, 8), (3, 8), (8, 8), (9, 8), (5, 2)])
def test_a_strip_is_contact_sheets_of_so_many_across_below_each_other(count, across):
    tiles = RNG.integers(0, 200, (count, 20, 30, 3), np.uint8)
    pictures, titles = [Image.fromarray(tile) for tile in tiles], [f"n{number}" for number in range(count)]
    seen = np.asarray(images.strip(pictures, titles, across))
    starts = range(0, count, across)
    rows = [
        np.asarray(images.contact_sheet([pictures[start : start + across]], titles[start : start + across]))
        for start in starts
    ]
    assert seen.shape == (sum(len(row) for row in rows), rows[0].shape[1], 3)
    top = 0
    for row in rows:
        np.testing.assert_array_equal(seen[top : top + len(row), : row.shape[1]], row)
        assert (seen[top : top + len(row), row.shape[1] :] == 255).all(), "the rest of a short row is white"
        top += len(row)


def test_every_picture_of_a_strip_is_there_once_in_reading_order_with_its_title_above():
    tiles = RNG.integers(0, 200, (5, 16, 24, 3), np.uint8)
    sheet = np.asarray(images.strip([Image.fromarray(tile) for tile in tiles], list("abcde"), across=2))
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (16, 24, 3))[:, :, 0]
    places = [np.argwhere((windows == tile).all((2, 3, 4))).tolist() for tile in tiles]
    assert all(len(found) == 1 for found in places), places
    tops, lefts = zip(*(found[0] for found in places), strict=True)
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4] and lefts[0] == lefts[2] == lefts[4] < lefts[1] == lefts[3]
    for top, left in zip(tops, lefts, strict=True):
        assert (sheet[top - 12 : top, left : left + 24] < 128).any(), "no title above this one"
