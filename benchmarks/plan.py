"""How near is the memory that `train.py --plan` estimates to what a training step takes?

python benchmarks/plan.py
python benchmarks/plan.py --sizes 384x12x64x8 --compile

Each size is D x N x side of the latents x pictures at once; of each, whatever blocks compute again
backwards, two micro-batches, the optimiser and the average are run. On CUDA the peak is the allocator's own count;
elsewhere it is the sum of what PyTorch's profiler saw allocated and freed, and of the state. The last line is JSON.
"""

import argparse
import copy
import functools
import gc
import json
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from isonext.config import TrainingConfig
from isonext.errors import UserError
from isonext.flow.loss import flow_loss
from isonext.models.cost import footprint
from isonext.training.optim import make_optimizer
from isonext.utils.cli import add_device_flags, new_parser, run
from isonext.utils.device import autocast, device_name, has_bf16, pick_device
from model import IsoNext, Recompute, count_parameters

MIB = 2**20
SIZES = ["64x3x16x16", "128x6x32x8", "192x8x16x16", "256x4x32x4"]


def make_step(model: IsoNext, device: torch.device, bf16: bool, pictures: int, side: int) -> Callable[[], None]:
    """A function that does one optimiser step in two micro-batches."""
    optimizer, average = make_optimizer(model, TrainingConfig()), copy.deepcopy(model).requires_grad_(False)

    def network(*inputs: torch.Tensor) -> torch.Tensor:
        with autocast(device, bf16):
            return model(*inputs)

    def step() -> None:
        for _ in range(2):
            shape = (2, pictures, model.stem.in_channels, side, side)
            x0, x1 = (x.to(memory_format=torch.channels_last) for x in torch.randn(shape, device=device))
            t = torch.rand(pictures, device=device)
            flow_loss(network, x0, x1, t, torch.zeros_like(t, dtype=torch.int64)).mean().backward()
        optimizer.step()
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.1)
        optimizer.zero_grad(set_to_none=True)

    return step


def allocated_peak(step: Callable[[], None]) -> int:
    """Bytes allocated on the CPU at most during the step, over those before it: the gradients are among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(size: list[int], recompute: Recompute, device: torch.device, bf16: bool, compiled: bool) -> dict:
    width, depth, side, pictures = size
    network = {"latent_channels": 4, "num_styles": 2, "hidden_dim": width, "num_layers": depth}
    estimate = footprint(functools.partial(IsoNext, **network), (4, side, side), bf16, True, recompute)
    gc.collect()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    model = IsoNext(**network, recompute=recompute).to(device, memory_format=torch.channels_last)
    if compiled:
        model.compile(dynamic=False)
    step = make_step(model, device, bf16, pictures, side)
    step()  # the first makes the moments
    row = {"size": "x".join(map(str, size)), "recompute": recompute, "estimated": round(estimate.peak(pictures))}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        row["measured"] = torch.cuda.max_memory_allocated(device) - before
        row["reserved"] = torch.cuda.max_memory_reserved(device)
    else:
        row["measured"] = allocated_peak(step) + 16 * count_parameters(model)  # weights, moments, average: from before
    return row | {"error": round(row["estimated"] / row["measured"] - 1, 4)}


def main(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    bf16 = has_bf16(device) and not args.fp32
    try:
        sizes = [[int(number) for number in text.split("x")] for text in args.sizes]
        if any(len(size) != 4 or min(size) < 1 for size in sizes):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--sizes {' '.join(args.sizes)}: each is written as DxNxSIDExPICTURES, e.g. 128x6x32x8"
        ) from None
    name = device_name(device)
    mode = f"{'BF16' if bf16 else 'float32'}, {'compiled' if args.compile else 'eager'}"
    print(f"{name}; {mode}; peak of a training step in MiB, with weights, gradients, AdamW and average")
    print(f"{'D x N x side x pictures':24s}{'recomputed':>14s}{'estimated':>11s}{'measured':>10s}{'error':>8s}")
    rows = []
    for size in sizes:
        for recompute in ("none", "selective", "full"):
            row = measure(size, recompute, device, bf16, args.compile)
            reserved = f"   {row['reserved'] / MIB:.1f} reserved" if "reserved" in row else ""
            print(f"{row['size']:24s}{recompute:>14s}{row['estimated'] / MIB:11.1f}"
                  f"{row['measured'] / MIB:10.1f}{row['error']:+8.1%}{reserved}")  # fmt: skip
            rows.append(row)
    worst = max(abs(row["error"]) for row in rows)
    print(f"largest error {worst:.1%}")
    print(json.dumps({"worst": worst, "rows": rows, "bf16": bf16, "compiled": args.compile, "device": name}))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Compare the estimated memory of training steps with the measured one.", config=False)
    parser.add_argument("--sizes", nargs="+", metavar="DxNxSIDExPICTURES", default=SIZES, help="what to measure")
    parser.add_argument("--fp32", action="store_true", help="without BF16")
    parser.add_argument("--compile", action="store_true", help="compiled, as training is; the estimate is of eager")
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, build_parser())
