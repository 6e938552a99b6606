"""sample.py: what it integrates, what it writes, and that one process and two write the same."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import CHECKPOINT, STUDIO, call, call_within, draw_styles, launch, refused
from isonext.flow.base import Base
from isonext.flow.transfer import TransferSettings, sample
from isonext.inference import sampling
from isonext.inference.sampling import draw_noise
from isonext.pipeline import load_pipeline
from isonext.utils.seeding import seeded

DIT = STUDIO | {
    "model": {"type": "dit", "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "time_dim": 16},
    "training": STUDIO["training"] | {"num_workers": 0},
    "data": {"image_size": 8, "val_fraction": 0.2, "flip": False},  # too small for the judge, which takes long
    "autoencoder": {"name": "dct:f1c3"},
}


class Slope:
    """v = slopes[style] * t + x * 0: from x0 to x0 + slope / 2 at t = 1."""

    null_style = 2

    def __init__(self, slopes):
        self.slopes = torch.tensor(slopes)

    def __call__(self, x, t, style):
        return (self.slopes[style] * t).view(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize("method", ["alf", "midpoint", "heun", "rk4"])
def test_a_sample_ends_where_the_guided_flow_leads(method):
    x0, style = torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 2])
    settings = TransferSettings(method=method, num_steps=4, cfg_scale=3.0)
    latents = sample(Slope([1.0, 4.0, -2.0]), x0, style, settings)
    # v_style + 2 (v_style - v_null), integrated: (1 + 2 * 3) / 2, (4 + 2 * 6) / 2, and the null style by itself
    assert torch.allclose(latents - x0, torch.tensor([3.5, 8.0, -1.0]).view(3, 1, 1, 1).expand_as(x0), atol=1e-4)


def test_guidance_keeps_to_its_interval_and_the_grid_is_shifted():
    seen = []

    def model(x, t, style):
        seen.append((round(t[0].item(), 6), len(x)))
        return torch.zeros_like(x)

    model.null_style = 1
    how = TransferSettings(method="euler", num_steps=4, cfg_scale=2.0, cfg_interval=(0.3, 1.0), time_shift=3.0)
    sample(model, torch.zeros(1, 1, 2, 2), torch.tensor([0]), how)
    # u = 0, 1/4, 1/2, 3/4 become 3 u / (1 + 2 u); where guidance begins there is a time of its own
    assert seen == [(0.0, 1), (0.3, 2), (0.5, 2), (0.75, 2), (0.9, 2)]


def test_a_sample_has_noise_of_its_own():
    class Some:
        base = Base()

        class spec:
            channels, space = 3, (2, 2)

    both, _ = draw_noise(Some, 7, [5, 6])
    assert torch.equal(both[1], draw_noise(Some, 7, [6])[0][0]) and not torch.equal(both[0], both[1])
    assert torch.equal(both[0], torch.randn(3, 2, 2, generator=seeded(7, "sample", 5)))
    assert not torch.equal(both, draw_noise(Some, 8, [5, 6])[0])


#################################################################################
#                                   The command                                 #
#################################################################################


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    """Where a user has trained a DiT on two styles, by the commands."""
    folder = tmp_path_factory.mktemp("dit")
    draw_styles(folder / "raw_data", 16)
    (folder / "config.json").write_text(json.dumps(DIT))
    for command in ("preprocess_latents", "train"):
        status, _, err = call_within(folder, command)
        assert status == 0, err
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_process_and_two_write_the_same_bytes(dit_folder):
    flags = ("--checkpoint", CHECKPOINT, "--num_samples", "7", "--batch_size", "2", "--num_steps", "3", "--npz")
    alone = call(dit_folder, "sample.py", *flags, "--output", "alone")
    together = launch(dit_folder, "sample.py", *flags, "--output", "together")
    assert (alone.returncode, together.returncode) == (0, 0), alone.stderr + together.stderr
    one, two = files(dit_folder / "alone"), files(dit_folder / "together")
    names = {f"sample_{number:05}.png" for number in range(1, 8)}
    assert one.keys() == two.keys() == names | {"grid.png", "samples.npz"}
    assert all(one[name] == two[name] for name in names | {"grid.png"})
    assert len({one[name] for name in names}) == 7
    with np.load(dit_folder / "together" / "samples.npz") as stored:
        pictures = [np.asarray(Image.open(dit_folder / "alone" / name)) for name in sorted(names)]
        assert np.array_equal(stored["arr_0"], np.stack(pictures)) and stored["arr_0"].dtype == np.uint8
        assert stored["arr_1"].tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_samples_by_style_a_second_run_and_a_subset(within, studio):
    flags = ("--checkpoint", CHECKPOINT, "--num_steps", "2", "--batch_size", "3", "--output")
    status, out, _ = within("sample", *flags, "s", "--num_samples_per_style", "2")
    assert status == 0 and "4 made" in out
    first = files(studio / "s")
    assert first.keys() == {"cold_001.png", "cold_002.png", "warm_001.png", "warm_002.png", "grid.png"}
    (studio / "s" / "warm_002.png").unlink()
    status, out, _ = within("sample", *flags, "s", "--num_samples_per_style", "2")
    assert status == 0 and "1 made" in out and "3 were there already" in out
    assert files(studio / "s") == first
    status, out, _ = within("sample", *flags, "t", "--num_samples_per_style", "1", "--styles", "warm")
    assert status == 0 and (studio / "t" / "warm_001.png").read_bytes() != first["cold_001.png"]
    ours, theirs = (np.asarray(Image.open(studio / name / "warm_001.png")).astype(int) for name in "st")
    assert abs(ours - theirs).max() <= 1  # the same noise, in a batch of another size


@pytest.mark.parametrize(("each", "compiled"), [("47", False), ("51", True)])  # 88 and 96 in full batches
def test_auto_compiles_for_as_many_pictures_as_there_are_of_all_styles(within, monkeypatch, each, compiled):
    asked = []
    monkeypatch.setattr(sampling, "compile_where_it_pays", lambda pipeline, asked_for, pays: asked.append(pays))
    monkeypatch.setattr(sampling, "is_worth_compiling", lambda trained, pipeline, space, count: count >= 96 * 3)
    monkeypatch.setattr(sampling, "sample_batches", lambda *_: 0)
    monkeypatch.setattr(sampling, "draw_sheet", lambda *_: Image.new("RGB", (8, 8)))
    flags = ("--checkpoint", CHECKPOINT, "--output", "none", "--num_samples_per_style", each, "--num_steps", "3")
    assert within("sample", *flags)[0] == 0
    assert asked == [compiled]


def test_it_makes_what_the_flow_makes(within, studio):
    """The picture is the checkpoint's flow from the noise of number 1 (place 0 of style 1), decoded."""
    flags = ("--checkpoint", CHECKPOINT, "--num_steps", "3", "--cfg_scale", "2", "--output", "u", "--styles", "warm")
    assert within("sample", *flags, "--num_samples_per_style", "1", "--seed", "4", "--precision", "fp32")[0] == 0
    pipeline, config = load_pipeline(studio / CHECKPOINT, torch.device("cpu"))
    pipeline.bf16 = False
    noise = torch.randn(12, 8, 8, generator=(generator := seeded(4, "sample", 1)))
    layout = torch.randn(pipeline.base.layout_numbers, generator=generator)
    how = TransferSettings(num_steps=3, cfg_scale=2.0, guidance="null", cfg_interval=config.inference.cfg_interval)
    style = torch.tensor([1])
    made = sample(pipeline, pipeline.base.sample(noise[None], layout[None], style), style, how)
    expected = pipeline.decode(made, 32, 32)[0].clamp(-1, 1).add(1).mul(127.5).round().permute(1, 2, 0)
    assert np.array_equal(np.asarray(Image.open(studio / "u" / "warm_001.png")), expected.numpy().astype(np.uint8))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--styles", "warm", "tepid"), ("style 'tepid' does not exist", "0 = cold, 1 = warm")),
        (("--styles", "1", "warm"), ("names a style twice",)),
        (("--num_samples", "0"), ("--num_samples 0", "1 or more")),
        (("--num_steps", "0"), ("inference.num_steps",)),
        (("--config", "flowedit.json"), ("flowedit", "--method alf")),
        (("--output", "config.json"), ("config.json", "is a file")),
    ],
)
def test_bad_flags_are_one_line(within, studio, flags, words):
    (studio / "flowedit.json").write_text('{"inference": {"method": "flowedit"}}')
    refused(within("sample", "--checkpoint", CHECKPOINT, "--output", "refused", *flags), *words)
    assert not (studio / "refused").exists()


