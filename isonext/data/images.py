"""Pictures: open, orient, crop, pad, save; the contact sheet. Pixels are RGB in [-1, 1], float32, (3, H, W)."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from isonext.data.colour import srgb_profile
from isonext.data.decode import READABLE, BadPicture, convert_picture, one_picture, open_picture, picture_size
from isonext.errors import UserError, first_line
from isonext.utils.io import written_whole

__all__ = ["READABLE", "BadPicture", "convert_picture", "one_picture", "open_picture", "picture_size"]  # of decode.py
_COMMON = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
SUFFIXES: tuple[str, ...] = (*_COMMON, ".avif") if features.check("avif") else _COMMON  # that are written
LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383, "AVIF": 65535}  # that the encoders take
MOST_ENLARGED = 2**25  # pixels: a thin strip enlarged to a given short side would take all memory
SHOWN_SUFFIXES = 8
SMALLEST_CROP = 0.6  # of the short side
GAP = 6  # pixels between the pictures of a sheet
ACROSS = 8  # pictures in a row of a strip


def square(picture: Image.Image, size: int) -> Image.Image:
    """The centre square, resized to `size` x `size` in one Lanczos pass (so a 10000 x 10 strip costs nothing)."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def random_box(sides: tuple[int, int], name: str, number: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of crop `number` of the picture `name`: a square of 0.6 to 1 of the short side, its
    size and its place uniform. A function of the two alone, so that a store comes out the same in any order."""
    digest = hashlib.sha256(f"{name}/{number}".encode(errors="surrogateescape")).digest()
    size, column, row = (int.from_bytes(digest[start : start + 8], "big") / 2**64 for start in (0, 8, 16))
    side = min(sides) * (SMALLEST_CROP + (1 - SMALLEST_CROP) * size)
    left, top = column * (sides[0] - side), row * (sides[1] - side)
    return left, top, left + side, top + side


def random_square(picture: Image.Image, size: int, name: str, number: int) -> Image.Image:
    """The `random_box` of a picture, resized to `size` x `size`."""
    return picture.resize((size, size), Image.Resampling.LANCZOS, box=random_box(picture.size, name, number))


def open_square(path: Path, size: int) -> Image.Image:
    """The `square` of a picture file; BadPicture says in one line why there is none."""
    with one_picture(path):
        return square(open_picture(path), size)


def resize_short_side(picture: Image.Image, size: int) -> Image.Image:
    """Same aspect ratio, the shorter side `size` pixels long."""
    return picture.resize(resized(picture.size, size), Image.Resampling.LANCZOS)


def refuse_enlarged(sides: tuple[int, int], short: int) -> None:
    """ValueError where the short side cannot be made `short` pixels long in a bounded amount of memory."""
    width, height = resized(sides, short)
    if short > min(sides) and width * height > MOST_ENLARGED:
        raise ValueError(
            f"with a short side of {short} pixels it would have {width} x {height}; at most {MOST_ENLARGED} are made "
            "by enlarging"
        )


def resized(sides: tuple[int, int], short: int) -> tuple[int, int]:
    """The sides at the same aspect ratio, the shorter one `short` pixels long."""
    scale = short / min(sides)
    return max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale))


def to_bytes(picture: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_pixels(values: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return values.float() / 127.5 - 1


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], clipped -> 8-bit RGB."""
    values = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def pad_to_multiple(pixels: Tensor, factor: int) -> Tensor:
    """(B, 3, H, W) -> sides that `factor` divides, by repeating the last row and column; crop back with [:H, :W]."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % factor, 0, -height % factor), mode="replicate")


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write whole or not at all, tagged as sRGB; the format is that of the suffix."""
    refuse_unwritable(path, picture.size)
    with written_whole(path) as beside:
        try:
            picture.save(beside, quality=95, icc_profile=srgb_profile())
        except Exception as error:
            if isinstance(error, OSError) and error.errno:  # the disk's matter: full, or not to be written to
                raise
            raise UserError(f"{path}: cannot be written ({first_line(error)})") from None


