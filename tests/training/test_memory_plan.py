"""What `auto` comes to, and what `train.py --plan` prints."""

import dataclasses
import math
import re

import pytest
import torch

from helpers import call, refused
from isonext.checkpoint import build_model, network_of
from isonext.config import TrainingConfig
from isonext.data.autoencoder import load_autoencoder
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.models.cost import Footprint, call_bytes, step_flops
from isonext.training import memory_plan
from isonext.training.memory_plan import (
    MicroBatch,
    choose_micro_batch,
    count_needs,
    describe_reduction,
    equal_pieces,
    print_plan,
    refuse_too_large,
)
from model import count_parameters
from small_vaes import save_small

NONE = Footprint(parameters=0, state=0, fixed=0, picture=20)
SELECTIVE = Footprint(parameters=0, state=0, fixed=0, picture=10)
FULL = Footprint(parameters=0, state=0, fixed=0, picture=2)


def needs(recompute: str) -> Footprint:
    return {"none": NONE, "selective": SELECTIVE, "full": FULL}[recompute]


@pytest.mark.parametrize(
    ("micro", "recompute", "share", "limit", "chosen"),
    [
        ("auto", "auto", 64, 1280, MicroBatch(64, "none")),  # all of it fits
        ("auto", "auto", 64, 1279, MicroBatch(64, "selective")),
        (16, False, 64, 320, MicroBatch(16, "none")),
        ("auto", "auto", 64, 90, MicroBatch(8, "selective")),  # 9 fit: enough
        ("auto", "auto", 64, 80, MicroBatch(8, "selective")),
        ("auto", "auto", 64, 79, MicroBatch(32, "full")),  # 7 fit: too few; 39 with blocks recomputed
        ("auto", "auto", 4, 45, MicroBatch(4, "selective")),  # few, but all there are
        ("auto", "auto", 64, 1, MicroBatch(1, "full")),  # nothing fits: the step itself will tell
        ("auto", False, 64, 79, MicroBatch(4, "selective")),
        ("auto", True, 64, 1000, MicroBatch(64, "full")),
        (16, "auto", 64, 160, MicroBatch(16, "selective")),
        (16, "auto", 64, 159, MicroBatch(16, "full")),
        (2, "auto", 64, 20, MicroBatch(2, "selective")),
        (100, "auto", 64, 640, MicroBatch(64, "selective")),
        (None, "auto", 64, 639, MicroBatch(64, "full")),
        (None, False, 64, 1, MicroBatch(64, "selective")),  # said, so done
        (16, True, 64, 1, MicroBatch(16, "full")),
    ],
)
def test_the_rule_of_auto(micro, recompute, share, limit, chosen):
    training = TrainingConfig(micro_batch_size=micro, gradient_checkpointing=recompute)
    assert choose_micro_batch(training, share, limit, needs) == chosen


def test_nothing_is_counted_where_nothing_is_left_to_choose():
    training = TrainingConfig(micro_batch_size=4, gradient_checkpointing=True)
    assert choose_micro_batch(training, 64, 0, lambda recompute: pytest.fail("counted")) == MicroBatch(4, "full")


@pytest.mark.parametrize(
    ("share", "most", "size"), [(64, 64, 64), (64, 500, 64), (64, 63, 32), (64, 23, 16), (64, 1, 1), (64, 0, 1),
                                (61, 30, 21), (60, 29, 20), (7, 3, 3), (1, 1, 1)]
)  # fmt: skip
def test_pieces_are_equal_where_there_need_not_be_twice_as_many(share, most, size):
    assert equal_pieces(share, most) == size


@pytest.mark.parametrize("share", range(1, 40))
def test_pieces_never_exceed_what_fits_nor_are_twice_as_many_as_needed(share):
    for most in range(1, 45):
        size = equal_pieces(share, most)
        assert 1 <= size <= most and math.ceil(share / size) < 2 * math.ceil(share / most)


def test_what_is_tried_after_running_out_of_memory():
    auto, fixed = TrainingConfig(), TrainingConfig(gradient_checkpointing=False)
    tried = [MicroBatch(9, "none")]
    while smaller := tried[-1].smaller(auto):
        tried.append(smaller)
    assert tried == [
        MicroBatch(9, "none"),
        *(MicroBatch(n, "selective") for n in (9, 5, 3, 2, 1)),
        MicroBatch(1, "full"),
    ]
    assert MicroBatch(1, "full").smaller(auto) is None and MicroBatch(1, "selective").smaller(fixed) is None
    assert MicroBatch(2, "full").smaller(TrainingConfig(gradient_checkpointing=True)) == MicroBatch(1, "full")


def test_only_what_auto_has_cut_is_said():
    assert describe_reduction(TrainingConfig(), MicroBatch(64, "selective"), 64) == ""
    assert (
        describe_reduction(TrainingConfig(), MicroBatch(16, "full"), 64)
        == ", 16 pictures at once, blocks recomputed backwards"
    )
    assert (
        describe_reduction(TrainingConfig(micro_batch_size=16, gradient_checkpointing=True), MicroBatch(16, "full"), 64)
        == ""
    )