#################################################################################
#                          A DiT in the everyday commands                       #
#################################################################################


def test_a_dit_transfers_and_certifies(dit_folder):
    flags = ("--checkpoint", CHECKPOINT, "--source_style", "cold", "--target_style", "warm", "--num_steps", "4")
    flags += ("--input", "tile.png", "--output", "x.png", "--certify")
    Image.open(dit_folder / "raw_data" / "cold" / "000.png").resize((8, 8)).save(dit_folder / "tile.png")
    status, out, err = call_within(dit_folder, "inference", *flags)
    assert status == 0 and "certificate: exact (0 of 192 elements differ)" in out, err


def test_a_dit_names_and_skips_pictures_of_another_size(dit_folder):
    (dit_folder / "some").mkdir()
    for name, size in (("wide", (12, 8)), ("fits", (8, 8))):
        Image.new("RGB", size, "red").save(dit_folder / "some" / f"{name}.png")
    flags = ("--checkpoint", CHECKPOINT, "--source_style", "0", "--target_style", "1", "--num_steps", "2")
    status, out, err = call_within(dit_folder, "inference", *flags, "--input", "some", "--output", "done")
    assert status == 1 and [path.name for path in (dit_folder / "done").iterdir()] == ["fits.png"]
    assert "skipped: some/wide.png: is 12 x 8 pixels" in out and "takes 8 x 8 alone" in out
    status, out, err = call_within(dit_folder, "inference", *flags, "--input", "some/wide.png", "--output", "wide.png")
    refused((status, out, err), "some/wide.png: is 12 x 8 pixels", "--size 8")


