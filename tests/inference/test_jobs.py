"""Transfers as commands: what is certified, kept, restored, interpolated, bounded, and what is refused."""

import errno
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import CHECKPOINT, call, refused, second_stage
from isonext.checkpoint import load_checkpoint
from isonext.data import images
from isonext.errors import first_line
from isonext.evaluation.metrics import ssim
from isonext.flow.solvers import LATTICE
from isonext.inference import jobs, plan, structure_file
from isonext.pipeline import Pipeline, load_pipeline
from isonext.utils.io import folder_lock, written_whole

FROM_COLD = ("--checkpoint", CHECKPOINT, "--source_style", "cold")
TO_WARM = (*FROM_COLD, "--target_style", "warm")
PICTURE = "raw_data/cold/003.png"


@pytest.fixture
def infer(within):
    """Run inference.py in the studio: returns (status, stdout, stderr)."""
    return lambda *flags: within("inference", *flags)


@pytest.fixture
def pipeline(studio):
    return load_pipeline(studio / CHECKPOINT, torch.device("cpu"))[0]


def out_of(result: tuple[int, str, str], status: int = 0) -> str:
    """The stdout of a command that ended with `status`."""
    assert result[0] == status, result
    return result[1]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def same(one: Path, other: Path) -> bool:
    return np.array_equal(pixels(one), pixels(other))


def sha256_in(out: str) -> str:
    exact = r"^certificate: exact \(0 of \d+ elements differ\)(?:, with the defects .* rms\))?, sha256 ([0-9a-f]{64})$"
    return re.search(exact, out, re.MULTILINE)[1]


def on_lattice(pipeline: Pipeline, path: Path) -> torch.Tensor:
    """The latents of a picture as integers: what a transfer starts from."""
    latents = pipeline.encode(images.to_pixels(images.to_bytes(images.open_picture(path)))[None])
    return (latents.double() / LATTICE).round().long()


def sha256_of(pipeline: Pipeline, *paths: Path) -> str:
    hashes = sorted({hashlib.sha256(on_lattice(pipeline, path).numpy().tobytes()).hexdigest() for path in paths})
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def codecs_own(pipeline: Pipeline, path: Path) -> np.ndarray:
    """The picture as the autoencoder alone gives it back."""
    height, width = pixels(path).shape[:2]
    decoded = pipeline.decode(on_lattice(pipeline, path).float() * LATTICE, height, width)
    return np.asarray(images.to_picture(decoded[0])).astype(int)


