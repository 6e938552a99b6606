"""How fast is a training step, how far from the machine's own limit, and where does its time go?

python benchmarks/train_step.py                          # D 128, N 6, batch 16, 32 x 32 latents
python benchmarks/train_step.py --hidden_dim 384 --num_layers 12 --batch_size 64 --latent_size 64
python benchmarks/train_step.py --config configs/dit_s.json          # a DiT

One run, one machine, variants in turn: float32 NCHW eager ("plain"), each switch of the default on top of the one
before, and the project's default. A step is forward, backward, clipping, AdamW and the average of the weights. The
share is the step's floating-point operations over its time, against the best BF16 matrix-multiply rate found in the
same run; an IsoNext's floor is those operations at that rate, and the bytes that cannot be avoided at the rate of a
copy. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from isonext.checkpoint import network_of
from isonext.config import Config, ModelConfig, TrainingConfig, load_config
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.flow.loss import flow_loss
from isonext.models.cost import step_flops
from isonext.training.optim import make_optimizer
from isonext.training.state import EMA
from isonext.utils.cli import add_device_flags, new_parser, run
from isonext.utils.device import allow_tf32, autocast, device_name, has_bf16, pick_device
from model import Recompute, VelocityNetwork, count_parameters


@dataclass
class Variant:
    name: str
    bf16: bool
    channels_last: bool
    compile: bool
    tf32: bool = True
    recompute: Recompute = "none"  # see model.py


VARIANTS = (
    Variant("plain: float32, NCHW, eager", False, False, False, tf32=False),
    Variant("+ TF32 (on CUDA), channels_last", False, True, False),
    Variant("+ BF16", True, True, False),
    Variant("+ torch.compile: the default", True, True, True),
    Variant("default, blocks keep products only", True, True, True, recompute="selective"),
)
ATTENTION = "aten::_scaled_dot_product_"
PLAIN, DEFAULT = VARIANTS[0].name, VARIANTS[3].name
KINDS = (
    "matrix multiplies",
    "convolutions",
    "attention",
    "norm, GELU, gate and other elementwise",
    "copies",
    "optimizer",
    "average",
)


def make_network(args: argparse.Namespace, recompute: Recompute = "none") -> VelocityNetwork:
    """That of --config, or an IsoNext of the sizes given."""
    config = Config(model=ModelConfig(hidden_dim=args.hidden_dim, num_layers=args.num_layers))
    config = load_config(args.config, args.overrides) if args.config else config
    styles = ["a", "b"] if config.training.label_drop_prob else ["a"]
    spec = LatentSpec("none", args.latent_channels, 1, args.latent_size, styles)
    return network_of(config, spec)(recompute=recompute)


def make_step(args: argparse.Namespace, variant: Variant, device: torch.device) -> Callable[[], None]:
    """A function that does one optimiser step of `variant`; warmed up, so compiled."""
    torch.manual_seed(0)
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    model = make_network(args, variant.recompute).to(device, memory_format=layout)
    optimizer, ema = make_optimizer(model, TrainingConfig()), EMA(model, 0.999)
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
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, 1000)
        optimizer.zero_grad(set_to_none=True)

    step()
    step()
    return step


def seconds(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def step_bytes(args: argparse.Namespace, network: VelocityNetwork) -> int:
    """What an IsoNext's blocks of one step must read and write in BF16, where every operation is one pass over memory.

    In units of one activation of D channels, forward: depthwise 2, norm 2, widen 1 + 4, GELU 4 + 4, narrow 4 + 1, gate
    and residual 2 + 1. Backward: narrow 1 + 4 for its input and 1 + 4 for its weights, GELU 8 + 4, widen 4 + 1 and
    4 + 1, norm 3 + 1, depthwise 2 and 2, gate and residual 3 + 1. Weights are small beside them.
    """
    activation = 2 * args.batch_size * args.latent_size**2 * network.blocks[0].widen.in_features
    return len(network.blocks) * (25 + 44) * activation


def matmul_rate(device: torch.device) -> float:
    """The best median rate of square BF16 multiplications, in operations a second."""
    best, sizes = 0.0, (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192)
    for size in sizes if has_bf16(device) else sizes[:1]:  # emulated, it would take minutes
        a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
        times = [seconds(lambda a=a, b=b: F.linear(a, b), device) for _ in range(9)]
        best = max(best, 2 * size**3 / statistics.median(times[2:]))
    return best


def copy_rate(device: torch.device) -> float:
    """The best rate of a copy of 256 MiB, in bytes a second, those read and those written."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)  # zeros might be one page for all
    target = torch.zeros_like(source)
    return 2 * 2**28 / min(seconds(lambda: target.copy_(source), device) for _ in range(7))


#################################################################################
#                            Where the time goes                                #
#################################################################################


def kind_of(name: str) -> str | None:
    """One of KINDS, by the name of a profiled operation."""
    for words, kind in (
        (("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"), KINDS[0]),
        (("conv", "isonext::depthwise"), KINDS[1]),
        ((ATTENTION,), KINDS[2]),
        (("adamw", "AdamW", "aten::_foreach_norm", "aten::linalg", "aten::_foreach_mul_"), KINDS[5]),
        (("aten::_foreach_lerp",), KINDS[6]),
        (("aten::copy_", "aten::clone", "aten::contiguous", "aten::fill_", "aten::zero_"), KINDS[4]),
        (("CompiledFxGraph", "triton", "aten::"), KINDS[3]),
    ):
        if any(word in name for word in words):
            return kind
    return None


