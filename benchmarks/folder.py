"""Does a folder of pictures keep the network busy?

python benchmarks/folder.py --checkpoint checkpoints/emoji/stage1_epoch16.pt --data raw_data/emoji_test/noto
python benchmarks/folder.py --checkpoint checkpoints/emoji/stage1_epoch16.pt --data raw_data/emoji_test/noto \\
    --sizes 3 --pictures 24 --batch_size 4 --rounds 1

Times the two legs alone on one batch in memory, and the whole of `inference.py --input FOLDER` (reading, encoding,
legs, decoding, writing), in turn, with the same compiled network. With --sizes instead the same pictures, resized to as
many sizes in turn, by --compile off, auto and on: from the start, and again once all is compiled. Last comes JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from isonext.config import config_to_dict
from isonext.data import images
from isonext.inference.inputs import Job, find_jobs, load_batches, plan_batches
from isonext.inference.jobs import transfer_batches
from isonext.inference.plan import Plan, Target, compile_rule
from isonext.pipeline import load_pipeline, transfer_settings
from isonext.utils.cli import add_device_flags, new_parser, run
from isonext.utils.device import device_name, pick_device


def draw_mixed(jobs: list[Job], sizes: int, step: int, folder: Path) -> list[Job]:
    """The pictures of the jobs, each `step` pixels wider than the last one, in turn `sizes` widths."""
    mixed = []
    for number, job in enumerate(jobs):
        picture = images.open_picture(job.source)
        width, height = picture.size
        source = folder / "in" / f"{number:05}.png"
        images.save_picture(picture.resize((width + step * (number % sizes), height)), source)
        mixed.append(Job(source, folder / "out" / source.name))
    return mixed


def measure_mixed(args: argparse.Namespace) -> int:
    """--sizes: seconds of a folder of mixed sizes by --compile off, auto and on, a network for each."""
    plans, compiled, seconds = {}, {}, {mode: [] for mode in ("off", "auto", "on")}
    with tempfile.TemporaryDirectory() as scratch:
        for mode in seconds:
            pipeline, config = load_pipeline(args.checkpoint, pick_device(args.device))
            settings, style = transfer_settings(config.inference), pipeline.spec.styles[1]
            compiles = compile_rule(mode, config_to_dict(config), pipeline, 2 * settings.num_steps)
            plans[mode] = Plan(pipeline, 0, [Target(style, style, 1)], settings, compiles=compiles)
        jobs = find_jobs(args.data, Path(scratch))[: args.pictures]
        jobs = draw_mixed(jobs, args.sizes, pipeline.codec.factor, Path(scratch))
        for _ in range(args.rounds + 1):
            for mode, plan in plans.items():  # in turn: a machine is not as fast all the time
                started = time.perf_counter()
                batches = plan_batches(jobs, None, args.batch_size, plan.compiles)
                compiled[mode] = sum(batch.compiled for batch in batches)
                if compiled[mode] and not plan.pipeline.compiled:
                    plan.pipeline.compile()
                loaded = load_batches(batches, plan.pipeline, None, args.batch_size, None)
                transfer_batches(loaded, plan, len(jobs), None)
                seconds[mode].append(time.perf_counter() - started)
    first, again = ({mode: part(times) for mode, times in seconds.items()} for part in (lambda t: t[0], median_later))
    name = device_name(pipeline.device)
    print(f"{name}; {len(jobs)} pictures of {args.sizes} sizes in turn, {len(batches)} batches of {args.batch_size}")
    for mode in seconds:
        shares = f"{first[mode] / first['off']:.2f} and {again[mode] / again['off']:.2f} of off"
        print(f"--compile {mode:4s} {first[mode]:8.1f} s from the start, {again[mode]:8.1f} s again   {shares}, "
              f"{compiled[mode]} batches compiled")  # fmt: skip
    result = {
        "first_s": first,
        "again_s": again,
        "compiled": compiled,
        "device": name,
        "pictures": len(jobs),
        "sizes": args.sizes,
    }
    print(json.dumps(result))
    return 0


def median_later(times: list[float]) -> float:
    return statistics.median(times[1:])


def main(args: argparse.Namespace) -> int:
    if args.sizes:
        return measure_mixed(args)
    pipeline, config = load_pipeline(args.checkpoint, pick_device(args.device))
    if config.training.compile:
        pipeline.compile()
    settings = transfer_settings(config.inference)
    styles, size = pipeline.spec.styles, args.batch_size
    plan = Plan(pipeline, 0, [Target(styles[1], styles[1], 1)], settings)
    legs, folder, skipped = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        jobs = find_jobs(args.data, Path(scratch))[: args.pictures]
        jobs = jobs[: len(jobs) // size * size]  # whole batches
        first = next(load_batches(plan_batches(jobs[:size], None, size), pipeline, None, size, [])).latents
        for number in range(args.rounds + 1):  # the first one compiles
            started = time.perf_counter()
            pipeline.transfer(first, 0, 1, settings)
            if pipeline.device.type == "cuda":
                torch.cuda.synchronize(pipeline.device)
            legs.append(size / (time.perf_counter() - started))
            anew = [Job(job.source, job.output.with_name(f"{number}_{job.output.name}")) for job in jobs]
            started = time.perf_counter()
            planned = plan_batches(anew, None, size, lambda of_size, pictures: pipeline.compiled)
            report = transfer_batches(load_batches(planned, pipeline, None, size, skipped), plan, len(anew), skipped)
            folder.append(report.done / (time.perf_counter() - started))
    bare, whole = statistics.median(legs[1:]), statistics.median(folder[1:])
    name = device_name(pipeline.device)
    print(f"{name}; {len(jobs)} pictures in batches of {size}, latents {tuple(first.shape[1:])}, "
          f"{report.nfe} evaluations a picture")  # fmt: skip
    print(f"legs alone      {bare:8.2f} pictures/s")
    print(f"whole folder    {whole:8.2f} pictures/s   {whole / bare:.1%} of the legs alone")
    result = {"legs_per_s": round(bare, 3), "folder_per_s": round(whole, 3), "share": round(whole / bare, 4)}
    print(json.dumps(result | {"device": name, "pictures": len(jobs), "batch_size": size}))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Compare a folder's throughput with that of its two legs alone.", config=False)
    parser.add_argument("--checkpoint", required=True, help="a stage1_epoch*.pt of train.py")
    parser.add_argument("--data", required=True, type=Path, help="a folder of pictures of the first style, of one size")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures at once")
    parser.add_argument("--pictures", type=int, help="the first so many of the folder; all by default")
    parser.add_argument("--sizes", type=int, default=0, help="measure a folder of as many sizes instead")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, build_parser())
