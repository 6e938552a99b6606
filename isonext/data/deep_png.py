"""PNG files of 16 bits a channel, which Pillow does not write."""

import struct
import zlib
from pathlib import Path

import numpy as np
from torch import Tensor

from isonext.utils.io import written_whole

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def save_deep(pixels: Tensor, path: Path) -> None:
    """(3, H, W) in [-1, 1], clipped, as RGB of 3 x 16 bits, tagged as sRGB (ISO/IEC 15948); whole or not at all."""
    values = ((pixels.detach().float().clamp(-1, 1) + 1) * 32767.5).round().permute(1, 2, 0).cpu().numpy()
    height, width = values.shape[:2]
    rows = np.ascontiguousarray(values.astype(">u2")).view(np.uint8).reshape(height, 6 * width)
    # Each row less the one above it (filter 2), modulo 256: pictures then pack to about two thirds.
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    filtered = np.hstack([np.full((height, 1), 2, np.uint8), rows - above])
    with written_whole(path) as beside, open(beside, "wb") as file:
        file.write(SIGNATURE)
        file.write(_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)))
        file.write(_chunk(b"sRGB", b"\0"))
        file.write(_chunk(b"IDAT", zlib.compress(filtered.tobytes(), 3)))
        file.write(_chunk(b"IEND", b""))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