#################################################################################
#                                    --plan                                     #
#################################################################################


@pytest.fixture
def printed(store, make_config, capsys):
    """A function: (config changes, GiB) -> the lines of the plan."""

    def lines(changes: dict | None = None, vram: float | None = 8.0) -> list[str]:
        print_plan(make_config(store, changes), vram)
        return capsys.readouterr().out.splitlines()

    return lines


def test_the_plan_of_a_store_has_its_figures(store, make_config, printed, monkeypatch):
    monkeypatch.setattr(memory_plan, "read_latent", lambda path: pytest.fail("read a latent"), raising=False)
    config, lines = make_config(store), printed()
    meta = memory_plan.read_meta(store / "latents")
    network = build_model(config, meta.latents)
    parameters = count_parameters(network)
    assert lines[0].startswith("isonext, D 16, N 1, BF16; latents 12 x 4 x 4 of 2 styles, from ")
    assert lines[1].split() == ["parameters", f"{parameters / 1e6:.2f}", "M"]
    assert "40 with mirrored ones" in lines[2] and f"{4 * 40 * 12 * 16 / 2**30:.3g} GiB" in lines[2]
    flops = [step_flops(network, 4, (4, 4), recompute) / 1e12 for recompute in (False, False, True)]
    table = dict(re.match(r"(\S.*?)  +(.*)", line).groups() for line in lines[4:9])
    assert lines[4].split() == ["recomputed", "backwards", "none", "selective", "full"]
    assert re.findall(r"(\S+) TFLOP", table["operations a step of 4"]) == [f"{value:.3g}" for value in flops]
    assert table["most at once in 8 GiB"].split() == ["4", "4", "4"]
    flags = "--set training.micro_batch_size=4 --set training.gradient_checkpointing=false"
    assert lines[-1] == f"for 8 GiB: {flags}"


def test_what_is_beside_the_steps_has_its_figures_too(store, make_config, printed, tmp_path, monkeypatch):
    """Through dct nothing is held but pixels (3 x 16 x 16) and latents (12 x 4 x 4): 960 floats a picture."""
    monkeypatch.setattr(memory_plan, "GIB", 2**10)
    legs = {}

    def count(make, shape):
        legs[shape] = call_bytes(make, shape)
        return legs[shape]

    monkeypatch.setattr(memory_plan, "call_bytes", count)
    lines = printed(vram=1e5)
    place = lines.index("beside the steps              peak memory")
    parameters = count_parameters(build_model(make_config(store), memory_plan.read_meta(store / "latents").latents))
    kernels = 2 * 12 * 3 * 4 * 4  # dct's
    assert set(legs) == {(16, 3, 16, 16), (8, 3, 16, 16), (16, 12, 4, 4), (8, 12, 4, 4), (32, 12, 4, 4)}
    assert legs[(16, 3, 16, 16)] == 2 * legs[(8, 3, 16, 16)] == 4 * 16 * 960 < legs[(16, 12, 4, 4)]
    assert lines[place + 1 : place + 5] == [
        f"preprocessing, 16 at once     {4 * (kernels + 16 * 960) / 2**10:.2f} GiB",
        f"validation, 16 at once        {(20 * parameters + 4 * kernels + legs[(32, 12, 4, 4)]) / 2**10:.2f} GiB",
        f"inference, 8 at once          {(4 * parameters + 4 * kernels + legs[(16, 12, 4, 4)]) / 2**10:.2f} GiB",
        "",
    ]


def test_an_autoencoder_that_is_not_there_is_neither_fetched_nor_guessed(tmp_path, printed):
    changes = {"autoencoder.name": "some/vae", "data.image_size": 64, "data.data_root": str(tmp_path / "none")}
    lines = printed(changes)
    place = lines.index("beside the steps              peak memory")
    assert lines[place + 1] == "preprocessing, 16 at once     unknown"
    assert all(line.endswith(" GiB and the autoencoder's") for line in lines[place + 2 : place + 4])
    reason = "autoencoder some/vae: no such local folder, and not in the cache"
    assert lines[place + 4] == f"what the autoencoder takes is unknown: {reason}"


@pytest.mark.parametrize("short", [False, True])
def test_a_small_card_gets_the_flags_that_fit_it(store, make_config, printed, short):
    deep = {"model.num_layers": 8}  # of few blocks, recomputing saves nothing
    spec = memory_plan.read_meta(store / "latents").latents
    needs = count_needs(network_of(make_config(store, deep), spec), spec, True, True)
    limit = needs("full").peak(2 if short else 4) * 1.0001
    vram = (limit / memory_plan.USABLE + memory_plan.CONTEXT) / memory_plan.GIB
    asked = {"training.micro_batch_size": 3, "training.gradient_checkpointing": False}
    chosen = choose_micro_batch(TrainingConfig(), 4, limit, needs)
    assert chosen == MicroBatch(2 if short else 4, "full")
    assert printed(asked | deep, vram)[-1].endswith(
        f"--set training.micro_batch_size={chosen.pictures} --set training.gradient_checkpointing=true"
    )