def test_a_dit_has_a_plan_and_goes_on_where_it_was(dit_folder):
    status, out, err = call_within(dit_folder, "train", "--plan", "--vram", "8")
    assert status == 0 and out.startswith("dit, D 16, N 2"), err
    status, out, err = call_within(dit_folder, "train", "--resume", "--set", "training.stage1_epochs=5")
    assert status == 0 and "resumed from" in out, err
    assert (dit_folder / "checkpoints" / "stage1_epoch5.pt").exists()


def test_a_dit_of_one_style_is_unconditional(tmp_path):
    draw_styles(tmp_path / "both", 16)
    (tmp_path / "both" / "cold").rename(tmp_path / "raw_data")
    (tmp_path / "raw_data" / "faces").mkdir()
    for path in (tmp_path / "raw_data").glob("*.png"):
        path.rename(tmp_path / "raw_data" / "faces" / path.name)
    training = DIT["training"] | {"stage1_epochs": 1}
    (tmp_path / "config.json").write_text(json.dumps(DIT | {"training": training}))
    for command in ("preprocess_latents", "train"):
        status, _, err = call_within(tmp_path, command)
        assert status == 0, err
    flags = ("--checkpoint", "checkpoints/stage1_epoch1.pt", "--num_samples_per_style", "3", "--output", "out")
    status, out, err = call_within(tmp_path, "sample", *flags)
    assert status == 0 and "no guidance" in out, err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"faces_00{n}.png" for n in (1, 2, 3)),
        "grid.png",
    ]
    status, out, err = call_within(tmp_path, "sample", *flags, "--cfg_scale", "2")
    refused((status, out, err), "--cfg_scale 2", "has one style")
