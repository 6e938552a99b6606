"""What test_model.py checks on this machine: each line of it holds, or says FAIL."""

import copy
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isonext.flow.guidance import GuidedField
from isonext.flow.loss import flow_loss
from isonext.flow.solvers import LatticeState, leapfrog_leg, time_grid
from isonext.models.cost import footprint
from isonext.utils.device import autocast
from model import IsoNext, Recompute, count_parameters

STYLES = 2


class Checks:
    """Prints a line a check and remembers whether all held."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, what: str, holds: bool, detail: str = "") -> None:
        self.failed += not holds
        print(f"  {'ok  ' if holds else 'FAIL'}  {what}{': ' if detail else ''}{detail}")


def small_model(device: torch.device) -> IsoNext:
    """A small network whose head is not zero, so that it moves things."""
    torch.manual_seed(0)
    model = IsoNext(latent_channels=4, num_styles=STYLES, hidden_dim=64, num_layers=3, num_groups=8).to(device)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks memory_format


def random_batch(device: torch.device, count: int = 4, side: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, x1, t, style."""
    generator = torch.Generator().manual_seed(1)
    x0, x1 = torch.randn(2, count, 4, side, side, generator=generator).to(device)
    t, style = torch.rand(count, generator=generator), torch.arange(count) % STYLES
    return x0, x1, t.to(device), style.to(device)


def check_architecture(check: Checks, device: torch.device) -> None:
    with torch.device("meta"):
        full = IsoNext(latent_channels=4, num_styles=STYLES)
    check("the 8 GB network (D 384, N 12)", True, f"{count_parameters(full) / 1e6:.2f} M parameters")
    model = IsoNext(latent_channels=4, num_styles=STYLES, hidden_dim=64, num_layers=3, num_groups=8).to(device)
    t, style = torch.rand(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    for height, width in ((32, 32), (17, 40), (1, 1)):
        x = torch.randn(1, 4, height, width, device=device)
        v = model(x, t, style)
        check(f"latents 4 x {height} x {width} give a velocity of that size", v.shape == x.shape)
        check("the velocity is zero before training", bool((v == 0).all()))


def check_loss(check: Checks, device: torch.device) -> None:
    x0, x1 = torch.tensor([[[[1.0]]]], device=device), torch.tensor([[[[3.0]]]], device=device)
    t, style = torch.tensor([0.25], device=device), torch.tensor([0], device=device)
    # x_t = 0.75 * 1 + 0.25 * 3 = 1.5 and v = 3 - 1 = 2, so a model that says v = x_t is off by 0.5.
    one = flow_loss(lambda x, t, style: x, x0, x1, t, style).item()
    check("the loss of one number by hand", one == 0.25, f"{one} (expected 0.25)")
    model, batch = small_model(device), random_batch(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = flow_loss(model, *batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    check("the loss falls on one batch", losses[-1] < 0.7 * losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f}")


@torch.inference_mode()
def check_reversibility(check: Checks, device: torch.device) -> None:
    model, (_, x1, _, a) = small_model(device), random_batch(device)
    b, grid = (a + 1) % STYLES, time_grid(20)
    with autocast(device, True):
        start = LatticeState.at_picture(x1)
        in_a, in_b = GuidedField(model, a), GuidedField(model, b)
        base = leapfrog_leg([(in_a, grid[::-1])], start)
        back = leapfrog_leg([(in_a, grid)], base)
        structure = LatticeState(base.position, torch.zeros_like(base.position))
        moved = leapfrog_leg([(in_b, grid)], structure)
        again = leapfrog_leg([(in_b, grid[::-1])], moved)
        home = leapfrog_leg([(in_a, grid)], LatticeState(again.position, again.defect + base.defect))
        for name, end in (("picture -> structure -> picture", back), ("style a -> b -> a", home)):
            differing = int(end.position.ne(start.position).sum() + end.defect.ne(start.defect).sum())
            check(f"{name}, 20 steps, BF16 network, bit for bit", differing == 0, f"{differing} elements differ")
    check("style a -> b moves the picture", not torch.equal(moved.position, start.position))


#################################################################################
#                                Memory and speed                               #
#################################################################################


def check_memory(check: Checks, device: torch.device) -> None:
    def estimate(side: int, recompute: Recompute) -> float:
        network: dict[str, Any] = {"latent_channels": 4, "num_styles": STYLES, "hidden_dim": 384, "num_layers": 12}
        return footprint(functools.partial(IsoNext, **network), (4, side, side), True, True, recompute).peak(64) / 2**30

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        model = IsoNext(4, STYLES, recompute="full").to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks memory_format
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        shadow = copy.deepcopy(model)  # the EMA
        timed_step(model, optimizer, device, batch=64, side=64, bf16=True)()
        peak = torch.cuda.max_memory_reserved(device) / 2**30
        detail = f"measured peak {peak:.2f} GB, estimated {estimate(64, 'full'):.2f} GB"
        check("D 384, N 12, batch 64 at 512 px fits 8 GB", peak < 8, detail)
        del shadow
        return
    for side in (32, 64):
        sizes = [estimate(side, recompute) for recompute in ("selective", "full")]
        detail = f"{sizes[0]:.1f} GB, with gradient_checkpointing {sizes[1]:.1f} GB (estimated, not measured)"
        check(f"D 384, N 12, batch 64 at {8 * side} px on a GPU", min(sizes) < 8, detail)


def timed_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, batch: int, side: int, bf16: bool
) -> Callable[[], float]:
    """A function that does one training step and returns its seconds."""
    x0, x1, t, style = random_batch(device, batch, side)

    def network(x: Tensor, t: Tensor, style: Tensor) -> Tensor:
        with autocast(device, bf16):
            return model(x, t, style)

    def step() -> float:
        started = time.perf_counter()
        flow_loss(network, x0, x1, t, style).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return step


def check_speed(check: Checks, device: torch.device) -> None:
    steps = {}
    for name, layout, bf16 in (
        ("float32, NCHW", torch.contiguous_format, False),
        ("float32, channels_last", torch.channels_last, False),
        ("BF16, channels_last", torch.channels_last, True),
    ):
        model = IsoNext(4, STYLES, hidden_dim=128, num_layers=4).to(device, memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks memory_format
        steps[name] = timed_step(model, torch.optim.AdamW(model.parameters()), device, 8, 32, bf16)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(6):  # in turn, so that a noisy moment of the machine hits all alike; the first warms up
        for name, step in steps.items():
            times[name].append(step())
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    plain = medians["float32, NCHW"]
    for name, seconds in medians.items():
        print(f"        {name:24s}{seconds * 1e3:8.1f} ms a step   {plain / seconds:4.1f} x")
    print("        benchmarks/train_step.py adds torch.compile to this")


def run_checks(device: torch.device) -> int:
    """All checks in turn; 0, or 1 where one failed."""
    check = Checks()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__} on {device} ({name})")
    for title, part in (
        ("architecture", check_architecture),
        ("loss", check_loss),
        ("reversibility", check_reversibility),
        ("memory", check_memory),
        ("speed (D 128, N 4, batch 8, 32 x 32 latents, eager)", check_speed),
    ):
        print(title)
        part(check, device)
    print(f"{check.failed} checks failed" if check.failed else "all checks passed")
    return 1 if check.failed else 0