def draw(path: Path, width: int, height: int, seed: int) -> Path:
    """Smooth colour waves."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width][..., None] / 16
    waves = np.sin(rng.uniform(1, 6, 3) * x + rng.uniform(0, 6, 3)) + np.cos(rng.uniform(1, 6, 3) * y)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((127.5 + 60 * waves).clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def album(tmp_path) -> Path:
    """Pictures of several sizes, one of them broken: in order a, b (32 x 20), broken, c (21 x 40), d (32 x 20)."""
    folder = tmp_path / "album"
    for seed, (name, size) in enumerate(
        {"a.png": (32, 20), "b.png": (32, 20), "c.png": (21, 40), "deep/d.png": (32, 20)}.items()
    ):
        draw(folder / name, *size, seed)
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def broken_network(monkeypatch, name: str = "__call__") -> None:
    """A network that gives other bits for the same input."""
    plain, calls = getattr(Pipeline, name), []

    def noisy(self, *inputs):
        calls.append(1)
        return plain(self, *inputs) + 1e-3 * len(calls)

    monkeypatch.setattr(Pipeline, name, noisy)


#################################################################################
#                                The certificate                                #
#################################################################################


def test_a_transfer_is_certified_exact_with_the_sha256_of_the_pictures_latents(infer, pipeline, tmp_path):
    out = out_of(infer(*TO_WARM, "--input", PICTURE, "--output", tmp_path / "a.png", "--certify", "--num_steps", "3"))
    assert "certificate: exact (0 of 768 elements differ)" in out  # 12 x 8 x 8
    assert sha256_in(out) == sha256_of(pipeline, Path(PICTURE))
    assert pixels(tmp_path / "a.png").shape == (32, 32, 3)


def test_asking_for_a_certificate_does_not_change_the_picture(infer, tmp_path):
    for name, extra in (("with", ["--certify"]), ("without", [])):
        out_of(infer(*TO_WARM, "--input", PICTURE, "--output", tmp_path / f"{name}.png", *extra))
    assert same(tmp_path / "with.png", tmp_path / "without.png")


def test_a_folder_is_certified_as_a_whole(infer, pipeline, tmp_path, album):
    (album / "bad.png").unlink()
    flags = ("--input", album, "--output", tmp_path / "out", "--certify", "--num_steps", "2", "--batch_size", "2")
    out = out_of(infer(*TO_WARM, *flags))
    count = 12 * (3 * 8 * 5 + 6 * 10)  # 32 x 20 three times, and 21 x 40 padded to 24 x 40
    assert f"exact (0 of {count} elements differ)" in out
    names = ("a.png", "b.png", "c.png", "deep/d.png")
    assert sha256_in(out) == sha256_of(pipeline, *(album / name for name in names))


def test_a_skipped_picture_makes_status_1_while_the_certificate_of_the_others_holds(infer, tmp_path, album):
    out = out_of(infer(*TO_WARM, "--input", album, "--output", tmp_path / "out", "--certify", "--num_steps", "1"), 1)
    assert "certificate: exact" in out and f"skipped: {album / 'bad.png'}: not a picture" in out
    out = out_of(
        infer(
            *TO_WARM, "--input", album, "--output", tmp_path / "o", "--certify", "--num_steps", "1", "--method=euler"
        ),
        3,
    )
    assert "NOT exact" in out and "skipped" in out


def test_every_target_is_certified(infer, tmp_path):
    flags = ("--input", PICTURE, "--output", tmp_path / "a.png", "--certify", "--num_steps", "2")
    assert "exact (0 of 1536 elements differ)" in out_of(infer(*FROM_COLD, *flags, "--target_style", "all"))
    out = out_of(infer(*FROM_COLD, *flags, "--interpolate", "cold", "warm", "--frames", "3"))
    assert "exact (0 of 2304 elements differ)" in out


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "rk4"])
def test_a_method_that_is_not_its_own_inverse_gets_status_3_and_the_reason(infer, tmp_path, method):
    flags = ("--input", PICTURE, "--output", tmp_path / "a.png", "--certify", "--num_steps", "2", "--method", method)
    out = out_of(infer(*TO_WARM, *flags), 3)
    line = next(line for line in out.splitlines() if line.startswith("certificate"))
    differing = int(
        re.fullmatch(rf"certificate: NOT exact: (\d+) of 768 .*; {method} is not .*--method alf is", line)[1]
    )
    assert 0 < differing <= 768
    assert pixels(tmp_path / "a.png").shape == (32, 32, 3), "the picture is there all the same"


def test_a_fixed_point_comes_back_far_closer_than_the_explicit_leg_but_not_to_the_bit(infer, tmp_path):
    flags = ("--input", PICTURE, "--output", tmp_path / "a.png", "--certify", "--num_steps", "6", "--method", "euler")
    gaps = {}
    for inversion in ("explicit", "fixed_point"):
        out = out_of(infer(*TO_WARM, *flags, "--precision", "fp32" if inversion == "explicit" else "auto",
                         "--inversion", inversion), 3)  # fmt: skip
        gaps[inversion] = float(re.search(r"the largest by (\S+) deviations", out)[1])
    assert "comes back to its tolerance" in out
    assert gaps["fixed_point"] < 0.01 * gaps["explicit"]


def test_the_certificate_notices_a_network_that_gives_other_bits_the_second_time(infer, tmp_path, monkeypatch):
    broken_network(monkeypatch)
    out = out_of(
        infer(*TO_WARM, "--input", PICTURE, "--output", tmp_path / "a.png", "--certify", "--num_steps", "2"), 3
    )
    assert "NOT exact" in out and "other bits for the same input" in out


def test_nothing_is_not_called_exact(infer, tmp_path, album):
    (album / "bad.png").unlink()
    flags = (*TO_WARM, "--input", album, "--output", tmp_path / "out", "--certify", "--num_steps", "1")
    assert "certificate: exact" in out_of(infer(*flags))
    assert "certificate: exact" not in infer(*flags)[1]  # all were there already: nothing was run


#################################################################################
#                               The structure file                              #
#################################################################################


def test_a_structure_is_restored_and_given_another_style_in_new_processes(studio, pipeline, tmp_path):
    saved, picture = tmp_path / "kept.safetensors", draw(tmp_path / "odd.png", 37, 26, seed=5)

    def run(*flags, output):
        done = call(studio, "inference.py", "--checkpoint", CHECKPOINT, *map(str, flags), "--output", str(output))
        assert done.returncode == 0, done.stderr
        return done

    keep = ("--save_structure", saved, "--certify", "--num_steps", "4")
    first = run(*TO_WARM[2:], "--input", picture, *keep, output=tmp_path / "warm.png")
    second = run("--restore", saved, output=tmp_path / "back.png")
    run("--from_structure", saved, "--target_style", "warm", output=tmp_path / "again.png")
    assert sha256_in(first.stdout) == sha256_in(second.stdout) == sha256_of(pipeline, picture)
    assert np.array_equal(pixels(tmp_path / "back.png"), codecs_own(pipeline, picture))
    assert same(tmp_path / "again.png", tmp_path / "warm.png")
    assert not same(tmp_path / "back.png", tmp_path / "warm.png")


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.integers(1, 5),
    strength=st.sampled_from([0, 0.3, 1]),
    scale=st.sampled_from([0, 1, 2.5]),
    guidance=st.sampled_from(["null", "source"]),
    interval=st.sampled_from([(0, 1), (0.2, 0.7)]),
    grid=st.sampled_from(["uniform", "cosine"]),
    shift=st.sampled_from([0.5, 1, 3]),
    rescale=st.sampled_from([0, 0.7]),
    clamp=st.sampled_from([None, 0.5]),
    precision=st.sampled_from(["bf16", "fp32"]),
)
def test_whatever_the_settings_the_file_restores_and_repeats(
    infer, pipeline, tmp_path, steps, strength, scale, guidance, interval, grid, shift, rescale, clamp, precision
):
    free = ["--cfg_scale", scale, "--guidance", guidance, "--cfg_interval", *interval, "--cfg_rescale", rescale]
    free += [] if clamp is None else ["--latent_clamp", clamp]
    fixed = ["--num_steps", steps, "--strength", strength, "--time_grid", grid, "--time_shift", shift]
    saved, first, again, back, other, fresh = (
        tmp_path / name for name in ("k.safetensors", *(f"{n}.png" for n in "abcde"))
    )
    start = ("--input", PICTURE, "--precision", precision, *fixed, *free)
    out = out_of(infer(*TO_WARM, *start, "--output", first, "--save_structure", saved, "--certify"))
    assert sha256_in(out) == sha256_of(pipeline, Path(PICTURE))
    out = out_of(infer("--checkpoint", CHECKPOINT, "--restore", saved, "--output", back))
    assert sha256_in(out) == sha256_of(pipeline, Path(PICTURE))
    assert np.array_equal(pixels(back), codecs_own(pipeline, Path(PICTURE)))
    from_it = ("--checkpoint", CHECKPOINT, "--from_structure", saved, *free)
    out_of(infer(*from_it, "--target_style", "warm", "--output", again, "--certify"))
    assert same(again, first)
    out_of(infer(*from_it, "--target_style", "cold", "--output", other))
    out_of(infer(*FROM_COLD, "--target_style", "cold", *start, "--output", fresh))
    assert same(other, fresh)


def test_all_styles_and_the_way_between_two_of_a_kept_structure_are_those_of_the_picture(infer, tmp_path):
    saved = tmp_path / "k.safetensors"
    out_of(
        infer(
            *TO_WARM, "--input", PICTURE, "--output", tmp_path / "a.png", "--num_steps", "3", "--save_structure", saved
        )
    )
    for flags in (("--target_style", "all"), ("--interpolate", "warm", "cold", "--frames", "3")):
        out = out_of(
            infer("--checkpoint", CHECKPOINT, "--from_structure", saved, "--output", tmp_path / "kept/x.png", *flags)
        )
        assert "without inverting again" in out
        out_of(infer(*FROM_COLD, "--input", PICTURE, "--num_steps", "3", "--output", tmp_path / "fresh/x.png", *flags))
    names = [f"x_{style}.png" for style in ("cold", "warm")] + [f"x_frames/x_{number}.png" for number in range(3)]
    assert all(same(tmp_path / "kept" / name, tmp_path / "fresh" / name) for name in names)


def test_a_structure_of_a_stored_latent_and_of_a_resized_picture_is_kept_as_well(infer, pipeline, tmp_path):
    saved, large = tmp_path / "k.safetensors", draw(tmp_path / "large.png", 96, 64, seed=1)
    for flags, size in (
        (("--input", "latents/cold/003.png.pt"), (32, 32)),
        (("--input", large, "--size", 24), (36, 24)),
    ):
        out_of(infer(*TO_WARM, *flags, "--output", tmp_path / "a.png", "--num_steps", "2", "--save_structure", saved))
        out_of(infer("--checkpoint", CHECKPOINT, "--restore", saved, "--output", tmp_path / "back.png"))
        assert Image.open(tmp_path / "back.png").size == size
    images.resize_short_side(Image.open(large), 24).save(tmp_path / "small.png")
    assert np.array_equal(pixels(tmp_path / "back.png"), codecs_own(pipeline, tmp_path / "small.png"))


@pytest.fixture
def saved(infer, tmp_path) -> Path:
    """A structure file of PICTURE on its way to `warm`, and nothing else in the folder."""
    path = tmp_path / "kept.safetensors"
    flags = ("--num_steps", "2", "--precision", "bf16", "--save_structure", path)
    out_of(infer(*TO_WARM, "--input", PICTURE, "--output", tmp_path / "a.png", *flags))
    (tmp_path / "a.png").unlink()
    return path


def nothing_beside(saved: Path) -> bool:
    return list(saved.parent.iterdir()) == [saved]


def test_another_checkpoint_is_refused_by_name(infer, saved):
    other, output = ("--checkpoint", "checkpoints/stage1_epoch2.pt"), ("--output", saved.with_name("b.png"))
    refused(infer(*other, "--restore", saved, *output), str(saved), "another checkpoint")
    refused(infer(*other, "--from_structure", saved, "--target_style", "0", *output), str(saved), "another checkpoint")
    assert nothing_beside(saved)


def test_other_bits_of_the_network_are_refused_for_restoring_and_no_hindrance_for_another_style(
    infer, saved, monkeypatch
):
    base = ("--checkpoint", CHECKPOINT, "--output", saved.with_name("b.png"))
    refused(infer(*base, "--restore", saved, "--precision", "fp32"), "another precision", "bf16", "fp32")
    refused(infer(*base, "--restore", saved, "--compile", "on"), "another compiled")
    with monkeypatch.context() as patch:
        patch.setattr(structure_file, "device_name", lambda device: "another machine's CPU")
        refused(infer(*base, "--restore", saved), "another device", "another machine's CPU")
        assert nothing_beside(saved)
        out_of(infer(*base, "--from_structure", saved, "--target_style", "0", "--precision", "fp32", "--certify"))
    out_of(infer(*base, "--restore", saved, "--precision", "bf16"))


def test_a_network_whose_bits_changed_unnoticed_is_noticed_and_nothing_is_written(infer, saved, monkeypatch):
    broken_network(monkeypatch)
    out = out_of(infer("--checkpoint", CHECKPOINT, "--restore", saved, "--output", saved.with_name("b.png")), 3)
    assert "NOT exact" in out and "nothing was written" in out
    assert nothing_beside(saved)


def test_a_way_back_that_goes_wrong_after_the_structure_is_no_exact_certificate_either(infer, saved, monkeypatch):
    monkeypatch.setattr(jobs, "digest", lambda state: "other latents")
    out = out_of(infer("--checkpoint", CHECKPOINT, "--restore", saved, "--output", saved.with_name("b.png")), 3)
    assert "NOT exact" in out and "certificate: exact" not in out and "nothing was written" in out
    assert nothing_beside(saved)


BY_THE_LEGS = {
    "method": "alf",
    "num_steps": "2",
    "time_grid": "uniform",
    "time_shift": "1",
    "inversion": "explicit",
    "tolerance": "1e-3",
    "noise_samples": "1",
}
BY_THE_GUIDANCE = {
    "cfg_scale": "1",
    "cfg_interval": "0 1",
    "cfg_rescale": "0",
    "guidance": "null",
    "latent_clamp": "3",
}
BY_THE_PICTURE = {
    "input": PICTURE,
    "source_style": "cold",
    "save_structure": "other.safetensors",
    "min_structure": "0.5",
    "strength": "1",
    "size": "32",
}


@pytest.mark.parametrize(
    ("way", "fixed"),
    [
        ("restore", BY_THE_LEGS | BY_THE_GUIDANCE | BY_THE_PICTURE | {"target_style": "0", "interpolate": "0 1"}),
        ("from_structure", BY_THE_LEGS | BY_THE_PICTURE),
    ],
)
def test_what_the_structure_file_fixes_is_refused_by_name_even_where_it_would_agree(infer, saved, way, fixed):
    base = ["--checkpoint", CHECKPOINT, f"--{way}", saved, "--output", saved.with_name("b.png")]
    base += ["--target_style", "1"] * (way == "from_structure")
    for name, values in fixed.items():
        refused(infer(*base, f"--{name}", *values.split()), f"--{name} ", f"--{way}")
    assert nothing_beside(saved)


def test_two_ways_in_at_once_and_a_sheet_of_what_is_not_there_are_refused(infer, saved):
    base = ("--checkpoint", CHECKPOINT, "--output", saved.with_name("b.png"), "--from_structure", saved)
    refused(infer(*base, "--restore", saved), "--from_structure", "--restore")
    refused(infer(*base, "--target_style", "1", "--compare"), "--compare")
    refused(infer(*base), "--target_style", "--interpolate")
    refused(infer(*base, "--target_style", "hot"), "'hot'", "1 = warm")
    assert nothing_beside(saved)


def test_the_guidance_of_another_style_is_free(infer, saved, tmp_path):
    base = ("--checkpoint", CHECKPOINT, "--from_structure", saved, "--target_style", "1")
    out_of(infer(*base, "--output", tmp_path / "plain.png", "--cfg_scale", "1"))
    out_of(infer(*base, "--output", tmp_path / "guided.png", "--cfg_scale", "4"))
    flags = ("--num_steps", "2", "--cfg_scale", "4", "--precision", "bf16")  # as `kept` was made
    out_of(infer(*TO_WARM, "--input", PICTURE, *flags, "--output", tmp_path / "fresh.png"))
    assert same(tmp_path / "guided.png", tmp_path / "fresh.png")
    assert not same(tmp_path / "guided.png", tmp_path / "plain.png")


def test_a_damaged_or_missing_structure_file_is_one_line(infer, saved, tmp_path):
    data, output = saved.read_bytes(), ("--checkpoint", CHECKPOINT, "--output", tmp_path / "b.png")
    saved.write_bytes(data[: len(data) // 2])
    refused(infer(*output, "--restore", saved), str(saved), "damaged")
    saved.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    refused(infer(*output, "--from_structure", saved, "--target_style", "0"), str(saved), "checksum")
    refused(infer(*output, "--restore", tmp_path / "nowhere.safetensors"), "nowhere.safetensors", "no such")
    refused(infer(*output, "--restore", PICTURE), "003.png", "not a structure file")
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    "flags", [["--set", "inference.num_steps=9"], ["--set", "nonsense"], ["--config", "nowhere.json"]]
)
def test_settings_by_set_and_config_are_refused_like_those_by_flags(infer, saved, flags):
    base = ("--checkpoint", CHECKPOINT, "--output", saved.with_name("b.png"))
    refused(infer(*base, "--restore", saved, *flags), f"{flags[0]} does not go with --restore")
    way = ("--from_structure", saved, "--target_style", "0")
    refused(infer(*base, *way, *flags), f"{flags[0]} does not go with --from_structure")
    assert nothing_beside(saved)


def test_a_transfer_that_may_take_no_step_is_kept_and_restored_too(infer, pipeline, tmp_path):
    flags = ("--input", PICTURE, "--output", tmp_path / "a.png", "--num_steps", "2", "--min_structure", "1")
    out_of(infer(*TO_WARM, *flags, "--save_structure", tmp_path / "k.safetensors"))
    out_of(infer("--checkpoint", CHECKPOINT, "--restore", tmp_path / "k.safetensors", "--output", tmp_path / "b.png"))
    assert np.array_equal(pixels(tmp_path / "b.png"), codecs_own(pipeline, Path(PICTURE)))


#################################################################################
#                            Several styles at once                             #
#################################################################################


def parts_of(sheet: Path, picture: np.ndarray) -> int:
    """How many times a picture is found in a sheet."""
    whole = pixels(sheet)
    windows = np.lib.stride_tricks.sliding_window_view(whole, picture.shape)[:, :, 0]
    return int((windows == picture).all((2, 3, 4)).sum())


def test_all_styles_are_made_from_one_inversion_and_shown_on_a_sheet(infer, pipeline, tmp_path):
    flags = ("--input", PICTURE, "--num_steps", "3")
    out = out_of(infer(*FROM_COLD, *flags, "--target_style", "all", "--output", tmp_path / "out" / "x.png"))
    # By hand: alf takes N + 1 = 4 evaluations a leg; one inversion, one leg to its own style without guidance, which
    # takes along the defect of one evaluation more, and one guided one of two evaluations each.
    assert "1 made, 17 network evaluations" in out and "cold -> 2 styles" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.png", "x_cold.png", "x_warm.png"]
    for style in ("cold", "warm"):
        out_of(infer(*FROM_COLD, *flags, "--target_style", style, "--output", tmp_path / f"{style}.png"))
        assert same(tmp_path / "out" / f"x_{style}.png", tmp_path / f"{style}.png")
    assert np.array_equal(pixels(tmp_path / "cold.png"), codecs_own(pipeline, Path(PICTURE)))
    # The source as the codec gives it back, which is also what its own style makes of it, and the other style.
    assert parts_of(tmp_path / "out" / "x.png", pixels(tmp_path / "cold.png")) == 2
    assert parts_of(tmp_path / "out" / "x.png", pixels(tmp_path / "warm.png")) == 1


def test_frames_lead_from_the_picture_itself_to_the_transfer_in_steps(infer, pipeline, tmp_path):
    flags = ("--input", PICTURE, "--num_steps", "4", "--cfg_scale", "2")
    out = out_of(
        infer(*FROM_COLD, *flags, "--interpolate", "cold", "warm", "--frames", "11", "--output", tmp_path / "x.png")
    )
    assert "cold -> 11 styles" in out
    frames = [tmp_path / "x_frames" / f"x_{number:02}.png" for number in range(11)]
    assert sorted((tmp_path / "x_frames").iterdir()) == frames
    out_of(infer(*TO_WARM, *flags, "--output", tmp_path / "warm.png"))
    assert np.array_equal(pixels(frames[0]), codecs_own(pipeline, Path(PICTURE)))
    assert same(frames[-1], tmp_path / "warm.png")
    way = [np.abs(pixels(frame) - pixels(frames[0])).mean() for frame in frames]
    assert way == sorted(way) and way[5] > 0, "each frame is further from the picture"
    assert all(parts_of(tmp_path / "x.png", pixels(frame)) >= 1 for frame in frames)


def test_the_ends_of_the_way_may_be_any_two_styles(infer, tmp_path):
    flags = ("--input", PICTURE, "--num_steps", "2", "--cfg_scale", "1")
    out_of(infer(*FROM_COLD, *flags, "--interpolate", "1", "cold", "--frames", "2", "--output", tmp_path / "x.png"))
    out_of(infer(*TO_WARM, *flags, "--output", tmp_path / "warm.png"))
    assert same(tmp_path / "x_frames" / "x_0.png", tmp_path / "warm.png")
    refused(
        infer(*FROM_COLD, *flags, "--interpolate", "cold", "hot", "--output", tmp_path / "y.png"), "'hot'", "1 = warm"
    )


def test_frames_of_a_folder_have_a_folder_a_picture(infer, tmp_path, album):
    flags = ("--interpolate", "cold", "warm", "--frames", "2", "--num_steps", "1")
    out_of(infer(*FROM_COLD, "--input", album, "--output", tmp_path / "out", *flags), 1)
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    stems = ("a", "b", "c", "deep/d")
    frames = {f"{s}_frames/{s.split('/')[-1]}_{number}.png" for s in stems for number in range(2)}
    assert found == {f"{stem}.png" for stem in stems} | frames
    assert Image.open(tmp_path / "out" / "c_frames" / "c_1.png").size == (21, 40)


@pytest.mark.parametrize(
    ("name", "flags"),
    [("x_warm.png", ["--target_style", "all"]), ("x_compare.png", ["--target_style", "warm", "--compare"])],
)
def test_the_input_is_not_overwritten_by_a_file_beside_the_output(infer, tmp_path, name, flags):
    picture = draw(tmp_path / name, 16, 16, seed=2)
    before = picture.read_bytes()
    infer(*FROM_COLD, "--input", picture, "--output", tmp_path / "x.png", "--num_steps", "1", *flags)
    assert picture.read_bytes() == before


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        (["a.png", "a_warm.png"], ["--target_style", "all"]),  # the picture in `warm`, and a sheet
        (["a.png", "a.jpg"], ["--target_style", "warm", "--compare"]),
        (["a.png", "a_compare.png"], ["--target_style", "warm", "--compare"]),
    ],
)
def test_pictures_of_a_folder_that_would_take_each_others_names_are_refused(infer, tmp_path, names, flags):
    for seed, name in enumerate(names):
        draw(tmp_path / "in" / name, 16, 16, seed)
    result = infer(*FROM_COLD, "--input", tmp_path / "in", "--output", tmp_path / "out", "--num_steps", "1", *flags)
    refused(result, *names)
    assert not (tmp_path / "out").exists()


def test_frames_of_pictures_that_differ_only_in_their_format_do_not_meet(infer, tmp_path):
    for seed, name in enumerate(("a.png", "a.jpg")):
        draw(tmp_path / "in" / name, 16, 16, seed)
    flags = ("--interpolate", "0", "1", "--frames", "2", "--num_steps", "1")
    out_of(infer(*FROM_COLD, "--input", tmp_path / "in", "--output", tmp_path / "out", *flags))
    found = sorted(path.name for path in (tmp_path / "out" / "a_frames").iterdir())
    assert found == ["a_0.jpg", "a_0.png", "a_1.jpg", "a_1.png"]


def test_a_picture_added_later_does_not_take_the_name_of_a_result_that_is_there(infer, tmp_path):
    flags = (*FROM_COLD, "--input", tmp_path / "in", "--output", tmp_path / "out", "--num_steps", "1")
    draw(tmp_path / "in" / "a_warm.png", 16, 16, seed=1)
    out_of(infer(*flags, "--target_style", "all"))
    before = pixels(tmp_path / "out" / "a_warm.png")
    draw(tmp_path / "in" / "a.png", 16, 16, seed=2)
    infer(*flags, "--target_style", "all")
    assert np.array_equal(pixels(tmp_path / "out" / "a_warm.png"), before)


#################################################################################
#                          As much structure as asked for                       #
#################################################################################


def tried_in(note: str) -> tuple[float, float, dict[float, float]]:
    """Of a note: the strength found, its structure, and every strength tried with its structure."""
    found = re.search(r"strength ([\d.]+) keeps structure (-?[\d.]+) \(tried (.*)\)", note)
    trials = {float(a): float(b) for a, b in re.findall(r"([\d.]+): (-?[\d.]+)", found[3])}
    return float(found[1]), float(found[2]), trials


def structure_left(pipeline: Pipeline, result: Path, picture: Path) -> float:
    """SSIM of two pictures of 11 pixels or more, the second as the codec gives it back."""
    a, b = (
        torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)[None].float()
        for values in (pixels(result), codecs_own(pipeline, picture))
    )
    return ssim(a, b).item()


def test_the_strongest_transfer_above_the_floor_is_found_and_its_trials_are_printed(infer, pipeline, tmp_path):
    flags = (*TO_WARM, "--input", PICTURE, "--num_steps", "8", "--cfg_scale", "4", "--output", tmp_path / "a.png")
    full = tried_in(out_of(infer(*flags, "--min_structure", "-1")))[1]
    floor = round((1 + full) / 2, 3)
    out = out_of(infer(*flags, "--min_structure", floor, "--certify"))
    assert f"structure {floor:g} or more" in out and "003.png as warm" in out
    strength, reached, trials = tried_in(out)
    assert trials[strength] == reached >= floor - 5e-4 > full  # printed to three digits
    stronger = min(other for other in trials if other > strength)
    assert trials[stronger] < floor and stronger == round(strength + 1 / 8, 2), "one step more is too much"
    assert structure_left(pipeline, tmp_path / "a.png", Path(PICTURE)) == pytest.approx(reached, abs=0.01)  # 8 bits
    assert "exact (0 of 768" in out
    # On the uniform grid it is the plain transfer of that strength and as many steps as are left.
    steps = round(8 * strength)
    plain = ("--strength", steps / 8, "--num_steps", steps, "--output", tmp_path / "plain.png")
    out_of(infer(*flags, *plain))
    assert np.abs(pixels(tmp_path / "plain.png") - pixels(tmp_path / "a.png")).max() <= 1


def test_the_lowest_floor_is_the_full_transfer_and_the_highest_the_picture_itself(infer, pipeline, tmp_path):
    flags = (*TO_WARM, "--input", PICTURE, "--num_steps", "4")
    assert tried_in(out_of(infer(*flags, "--min_structure", "-1", "--output", tmp_path / "low.png")))[0] == 1.0
    out_of(infer(*flags, "--output", tmp_path / "plain.png"))
    assert same(tmp_path / "low.png", tmp_path / "plain.png")
    out = out_of(infer(*flags, "--min_structure", "1", "--output", tmp_path / "high.png", "--certify"))
    assert tried_in(out)[:2] == (0.0, 1.0) and "exact (0 of" in out
    assert np.array_equal(pixels(tmp_path / "high.png"), codecs_own(pipeline, Path(PICTURE)))


def test_a_lower_floor_never_gives_a_weaker_transfer(infer, tmp_path):
    flags = (*TO_WARM, "--input", PICTURE, "--num_steps", "6", "--cfg_scale", "4", "--output", tmp_path / "a.png")
    strengths = [tried_in(out_of(infer(*flags, "--min_structure", floor)))[0] for floor in (0.99, 0.95, 0.9, 0.8, 0.6)]
    assert strengths == sorted(strengths) and strengths[0] < strengths[-1]


def test_every_picture_of_a_folder_gets_a_strength_of_its_own_and_small_ones_are_no_problem(infer, tmp_path):
    folder = tmp_path / "in"
    sizes = {"a.png": (1, 1), "b.png": (3, 40), "c.png": (10, 10), "d.png": (32, 24), "e.png": (48, 11)}
    for seed, (name, size) in enumerate(sizes.items()):
        draw(folder / name, *size, seed)
    flags = ("--num_steps", "6", "--cfg_scale", "4", "--min_structure", "0.97", "--batch_size", "3")
    out = out_of(infer(*TO_WARM, "--input", folder, "--output", tmp_path / "out", *flags))
    notes = [line for line in out.splitlines() if " as warm: strength" in line]
    assert [Path(note.split()[0]).name for note in notes] == list(sizes)
    assert len({tried_in(note)[0] for note in notes}) > 1
    for note, (name, size) in zip(notes, sizes.items(), strict=True):
        single = ("--input", folder / name, "--output", tmp_path / name)
        assert note in out_of(infer(*TO_WARM, *single, *flags)).splitlines()
        assert same(tmp_path / name, tmp_path / "out" / name)
        assert Image.open(tmp_path / name).size == size


def test_each_target_has_a_strength_of_its_own(infer, tmp_path):
    flags = ("--num_steps", "4", "--cfg_scale", "4", "--min_structure", "0.95", "--output", tmp_path / "a.png")
    out = out_of(infer(*FROM_COLD, "--input", PICTURE, "--target_style", "all", *flags, "--certify"))
    cold, warm = (next(line for line in out.splitlines() if f"as {style}: " in line) for style in ("cold", "warm"))
    assert tried_in(cold)[:2] == (1.0, 1.0), "its own style changes nothing"
    assert tried_in(warm)[0] < 1 and "exact (0 of 1536" in out


def test_the_picture_is_decoded_once_whatever_it_is_compared_with(infer, tmp_path, monkeypatch):
    decode, decoded = Pipeline.decode, []
    monkeypatch.setattr(Pipeline, "decode", lambda self, z, *size: decoded.append(len(z)) or decode(self, z, *size))
    flags = ("--num_steps", "4", "--cfg_scale", "4", "--output", tmp_path / "a.png")
    many = ("--input", PICTURE, "--target_style", "all", *flags)
    out = out_of(infer(*FROM_COLD, *many, "--min_structure", "0.95"))
    trials = [tried_in(line)[2] for line in out.splitlines() if " keeps structure " in line]
    assert len(trials) == 2 and decoded == [1] * (sum(map(len, trials)) + 2 + 1)
    decoded.clear()
    out_of(infer(*FROM_COLD, *many))
    assert decoded == [1] * (2 + 1)


@pytest.mark.parametrize("extra", [["--method", "euler"], ["--time_grid", "cosine"], ["--strength", "0.5"]])
def test_the_floor_is_kept_by_other_methods_grids_and_below_a_largest_strength(infer, pipeline, tmp_path, extra):
    flags = ("--input", PICTURE, "--num_steps", "5", "--cfg_scale", "4", "--output", tmp_path / "a.png")
    strength, reached, trials = tried_in(out_of(infer(*TO_WARM, *flags, "--min_structure", "0.96", *extra)))
    assert reached >= 0.96 and 0 < strength <= (0.5 if extra[0] == "--strength" else 1)
    assert max(trials) <= (0.5 if extra[0] == "--strength" else 1)
    assert structure_left(pipeline, tmp_path / "a.png", Path(PICTURE)) == pytest.approx(reached, abs=0.01)


def test_a_structure_cut_short_by_its_floor_is_kept_and_repeated(infer, pipeline, tmp_path):
    saved = tmp_path / "k.safetensors"
    flags = ("--input", PICTURE, "--num_steps", "6", "--cfg_scale", "4", "--min_structure", "0.95")
    out = out_of(infer(*TO_WARM, *flags, "--output", tmp_path / "a.png", "--save_structure", saved))
    assert 0 < tried_in(out)[0] < 1
    out_of(infer("--checkpoint", CHECKPOINT, "--restore", saved, "--output", tmp_path / "back.png"))
    assert np.array_equal(pixels(tmp_path / "back.png"), codecs_own(pipeline, Path(PICTURE)))
    again = ("--from_structure", saved, "--target_style", "warm", "--cfg_scale", "4", "--output", tmp_path / "b.png")
    out_of(infer("--checkpoint", CHECKPOINT, *again, "--certify"))
    assert same(tmp_path / "a.png", tmp_path / "b.png")


def test_another_style_of_a_cut_structure_prints_the_strength_it_has(infer, tmp_path):
    saved = tmp_path / "k.safetensors"
    flags = ("--input", PICTURE, "--num_steps", "6", "--min_structure", "0.95", "--output", tmp_path / "a.png")
    strength = tried_in(out_of(infer(*TO_WARM, *flags, "--cfg_scale", "4", "--save_structure", saved)))[0]
    assert 0 < strength < 1
    again = ("--from_structure", saved, "--target_style", "warm", "--output", tmp_path / "b.png")
    assert f"strength {strength:g}" in out_of(infer("--checkpoint", CHECKPOINT, *again))


#################################################################################
#                              Fixed points and flowedit                        #
#################################################################################


def test_a_fixed_point_reports_its_largest_residual(infer, tmp_path):
    flags = ("--input", PICTURE, "--num_steps", "3", "--method", "heun", "--inversion", "fixed_point")
    out = out_of(infer(*TO_WARM, *flags, "--tolerance", "1e-4", "--output", tmp_path / "a.png"))
    largest = float(
        re.search(r"^fixed point: largest residual (\S+), all of them within 0.0001$", out, re.MULTILINE)[1]
    )
    assert 0 < largest <= 1e-4
    out_of(infer(*TO_WARM, *flags[:-2], "--precision", "fp32", "--output", tmp_path / "explicit.png"))
    assert not same(tmp_path / "a.png", tmp_path / "explicit.png")


def test_a_fixed_point_that_cannot_be_reached_names_the_pictures(infer, tmp_path, album):
    flags = ("--num_steps", "2", "--method", "euler", "--inversion", "fixed_point", "--tolerance", "0")
    out = out_of(infer(*TO_WARM, "--input", album, "--output", tmp_path / "out", *flags, "--batch_size", "2"), 1)
    names = ", ".join(str(album / name) for name in ("a.png", "b.png", "c.png", "deep/d.png"))
    assert f"not certified, 4 did not converge: {names}" in out


def test_a_fixed_point_is_not_said_to_have_converged_where_a_strength_is_searched(infer, tmp_path):
    flags = ("--num_steps", "2", "--method", "euler", "--inversion", "fixed_point", "--tolerance", "0")
    out = out_of(infer(*TO_WARM, "--input", PICTURE, "--output", tmp_path / "a.png", *flags, "--min_structure", "0.5"))
    assert "all of them within" not in out


def test_flowedit_draws_the_same_noise_for_the_same_seed(infer, tmp_path):
    flags = ("--input", PICTURE, "--method", "flowedit", "--num_steps", "3", "--noise_samples", "2")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out_of(infer(*TO_WARM, *flags, "--seed", seed, "--output", tmp_path / f"{name}.png"))
    out_of(infer(*TO_WARM, *flags[:-1], "1", "--seed", "1", "--output", tmp_path / "one.png"))
    assert same(tmp_path / "a.png", tmp_path / "b.png")
    assert not same(tmp_path / "a.png", tmp_path / "c.png") and not same(tmp_path / "a.png", tmp_path / "one.png")


def test_flowedit_to_its_own_style_is_the_picture_and_a_frame_of_it_between_two_styles_works(infer, pipeline, tmp_path):
    flags = ("--input", PICTURE, "--method", "flowedit", "--num_steps", "3")
    out_of(infer(*FROM_COLD, *flags, "--target_style", "cold", "--output", tmp_path / "a.png"))
    assert np.abs(pixels(tmp_path / "a.png") - codecs_own(pipeline, Path(PICTURE))).max() <= 1  # it is off the lattice
    out_of(infer(*FROM_COLD, *flags, "--interpolate", "cold", "warm", "--frames", "2", "--output", tmp_path / "x.png"))
    out_of(infer(*TO_WARM, *flags, "--output", tmp_path / "warm.png"))
    assert same(tmp_path / "x_frames" / "x_1.png", tmp_path / "warm.png")


#################################################################################
#                                    Folders                                    #
#################################################################################


@pytest.mark.parametrize("method", ["alf", "flowedit"])
def test_a_folder_of_all_sizes_gives_what_its_pictures_give_one_by_one(infer, tmp_path, album, method):
    flags = ("--num_steps", "3", "--method", method)
    out = out_of(infer(*TO_WARM, *flags, "--input", album, "--output", tmp_path / "out", "--batch_size", "2"), 1)
    assert "4 made" in out and f"skipped: {album / 'bad.png'}: not a picture" in out
    names = ["a.png", "b.png", "c.png", "deep/d.png"]
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png")) == names
    for name in names:
        out_of(infer(*TO_WARM, *flags, "--input", album / name, "--output", tmp_path / "one.png"))
        gap = np.abs(pixels(tmp_path / "one.png") - pixels(tmp_path / "out" / name)).max()
        assert gap <= 1, name  # another batch shape is another order of summation


def test_only_what_is_missing_is_made_and_overwrite_makes_all_anew(infer, tmp_path, album):
    (album / "bad.png").unlink()
    flags = (*TO_WARM, "--num_steps", "1", "--input", album, "--output", tmp_path / "out")
    assert "4 made" in out_of(infer(*flags))
    before = pixels(tmp_path / "out" / "b.png")
    (tmp_path / "out" / "b.png").unlink()
    Image.new("RGB", (5, 5)).save(tmp_path / "out" / "a.png")
    assert "1 made" in (out := out_of(infer(*flags))) and "3 were there already" in out
    assert np.abs(pixels(tmp_path / "out" / "b.png") - before).max() <= 1
    assert Image.open(tmp_path / "out" / "a.png").size == (5, 5)
    assert "4 made" in out_of(infer(*flags, "--overwrite"))
    assert Image.open(tmp_path / "out" / "a.png").size == (32, 20)


def test_a_tile_size_does_not_matter_to_the_block_codec(infer, tmp_path):
    picture = draw(tmp_path / "a.png", 100, 70, seed=3)
    for tile in (64, 0):
        flags = ("--num_steps", "1", "--tile", tile, "--output", tmp_path / f"{tile}.png")
        out_of(infer(*TO_WARM, "--input", picture, *flags))
    assert same(tmp_path / "64.png", tmp_path / "0.png")


#################################################################################
#                                   Bad input                                   #
#################################################################################


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--source_style", "0", "--target_style", "1"], ["--input is missing"]),
        (["--input", PICTURE, "--target_style", "1"], ["--source_style is missing"]),
        (["--input", PICTURE, "--source_style", "0"], ["--target_style", "--interpolate"]),
        (["--target_style", "1"], ["--input is missing"]),
    ],
)
def test_what_is_missing_is_named(infer, tmp_path, flags, words):
    refused(infer("--checkpoint", CHECKPOINT, "--output", tmp_path / "a.png", *flags), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--interpolate", "0", "1"], ["either --target_style", "--interpolate"]),
        (["--frames", "1"], ["--frames 1", "from 2"]),
        (["--frames", "100000"], ["--frames 100000", "10000"]),
        (["--strength", "-0.1"], ["--strength", "from 0 to 1"]),
        (["--strength", "nan"], ["--strength", "from 0 to 1"]),
        (["--min_structure", "1.1"], ["--min_structure", "from -1 to 1"]),
        (["--min_structure", "nan"], ["--min_structure"]),
        (["--num_steps", "0"], ["num_steps", "from 1 to 10000"]),
        (["--noise_samples", "0"], ["noise_samples", "from 1 to 1000"]),
        (["--time_shift", "0"], ["time_shift", "0.01"]),
        (["--cfg_rescale", "2"], ["cfg_rescale", "0 to 1"]),
        (["--tolerance", "-1"], ["tolerance", "0 or more"]),
        (["--tile", "10"], ["--tile 10", "64"]),
        (["--tile", "-64"], ["--tile -64"]),
        (["--target_style", "hot"], ["'hot'", "0 = cold, 1 = warm"]),
        (["--source_style", "2"], ["'2'", "0 = cold, 1 = warm"]),
        (["--inversion", "fixed_point"], ["alf is exactly reversible already", "euler"]),
        (["--inversion", "fixed_point", "--method", "flowedit"], ["flowedit has no inversion", "euler"]),
        (["--inversion", "fixed_point", "--method", "euler", "--precision", "bf16"], ["float32", "BF16"]),
        (["--method", "flowedit", "--certify"], ["flowedit", "--certify"]),
        (["--method", "flowedit", "--min_structure", "0.5"], ["flowedit", "--min_structure"]),
        (["--method", "flowedit", "--save_structure", "k.safetensors"], ["flowedit", "--method alf"]),
        (["--method", "euler", "--save_structure", "k.safetensors"], ["euler", "--method alf"]),
        (["--save_structure", "k.pt"], ["k.pt", ".safetensors"]),
        (["--target_style", "all", "--save_structure", "k.safetensors"], ["--save_structure", "one target"]),
        (["--input", "raw_data", "--save_structure", "k.safetensors"], ["--save_structure", "one picture"]),
        (["--target_style", "all", "--compare"], ["--compare", "one target"]),
        (["--input", "config.json"], ["config.json", "not a picture"]),
        (["--output", "config.json/a.png"], ["config.json"]),
        (["--save_structure", "config.json/k.safetensors"], ["config.json"]),
    ],
)
def test_flags_out_of_range_or_at_odds_are_one_line_and_nothing_is_written(infer, studio, tmp_path, flags, words):
    before = sorted(studio.rglob("*"))
    refused(infer(*TO_WARM, "--input", PICTURE, "--num_steps", "1", "--output", tmp_path / "a.png", *flags), *words)
    assert list(tmp_path.iterdir()) == [] and sorted(studio.rglob("*")) == before


def test_a_seed_beyond_64_bits_is_one_line(infer, tmp_path):
    flags = ("--input", PICTURE, "--output", tmp_path / "a.png", "--num_steps", "1", "--method", "flowedit")
    refused(infer(*TO_WARM, *flags, "--seed", 10**20), "seed")


def test_a_result_that_cannot_be_written_is_one_line_for_a_picture_and_for_a_folder(
    infer, tmp_path, album, monkeypatch
):
    def full(picture, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(jobs.images, "save_picture", full)
    flags = (*TO_WARM, "--num_steps", "1")
    refused(infer(*flags, "--input", PICTURE, "--output", tmp_path / "x.png"), "No space left", "x.png")
    refused(infer(*flags, "--input", album, "--output", tmp_path / "out"), "No space left", "a.png")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["transfers.json"]
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("where", ["transfer_batch", "save_results"])
@pytest.mark.parametrize(
    "error", [TypeError("odd"), MemoryError(), RecursionError("too deep"), OSError(36, "too long")]
)
def test_what_one_picture_s_transfer_or_result_raises_is_its_line(infer, tmp_path, album, monkeypatch, where, error):
    real = getattr(jobs, where)

    def fail(first, *others):
        if (first.jobs[0] if where == "transfer_batch" else first).source.name == "b.png":
            raise error
        return real(first, *others)

    monkeypatch.setattr(jobs, where, fail)
    flags = ("--num_steps", "1", "--input", album, "--output", tmp_path / "out", "--batch_size", "1")
    out = out_of(infer(*TO_WARM, *flags), 1)
    verb = "transferred" if where == "transfer_batch" else "saved"
    assert "3 made" in out and f"skipped: {album / 'b.png'}: cannot be {verb} ({first_line(error)})" in out
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["a.png", "c.png", "d.png"]


def test_a_full_disk_ends_a_folder(infer, tmp_path, album, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "save_results", fail)
    refused(infer(*TO_WARM, "--num_steps", "1", "--input", album, "--output", tmp_path / "out"), "No space left")


def test_a_file_in_the_way_of_one_result_of_a_folder_is_one_line_that_names_it(infer, tmp_path, album):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "deep").write_text("a file where a folder should be")
    out = out_of(infer(*TO_WARM, "--num_steps", "1", "--input", album, "--output", tmp_path / "out"), 1)
    assert "3 made" in out and f"skipped: {album / 'deep' / 'd.png'}: cannot be saved (" in out
    left = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert left == ["a.png", "b.png", "c.png", "deep", "transfers.json"], (
        "the others are whole, and no temporary file is left"
    )


def test_a_structure_too_large_for_the_format_of_its_result_is_refused_before_the_work(infer, tmp_path, monkeypatch):
    wide, kept = draw(tmp_path / "wide.png", 16400, 4, seed=0), tmp_path / "x.safetensors"
    flags = ("--num_steps", "1", "--input", wide, "--output", tmp_path / "x.png", "--save_structure", kept)
    out_of(infer(*TO_WARM, *flags))
    monkeypatch.setattr(Pipeline, "generate", lambda *_: pytest.fail("it works"))
    monkeypatch.setattr(Pipeline, "restore", lambda *_: pytest.fail("it works"))
    of_it = ("--checkpoint", CHECKPOINT, "--output", tmp_path / "x.webp")
    for way in (("--from_structure", kept, "--target_style", "warm"), ("--restore", kept)):
        refused(infer(*of_it, *way), "x.webp", "16400 x 4 pixels", "16383")


def test_a_picture_too_large_for_its_format_is_one_line(infer, tmp_path):
    wide = draw(tmp_path / "wide.png", 16400, 4, seed=0)
    refused(infer(*TO_WARM, "--num_steps", "1", "--input", wide, "--output", tmp_path / "a.webp"), "16383")
    assert not (tmp_path / "a.webp").exists()


def test_the_checkpoints_own_settings_are_those_of_a_plain_run_and_a_config_replaces_them(infer, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"inference": {"num_steps": 2, "method": "heun", "cfg_scale": 3}}))
    base = (*TO_WARM, "--input", PICTURE, "--output", tmp_path / "a.png")
    assert "alf, 20 steps a leg, source guidance 1.5, strength 1\n" in out_of(infer(*base))
    config = ("--config", tmp_path / "config.json")
    assert "heun, 2 steps a leg, source guidance 3, strength 1\n" in out_of(infer(*base, *config))
    out = out_of(infer(*base, *config, "--set", "inference.num_steps=4", "--cfg_scale", "1", "--strength", "0.5"))
    assert "heun, 4 steps a leg, no guidance, strength 0.5\n" in out


def test_in_a_mixed_folder_full_batches_of_a_frequent_size_are_compiled_and_nothing_else(
    infer, tmp_path, studio, monkeypatch
):
    """Seven pictures of one size among three of another: of them six make three full batches."""
    sizes = [(24, 24), (16, 24), (24, 24), (24, 24), (16, 24), (24, 24), (24, 24), (16, 24), (24, 24), (24, 24)]
    for number, (width, height) in enumerate(sizes):
        draw(tmp_path / "in" / f"{number}.png", width, height, number)
    shapes, real = [], torch.nn.Module.compile

    def backend(graph, inputs):
        def run(*values):
            shapes.append(max((tuple(value.shape) for value in values if isinstance(value, torch.Tensor)), key=len))
            return graph(*values)

        return run

    flags = (*TO_WARM, "--input", tmp_path / "in", "--batch_size", "2", "--num_steps", "1", "--cfg_scale", "1")
    out_of(infer(*flags, "--output", tmp_path / "plain", "--certify", "--compile", "off"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend=backend, **options))
    monkeypatch.setattr(plan, "is_worth_compiling", lambda trained, pipeline, space, count: count >= 6 * 2)
    torch.compiler.reset()
    out = out_of(infer(*flags, "--output", tmp_path / "auto", "--certify"))
    assert "certificate: exact" in out
    assert {shape[0] for shape in shapes} == {2} and {shape[2:] for shape in shapes} == {(6, 6)}
    # 3 batches of 2 blocks: a leg of one step by alf has 3 evaluations, the way back 2 of each leg again at least
    assert len(shapes) % (3 * 2) == 0 and len(shapes) >= 3 * 2 * 6
    for number in range(10):
        gap = pixels(tmp_path / "plain" / f"{number}.png") - pixels(tmp_path / "auto" / f"{number}.png")
        assert np.abs(gap).max() <= 1


def test_more_sizes_are_compiled_than_torch_would_by_itself(pipeline, monkeypatch):
    graphs, real = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend=backend, **options))
    torch.compiler.reset()
    pipeline.compile()
    with torch.inference_mode():
        for side in range(4, 15):
            pipeline(torch.zeros(1, 12, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert len(graphs) == 11


def test_results_of_other_settings_are_neither_kept_nor_mixed(infer, tmp_path, album):
    (album / "bad.png").unlink()
    flags = ("--num_steps", "1", "--input", album, "--output", tmp_path / "out")
    out_of(infer(*TO_WARM, *flags))
    first = pixels(tmp_path / "out" / "b.png")
    refused(
        infer(*TO_WARM, *flags, "--strength", "0.5"),
        "out: holds a.png, made with strength 1.0, not 0.5; give another folder, or --overwrite",
    )
    refused(infer(*FROM_COLD, "--target_style", "all", *flags), 'made with targets ["warm"], not ["cold", "warm"]')
    assert np.array_equal(pixels(tmp_path / "out" / "b.png"), first)
    out_of(infer(*TO_WARM, *flags, "--strength", "0.5", "--overwrite"))
    assert not np.array_equal(pixels(tmp_path / "out" / "b.png"), first)
    (tmp_path / "out" / "transfers.json").unlink()
    refused(infer(*TO_WARM, *flags), "out: holds a.png, and no record of what made it")
    Image.new("RGB", (5, 5)).save(tmp_path / "out" / "mine.png")
    out_of(infer(*TO_WARM, *flags, "--overwrite"))
    assert Image.open(tmp_path / "out" / "mine.png").size == (5, 5), "a picture of no job stays"


def test_a_run_that_is_killed_under_other_settings_leaves_no_mixture(infer, tmp_path, album, monkeypatch):
    (album / "bad.png").unlink()
    flags = (*TO_WARM, "--num_steps", "1", "--input", album, "--output", tmp_path / "out")
    out_of(infer(*flags))
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "transfer_batches", lambda *_: 1 / 0)
        assert infer(*flags, "--strength", "0.5", "--overwrite")[0] == 1
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["transfers.json"]
    assert "4 made" in out_of(infer(*flags, "--strength", "0.5"))


def test_a_disk_that_fills_up_under_a_result_ends_a_folder(infer, tmp_path, album, monkeypatch):
    def full(picture, path):
        with written_whole(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs.images, "save_picture", full)
    flags = (*TO_WARM, "--num_steps", "1", "--input", album, "--output", tmp_path / "out", "--batch_size", "1")
    refused(infer(*flags), "could not be written (No space left on device)")


def test_one_run_at_a_time_makes_a_folder_and_a_folder_in_the_way_is_no_result(infer, tmp_path, album):
    (album / "bad.png").unlink()
    flags = (*TO_WARM, "--num_steps", "1", "--input", album, "--output", tmp_path / "out")
    with folder_lock(tmp_path / "out"):
        refused(infer(*flags), "out: is in use by another run")
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    assert "3 made" in out_of(infer(*flags), 1)


def test_a_record_of_another_program_is_not_written_over(infer, tmp_path, album):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "transfers.json").write_text('{"my": "notes"}')
    result = infer(*TO_WARM, "--num_steps", "1", "--input", album, "--output", tmp_path / "out", "--overwrite")
    refused(result, "transfers.json: damaged, or no record of what made the pictures here")
    assert (tmp_path / "out" / "transfers.json").read_text() == '{"my": "notes"}'


#################################################################################
#                        Stage 2: a transfer in a few steps                     #
#################################################################################


@pytest.fixture(scope="module")
def second(studio) -> Path:
    """A checkpoint of stage 2 of the studio, its map of random weights."""
    return second_stage(studio / CHECKPOINT, studio / "checkpoints/stage2_epoch1.pt")


@pytest.fixture
def few(infer, second):
    """The same as `infer` from cold, by stage 2."""
    return lambda *flags: infer("--checkpoint", second, "--source_style", "cold", *flags)


def test_stage_2_transfers_by_map_in_one_evaluation_and_certifies_it(few, second, tmp_path):
    flags = ("--target_style", "warm", "--input", PICTURE, "--output", tmp_path / "a.png")
    out = out_of(few(*flags, "--certify"))
    assert "cold -> warm: map, one leg of 1 step, guidance 1.5, strength 1" in out
    assert "1 made, 1 network evaluations" in out
    mapped = load_pipeline(second, torch.device("cpu"))[0]
    assert sha256_in(out) == sha256_of(mapped, Path(PICTURE)) and "with the defects" in out
    latents = mapped.encode(images.to_pixels(images.to_bytes(images.open_picture(PICTURE)))[None])
    start = on_lattice(mapped, PICTURE).float() * LATTICE
    v = mapped.map_velocity(start, torch.zeros(1), *torch.tensor([[0], [1]]), torch.tensor([1.5]))
    decoded = mapped.decode(latents + v, 32, 32)
    assert np.abs(np.asarray(images.to_picture(decoded[0])).astype(int) - pixels(tmp_path / "a.png")).max() <= 1
    assert "3 network evaluations" in out_of(few(*flags, "--num_steps", "2"))


def test_a_folder_by_map_is_certified_as_a_whole(few, second, tmp_path, album):
    (album / "bad.png").unlink()
    flags = ("--target_style", "warm", "--input", album, "--output", tmp_path / "out", "--batch_size", "2")
    out = out_of(few(*flags, "--certify", "--num_steps", "4"))
    mapped = load_pipeline(second, torch.device("cpu"))[0]
    assert sha256_in(out) == sha256_of(mapped, *(album / name for name in ("a.png", "b.png", "c.png", "deep/d.png")))


def test_the_teacher_of_stage_2_makes_the_pictures_of_stage_1(few, infer, tmp_path):
    flags = ("--input", PICTURE, "--num_steps", "2")
    out_of(infer(*TO_WARM, *flags, "--output", tmp_path / "one.png"))
    out = out_of(
        few("--target_style", "warm", *flags, "--method", "alf", "--output", tmp_path / "two.png", "--certify")
    )
    assert "alf, 2 steps a leg" in out and same(tmp_path / "one.png", tmp_path / "two.png")
    to_warm = ("--target_style", "warm", "--input", PICTURE, "--output", tmp_path / "usual.png")
    assert "alf, 20 steps a leg" in out_of(few(*to_warm, "--method", "alf"))  # not the map's one step
    assert "heun, 20 steps a leg" in out_of(few(*to_warm, "--set", "inference.method=heun"))
    assert "alf, 1 steps a leg" in out_of(few(*to_warm, "--method", "alf", "--num_steps", "1"))


def test_a_structure_of_map_gives_the_original_and_other_styles_without_it(few, infer, second, tmp_path):
    kept, made = tmp_path / "a.safetensors", tmp_path / "made.png"
    flags = ("--target_style", "warm", "--input", PICTURE, "--num_steps", "2", "--strength", "0.75", "--cfg_scale", "3")
    out_of(few(*flags, "--output", made, "--save_structure", kept))
    structure = structure_file.load_structure(kept)
    assert structure.settings.method == "map" and structure.target == "warm" and structure.state.defect.any()
    out = out_of(infer("--checkpoint", second, "--restore", kept, "--output", tmp_path / "back.png"))
    assert "certificate: exact (0 of 768 elements differ)" in out
    mapped = load_pipeline(second, torch.device("cpu"))[0]
    assert np.array_equal(pixels(tmp_path / "back.png"), codecs_own(mapped, Path(PICTURE)))
    of_kept = ("--checkpoint", second, "--from_structure", kept, "--certify", "--target_style")
    out = out_of(infer(*of_kept, "warm", "--cfg_scale", "3", "--output", tmp_path / "again.png"))
    assert same(tmp_path / "again.png", made) and "7 network evaluations" in out  # 4 back, 3 there
    assert "by way of the picture" in out and "exact (0 of 768" in out
    out_of(infer(*of_kept, "cold", "--output", tmp_path / "itself.png"))
    assert same(tmp_path / "itself.png", tmp_path / "back.png")


def test_the_scale_that_was_measured_is_the_maps_alone(infer, second, tmp_path):
    measured = load_checkpoint(second)
    measured.config.inference.cfg_scale = "auto"
    point = {"cfg_scale": 3.0, "style_success": 0.5, "ssim": 0.25}
    measured.front = {"scale": 3.0, "ceiling": 0.5, "pictures": 4, "points": [point]}
    measured.save(tmp_path / "measured.pt")
    network, to_warm = ("--checkpoint", tmp_path / "measured.pt"), ("--target_style", "warm")
    for method, scale in (("map", 3), ("alf", 2)):
        kept = tmp_path / f"{method}.safetensors"
        flags = (*network, "--source_style", "cold", "--input", PICTURE, *to_warm, "--method", method)
        assert f"guidance {scale}," in out_of(infer(*flags, "--output", tmp_path / "a.png", "--save_structure", kept))
        out = out_of(infer(*network, "--from_structure", kept, *to_warm, "--output", tmp_path / "b.png"))
        assert f"guidance {scale}," in out and same(tmp_path / "a.png", tmp_path / "b.png")


def test_a_structure_of_other_legs_than_the_checkpoints_goes_on_with_its_own(infer, studio, tmp_path):
    solved = load_checkpoint(studio / CHECKPOINT)
    solved.config.inference.method, solved.config.inference.inversion = "heun", "fixed_point"
    solved.save(tmp_path / "solved.pt")
    network, kept = ("--checkpoint", tmp_path / "solved.pt"), tmp_path / "a.safetensors"
    legs = ("--method", "alf", "--inversion", "explicit", "--num_steps", "2", "--time_grid", "cosine")
    flags = ("--source_style", "cold", "--target_style", "warm", "--input", PICTURE, "--save_structure", kept)
    out_of(infer(*network, *flags, *legs, "--output", tmp_path / "a.png"))
    to_warm = ("--from_structure", kept, "--target_style", "warm", "--output", tmp_path / "b.png")
    assert "alf, 2 steps a leg" in out_of(infer(*network, *to_warm)) and same(tmp_path / "a.png", tmp_path / "b.png")


def test_all_styles_and_an_interpolation_by_map(few, second, tmp_path):
    one, sheet = ("--input", PICTURE, "--certify", "--output"), tmp_path / "s.png"
    out = out_of(few("--target_style", "all", *one, sheet))
    assert "2 network evaluations" in out
    out_of(few("--target_style", "warm", *one, tmp_path / "warm.png"))
    mapped = load_pipeline(second, torch.device("cpu"))[0]
    assert same(tmp_path / "s_warm.png", tmp_path / "warm.png")
    assert np.array_equal(pixels(tmp_path / "s_cold.png"), codecs_own(mapped, Path(PICTURE)))
    out_of(few("--interpolate", "cold", "warm", "--frames", "3", *one, tmp_path / "i.png"))
    frames = [tmp_path / f"i_frames/i_{number}.png" for number in range(3)]
    assert same(frames[0], tmp_path / "s_cold.png") and same(frames[2], tmp_path / "warm.png")
    assert not same(frames[1], frames[0]) and not same(frames[1], frames[2])


def test_min_structure_by_map_finds_a_strength_whose_transfer_it_is(few, tmp_path):
    flags = ("--target_style", "warm", "--input", PICTURE)
    out = out_of(few(*flags, "--output", tmp_path / "a.png", "--min_structure", "0.9", "--certify"))
    strength = re.search(r"strength (\d\.\d\d) keeps structure (\d\.\d+)", out)
    assert 0 < float(strength[1]) < 1 and float(strength[2]) >= 0.9
    exact = round(float(strength[1]) * 16) / 16
    out_of(few(*flags, "--output", tmp_path / "b.png", "--strength", exact))
    assert same(tmp_path / "a.png", tmp_path / "b.png")


def test_map_is_refused_without_a_map_beyond_its_scales_and_for_a_fixed_point(few, infer, tmp_path):
    one = ("--input", PICTURE, "--output", tmp_path / "a.png")
    refused(infer(*TO_WARM, *one, "--method", "map"), "method map", CHECKPOINT, "stage 1", "stage 2")
    for scale in ("4.5", "0.5"):
        words = (f"cfg_scale {scale}", "from 1 to 4", "--method alf")
        refused(few("--target_style", "warm", *one, "--cfg_scale", scale), *words)
    refused(few("--target_style", "warm", *one, "--inversion", "fixed_point"), "map is exactly reversible already")
    assert not (tmp_path / "a.png").exists()


def test_the_way_back_of_map_with_other_bits_is_told(few, tmp_path, monkeypatch):
    broken_network(monkeypatch, "map_velocity")
    flags = ("--target_style", "warm", "--input", PICTURE, "--output", tmp_path / "a.png")
    out = out_of(few(*flags, "--certify"), 3)
    assert "NOT exact" in out and "other bits" in out
