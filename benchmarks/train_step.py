"""How fast is a training step, and how far from the machine's own limit?

python benchmarks/train_step.py                          # D 128, N 6, batch 16, 32 x 32 latents
python benchmarks/train_step.py --hidden_dim 384 --num_layers 12 --batch_size 64 --latent_size 64

One run, one machine, variants in turn: float32 NCHW eager ("plain"), each switch of the default on top of the one
before, and the project's default (BF16, channels_last, torch.compile). The share is the step's floating-point
operations over its time, against the best BF16 matrix-multiply rate found in the same run. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import add_device_flags, new_parser, run
from cost import step_flops
from device import allow_tf32, autocast, device_name, has_bf16, pick_device
from flow import flow_loss
from model import IsoNext, count_parameters


@dataclass
class Variant:
    name: str
    bf16: bool
    channels_last: bool
    compile: bool
    tf32: bool = True


VARIANTS = (
    Variant("plain: float32, NCHW, eager", False, False, False, tf32=False),
    Variant("float32, channels_last, eager", False, True, False),
    Variant("BF16, channels_last, eager", True, True, False),
    Variant("default: BF16, channels_last, compiled", True, True, True),
)


def make_step(args: argparse.Namespace, variant: Variant, device: torch.device) -> Callable[[], None]:
    """A function that does one optimiser step of `variant`; warmed up, so compiled."""
    torch.manual_seed(0)
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    model = IsoNext(args.latent_channels, num_styles=2, hidden_dim=args.hidden_dim, num_layers=args.num_layers).to(
        device, memory_format=layout
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if variant.compile:
        model.compile(dynamic=False)
    shape = (2, args.batch_size, args.latent_channels, args.latent_size, args.latent_size)
    x0, x1 = (x.to(device, memory_format=layout) for x in torch.randn(shape))
    t, style = torch.rand(args.batch_size).to(device), (torch.arange(args.batch_size) % 2).to(device)

    def network(*inputs: torch.Tensor) -> torch.Tensor:
        with autocast(device, variant.bf16):
            return model(*inputs)

    def step() -> None:
        allow_tf32(variant.tf32)
        flow_loss(network, x0, x1, t, style).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step.parameters = count_parameters(model)
    step()
    step()
    return step


def seconds(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def matmul_rate(device: torch.device) -> float:
    """The best median rate of square BF16 multiplications, in operations a second."""
    best, sizes = 0.0, (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192)
    for size in sizes if has_bf16(device) else sizes[:1]:  # emulated, it would take minutes
        a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
        times = [seconds(lambda a=a, b=b: F.linear(a, b), device) for _ in range(9)]
        best = max(best, 2 * size**3 / statistics.median(times[2:]))
    return best


def main(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    name = device_name(device)
    steps = {variant.name: make_step(args, variant, device) for variant in VARIANTS}
    plain, default = VARIANTS[0].name, VARIANTS[-1].name
    shape = args.latent_size, args.latent_channels, args.hidden_dim, args.num_layers
    flops, rates = step_flops(args.batch_size, *shape), [matmul_rate(device)]
    times = {name: [] for name in steps}
    for _ in range(args.rounds):  # in turn, so that a noisy moment of the machine hits all alike
        for variant, step in steps.items():
            times[variant].append(seconds(step, device))
    rates.append(matmul_rate(device))
    medians = {variant: statistics.median(values) for variant, values in times.items()}
    rate = max(rates)

    print(f"{name}; D {args.hidden_dim}, N {args.num_layers}, batch {args.batch_size}, "
          f"{args.latent_channels} x {args.latent_size} x {args.latent_size}, "
          f"{steps[plain].parameters / 1e6:.2f} M parameters, {flops / 1e9:.0f} GFLOP a step")  # fmt: skip
    print(f"BF16 matrix multiply: {rate / 1e9:.0f} GFLOP/s")
    for variant, median in medians.items():
        share = flops / median / rate
        print(f"{variant:42s}{median * 1e3:9.1f} ms   {medians[plain] / median:5.2f} x   {share:5.1%} of matmul rate")
    result = {
        "plain_ms": round(medians[plain] * 1e3, 2),
        "default_ms": round(medians[default] * 1e3, 2),
        "ratio": round(medians[plain] / medians[default], 3),
        "matmul_share": round(flops / medians[default] / rate, 4),
        "matmul_gflops": round(rate / 1e9, 1),
        "step_gflop": round(flops / 1e9, 2),
        "device": name,
        "shape": [args.hidden_dim, args.num_layers, args.batch_size, args.latent_channels, args.latent_size],
    }
    if device.type == "cuda":
        result["peak_memory_gb"] = round(torch.cuda.max_memory_reserved(device) / 2**30, 3)
        print(f"peak memory of all variants together: {result['peak_memory_gb']} GB reserved")
    print(json.dumps(result))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Time a training step, plain against default, and against the matmul rate.", config=False)
    parser.add_argument("--hidden_dim", type=int, default=128, help="width D")
    parser.add_argument("--num_layers", type=int, default=6, help="depth N")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures a step")
    parser.add_argument("--latent_channels", type=int, default=4, help="channels of the latents")
    parser.add_argument("--latent_size", type=int, default=32, help="side of the latents")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each variant")
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, build_parser())
