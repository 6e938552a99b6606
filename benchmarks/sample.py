"""How many samples a second, by one process and by two?

python benchmarks/sample.py --checkpoint checkpoints/digits/stage1_epoch20.pt --num_samples 256 --num_steps 30

Runs sample.py as a user would, alone and under torchrun, in turn; the rate is the one that it prints: solver, decoding
and writing, without the start. On CUDA two processes need two devices. The share is the network's floating-point
operations over the time of one process, against the best BF16 matrix-multiply rate found in the same run. The last line
is JSON.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from isonext.checkpoint import load_checkpoint, load_model
from isonext.errors import UserError
from isonext.models.cost import forward_flops
from isonext.utils.cli import add_device_flags, new_parser, run
from isonext.utils.device import device_name, pick_device

SAMPLE = Path(__file__).resolve().parents[1] / "sample.py"


def measure_rate(flags: list[str], processes: int) -> float:
    """Pictures a second of one run of sample.py into a folder that is thrown away."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, *(launcher if processes > 1 else []), str(SAMPLE), *flags, "--output", scratch]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"([\d.]+) pictures/s", done.stdout)
    if done.returncode or not found:
        raise UserError(f"sample.py failed: {done.stderr.strip() or done.stdout.strip()}")
    return float(found[1])


def main(args: argparse.Namespace) -> int:
    for name in ("num_samples", "batch_size", "num_steps", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    from train_step import matmul_rate  # beside this file

    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    network = load_model(checkpoint, args.checkpoint, torch.device("cpu"))
    flags = ["--method", "alf", "--cfg_interval", "0", "1"]  # so that the evaluations are known
    for name in ("checkpoint", "num_samples", "batch_size", "num_steps", "cfg_scale", "device", "compile"):
        flags += [f"--{name}", str(getattr(args, name))]
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.rounds):
        for processes, measured in rates.items():
            measured.append(measure_rate(flags, processes))
    one, two = (statistics.median(measured) for measured in rates.values())
    matmul = matmul_rate(device)
    # alf evaluates the field once a step and once more; guidance doubles each of these.
    nfe = (args.num_steps + 1) * (1 if args.cfg_scale == 1 else 2)
    flops = nfe * forward_flops(network, 1, checkpoint.latents.space)
    print(f"{device_name(device)}; {type(network).__name__}, {args.num_samples} samples, {nfe} evaluations each")
    print(f"one process     {one:8.2f} samples/s   {one * flops / matmul:.1%} of {matmul / 1e9:.0f} GFLOP/s")
    print(f"two processes   {two:8.2f} samples/s   {two / one:.2f} x")
    result = {"one_per_s": one, "two_per_s": two, "ratio": round(two / one, 3)}
    result |= {"matmul_share": round(one * flops / matmul, 4), "matmul_gflops": round(matmul / 1e9, 1), "nfe": nfe}
    print(json.dumps(result | {"device": device_name(device), "samples": args.num_samples, "batch": args.batch_size}))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Time sample.py in one process and in two.", config=False)
    parser.add_argument("--checkpoint", required=True, help="a stage1_epoch*.pt of train.py")
    parser.add_argument("--num_samples", type=int, default=128, help="pictures a run")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures at once")
    parser.add_argument("--num_steps", type=int, default=20, help="of the solver")
    parser.add_argument("--cfg_scale", type=float, default=1.0, help="guidance; 1 is none")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="off", help="compiling counts as time")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each")
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, build_parser())
