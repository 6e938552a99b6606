"""How long does a transfer take, what of it is the network, and how much faster is stage 2?

python benchmarks/transfer.py --checkpoint checkpoints/emoji/stage1_epoch16.pt --batch_sizes 1 32
python benchmarks/transfer.py --checkpoint checkpoints/photo/stage2/stage2_epoch12.pt --side 256 --batch_sizes 32 \\
    --code ../contrastive-unpaired-translation

Pictures of noise in memory through the four parts of a transfer: encode, the inversion leg, the generation leg in
another style, decode. With a checkpoint of stage 2 its teacher, stage 1, comes first and the map with each of --steps
is timed beside it. With --code also the generator that CUT and CycleGAN have at 256 pixels, ResNet-9, made by that
checkout, in the same precision. Each round runs all of them once; the figures are medians over the rounds, and so are
the ratios, of the speed to the first one's in the same round. The last line is JSON.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from isonext.config import config_to_dict
from isonext.errors import UserError
from isonext.flow.transfer import TransferSettings
from isonext.pipeline import Pipeline, load_pipeline, settled, transfer_settings
from isonext.utils.cli import add_device_flags, new_parser, run
from isonext.utils.device import autocast, device_name, pick_device

PARTS = ("encode", "invert", "generate", "decode")


@dataclass
class Contestant:
    """Something that makes a transfer of pixels: its seconds of each of `PARTS`, and its network evaluations."""

    name: str
    work: Callable[[Tensor, Callable[[], None]], int]  # of pixels; calls the second before and after each part


def ours(pipeline: Pipeline, settings: TransferSettings) -> Contestant:
    def work(pixels: Tensor, mark: Callable[[], None]) -> int:
        mark()
        latents = pipeline.encode(pixels)
        mark()
        inverted = pipeline.invert(latents, 0, settings)
        mark()
        made = pipeline.generate(inverted, 0, 1, settings)
        mark()
        pipeline.decode(made.latents, *pixels.shape[2:]).cpu()
        mark()
        return made.nfe

    pipeline.check_settings(settings)
    return Contestant(f"{settings.method}, {settings.num_steps} steps", work)


def resnet9(code: Path, pipeline: Pipeline, compiled: bool) -> Contestant:
    """The generator of CUT and CycleGAN as a checkout of either makes it; it has no autoencoder and no legs."""
    if not (code / "models" / "networks.py").is_file():
        raise UserError(f"--code {code}: has no models/networks.py; give a checkout of CUT's or CycleGAN's repository")
    sys.path.insert(0, str(code))
    network: nn.Module = importlib.import_module("models.networks").define_G(3, 3, 64, "resnet_9blocks", "instance")
    network = network.eval().to(pipeline.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks memory_format
    if compiled:
        network.compile()

    @torch.inference_mode()
    def work(pixels: Tensor, mark: Callable[[], None]) -> int:
        for _ in PARTS[:3]:
            mark()
        with autocast(pipeline.device, pipeline.bf16):
            network(pixels.to(pipeline.device, memory_format=torch.channels_last)).float().cpu()
        for _ in PARTS[2:]:
            mark()
        return 1

    return Contestant("ResNet-9", work)


def contestants(args: argparse.Namespace) -> tuple[Pipeline, int, list[Contestant]]:
    """The pipeline, the side of its pictures, and what is timed."""
    pipeline, config = load_pipeline(args.checkpoint, pick_device(args.device))
    if len(pipeline.spec.styles) < 2:
        raise UserError(f"{args.checkpoint}: has one style, and a transfer needs two")
    if args.compile:
        pipeline.compile()
    own = transfer_settings(config.inference, front=pipeline.front)
    found = [own]
    if pipeline.map is not None:
        flow = settled(config_to_dict(config), (), {"method": "alf"}).inference
        found = [transfer_settings(flow, front=pipeline.front)]
        found += [replace(own, num_steps=steps) for steps in args.steps]
    timed = [ours(pipeline, settings) for settings in found]
    if args.code:
        timed.append(resnet9(args.code, pipeline, args.compile))
    return pipeline, args.side or config.data.image_size, timed


def time_rounds(args: argparse.Namespace, pipeline: Pipeline, timed: list[Contestant], pixels: Tensor) -> list[dict]:
    """A row for each contestant: medians of its parts in milliseconds, and of its speed against the first one's."""
    clock = time.thread_time if args.cpu_time else time.perf_counter
    rounds: list[list[list[float]]] = []  # of each round, of each contestant, seconds of each part
    evaluations = []

    def once(contestant: Contestant) -> list[float]:
        marks: list[float] = []

        def mark() -> None:
            if pipeline.device.type == "cuda":
                torch.cuda.synchronize(pipeline.device)
            marks.append(clock())

        evaluations.append(contestant.work(pixels, mark))
        return [b - a for a, b in pairwise(marks)]

    for _ in range(1 + args.rounds):  # the first one warms up, and compiles
        rounds.append([once(contestant) for contestant in timed])
    rows = []
    for number, contestant in enumerate(timed):
        own, first = ([times[which] for times in rounds[1:]] for which in (number, 0))
        row = {part: 1000 * statistics.median(t) for part, t in zip(PARTS, zip(*own, strict=True), strict=True)}
        row["all"] = 1000 * statistics.median(map(sum, own))
        network, whole = (
            statistics.median(sum(a[part]) / sum(b[part]) for a, b in zip(first, own, strict=True))
            for part in (slice(1, 3), slice(None))
        )
        row |= {"network_speed": network, "speed": whole}
        row = {key: round(value, 2) for key, value in row.items()}
        rows.append({"name": contestant.name, "batch": len(pixels), "nfe": evaluations[number]} | row)
    return rows


