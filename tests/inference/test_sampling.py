"""sample.py: what it integrates, what it writes, and that one process and two write the same."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import CHECKPOINT, STUDIO, call, call_within, draw_styles, launch, refused, second_stage
from isonext.flow.base import Base
from isonext.flow.transfer import TransferSettings, sample
from isonext.inference import sampling
from isonext.inference.sampling import draw_noise
from isonext.pipeline import load_pipeline
from isonext.utils.io import folder_lock
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
    assert one.keys() == two.keys() == names | {"grid.png", "samples.npz", "samples.json"}
    assert all(one[name] == two[name] for name in names | {"grid.png", "samples.json"})
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
    assert first.keys() == {"cold_001.png", "cold_002.png", "warm_001.png", "warm_002.png", "grid.png", "samples.json"}
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
    place = torch.rand(1, generator=generator)
    how = TransferSettings(num_steps=3, cfg_scale=2.0, guidance="null", cfg_interval=config.inference.cfg_interval)
    style = torch.tensor([1])
    made = sample(pipeline, pipeline.base.sample(noise[None], place, style), style, how)
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
#                        What the folder holds, and who made it                 #
#################################################################################

TWO = ("--checkpoint", CHECKPOINT, "--num_steps", "2", "--num_samples_per_style", "2", "--output", "o")


@pytest.fixture
def made(within, studio):
    """A folder `o` of two samples a style; (a function that runs sample.py on it again, the folder)."""
    shutil.rmtree(studio / "o", ignore_errors=True)
    assert within("sample", *TWO)[0] == 0
    return lambda *flags: within("sample", *TWO, *flags), studio / "o"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--seed", "1"), "made with seed 0, not 1"),
        (("--num_steps", "3"), "made with num_steps 2, not 3"),
        (("--cfg_scale", "3"), "made with cfg_scale 1.5, not 3.0"),
        (("--precision", "fp32"), "made with precision bf16, not fp32"),
        (("--checkpoint", "checkpoints/stage1_epoch2.pt"), "made with checkpoint "),
    ],
)
def test_a_folder_of_other_settings_is_refused_and_stays(made, flags, words):
    again, folder = made
    before = files(folder)
    refused(again(*flags), "--output o: holds cold_001.png, ", words, "--overwrite")
    assert files(folder) == before


def test_the_styles_of_numbered_samples_are_part_of_what_made_them(within, studio):
    flags = ("--checkpoint", CHECKPOINT, "--num_steps", "2", "--output", "numbered", "--num_samples")
    assert within("sample", *flags, "1")[0] == 0
    assert within("sample", *flags, "3")[0] == 0, "more of the same"
    refused(within("sample", *flags, "3", "--styles", "warm"), "made with styles []", 'not ["warm"]')
    refused(within("sample", *flags[:-1]), "holds grid.png, made with styles [], not null")


def test_overwrite_makes_all_anew_and_a_killed_one_leaves_no_mixture(made, monkeypatch):
    again, folder = made
    first = files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "make_pictures", lambda *_: 1 / 0)
        assert again("--seed", "1", "--overwrite")[0] == 1
    assert files(folder).keys() == {"samples.json"}
    assert again("--seed", "1")[0] == 0, "goes on where it was"
    second = files(folder)
    assert second.keys() == first.keys() and all(second[name] != first[name] for name in first)
    refused(again("--num_samples_per_style", "1", "--overwrite"), "holds cold_002.png, made with seed 1, not 0")
    assert files(folder) == second


def test_pictures_of_unknown_settings_are_neither_kept_nor_written_over(made, studio):
    again, folder = made
    first = files(folder)
    (folder / "samples.json").unlink()
    Image.new("RGB", (9, 9)).save(folder / "holiday.png")
    refused(again(), "holds cold_001.png, and no record of what made it; give another folder, or --overwrite")
    (folder / "samples.json").write_text("{")
    refused(again(), "samples.json: damaged")
    (folder / "samples.json").unlink()
    assert again("--overwrite")[0] == 0
    assert {name: data for name, data in files(folder).items() if name != "holiday.png"} == first


def test_a_picture_of_another_size_is_named_and_packs_nothing(made):
    again, folder = made
    Image.new("RGB", (9, 7)).save(folder / "warm_002.png")
    refused(again("--npz"), "o/warm_002.png: is 9 x 7 pixels, but samples have 32 x 32; delete it")
    assert not (folder / "samples.npz").exists()
    (folder / "warm_002.png").unlink()
    assert again("--npz")[0] == 0
    with np.load(folder / "samples.npz") as stored:
        assert stored["arr_0"].shape == (4, 32, 32, 3) and stored["arr_1"].tolist() == [0, 0, 1, 1]


def test_a_packed_file_with_too_few_bytes_gets_no_name(made, monkeypatch):
    again, folder = made
    monkeypatch.setattr(sampling, "_pixels", lambda path, side: np.zeros((side, side - 1, 3), np.uint8))
    refused(again("--npz"), "o: the pictures could not be packed whole")
    assert not (folder / "samples.npz").exists()


def test_two_runs_at_once_in_one_folder_are_one_line(made):
    again, folder = made
    with folder_lock(folder):
        refused(again(), "o: is in use by another run")


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
    assert status == 1 and [path.name for path in (dit_folder / "done").glob("*.png")] == ["fits.png"]
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
        "samples.json",
    ]
    status, out, err = call_within(tmp_path, "sample", *flags, "--cfg_scale", "2")
    refused((status, out, err), "--cfg_scale 2", "has one style")


def test_a_checkpoint_of_stage_2_samples_by_its_teacher(studio, within):
    second = second_stage(studio / CHECKPOINT, studio / "checkpoints/stage2_sampled.pt")
    few = ("--num_samples", "2", "--styles", "warm", "--seed", "3")
    for name, checkpoint in (("one", CHECKPOINT), ("two", second)):
        status, out, err = within("sample", "--checkpoint", checkpoint, "--output", f"of_{name}", *few)
        assert status == 0, err
        assert "alf, 20 steps" in out
    for number in (1, 2):
        one, two = (studio / f"of_{name}/sample_0000{number}.png" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    (studio / "of_map.json").write_text('{"inference": {"method": "map"}}')
    flags = ("--checkpoint", second, "--output", "none", "--config", "of_map.json")
    refused(within("sample", *flags), "inference.method map changes pictures", "--method alf")
