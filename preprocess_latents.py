"""Encode folders of pictures, one folder a style, to a latent store: once, so that training never sees a pixel.

python preprocess_latents.py --config config.json --target_size 512

Run again after a kill it goes on where it was; after pictures came, went or changed it does only the difference.
"""

import argparse
from pathlib import Path

from isonext.config import load_config
from isonext.errors import UserError
from isonext.utils.cli import add_device_flags, new_parser, run


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Encode folders of pictures (one folder a style) to a latent store.")
    parser.add_argument("--config", default="config.json", help="the JSON config")
    parser.add_argument("--target_size", type=int, help="side of the squares in pixels (data.image_size)")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures at once, at most; of large ones fewer are")
    parser.add_argument("--num_workers", type=int, help="decoding processes (training.num_workers)")
    parser.add_argument("--format", choices=("pt", "safetensors"), help="of the store's files (data.format)")
    parser.add_argument(
        "--split_by",
        metavar="RULE",
        help="held out whole: picture, folder-prefix, or a FILE.csv's groups (data.split_by)",
    )
    add_device_flags(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: must be 1 or more")
    from isonext.data.preprocess import preprocess, print_report
    from isonext.utils.device import pick_device

    flags = {
        "data.image_size": args.target_size,
        "training.num_workers": args.num_workers,
        "data.format": args.format,
        "data.split_by": args.split_by,
    }
    overrides = [*args.overrides, *(f"{name}={value}" for name, value in flags.items() if value is not None)]
    config = load_config(args.config, overrides)
    report = preprocess(config, pick_device(args.device), batch=args.batch_size)
    print_report(report, Path(config.data.data_root))
    return 1 if report.skipped else 0  # done, but not for every picture


if __name__ == "__main__":
    run(main, build_parser())