def test_a_card_too_small_for_one_picture_is_told_so(printed):
    assert printed(vram=0.5)[-1].startswith("not one picture fits 0.5 GiB: lower model.hidden_dim")


def test_by_default_the_card_is_the_one_that_is_there_and_8_gib_where_there_is_none(printed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert printed(vram=None)[-1].startswith("for 8 GiB: ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**30, 24 * 2**30))
    monkeypatch.setattr(memory_plan, "has_bf16", lambda device: False)
    lines = printed(vram=None)
    assert lines[-1].startswith("for 24 GiB: ") and "float32" in lines[0]


@pytest.mark.parametrize(
    ("changes", "latents"),
    [
        ({"autoencoder.name": "dct:f4c12"}, "12 x 4 x 4 of 2 styles"),
        ({"autoencoder.name": "some/vae", "data.image_size": 64}, "4 x 8 x 8 of 2 styles"),
        ({"autoencoder.name": "some/vae", "data.image_size": 64, "model.latent_channels": 16}, "16 x 8 x 8 of 2"),
        ({"model.num_styles": 5}, "of 5 styles"),
    ],
)
def test_without_a_store_the_config_is_counted_and_the_plan_says_so(tmp_path, printed, changes, latents):
    lines = printed(changes | {"data.data_root": str(tmp_path / "none")})
    assert latents in lines[0] and "no store at" in lines[0] and "preprocess_latents.py" in lines[0]
    assert not (tmp_path / "none").exists() and "--set" in lines[-1]


@pytest.mark.parametrize(
    ("name", "side", "latents"),
    [
        ("DC", 512, "8 x 128 x 128"),
        ("Flux2", 512, "12 x 64 x 64"),
        ("Wan", 1024, "4 x 256 x 256"),
        ("RAE", 32, "64 x 4 x 4"),
    ],
)
def test_an_autoencoder_on_this_machine_says_its_latents_and_what_it_takes(
    tmp_path, printed, monkeypatch, name, side, latents
):
    monkeypatch.setattr(memory_plan, "GIB", 2**10)
    changes = {"autoencoder.name": str(save_small(name, tmp_path / "vae")), "data.image_size": side}
    lines = printed(changes | {"data.data_root": str(tmp_path / "none")}, vram=1e5)
    assert f"latents {latents} of 2 styles" in lines[0]
    codec = load_autoencoder(changes["autoencoder.name"], torch.device("cpu"))
    codec.bf16_encode = True
    weights = 4 * sum(tensor.numel() for tensor in (*codec.parameters(), *codec.buffers()))
    encoding = (weights + call_bytes(lambda: codec.encode, (16, 3, side, side))) / 2**10
    said = next(line for line in lines if line.startswith("preprocessing, 16 at once"))
    assert float(said.split()[-2]) == pytest.approx(encoding, rel=0.01, abs=0.011)
    assert not any("unknown" in line for line in lines)


def test_a_store_that_is_not_finished_is_planned_with_and_said_to_be(store, printed):
    meta = memory_plan.read_meta(store / "latents")
    dataclasses.replace(meta, complete=False).write(store / "latents")
    assert "has not finished" in printed()[0]


def test_the_command_plans_and_touches_nothing(studio):
    before = {path: path.stat().st_mtime_ns for path in studio.rglob("*")}
    done = call(studio, "train.py", "--plan", "--vram", "8", "--set", "checkpoint.save_dir=new")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("for 8 GiB: --set training.micro_batch_size=8 ")
    assert {path: path.stat().st_mtime_ns for path in studio.rglob("*")} == before


@pytest.mark.parametrize("vram", ["0", "-1", "nan", "inf"])
def test_memory_that_no_card_has_is_refused_in_one_line(within, vram):
    refused(within("train", "--plan", "--vram", vram), "--vram", "GiB", "above 0")


def test_vram_without_plan_and_a_config_that_contradicts_the_store_are_refused(within):
    refused(within("train", "--vram", "8"), "--vram", "--plan")
    refused(within("train", "--plan", "--set", "model.latent_channels=4"), "latent_channels = 4", "12")


def test_a_network_that_the_memory_does_not_hold_is_refused_before_it_is_made(make_config, tmp_path):
    spec = LatentSpec("dct:f4c12", 12, 4, 16, ["ink", "oil"])
    network = network_of(make_config(tmp_path), spec)
    held = 4 * 5 * sum(parameter.numel() for parameter in network().parameters())  # gradients, moments, average
    refuse_too_large(network, held)
    with pytest.raises(UserError, match=r"GiB are free; lower model\.hidden_dim"):
        refuse_too_large(network, held - 1)
