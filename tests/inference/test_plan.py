"""What torch.compile is asked for, and what it is not."""

from types import SimpleNamespace

import pytest
import torch

from isonext.inference import plan
from isonext.inference.plan import CPU_RATE, GPU_RATE, compile_rule, is_worth_compiling
from isonext.models.cost import forward_flops
from model import IsoNext

TRAINED = {"training": {"compile": True}}
NETWORK = IsoNext(4, 2, hidden_dim=32, num_layers=2, num_groups=8)


def pipeline(device: str = "cpu") -> SimpleNamespace:
    return SimpleNamespace(model=NETWORK, device=torch.device(device), codec=SimpleNamespace(factor=8))


def fewest(rate: float) -> float:
    """Evaluations of 16 x 16 cells, a tenth of whose time are 45 seconds."""
    return 450 * rate / forward_flops(NETWORK, 1, (16, 16))


@pytest.mark.parametrize(("device", "rate"), [("cpu", 3 * CPU_RATE), ("cuda", GPU_RATE)])
@pytest.mark.parametrize("processes", [1, 4])
def test_a_tenth_of_the_time_that_a_process_would_take_must_make_up_for_compiling(monkeypatch, device, rate, processes):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(plan.distributed, "world", lambda: processes)
    least = processes * fewest(rate)
    assert not is_worth_compiling(TRAINED, pipeline(device), (16, 16), int(least * 0.999))
    assert is_worth_compiling(TRAINED, pipeline(device), (16, 16), int(least * 1.001))
    assert not is_worth_compiling(TRAINED, pipeline(device), (8, 16), int(least * 1.001)), "half the cells"
    assert not is_worth_compiling({"training": {"compile": False}}, pipeline(device), (16, 16), int(least * 9))


def test_auto_goes_by_the_size_and_what_full_batches_hold_and_on_and_off_by_nothing():
    pictures = int(fewest(CPU_RATE * torch.get_num_threads()) / 40) + 1
    auto = compile_rule("auto", TRAINED, pipeline(), 40)
    assert auto((121, 128), pictures) and not auto((120, 128), pictures)  # 16 x 16 cells; 16 x 15
    assert not auto((128, 128), pictures - 2) and not auto((4096, 4096), 0)
    assert compile_rule("on", {"training": {"compile": False}}, pipeline(), 40)((8, 8), 0)
    assert not compile_rule("off", TRAINED, pipeline(), 40)((128, 128), 9 * pictures)
