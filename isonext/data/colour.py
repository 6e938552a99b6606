"""What the values of a picture file mean, as 8-bit sRGB: its depth, its colour profile, its transparency.

| values | white |
| 1 to 16 bits, by the file's own depth | the largest value; of more than 8 bits the 8 highest are taken |
| float | 1; what lies a little outside 0 to 1 is cut off, anything else is refused |
| 32-bit integers | not agreed on: refused |
"""

import functools
import io
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, features

FLOAT_RANGE = (-1.0, 2.0)  # how far a resampled picture may overshoot 0 to 1
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of profiles: ICC's name -> Pillow's


def eight_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits as one of 8, in the mode L or LA; any other as it is. See above."""
    if picture.mode == "I":
        raise ValueError("of 32-bit integers nothing says which is white; save it with 8 or 16 bits")
    if picture.mode != "F" and not picture.mode.startswith("I;16"):
        return picture
    tags, key, alpha = getattr(picture, "tag_v2", {}), picture.info.get("transparency"), None
    if picture.mode == "F":
        grey = _bytes_of_floats(np.array(picture))
    else:
        values = np.asarray(picture)
        grey = (values >> (tags.get(258, (16,))[0] - 8)).astype(np.uint8)  # BitsPerSample: of a TIFF 12 or 16
        alpha = np.where(values == key, 0, 255).astype(np.uint8) if isinstance(key, int) else None
    shallow = Image.fromarray(255 - grey if tags.get(262) == 0 else grey)  # white is zero: Pillow leaves it so
    if alpha is not None:
        shallow.putalpha(Image.fromarray(alpha))
    shallow.info["icc_profile"] = picture.info.get("icc_profile")
    return shallow


def _bytes_of_floats(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    if not (low >= FLOAT_RANGE[0] and high <= FLOAT_RANGE[1]):  # NaN is neither
        raise ValueError(f"its float values go from {low:g} to {high:g}, but 0 is black and 1 is white; scale them")
    np.clip(values, 0, 1, out=values)
    values *= 255
    return np.rint(values, out=values).astype(np.uint8)


def to_srgb(picture: Image.Image, path: Path) -> Image.Image:
    """Any 8-bit picture as RGB, its colours converted by its profile, transparency laid on white."""
    base = {"CMYK": "CMYK", "1": "L", "L": "L", "LA": "L"}.get(picture.mode, "RGB")
    alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    colours = picture if picture.mode == base else picture.convert(base)
    profile = picture.info.get("icc_profile")
    rgb = _by_profile(colours, profile, path) if profile else colours.convert("RGB")
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    rgb.info.clear()  # what was said there of the file's colours is done
    return rgb


def _by_profile(colours: Image.Image, profile: bytes, path: Path) -> Image.Image:
    """RGB, L or CMYK as sRGB; with a line on stderr, and as if there were none, where the profile is of no use."""
    try:
        return _conversion(profile, colours.mode)(colours)
    except Exception as error:  # damaged, or of another kind of colours
        tell_useless_profile(path, str(error).partition("\n")[0])
        return colours.convert("RGB")


def tell_useless_profile(path: Path, reason: str) -> None:
    print(f"warning: {path}: its colour profile is of no use ({reason}); read without it", file=sys.stderr)


@functools.lru_cache(maxsize=16)
def _conversion(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image]:
    """What makes pictures of a mode RGB by the profile: relative colorimetric, with black point compensation."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    wanted = SPACES.get(space)
    if wanted is None or (wanted != mode and (wanted, mode) != ("RGB", "L")):
        raise ValueError(f"it is one of {space} colours, the picture has {'grey' if mode == 'L' else mode}")
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    if wanted == "L":
        flags |= ImageCms.Flags.NOOPTIMIZE  # the short cut for grey is some levels off in the dark
    srgb, relative = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
    transform = ImageCms.buildTransform(opened, srgb, wanted, "RGB", relative, flags)

    def convert(picture: Image.Image) -> Image.Image:
        return ImageCms.applyTransform(picture.convert(wanted), transform)  # type: ignore[return-value]  # not in place

    if wanted == "CMYK":
        return convert
    steps = np.linspace(0, 255, 16).astype(np.uint8)
    cube = np.stack(np.meshgrid(*[steps] * 3), -1).reshape(64, 64, 3)
    probe = Image.fromarray(cube if wanted == "RGB" else np.arange(256, dtype=np.uint8)[None])
    table = np.asarray(convert(probe))
    if np.abs(table.astype(int) - np.asarray(probe.convert("RGB"), int)).max() <= 1:
        return lambda picture: picture.convert("RGB")  # sRGB itself, of whatever maker: not one bit may change
    if wanted == "RGB":
        return convert
    return lambda picture: Image.merge("RGB", [picture.point(column) for column in table[0].T.tolist()])


@functools.cache
def srgb_profile() -> bytes | None:
    """The tag of our own pictures; the same bytes always, though lcms writes the time of day into it."""
    if not features.check("littlecms2"):
        return None
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    return bytes(profile)
