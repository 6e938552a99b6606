"""Pictures: open, orient, crop, pad, save; the contact sheet. Pixels are RGB in [-1, 1], float32, (3, H, W)."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from isonext.errors import UserError
from isonext.utils.io import written_whole

warnings.filterwarnings("ignore", module=r"PIL\.")  # large, or of odd metadata: not the user's concern

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class BadPicture(UserError):
    """A file that is no picture, or a broken one. Folders skip it and say so."""


def open_picture(path: str | Path) -> Image.Image:
    """Any picture file as 8-bit RGB, turned upright by its EXIF tag, transparency laid on white."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except FileNotFoundError:
        raise BadPicture(f"{path}: no such picture") from None
    except Image.UnidentifiedImageError:
        raise BadPicture(f"{path}: not a picture") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadPicture(f"{path}: cannot be read ({error})") from None


def picture_size(path: Path) -> tuple[int, int] | None:
    """Width and height of what `open_picture` will give, from the file's header alone; None where it has none."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if picture.format == "TIFF" or (picture.format == "PNG" and "exif" not in picture.info):
                return width, height  # of a TIFF upright already; a PNG would be decoded in search of a tag
            turned = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return (height, width) if turned else (width, height)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):  # 16-bit and float grey, which PIL would clip at 255
        grey = np.asarray(picture).astype(np.float64)
        top = 65535 if picture.mode != "F" else 255 if grey.max() > 1 else 1
        return Image.fromarray((grey / top * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def square(picture: Image.Image, size: int) -> Image.Image:
    """The centre square, resized to `size` x `size` in one Lanczos pass (so a 10000 x 10 strip costs nothing)."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def resize_short_side(picture: Image.Image, size: int) -> Image.Image:
    """Same aspect ratio, the shorter side `size` pixels long."""
    return picture.resize(resized(picture.size, size), Image.Resampling.LANCZOS)


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
    """Write whole or not at all; the format is that of the suffix."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: a picture is written as one of {' '.join(SUFFIXES)}")
    with written_whole(path) as beside:
        try:
            picture.save(beside, quality=95)
        except ValueError as error:  # a side longer than the format knows
            raise UserError(f"{path}: cannot be written ({error})") from None


def find_pictures(folder: Path) -> list[Path]:
    """Every picture below `folder`, nested ones too, relative to it and sorted; hidden files are none."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    found = (path.relative_to(folder) for path in files)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str] = (),
    zoom: int = 1,
    gap: int = 6,
    names: Sequence[str] = (),
) -> Image.Image:
    """A grid of equally large pictures under column titles, beside the rows' names, on white; `zoom` repeats pixels."""
    width, height = (side * zoom for side in rows[0][0].size)
    letters = max(11, min(18, width // 8))
    font = ImageFont.load_default(letters)
    head = int(letters * 1.8) if titles else 0
    columns = max(len(row) for row in rows)
    left = gap + max((2 * gap + int(font.getlength(name)) for name in names), default=0)
    sheet = Image.new("RGB", (left + columns * (width + gap), head + gap + len(rows) * (height + gap)), "white")
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


def strip(pictures: Sequence[Image.Image], titles: Sequence[str], across: int = 8) -> Image.Image:
    """Equally large pictures, each under its own title, in rows of `across`."""
    places = range(0, len(pictures), across)
    rows = [contact_sheet([pictures[start : start + across]], titles[start : start + across]) for start in places]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * rows[0].height))
    return sheet
