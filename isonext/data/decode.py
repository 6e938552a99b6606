"""A picture file decoded: what it may be, how large, which way up. What its values mean is colour.py's matter.

A file's content says what it is, whatever its suffix, and only the formats that the suffixes promise are tried: none
of their decoders starts a program, and the limits below hold for all of them.
"""

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, features

from isonext.data.colour import eight_bits, tell_useless_profile, to_srgb
from isonext.errors import UserError, first_line

warnings.filterwarnings("ignore", module=r"PIL\.")  # large, or of odd metadata: not the user's concern

MOST_PIXELS = 2**27  # decoded at once: up to 2.5 GB of memory on the way to RGB
MOST_PIXELS_JPEG2000 = 2**25  # the one slow decoder: some 3 million pixels a second
MOST_SCANNED_PIXELS = 2**31  # of a JPEG, pixels times scans: a few bytes may ask for one scan more of all pixels
PROMISED = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"), "JPEG2000"),
    **dict.fromkeys((".heic", ".heif"), "HEIF"),
    ".webp": "WEBP",
    ".gif": "GIF",
    ".avif": "AVIF",
}
TURNS = {  # EXIF 2.32, tag 0x0112 -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
PNG_ERRORS = (ValueError, SyntaxError, IndexError, Image.UnidentifiedImageError)  # of chunks that are no pixels, too


def _installed() -> dict[str, str]:
    """Of `PROMISED`, what this Pillow can decode."""
    missing = {name for name in ("WEBP", "AVIF") if not features.check(name.lower())}
    missing |= set() if features.check("jpg_2000") else {"JPEG2000"}
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        missing.add("HEIF")
    return {suffix: name for suffix, name in PROMISED.items() if name not in missing}


READABLE = _installed()  # suffix -> format
FORMATS = sorted({*READABLE.values(), "DIB"})  # what .dib and some .bmp hold


class BadPicture(UserError):
    """A file that is no picture, or a broken one. Folders skip it and say so."""


@contextlib.contextmanager
def one_picture(path: str | Path) -> Iterator[None]:
    """Within, whatever goes wrong is a matter of this picture alone: a BadPicture of one line."""
    shown = str(path).replace("\n", r"\n")
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise BadPicture(f"{shown}: no such picture") from None
    except Image.UnidentifiedImageError:
        raise BadPicture(f"{shown}: not a picture") from None
    except Exception as error:  # decoders stumble over damaged files in every way there is
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise BadPicture(f"{shown}: cannot be read ({reason})") from None


def open_picture(path: str | Path) -> Image.Image:
    """Any picture file as 8-bit sRGB, turned upright by its EXIF tag, transparency laid on white.

    BadPicture says in one line why not.
    """
    with one_picture(path):
        path = Path(path)
        if path.exists() and not path.is_file():
            raise BadPicture(f"{path}: not a file")  # to open a pipe would wait for its other end
        try:
            return _decode(path, path)
        except PNG_ERRORS:
            if path.read_bytes()[:8] != b"\x89PNG\r\n\x1a\n":
                raise
        return _decode_png_without_extras(path)


def convert_picture(picture: Image.Image) -> Image.Image:
    """A picture that Pillow opened or made, as `open_picture` gives a file's."""
    name = Path(getattr(picture, "filename", "") or "the picture")
    with one_picture(name):
        picture.load()
        turn = TURNS.get(_orientation(picture))
        rgb = to_srgb(eight_bits(picture), name)
        return rgb if turn is None else rgb.transpose(turn)


def picture_size(path: Path) -> tuple[int, int] | None:
    """Width and height of what `open_picture` will give, from the file's header alone; None where it has none."""
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if picture.format == "TIFF" or (picture.format == "PNG" and "exif" not in picture.info):
                return width, height  # of a TIFF upright already; a PNG would be decoded in search of a tag
            return (height, width) if _orientation(picture) in (5, 6, 7, 8) else (width, height)
    except Exception:  # the reason is told when it is read
        return None


def _decode(source: Any, path: Path) -> Image.Image:
    """`source`, a path or a file in memory, of the picture that is called `path`."""
    with Image.open(source, formats=FORMATS) as picture:
        _refuse_endless(picture, path)
        deep_key = _deep_key(picture)
        picture.load()
        turn = TURNS.get(_orientation(picture))
        decoded: Image.Image = picture
        if deep_key:
            decoded = picture.copy()
            decoded.putalpha(_mask_deep(source, np.asarray(picture), deep_key))
        rgb = to_srgb(eight_bits(decoded), path)
    return rgb if turn is None else rgb.transpose(turn)  # one of the turns is number 0


def _refuse_endless(picture: Image.Image, path: Path) -> None:
    """BadPicture where decoding would take minutes or more memory than there is."""
    width, height = picture.size
    most = MOST_PIXELS_JPEG2000 if picture.format == "JPEG2000" else MOST_PIXELS
    if width * height > most:
        raise BadPicture(f"{path}: has {width} x {height} pixels, of this format at most {most} are decoded; reduce it")
    if picture.format in ("JPEG", "MPO"):
        with open(path, "rb") as file:
            scans = sum(block.count(b"\xff\xda") for block in iter(lambda: file.read(2**20), b""))
        if width * height * scans > MOST_SCANNED_PIXELS:
            raise BadPicture(
                f"{path}: has {width} x {height} pixels in {scans} scans, at most {MOST_SCANNED_PIXELS} pixels are "
                "scanned; save it anew"
            )


def _orientation(picture: Image.Image) -> int:
    """The EXIF tag; 1, which is upright, where there is none or it cannot be read."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation)
        return value if isinstance(value, int) else 1
    except Exception:  # damaged metadata: the pixels are none the worse
        return 1


#################################################################################
#                                      PNG                                      #
#################################################################################


def _deep_key(picture: Image.Image) -> tuple[int, ...] | None:
    """The colour that is transparent in a PNG of 3 x 16 bits, not decoded yet; None of any other picture."""
    if picture.format != "PNG" or picture.mode != "RGB" or picture.tile[0].args != "RGB;16B":  # type: ignore[attr-defined]
        return None
    return picture.info.get("transparency")


def _mask_deep(source: Any, high: np.ndarray, key: tuple[int, ...]) -> Image.Image:
    """0 where all 3 x 16 bits are those of `key`, else 255; `high` (H, W, 3) are the bytes that Pillow gives."""
    with Image.open(source, formats=["PNG"]) as picture:
        picture.tile = [picture.tile[0]._replace(args="RGB;16L")]  # type: ignore[attr-defined]  # the other bytes
        picture.load()
        low = np.asarray(picture)
    same = (high == np.array(key) >> 8) & (low == np.array(key) & 255)
    return Image.fromarray(np.where(same.all(-1), 0, 255).astype(np.uint8))


def _decode_png_without_extras(path: Path) -> Image.Image:
    """A PNG that could not be decoded as a whole: without its texts, which may be large, then without its profile."""
    data = path.read_bytes()
    try:
        return _decode(io.BytesIO(_without_chunks(data, PNG_TEXTS)), path)
    except PNG_ERRORS:
        decoded = _decode(io.BytesIO(_without_chunks(data, (*PNG_TEXTS, b"iCCP"))), path)
        tell_useless_profile(path, "it cannot be unpacked")
        return decoded


def _without_chunks(data: bytes, kinds: tuple[bytes, ...]) -> bytes:
    """A PNG less its chunks of these kinds."""
    parts, place = [data[:8]], 8
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        if data[place + 4 : place + 8] not in kinds:
            parts.append(data[place : place + 12 + length])
        place += 12 + length
    return b"".join(parts)