def where_time_goes(step: Callable[[], None], device: torch.device, rounds: int) -> dict[tuple[str, str], float]:
    """(kind of work, "forward", "backward" or "") -> milliseconds of a step; of each operation the median of rounds."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    steps = []
    for _ in range(rounds):
        with profile(activities=activities, acc_events=True) as profiled:
            step()
        events = sorted((e for e in profiled.events() if kind_of(e.name)), key=lambda e: e.time_range.start)
        spent = [(e, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3) for e in events]
        steps.append(spent)
    usual = statistics.mode(len(spent) for spent in steps)
    table = defaultdict(float)
    for same in zip(*(spent for spent in steps if len(spent) == usual), strict=True):
        event, kind = same[0][0], kind_of(same[0][0].name)
        table[kind, side_of(event) if kind in KINDS[:4] else ""] += statistics.median(time for _, time in same)
    return dict(table)


def attention_kernel(step: Callable[[], None], device: torch.device) -> str:
    """The operation that attention was; on CUDA anything but a fused one is an error, since it would cost the speed."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    names = {event.name for event in profiled.events() if event.name.startswith(ATTENTION)}
    forward = sorted(name for name in names if not name.endswith("backward"))
    if device.type == "cuda" and not any(kind in " ".join(forward) for kind in ("flash", "efficient", "cudnn")):
        raise UserError(f"attention ran as {' '.join(forward) or 'nothing'}: none of CUDA's fused kernels took it")
    return " ".join(forward).replace("aten::_", "")


def side_of(event: torch.autograd.profiler_util.FunctionEvent) -> str:
    while event is not None:
        if "autograd::engine" in event.name or "Backward" in event.name:
            return "backward"
        event = event.cpu_parent
    return "forward"


def main(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    steps = {variant.name: make_step(args, variant, device) for variant in VARIANTS}
    matmul, copy = [matmul_rate(device)], [copy_rate(device)]
    times = {name: [] for name in steps}
    for _ in range(args.rounds):  # in turn, so that a noisy moment of the machine hits all alike
        for variant, step in steps.items():
            times[variant].append(seconds(step, device))
    matmul.append(matmul_rate(device))
    copy.append(copy_rate(device))
    medians = {variant: 1e3 * statistics.median(values) for variant, values in times.items()}
    table = where_time_goes(steps[DEFAULT], device, args.rounds)
    with torch.device("meta"):
        network = make_network(args)
    result = figures(args, device, network, medians, max(matmul), max(copy))
    if network.attends:
        result["attention"] = attention_kernel(steps[DEFAULT], device)
    print_tables(result, medians, table)
    result["variants_ms"] = {name: round(value, 2) for name, value in medians.items()}
    result["where_ms"] = {" ".join(key).strip(): round(value, 2) for key, value in table.items()}
    print(json.dumps(result))
    return 0


def figures(
    args: argparse.Namespace,
    device: torch.device,
    network: VelocityNetwork,  # on the meta device
    medians: dict[str, float],  # milliseconds by variant
    matmul: float,  # operations a second
    copy: float,  # bytes a second
) -> dict:
    flops = step_flops(network, args.batch_size, (args.latent_size,) * 2)
    plain, default = (medians[name] for name in (PLAIN, DEFAULT))
    result = {
        "device": device_name(device),
        "network": f"{type(network).__name__}, {len(network.blocks)} blocks",
        "shape": [args.batch_size, args.latent_channels, args.latent_size, args.latent_size],
        "parameters": count_parameters(network),
        "step_gflop": round(flops / 1e9, 2),
        "matmul_gflops": round(matmul / 1e9, 1),
        "plain_ms": round(plain, 2),
        "default_ms": round(default, 2),
        "ratio": round(plain / default, 3),
        "matmul_share": round(1e3 * flops / matmul / default, 4),
    }
    if not network.attends:
        moved = step_bytes(args, network)
        floor = 1e3 * (flops / matmul + moved / copy)
        result |= {"step_gb": round(moved / 1e9, 3), "copy_gb_s": round(copy / 1e9, 2)}
        result |= {"floor_ms": round(floor, 2), "floor_share": round(floor / default, 4)}
    if device.type == "cuda":
        result["peak_memory_gb"] = round(torch.cuda.max_memory_reserved(device) / 2**30, 3)
    return result


def print_tables(result: dict, medians: dict[str, float], table: dict[tuple[str, str], float]) -> None:
    print(f"{result['device']}; {result['network']}, {result['parameters'] / 1e6:.2f} M parameters, batch and latents "
          f"{' x '.join(map(str, result['shape']))}")  # fmt: skip
    print(f"a step: {result['step_gflop']:.0f} GFLOP at {result['matmul_gflops']:.0f} GFLOP/s (BF16 matrix multiply)")
    if "floor_ms" in result:
        print(f"and {result['step_gb']:.2f} GB at {result['copy_gb_s']:.1f} GB/s (copy): {result['floor_ms']:.0f} ms")
    if "attention" in result:
        print(f"attention: {result['attention']}")
    print()
    for name, median in medians.items():
        share = result["step_gflop"] / median / result["matmul_gflops"] * 1e3
        print(f"{name:36s}{median:9.1f} ms   {result['plain_ms'] / median:5.2f} x   {share:5.1%} of matmul rate")
    print(f"\nwhere the default's time goes{'':20s}ms   share")
    whole = sum(table.values())
    for (kind, side), spent in sorted(
        table.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1] != "forward")
    ):
        print(f"  {f'{kind}, {side}' if side else kind:44s}{spent:6.1f}   {spent / whole:5.1%}")
    if "peak_memory_gb" in result:
        print(f"peak memory of all variants together: {result['peak_memory_gb']} GB reserved")


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Time a training step, plain against default, and against the matmul rate.")
    parser.add_argument("--config", help="the network of this config, in place of an IsoNext of the sizes below")
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