def main(args: argparse.Namespace) -> int:
    for name, least in (("rounds", 1), ("side", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name} {value}: must be {least} or more")
    for name in ("batch_sizes", "steps"):
        if min(getattr(args, name)) < 1:
            raise UserError(f"--{name} {min(getattr(args, name))}: must be 1 or more")
    pipeline, side, timed = contestants(args)
    name = device_name(pipeline.device)
    print(f"{name}; {side} px, BF16: {pipeline.bf16}, compiled: {args.compile}")
    print(f"{'batch':>5}  {'':14}{'nfe':>5}" + "".join(f"{part:>11}" for part in (*PARTS, "in all")) + "   ms;"
          f"{'pictures/s':>12}{'network':>10}{'in all':>8}  times as fast")  # fmt: skip
    rows: list[dict] = []
    for batch in args.batch_sizes:
        for row in time_rounds(args, pipeline, timed, torch.rand(batch, 3, side, side) * 2 - 1):
            parts = "".join(f"{row[part]:11.1f}" for part in (*PARTS, "all"))
            print(
                f"{batch:5}  {row['name']:14}{row['nfe']:5}{parts}      {1000 * batch / row['all']:12.2f}"
                f"{row['network_speed']:10.2f}{row['speed']:8.2f}"
            )
            rows.append(row)
    described = {"device": name, "side": side, "compiled": args.compile, "rounds": args.rounds}
    print(json.dumps(described | {"rows": rows}))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Time the parts of a transfer.", config=False)
    parser.add_argument("--checkpoint", required=True, help="a stage1_epoch*.pt or stage2_epoch*.pt of train.py")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32], help="pictures at once")
    parser.add_argument("--side", type=int, help="pixels; by default those of training")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="of the map, where there is one")
    parser.add_argument("--code", type=Path, help="a checkout of CUT or CycleGAN, whose generator is timed beside ours")
    parser.add_argument("--rounds", type=int, default=5, help="timed transfers")
    parser.add_argument("--cpu_time", action="store_true", help="of this thread, where others work beside it")
    parser.add_argument("--compile", action="store_true", help="torch.compile first, which is not timed")
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, build_parser())
