"""Draw ten folders of digits, so that class-conditional generation can be tried without a download.

python examples/digits.py                       # raw_data/digits/0 ... 9, 600 pictures each, 32 px, in seconds
python preprocess_latents.py --config configs/digits.json
python train.py --config configs/digits.json
python sample.py --checkpoint checkpoints/digits/stage1_epoch20.pt --num_samples_per_style 8 --output out/digits

Size, slant, turn, place, weight and colours are drawn at random, as a function of (seed, digit, number).
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from isonext.errors import UserError
from isonext.utils.cli import new_parser, run
from isonext.utils.io import written_whole

OVER = 4  # drawn this many times larger, then reduced: smooth edges


def draw_digit(digit: int, size: int, rng: np.random.Generator) -> Image.Image:
    """One digit, (size, size) RGB: a light colour on a dark one."""
    side = size * OVER
    font = ImageFont.load_default(side * rng.uniform(0.65, 0.85))
    mask = Image.new("L", (side, side))
    weight = int(rng.integers(0, max(2, side // 24)))
    ImageDraw.Draw(mask).text((side / 2, side / 2), str(digit), 255, font, anchor="mm", stroke_width=weight)
    turn, slant = rng.normal(0, math.radians(7)), rng.normal(0, 0.15)
    shift = rng.normal(0, side / 30, 2)
    # From where each pixel is taken: turned and slanted about the centre.
    a, b = math.cos(turn), math.sin(turn) + slant
    c, d = -math.sin(turn), math.cos(turn)
    x, y = side / 2 + shift[0], side / 2 + shift[1]
    matrix = (a, b, side / 2 - a * x - b * y, c, d, side / 2 - c * x - d * y)
    mask = mask.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    dark, light = rng.integers(0, 90, 3), rng.integers(150, 256, 3)
    ground, ink = (Image.new("RGB", (side, side), tuple(int(v) for v in colour)) for colour in (dark, light))
    return Image.composite(ink, ground, mask).resize((size, size), Image.Resampling.BOX)


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Draw ten folders of digits.", config=False)
    parser.add_argument("--output", type=Path, default=Path("raw_data/digits"), help="a folder")
    parser.add_argument("--count", type=int, default=600, help="pictures a digit")
    parser.add_argument("--size", type=int, default=32, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    return parser


def main(args: argparse.Namespace) -> int:
    for name, least in (("count", 1), ("size", 8), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be {least} or more")
    for digit in range(10):
        for number in range(args.count):
            picture = draw_digit(digit, args.size, np.random.default_rng([args.seed, digit, number]))
            with written_whole(args.output / str(digit) / f"{number:04}.png") as beside:
                picture.save(beside)
    print(f"{10 * args.count} digits written to {args.output}")
    return 0


if __name__ == "__main__":
    run(main, build_parser())
