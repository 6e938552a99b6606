"""Measure a checkpoint on held-out pictures: is the style right, is the picture still the same.

python evaluate.py --checkpoint checkpoints/stage1_epoch200.pt --data test_data --pairs --output report/

`--data` holds one folder a style, beside `raw_data` and not in it, where it would count as a style; without it the
validation split of the latent store is taken. With `--pairs`, files of the same name are the same picture in every
style.
"""

import argparse
from pathlib import Path

from isonext.evaluation.options import EvaluateOptions
from isonext.utils.cli import add_device_flags, new_parser, run


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Measure a checkpoint on held-out pictures. --set inference.KEY=VALUE changes the settings.")
    parser.add_argument("--checkpoint", required=True, help="a stage1_epoch*.pt of train.py, or a folder of export.py")
    parser.add_argument(
        "--baseline", nargs="+", action="extend", default=[], metavar="FILE", help="other checkpoints to compare with"
    )
    parser.add_argument(
        "--data", type=Path, help="held-out pictures, one folder a style; by default the store's validation split"
    )
    parser.add_argument(
        "--train_data", type=Path, help="pictures the classifier learns from; by default data.raw_data_root"
    )
    parser.add_argument("--pairs", action="store_true", help="files of one name are one picture in every style")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder of the report")
    parser.add_argument("--strength", type=float, default=1.0, help="0 keeps the picture, 1 is the full transfer")
    parser.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=A,B",
        help="measure every combination, e.g. cfg_scale=1,1.5,2",
    )
    parser.add_argument(
        "--quick", action="store_true", help="no certificate, cycle, FID, KID and LPIPS: a third of the work"
    )
    parser.add_argument("--limit", type=int, help="at most this many test pictures a style")
    add_device_flags(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    from isonext.evaluation.sweep import evaluate

    return evaluate(
        EvaluateOptions(
            checkpoint=args.checkpoint,
            baselines=tuple(args.baseline),
            data=args.data,
            train_data=args.train_data,
            pairs=args.pairs,
            output=args.output,
            overrides=tuple(args.overrides),
            strength=args.strength,
            sweep=tuple(args.sweep),
            quick=args.quick,
            limit=args.limit,
            device=args.device,
        )
    )


if __name__ == "__main__":
    run(main, build_parser())
