"""What values mean: every depth by a continuous rule or a refusal, every profile to sRGB by its own definition."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import picture_files as files
from isonext.data import images

RNG = np.random.default_rng(3)


def read(tmp_path, content: bytes, name: str = "a.png") -> np.ndarray:
    (tmp_path / name).write_bytes(content)
    return np.asarray(images.open_picture(tmp_path / name)).astype(int)


#################################################################################
#                                     Depth                                     #
#################################################################################

ALL = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_of_16_bits_the_8_highest_are_taken_of_grey_and_rgb_alike(tmp_path, kind, channels):
    values = ALL if channels == 1 else np.repeat(ALL[..., None], 3, -1)
    seen = read(tmp_path, files.png(values) if kind == "png" else files.tiff(values, bits=16))
    np.testing.assert_array_equal(seen, np.repeat(ALL[..., None] // 256, 3, -1))


def test_12_bits_have_their_own_white(tmp_path):
    values = np.arange(4096).reshape(64, 64)
    seen = read(tmp_path, files.twelve_bits(values))
    np.testing.assert_array_equal(seen[..., 1], values // 16)


def test_white_may_be_zero_in_16_bits_too(tmp_path):
    seen = read(tmp_path, files.tiff(ALL, bits=16, white_is_zero=True))
    np.testing.assert_array_equal(seen[..., 0], 255 - ALL // 256)
    halves = np.array([[0, 0.2, 1]], np.float32)
    seen = read(tmp_path, files.tiff(halves, bits=32, white_is_zero=True))
    assert seen[0, :, 0].tolist() == [255, 204, 0]


def test_16_bits_may_be_of_either_byte_order_and_of_jpeg_2000(tmp_path):
    values = ALL[:8] * 256 + ALL[8:16] % 256
    motorola = b"MM\0*" + struct.pack(">I", 8 + values.nbytes) + values.astype(">u2").tobytes()
    short = [(256, 256), (257, 8), (258, 16), (259, 1), (262, 1), (277, 1), (278, 8)]
    table = [struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in short]
    table[5:5] = [struct.pack(">HHII", 273, 4, 1, 8)]
    table.append(struct.pack(">HHII", 279, 4, 1, values.nbytes))
    motorola += struct.pack(">H", len(table)) + b"".join(table) + bytes(4)
    for content in (motorola, files.encoded(values, "JPEG2000")):
        np.testing.assert_array_equal(read(tmp_path, content)[..., 0], values // 256)


@pytest.mark.parametrize("top", [1, 1.0000001, 1.1, 2])
@pytest.mark.parametrize("dtype", [np.float32])
def test_one_is_the_white_of_floats_and_there_is_no_cliff_behind_it(tmp_path, top, dtype):
    values = np.linspace(-0.1, top, 60, dtype=dtype).reshape(6, 10)
    seen = read(tmp_path, files.tiff(values, bits=32), "a.tif")
    np.testing.assert_allclose(seen[..., 0], values.clip(0, 1) * 255, atol=0.501)


@pytest.mark.parametrize("value", [255, 2.01, -1.01, np.inf, -np.inf, np.nan])
def test_floats_that_leave_open_what_is_white_are_refused_by_their_range(tmp_path, value):
    values = np.full((4, 5), 0.5, np.float32)
    values[1, 2] = value
    with pytest.raises(images.BadPicture, match=r"a\.tif: .*float values go from .* 0 is black and 1 is white"):
        read(tmp_path, files.tiff(values, bits=32), "a.tif")


@pytest.mark.parametrize("top", [255, 65535, 2**31 - 1])
@pytest.mark.parametrize("dtype", [np.uint32, np.int32])
def test_32_bit_integers_are_refused(tmp_path, top, dtype):
    values = np.linspace(0, top, 20).astype(dtype).reshape(4, 5)
    with pytest.raises(images.BadPicture, match=r"a\.tif: .*32-bit integers nothing says which is white"):
        read(tmp_path, files.tiff(values, bits=32), "a.tif")


def test_the_transparent_grey_of_16_bits_becomes_white_and_its_neighbours_do_not(tmp_path):
    key = files.chunk(b"tRNS", struct.pack(">H", 1000))
    values = np.array([[1000, 999, 1001, 0, 65535]], np.uint16)
    assert read(tmp_path, files.png(values, key))[0, :, 0].tolist() == [255, 3, 3, 0, 255]


def test_the_transparent_colour_of_16_bits_becomes_white_and_its_neighbours_do_not(tmp_path):
    key = files.chunk(b"tRNS", struct.pack(">3H", 1000, 2000, 3000))
    values = np.array([[[1000, 2000, 3000], [1000, 2000, 3001], [1000, 2001, 3000], [1001, 2000, 3000]]], np.uint16)
    assert read(tmp_path, files.png(values, key))[0].tolist() == [[255, 255, 255], *[[3, 7, 11]] * 3]


#################################################################################
#                                 Colour profiles                               #
#################################################################################

ADOBE = files.rgb_profile(files.ADOBE, files.gamma_curve(files.ADOBE_GAMMA))
P3 = files.rgb_profile(files.DISPLAY_P3, files.srgb_curve())
COLOURS = RNG.integers(0, 256, (6, 8, 3), np.uint8)


def adobe_as_srgb(values: np.ndarray) -> np.ndarray:
    return files.srgb_of((values / 255) ** files.ADOBE_GAMMA @ files.ADOBE.T)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_adobe_rgb_becomes_srgb(tmp_path, kind):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    content = files.encoded(Image.new("RGB", (8, 8), (60, 200, 60)), kind, icc_profile=ADOBE, **options)
    assert np.abs(read(tmp_path, content) - (0, 201, 37)).max() <= 2 + 4 * (kind == "JPEG")


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (ADOBE, adobe_as_srgb(COLOURS)),
        (P3, files.srgb_of(files.linear_of_srgb(COLOURS) @ files.DISPLAY_P3.T)),
        (files.rgb_profile(files.SRGB, files.gamma_curve(1)), files.srgb_of(COLOURS / 255 @ files.SRGB.T)),
    ],
    ids=["Adobe", "P3", "linear"],
)
@pytest.mark.parametrize("alpha", [False, True])
def test_rgb_is_converted_by_the_definition_of_its_space(tmp_path, profile, expected, alpha):
    picture = Image.fromarray(COLOURS)
    if alpha:
        picture.putalpha(Image.new("L", picture.size, 51))
        expected = 0.2 * expected + 0.8 * 255
    seen = read(tmp_path, files.encoded(picture, "PNG", icc_profile=profile))
    np.testing.assert_allclose(seen, expected, atol=1.6)


@pytest.mark.parametrize("mode", ["L", "LA", "16"])
def test_grey_is_converted_by_its_curve(tmp_path, mode):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(ramp * np.uint16(257) if mode == "16" else ramp)
    picture = picture.convert("LA") if mode == "LA" else picture
    seen = read(tmp_path, files.encoded(picture, "PNG", icc_profile=files.grey_profile(1.0)))
    expected = files.srgb_of((ramp / 255)[..., None] * files.SRGB.sum(1))
    np.testing.assert_allclose(seen, expected, atol=1.6)


def test_a_palette_and_a_grey_picture_are_converted_by_a_profile_of_rgb(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([60, 200, 60, 200, 150, 100, 0, 0, 0])
    palette.putdata([0, 1, 2])
    seen = read(tmp_path, files.encoded(palette, "PNG", icc_profile=ADOBE))
    expected = adobe_as_srgb(np.array([[60, 200, 60], [200, 150, 100], [0, 0, 0]]))
    np.testing.assert_allclose(seen[0], expected, atol=1.6)
    grey = read(tmp_path, files.encoded(Image.new("L", (2, 2), 100), "PNG", icc_profile=ADOBE))
    np.testing.assert_allclose(grey[0, 0], adobe_as_srgb(np.array([100, 100, 100])), atol=1.6)


def lab_as_srgb(lab: np.ndarray) -> np.ndarray:
    """CIELAB as bytes -> sRGB, after black point compensation from the L* of full black, here byte 51."""
    lightness, a, b = lab[..., 0] / 255 * 100, lab[..., 1] - 128.0, lab[..., 2] - 128.0
    y = (lightness + 16) / 116
    roots = np.stack([y + a / 500, y, y - b / 200], -1)
    white = np.array([0.9642, 1, 0.8249])
    values = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * white
    black = ((51 / 255 * 100 + 16) / 116) ** 3
    return files.srgb_of((values - black * white) / (1 - black))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted_by_its_profile_with_its_black_as_black(tmp_path, kind):
    corners = np.zeros((2, 2, 2, 2, 3))
    corners[...] = (51, 128, 128)  # L* 20: this press has no deeper black
    corners[0, 0, 0, 0] = (255, 128, 128)
    corners[1, 0, 0, 0] = (150, 100, 100)
    profile = files.cmyk_profile(corners)
    inks = {(0, 0, 0, 0): corners[0, 0, 0, 0], (255, 0, 0, 0): corners[1, 0, 0, 0], (0, 0, 0, 255): (51, 128, 128)}
    for ink, lab in inks.items():
        seen = read(tmp_path, files.encoded(Image.new("CMYK", (8, 8), ink), kind, icc_profile=profile))
        np.testing.assert_allclose(seen[4, 4], lab_as_srgb(np.array(lab)), atol=3, err_msg=str(ink))


@pytest.mark.parametrize("curve", [files.srgb_curve(), files.srgb_table(1024), files.srgb_table(4096)])
@pytest.mark.parametrize("digits", [4, 5])
def test_where_the_profile_is_srgb_of_any_maker_not_one_value_changes(tmp_path, capfd, curve, digits):
    profile = files.rgb_profile(files.SRGB.round(digits), curve)
    np.testing.assert_array_equal(read(tmp_path, files.encoded(COLOURS, "PNG", icc_profile=profile)), COLOURS)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("profile", "mode"),
    [
        (b"no profile", "RGB"),
        (ADOBE[:200], "RGB"),
        (files.grey_profile(1.0), "RGB"),
        (ADOBE, "CMYK"),
        (files.profile(b"RGB ", b"mntr", {}), "RGB"),
    ],
    ids=["text", "cut", "grey-for-rgb", "rgb-for-cmyk", "empty"],
)
def test_a_profile_of_no_use_is_one_line_and_the_picture_is_read_without_it(tmp_path, capfd, profile, mode):
    picture = Image.fromarray(COLOURS).convert(mode)
    plain = read(tmp_path, files.encoded(picture, "TIFF"))
    assert capfd.readouterr().err == ""
    np.testing.assert_array_equal(read(tmp_path, files.encoded(picture, "TIFF", icc_profile=profile)), plain)
    err = capfd.readouterr().err
    assert err.startswith(f"warning: {tmp_path / 'a.png'}: its colour profile is of no use (") and err.count("\n") == 1


def test_a_profile_that_a_png_packs_too_large_is_of_no_use_either(tmp_path, capfd):
    packed = files.chunk(b"iCCP", b"big\0\0" + zlib.compress(bytes(2**21)))
    seen = read(tmp_path, files.png_with(files.encoded(COLOURS, "PNG"), packed))
    np.testing.assert_array_equal(seen, COLOURS)
    assert "colour profile is of no use" in capfd.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jfif", ".webp", ".tif", ".avif"])
def test_results_are_tagged_as_srgb_always_by_the_same_bytes(tmp_path, suffix):
    if suffix not in images.SUFFIXES:
        pytest.skip("this Pillow has no AVIF")
    images.save_picture(Image.fromarray(COLOURS), tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as saved:
        tag = saved.info["icc_profile"]
    assert b"sRGB" in tag or "sRGB".encode("utf-16-be") in tag
    assert tag[24:36] == struct.pack(">6H", 2000, 1, 1, 0, 0, 0), "not the time of day"
    seen = np.asarray(images.open_picture(tmp_path / f"a{suffix}"))
    if suffix in (".png", ".tif"):
        np.testing.assert_array_equal(seen, COLOURS)


def test_what_was_said_of_the_colours_of_a_file_does_not_stay_with_its_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(files.encoded(COLOURS, "PNG", icc_profile=ADOBE))
    assert "icc_profile" not in images.open_picture(tmp_path / "a.png").info
