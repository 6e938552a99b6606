"""Does a folder of pictures keep the network busy?

python benchmarks/folder.py --checkpoint checkpoints/emoji/stage1_epoch16.pt --data raw_data/emoji_test/noto

Times the two legs alone on one batch in memory, and the whole of `inference.py --input FOLDER` (reading, encoding,
legs, decoding, writing), in turn, with the same compiled network. The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from isonext.inference.inputs import Job, find_jobs, load_batches
from isonext.inference.jobs import transfer_batches
from isonext.inference.plan import Plan, Target
from isonext.pipeline import load_pipeline, transfer_settings
from isonext.utils.cli import add_device_flags, new_parser, run
from isonext.utils.device import device_name, pick_device


def main(args: argparse.Namespace) -> int:
    pipeline, config = load_pipeline(args.checkpoint, pick_device(args.device))
    if config.training.compile:
        pipeline.compile()
    settings = transfer_settings(config.inference)
    styles, size = pipeline.spec.styles, args.batch_size
    plan = Plan(pipeline, 0, [Target(styles[1], styles[1], 1)], settings)
    legs, folder, skipped = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        jobs = find_jobs(args.data, Path(scratch))
        jobs = jobs[: len(jobs) // size * size]  # whole batches
        first = next(load_batches(jobs[:size], pipeline, None, size, [])).latents
        for number in range(args.rounds + 1):  # the first one compiles
            started = time.perf_counter()
            pipeline.transfer(first, 0, 1, settings)
            if pipeline.device.type == "cuda":
                torch.cuda.synchronize(pipeline.device)
            legs.append(size / (time.perf_counter() - started))
            anew = [Job(job.source, job.output.with_name(f"{number}_{job.output.name}")) for job in jobs]
            started = time.perf_counter()
            report = transfer_batches(load_batches(anew, pipeline, None, size, skipped), plan, len(anew), skipped)
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
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, build_parser())
