"""The estimates of cost.py against what the CPU's allocator did in a real step, by PyTorch's profiler."""

import gc
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from isonext.models.cost import Footprint, call_bytes, footprint, forward_flops, step_flops
from isonext.models.dit import DiT
from model import DepthwiseConv, IsoNext

SIZES = {
    "small": {"latent_channels": 4, "hidden_dim": 32, "num_layers": 2, "num_groups": 8, "kernel_size": 5},
    "deep": {"latent_channels": 12, "hidden_dim": 64, "num_layers": 6, "style_dim": 32, "time_dim": 32},
    "wide": {"latent_channels": 4, "hidden_dim": 160, "num_layers": 3, "expansion": 2},
}


def measured_peak(model: IsoNext, side: int, pictures: int, bf16: bool, channels_last: bool) -> int:
    """Bytes that the allocator had given out at most in the second micro-batch of a step, beside the state."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)

    def micro_batch() -> None:
        shape = (pictures, model.stem.in_channels, side, side)
        x0, x1 = (torch.zeros(shape).contiguous(memory_format=layout) for _ in range(2))
        t, style = torch.rand(pictures), torch.zeros(pictures, dtype=torch.int64)
        xt = torch.lerp(x0, x1, t[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            v = model(xt, t, style)
        (v - (x1 - x0)).square().flatten(1).mean(1).mean().backward()

    micro_batch()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        micro_batch()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most > now == 0  # all that was given out came back
    return most


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("bf16", "channels_last"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize(("name", "side", "pictures"), [("small", 16, 6), ("deep", 8, 16), ("wide", 24, 3)])
def test_the_estimate_is_what_a_real_step_takes(name, side, pictures, bf16, channels_last, recompute):
    network = SIZES[name] | {"num_styles": 2}
    model = IsoNext(**network, recompute=recompute)
    estimate = footprint(
        partial(IsoNext, **network), (network["latent_channels"], side, side), bf16, channels_last, recompute
    )
    assert estimate.state == sum(5 * 4 * parameter.numel() for parameter in model.parameters())
    expected = measured_peak(model, side, pictures, bf16, channels_last)
    assert estimate.peak(pictures) - estimate.state == pytest.approx(expected, rel=0.15)


def test_a_network_that_is_not_on_a_cpu_takes_as_much(monkeypatch):
    """The depthwise convolution has a gradient of its own on a CPU; elsewhere PyTorch's saves as many bytes."""
    network = SIZES["deep"] | {"num_styles": 2}
    for recompute in ("none", "selective", "full"):
        own = footprint(partial(IsoNext, **network), (12, 16, 16), True, True, recompute)
        with monkeypatch.context() as patch:
            patch.setattr(DepthwiseConv, "forward", torch.nn.Conv2d.forward)
            plain = footprint(partial(IsoNext, **network), (12, 16, 16), True, True, recompute)
        assert own.picture == pytest.approx(plain.picture, rel=0.02)


def test_counting_neither_takes_memory_nor_draws_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    network = partial(IsoNext, latent_channels=4, num_styles=2, hidden_dim=1024, num_layers=4)
    huge = footprint(network, (4, 512, 512), True, True, "selective")
    assert huge.peak(64) > 2**40  # 1 TiB, which this machine does not have
    assert torch.equal(torch.rand(1), expected)


def test_the_largest_micro_batch_is_the_last_whose_peak_fits():
    line = Footprint(parameters=0, state=100, fixed=20, picture=30)
    assert [line.largest(limit) for limit in (0, 119, 149, 150, 179, 180, 421)] == [0, 0, 0, 1, 1, 2, 10]
    assert all(line.peak(line.largest(limit)) <= limit < line.peak(line.largest(limit) + 1) for limit in (150, 400))


def test_the_operations_of_a_step_are_those_counted_by_hand():
    # One cell: stem and head 9 * 2 * 8 = 144 multiply-adds each, a block 25 * 8 + 2 * 3 * 64 = 584, two of them.
    with torch.device("meta"):
        network = IsoNext(2, 3, hidden_dim=8, num_layers=2, kernel_size=5, num_groups=4, expansion=3)
    assert step_flops(network, 5, (4, 4)) == 2 * 5 * 16 * (3 * (288 + 2 * 584) - 144)
    assert forward_flops(network, 5, (4, 4)) == 2 * 5 * 16 * (288 + 2 * 584)
    again = step_flops(network, 5, (4, 4), recompute=True)
    assert again == 2 * 5 * 16 * (3 * 288 - 144 + 4 * 2 * 584)


def test_a_call_takes_its_input_and_what_is_held_at_once_counted_by_hand():
    x = 4 * 2 * 3 * 8 * 8
    assert call_bytes(lambda: torch.relu, (2, 3, 8, 8)) == 2 * x
    assert (
        call_bytes(lambda: lambda t: t.relu().neg().abs(), (2, 3, 8, 8)) == 3 * x
    )  # each only until the next is there
    weights = torch.nn.Conv2d(3, 5, 2, stride=2)
    assert call_bytes(lambda: weights, (2, 3, 8, 8)) == x + 4 * 2 * 5 * 4 * 4, "real weights do not count"
    assert call_bytes(lambda: torch.nn.Conv2d(3, 5, 2, stride=2), (2, 3, 8, 8)) == x + 4 * 2 * 5 * 4 * 4


def test_group_norm_is_float32_as_on_a_card():
    def norm(x):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.group_norm(x.bfloat16(), 1)

    # in BF16: x, its copy of 2 bytes, the norm's input in float32, and its result
    assert call_bytes(lambda: norm, (2, 3, 8, 8)) == pytest.approx((4 + 2 + 4 + 4) * 384, abs=64)  # and its statistics


def test_a_gpu_keeps_attention_in_bf16_and_a_cpu_in_float32():
    dit = {"hidden_dim": 64, "num_layers": 1, "num_heads": 4, "patch_size": 1, "time_dim": 16}
    network = partial(DiT, size=(16, 16), latent_channels=2, num_styles=2, **dit)
    cpu, gpu = (footprint(network, (2, 16, 16), True, False, "none", on_cpu=on_cpu).picture for on_cpu in (True, False))
    in_float32 = [footprint(network, (2, 16, 16), False, False, "none", on_cpu).picture for on_cpu in (True, False)]
    numbers = 256 * 64  # of q, k, v or the result, of one picture: two bytes less for what is kept of v and the result
    assert cpu - gpu >= 2 * 2 * numbers and in_float32[0] == in_float32[1]
