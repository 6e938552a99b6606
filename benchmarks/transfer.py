"""How long does a transfer take, and what of it is the network?

python benchmarks/transfer.py --checkpoint checkpoints/emoji/stage1_epoch16.pt --batch_sizes 1 32

Pictures of noise in memory through the four parts of a transfer: encode, the inversion leg, the generation leg in
another style, decode. Each round runs all parts once; the figures are medians over the rounds. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from isonext.errors import UserError
from isonext.flow.transfer import TransferSettings
from isonext.pipeline import Pipeline, load_pipeline, transfer_settings
from isonext.utils.cli import add_device_flags, new_parser, run
from isonext.utils.device import device_name, pick_device

PARTS = ("encode", "invert", "generate", "decode")


def time_parts(
    pipeline: Pipeline, pixels: torch.Tensor, settings: TransferSettings, clock: Callable[[], float]
) -> tuple[list[float], int]:
    """Seconds of each of `PARTS` for a batch of pixels, and the network evaluations a picture."""
    marks = []

    def mark() -> None:
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize(pipeline.device)
        marks.append(clock())

    mark()
    latents = pipeline.encode(pixels)
    mark()
    inverted = pipeline.invert(latents, 0, settings)
    mark()
    made = pipeline.generate(inverted, 0, 1, settings)
    mark()
    pipeline.decode(made.latents, *pixels.shape[2:]).cpu()
    mark()
    return [b - a for a, b in pairwise(marks)], made.nfe


def main(args: argparse.Namespace) -> int:
    for name, least in (("rounds", 1), ("side", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name} {value}: must be {least} or more")
    if min(args.batch_sizes) < 1:
        raise UserError(f"--batch_sizes {min(args.batch_sizes)}: must be 1 or more")
    pipeline, config = load_pipeline(args.checkpoint, pick_device(args.device))
    if len(pipeline.spec.styles) < 2:
        raise UserError(f"{args.checkpoint}: has one style, and a transfer needs two")
    if args.compile:
        pipeline.compile()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    settings, side = transfer_settings(config.inference, front=pipeline.front), args.side or config.data.image_size
    name = device_name(pipeline.device)
    print(f"{name}; {side} px, {settings.method}, scale {settings.cfg_scale:g}, compiled: {args.compile}")
    print(f"{'batch':>5}" + "".join(f"{part:>11}" for part in (*PARTS, "in all")) + "   ms; pictures/s")
    rows = []
    for batch in args.batch_sizes:
        pixels = torch.rand(batch, 3, side, side) * 2 - 1
        time_parts(pipeline, pixels, settings, clock)  # warms up, and compiles
        rounds = [time_parts(pipeline, pixels, settings, clock) for _ in range(args.rounds)]
        parts = [1000 * statistics.median(times) for times in zip(*(times for times, _ in rounds), strict=True)]
        whole = 1000 * statistics.median(sum(times) for times, _ in rounds)
        print(f"{batch:5}" + "".join(f"{ms:11.1f}" for ms in (*parts, whole)) + f"   {1000 * batch / whole:.2f}")
        row = dict(zip(PARTS, (round(ms, 2) for ms in parts), strict=True))
        rows.append(row | {"batch": batch, "all": round(whole, 2), "nfe": rounds[0][1]})
    print(json.dumps({"device": name, "side": side, "compiled": args.compile, "rounds": args.rounds, "rows": rows}))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Time the parts of a transfer.", config=False)
    parser.add_argument("--checkpoint", required=True, help="a stage1_epoch*.pt of train.py")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32], help="pictures at once")
    parser.add_argument("--side", type=int, help="pixels; by default those of training")
    parser.add_argument("--rounds", type=int, default=5, help="timed transfers")
    parser.add_argument("--cpu_time", action="store_true", help="of this thread, where others work beside it")
    parser.add_argument("--compile", action="store_true", help="torch.compile first, which is not timed")
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, build_parser())
