"""Picture files made by code, byte by byte where Pillow would not write them: EXIF, TIFF, PNG chunks, ICC profiles."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

ORIENTATION = (0x0112, 3, 1, struct.pack("<H", 6))  # to be seen turned by 90 degrees clockwise
ODD_ENTRIES = {  # sound or broken, all of them make Pillow raise when it writes the EXIF data again, or might
    "XResolution-byte": (0x011A, 1, 1, b"\x48"),
    "XResolution-ascii": (0x011A, 2, 3, b"72\0"),
    "XResolution-srational": (0x011A, 10, 1, struct.pack("<ii", -72, 1)),
    "ImageLength-rational": (0x0101, 5, 1, struct.pack("<II", 8, 1)),
    "XResolution-over-0": (0x011A, 5, 1, struct.pack("<II", 72, 0)),
    "unknown-type": (0x011A, 99, 1, b"1234"),
}
# Red, green and blue of RGB spaces as XYZ under D50, the columns of their matrices.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE_GAMMA = 563 / 256


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    """As Pillow writes it."""
    file = io.BytesIO()
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(file, kind, **options)
    return file.getvalue()


def ifd(entries: list[tuple[int, int, int, bytes]], start: int) -> bytes:
    """A TIFF directory that lies at `start`, of entries (tag, type, count, value); long values follow it."""
    table, rest = struct.pack("<H", len(entries)), b""
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            place = start + 2 + 12 * len(entries) + 4 + len(rest)
            value, rest = struct.pack("<I", place), rest + value
        table += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return table + bytes(4) + rest


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + ifd(list(entries), 8)


def tiff(values: np.ndarray, *entries: tuple[int, int, int, bytes], bits: int, white_is_zero: bool = False) -> bytes:
    """An uncompressed TIFF of (H, W) or (H, W, 3) values that are laid out already; 1 float, 2 signed, 3 unsigned."""
    height, width, *rest = values.shape
    channels, data = (rest or [1])[0], values.tobytes()
    photometric = 2 if channels == 3 else 0 if white_is_zero else 1
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    short = [(256, width), (257, height), (259, 1), (262, photometric), (277, channels), (278, height)]
    table = [(tag, 3, 1, struct.pack("<H", value)) for tag, value in short]
    table += [(tag, 3, channels, struct.pack("<H", value) * channels) for tag, value in ((258, bits), (339, kind))]
    table += [(273, 4, 1, struct.pack("<I", 8)), (279, 4, 1, struct.pack("<I", len(data))), *entries]
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + ifd(table, 8 + len(data))


def twelve_bits(values: np.ndarray) -> bytes:
    """A TIFF of (H, W) values of 12 bits, two of them in three bytes."""
    a, b = values.reshape(-1, 2).T.astype(np.uint16)
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8)
    whole = tiff(packed.reshape(len(values), -1), bits=12)
    return whole.replace(struct.pack("<HHIHH", 256, 3, 1, packed.size // len(values), 0),
                         struct.pack("<HHIHH", 256, 3, 1, values.shape[1], 0))  # fmt: skip


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(png: bytes, *chunks: bytes, behind: bool = False) -> bytes:
    """A PNG with further chunks before its pixels, or behind them."""
    place = png.index(b"IEND" if behind else b"IDAT") - 4
    return png[:place] + b"".join(chunks) + png[place:]


def png(values: np.ndarray, *chunks: bytes) -> bytes:
    """A PNG of 16 bits, grey (H, W) or RGB (H, W, 3), with chunks before its pixels."""
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def text_chunk(length: int) -> bytes:
    return chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(length)))


def jpeg_with_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    whole = encoded(Image.new("RGB", (side, side), (10, 20, 30)), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * scans + whole[-2:]


#################################################################################
#                                  ICC profiles                                 #
#################################################################################


def profile(space: bytes, kind: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 4."""
    table, data, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content = content.ljust(-len(content) % 4 + len(content), b"\0")
        table += name + struct.pack(">II", place + len(data), len(content))
        data += content
    head = struct.pack(">I4xI4s4s4s", place + len(data), 0x04200000, kind, space, connection)
    head += struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(0.9642, 1.0, 0.8249)[8:]
    return head.ljust(128, b"\0") + table + data


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma_curve(gamma: float) -> bytes:
    return b"para" + bytes(4) + struct.pack(">HHi", 0, 0, round(gamma * 65536))


def srgb_curve() -> bytes:
    numbers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para" + bytes(4) + struct.pack(">HH5i", 3, 0, *(round(number * 65536) for number in numbers))


def srgb_table(entries: int) -> bytes:
    """The same curve as a table, which the profile that cameras embed has."""
    values = np.rint(65535 * linear_of_srgb(np.linspace(0, 255, entries))).astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", entries) + values.tobytes()


def rgb_profile(matrix: np.ndarray, curve: bytes) -> bytes:
    tags = {name: xyz(*column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)}
    return profile(b"RGB ", b"mntr", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve) | {b"wtpt": xyz(1, 1, 1)})


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", b"mntr", {b"kTRC": gamma_curve(gamma), b"wtpt": xyz(0.9642, 1, 0.8249)})


def cmyk_profile(corners: np.ndarray) -> bytes:
    """A press of `corners` (2, 2, 2, 2, 3): CIELAB of each mixture of full inks, in bytes; between them it is linear.

    The way back, which tells what is its black, prints lightness by black ink alone.
    """
    back = np.zeros((2, 2, 2, 4))
    back[0, ..., 3] = 255
    there, back = lookup_table(corners), lookup_table(back)
    tags = {b"A2B0": there, b"A2B1": there, b"B2A0": back, b"B2A1": back}
    return profile(b"CMYK", b"prtr", tags, b"Lab ")


def lookup_table(corners: np.ndarray) -> bytes:
    """What each corner of a cube of as many dimensions as there are inputs becomes, all in bytes."""
    inputs, outputs, ramp = corners.ndim - 1, corners.shape[-1], bytes(range(256))
    identity = struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    head = b"mft1" + bytes(4) + bytes((inputs, outputs, 2, 0)) + identity
    return head + ramp * inputs + corners.astype(np.uint8).tobytes() + ramp * outputs


def srgb_of(linear_xyz: np.ndarray) -> np.ndarray:
    """XYZ under D50 (..., 3) -> sRGB of 0 to 255, cut off: IEC 61966-2-1."""
    linear = np.clip(linear_xyz @ np.linalg.inv(SRGB).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def linear_of_srgb(values: np.ndarray) -> np.ndarray:
    """Of 0 to 255."""
    values = np.asarray(values) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
