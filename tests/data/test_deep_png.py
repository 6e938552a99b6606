"""PNG of 16 bits a channel: every value to the bit, as other programs read it."""

import numpy as np
import torch
from PIL import Image

from isonext.data.deep_png import save_deep
from isonext.data.images import open_picture


def read_deep(path) -> np.ndarray:
    """(H, W, 3) uint16: Pillow decodes the high bytes and, told so, the low ones."""
    parts = []
    for half in ("B", "L"):
        with Image.open(path) as picture:
            picture.tile = [picture.tile[0]._replace(args=f"RGB;16{half}")]
            picture.load()
            parts.append(np.asarray(picture).astype(np.uint16))
    return parts[0] * 256 + parts[1]


def test_all_16_bits_are_kept_and_what_is_out_of_range_is_clipped(tmp_path):
    values = torch.arange(3 * 5 * 7).view(3, 5, 7) * 600 + 1  # 1 to 62401
    pixels = values / 32767.5 - 1
    pixels[:, 0, 0], pixels[:, 4, 6] = -3, 3
    save_deep(pixels, tmp_path / "a.png")
    found = read_deep(tmp_path / "a.png").transpose(2, 0, 1)
    assert found.shape == (3, 5, 7)
    assert (found[:, 0, 0] == 0).all() and (found[:, 4, 6] == 65535).all()
    inside = np.ones((5, 7), bool)
    inside[0, 0] = inside[4, 6] = False
    assert np.array_equal(found[:, inside], values.numpy()[:, inside])


def test_the_picture_is_the_same_at_8_bits(tmp_path):
    grey = torch.full((3, 4, 4), 200 / 127.5 - 1)
    save_deep(grey, tmp_path / "a.png")
    assert (np.asarray(open_picture(tmp_path / "a.png")) == 200).all()