def refuse_unwritable(path: str | Path, size: tuple[int, int]) -> None:
    """UserError where the format of the suffix is none that is written, or takes no picture of this size."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: a picture is written as one of {' '.join(SUFFIXES)}")
    most = LONGEST_SIDE.get(READABLE[suffix])
    if most and max(size) > most:
        raise UserError(
            f"{path}: would have {size[0]} x {size[1]} pixels, a {suffix} has at most {most} a side; write a .png"
        )


def find_pictures(folder: Path, left_out: Counter[str] | None = None) -> list[Path]:
    """Every picture below `folder`, in nested and linked folders too, relative to it and sorted; hidden ones are none.

    `left_out` is told how many other files there are of each suffix. UserError where links lead round in a circle, or
    to a folder twice.
    """
    found: list[Path] = []
    waiting = [folder] if folder.is_dir() else []
    seen: dict[tuple[int, int], Path] = {}
    while waiting:
        place = waiting.pop()
        status = os.stat(place)
        known = seen.setdefault((status.st_dev, status.st_ino), place)
        if known != place:
            raise UserError(f"{place}: is the same folder as {known}, by a link; remove the link")
        for entry in os.scandir(place):
            if entry.name.startswith("."):
                continue
            path = place / entry.name
            suffix = path.suffix.lower()
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(path)):
                waiting.append(path)
            elif suffix in READABLE:
                found.append(path.relative_to(folder))
            elif left_out is not None:
                left_out[suffix] += 1
    return sorted(found)


def left_out_line(left_out: Counter[str]) -> str:
    """The line that says which files are no pictures by their names."""
    several = left_out.most_common(SHOWN_SUFFIXES)
    counts = [f"{count} {suffix or 'without a suffix'}" for suffix, count in several]
    rest = left_out.total() - sum(count for _, count in several)
    heif = "; .heic wants pip install pillow-heif" if {".heic", ".heif"} & left_out.keys() else ""
    return f"left out by suffix: {', '.join(counts + [f'{rest} others'] * bool(rest))}{heif}"


def strip_size(size: tuple[int, int], count: int) -> tuple[int, int]:
    """Width and height of the `strip` of so many pictures of a size; of one, it is the picture itself."""
    if count == 1:
        return size
    column, row = contact_sheet_size(size, min(count, ACROSS), 1, titled=True)
    return column, row * -(-count // ACROSS)


def contact_sheet_size(
    size: tuple[int, int], columns: int, rows: int, titled: bool, left: int = GAP, gap: int = GAP
) -> tuple[int, int]:
    """Width and height of a `contact_sheet` of tiles of a size."""
    head = int(letter_size(size[0]) * 1.8) if titled else 0
    return left + columns * (size[0] + gap), head + gap + rows * (size[1] + gap)


def letter_size(width: int) -> int:
    """Of titles above pictures of so many pixels."""
    return max(11, min(18, width // 8))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str] = (),
    zoom: int = 1,
    gap: int = GAP,
    names: Sequence[str] = (),
) -> Image.Image:
    """A grid of equally large pictures under column titles, beside the rows' names, on white; `zoom` repeats pixels."""
    width, height = (side * zoom for side in rows[0][0].size)
    font = ImageFont.load_default(letter_size(width))
    columns = max(len(row) for row in rows)
    left = gap + max((2 * gap + int(font.getlength(name)) for name in names), default=0)
    whole = contact_sheet_size((width, height), columns, len(rows), bool(titles), left, gap)
    head = whole[1] - gap - len(rows) * (height + gap)
    sheet = Image.new("RGB", whole, "white")
    draw = ImageDraw.Draw(sheet)
    for y, name in enumerate(names):
        draw.text((left - 2 * gap, head + gap + y * (height + gap) + height / 2), name, "black", font, anchor="rm")
    for column, title in enumerate(titles):
        draw.text((left + column * (width + gap) + width / 2, head / 2 + gap / 2), title, "black", font, anchor="mm")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            tile = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + x * (width + gap), head + gap + y * (height + gap)))
    return sheet


def strip(pictures: Sequence[Image.Image], titles: Sequence[str], across: int = ACROSS) -> Image.Image:
    """Equally large pictures, each under its own title, in rows of `across`."""
    places = range(0, len(pictures), across)
    rows = [contact_sheet([pictures[start : start + across]], titles[start : start + across]) for start in places]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * rows[0].height))
    return sheet
