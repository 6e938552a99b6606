"""The micro-Doppler example: the physics of its pictures, and that its report tells good ones from bad ones."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT, call, refused
from isonext import errors
from isonext.evaluation.intervals import Estimate, bootstrap, share
from isonext.utils import cli

sys.path.append(str(ROOT / "examples/micro_doppler"))

import scores
import simulate
from radar import (
    CELLS,
    RANGE_DB,
    Radar,
    check_aliasing,
    colours,
    decibels,
    echo,
    ellipsoid_rcs,
    from_rgb,
    reduced,
    ridge_speeds,
    spectrogram,
    step_rate,
    to_rgb,
)
from walker import PARTS, Body, Gait, arm_angles, cyclic, leg_angles, walk

FOLDER = ROOT / "examples/micro_doppler"
RADAR = Radar()
AVERAGE = Gait(height_m=1.75, speed_mps=1.2)


def command(name: str):
    """The module of a command; by its path, since the root has an evaluate.py of its own."""
    spec = importlib.util.spec_from_file_location(f"micro_doppler_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ran(monkeypatch, capsys):
    """Run a command of the example in this process: returns (status, stdout, stderr)."""

    def run(name: str, *arguments) -> tuple[int, str, str]:
        module = command(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(module.main, module.build_parser())
        out, err = capsys.readouterr()
        return ended.value.code, out, "".join(line for line in err.splitlines(True) if not line.startswith("\r"))

    return run


def sphere(distance: np.ndarray, radius: float = 0.1) -> Body:
    """A sphere on the x axis, (T,) m away."""
    centres = np.stack([distance, 0 * distance, 0 * distance], -1)[:, None]
    along, across = (np.broadcast_to(axis, centres.shape) for axis in ([0.0, 0, 1], [0.0, 1, 0]))
    return Body(centres, along, across, np.full((1, 3), radius))


def recorded(gait: Gait, heading: float = 0.0, noise_free_s: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Noise-free dB (256, 256) of a steady walk, and the cosine of its aspect angle over time (T,)."""
    times = np.arange(round(noise_free_s * RADAR.prf_hz)) / RADAR.prf_hz
    drawn = simulate.Recording(gait, 0.0, np.radians(heading), 6.0, np.zeros((2, 3)), 20.0)
    body = simulate.place(walk(gait, *simulate.path_of(drawn, times)), drawn)
    base = body.centres[:, PARTS.index("torso")]
    return decibels(spectrogram(echo(RADAR, body))), -base[:, 0] / np.linalg.norm(base, axis=1)


#################################################################################
#                                   The radar                                   #
#################################################################################


@pytest.mark.parametrize("speed", [-5.9, -3.0, 0.0, 0.4, 1.5, 6.1])
def test_a_point_of_constant_speed_lands_on_its_doppler_bin(speed):
    body = sphere(30 - speed * np.arange(RADAR.picture_pulses) / RADAR.prf_hz)
    power = spectrogram(echo(RADAR, body))
    bin_mps = RADAR.wavelength_m / 2 * RADAR.prf_hz / CELLS
    assert bin_mps == pytest.approx(0.0488, abs=1e-4)
    assert np.abs(RADAR.row_speeds(CELLS)[power.argmax(0)] - speed).max() <= 0.5 * bin_mps + 1e-9
    assert np.abs(ridge_speeds(decibels(power), RADAR) - speed).max() < 0.3 * bin_mps
    small = reduced(power, 64)
    assert small.sum() * 16 == pytest.approx(power.sum())
    assert np.abs(RADAR.row_speeds(64)[small.argmax(0)] - speed).max() <= 2.5 * bin_mps


def test_the_echo_of_a_sphere_follows_the_radar_equation():
    signal = echo(RADAR, sphere(np.array([5.0, 5.0 + RADAR.wavelength_m / 8, 5.0 + RADAR.wavelength_m / 4])))
    assert np.abs(signal) == pytest.approx(np.sqrt(np.pi * 0.1**2) / 25, rel=3e-3)
    assert np.angle(signal[1:] / signal[:-1]) == pytest.approx([-np.pi / 2] * 2)  # there and back: a half a quarter


def test_rcs_of_an_ellipsoid():
    directions = np.random.default_rng(0).normal(size=(50, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    assert ellipsoid_rcs(np.full(3, 0.2), directions) == pytest.approx(np.pi * 0.2**2)
    a, b, c = 0.1, 0.2, 0.4
    along_axes = ellipsoid_rcs(np.array([a, b, c]), np.eye(3))
    assert along_axes == pytest.approx(np.pi * np.array([(b * c / a) ** 2, (a * c / b) ** 2, (a * b / c) ** 2]))


def test_a_body_part_is_seen_from_its_own_axes():
    body = sphere(np.array([10.0]))
    lying = replace(body, along=np.array([[[1.0, 0, 0]]]), semi_axes=np.array([[0.1, 0.2, 0.4]]))
    assert np.abs(echo_still(lying)) ** 2 * 1e4 == pytest.approx(np.pi * (0.1 * 0.2 / 0.4) ** 2)  # its tip
    upright = replace(body, semi_axes=np.array([[0.1, 0.2, 0.4]]))
    assert np.abs(echo_still(upright)) ** 2 * 1e4 == pytest.approx(np.pi * (0.2 * 0.4 / 0.1) ** 2)  # its front


def echo_still(body: Body) -> np.ndarray:
    twice = {name: np.repeat(getattr(body, name), 2, 0) for name in ("centres", "along", "across")}
    return echo(RADAR, replace(body, **twice))[0]


def test_what_would_fold_over_is_refused():
    assert RADAR.fastest_mps == pytest.approx(2000 * 299_792_458 / 24e9 / 4)
    times = np.arange(10) / RADAR.prf_hz
    check_aliasing(RADAR, sphere(20 - 0.999 * RADAR.fastest_mps * times).centres)
    with pytest.raises(errors.UserError, match=r"--prf 2000: .* 6\.25 m/s"):
        check_aliasing(RADAR, sphere(20 + 1.001 * RADAR.fastest_mps * times).centres)


#################################################################################
#                                   The walker                                  #
#################################################################################


def test_the_tables_of_boulics_model():
    gait = Gait(height_m=1 / 0.491, speed_mps=1.0)  # a leg of 1 m: relative speed 1, below where the tables shift
    assert (gait.leg_m, gait.relative_speed, gait.cycle_s) == pytest.approx((1, 1, 1.346))
    assert replace(gait, stride=1.1).cycle_s == pytest.approx(1.1 * 1.346)
    assert Gait(height_m=1 / 0.491, speed_mps=2.25).cycle_s == pytest.approx(1.346 / 1.5)
    phase = np.array([0.5, 0.9, 0.75, 0.4])
    hip, knee, _ = leg_angles(gait, phase, 1.0)
    assert np.degrees(hip[:2]) == pytest.approx([-15, 25]) and np.degrees(knee[2:]) == pytest.approx([70, 3])
    shoulder, elbow = arm_angles(gait, np.array([0.0, 0.5]), 1.0)
    assert np.degrees(shoulder) == pytest.approx([3 - 1.5 * 9.88, 3 + 0.5 * 9.88])
    assert np.degrees(arm_angles(replace(gait, elbows_deg=9), phase, 1)[1] - arm_angles(gait, phase, 1)[1]) == (
        pytest.approx(9)
    )
    fast = Gait(height_m=1 / 0.491, speed_mps=2.999999)
    assert np.degrees(leg_angles(fast, np.array([0.1, 0.5, 0.9]), 1)[0]) == pytest.approx([30, -15, 31], abs=1e-3)
    assert np.degrees(elbow).max() < 60
    with pytest.raises(ValueError, match="relative speed"):
        Gait(1.75, 0.3)


def test_a_cyclic_curve_is_periodic_and_has_its_extremes_at_its_points():
    x, y = [-0.1, 0.3, 0.6], [2.0, -1.0, 5.0]
    phase = np.linspace(-1, 2, 3001)
    curve = cyclic(x, y, phase)
    assert cyclic(x, y, np.array(x)) == pytest.approx(y)
    assert curve[:1000] == pytest.approx(curve[1000:2000]) and (curve.min(), curve.max()) == (-1, 5)


def test_the_body_keeps_its_lengths_and_its_left_side_is_its_right_half_a_cycle_later():
    phase = np.linspace(0, 2, 801)  # half a cycle is 200 samples
    body = walk(AVERAGE, phase, phase * AVERAGE.cycle_s * AVERAGE.speed_mps)
    assert np.linalg.norm(body.along, axis=-1) == pytest.approx(1)
    assert (body.along * body.across).sum(-1) == pytest.approx(0, abs=1e-12)
    half_way = AVERAGE.cycle_s * AVERAGE.speed_mps / 2
    for part in ("upper arm", "lower arm", "thigh", "shin", "foot"):
        right, left = (body.centres[:, PARTS.index(f"{side} {part}")] for side in ("right", "left"))
        assert left[200:] == pytest.approx(right[:-200] * [1, -1, 1] + [half_way, 0, 0])
    lame = walk(replace(AVERAGE, leg_asymmetry=0.2), phase, 0 * phase).centres[:, :, 0]
    right, left = (np.ptp(lame[:, PARTS.index(f"{side} thigh")]) for side in ("right", "left"))
    assert right > 1.3 * left


def test_the_feet_stand_in_turn_and_the_head_is_at_its_height():
    phase = np.linspace(0, 1, 1001)
    body = walk(AVERAGE, phase, phase * AVERAGE.cycle_s * AVERAGE.speed_mps)
    speeds = np.diff(body.centres[:, :, 0], axis=0) * 1000 / AVERAGE.cycle_s
    right, left = (speeds[:, PARTS.index(f"{side} foot")] for side in ("right", "left"))
    assert abs(right[100:400]).max() < 0.6 < 3 < right.max() < 5  # it stands, while
    assert left[100:400].max() > 3  # the other one swings
    assert speeds.mean(0) == pytest.approx(AVERAGE.speed_mps)
    assert body.centres[:, 0, 2].max() == pytest.approx((0.039 + 0.491 + 0.288 + 0.065) * 1.75, abs=0.02)


#################################################################################
#                                 The pictures                                  #
#################################################################################


@pytest.mark.parametrize("heading", [0, 35, 60])
def test_the_ridge_follows_speed_times_the_cosine_of_the_aspect_angle(heading):
    db, cosine = recorded(AVERAGE, heading)
    speeds = ridge_speeds(db, RADAR)
    assert speeds.mean() == pytest.approx(AVERAGE.speed_mps * cosine.mean(), abs=0.04)
    for part, truth in zip(np.array_split(speeds, 2), np.array_split(cosine, 2), strict=True):
        assert part.mean() == pytest.approx(AVERAGE.speed_mps * truth.mean(), abs=0.08)


@pytest.mark.parametrize("gait", [AVERAGE, Gait(1.6, 1.0, stride=1.08), Gait(1.9, 1.3, stride=0.92, arms=0.5)])
@pytest.mark.parametrize("size", [256, 64])
def test_the_picture_has_two_steps_a_cycle(gait, size):
    power = 10 ** (recorded(gait)[0] / 10)
    assert step_rate(decibels(reduced(power, size)), RADAR) == pytest.approx(2 / gait.cycle_s, rel=0.04)


def test_the_limbs_are_on_both_sides_of_the_ridge_and_nothing_walks_away():
    db, _ = recorded(AVERAGE)
    speeds, strong = RADAR.row_speeds(CELLS), (db > -35).mean(1)
    assert strong[(speeds > 2.5) & (speeds < 4)].min() > 0  # swinging feet
    assert strong[(speeds > 0.1) & (speeds < 0.8)].min() > 0.05  # standing legs
    assert strong[speeds < -0.5].max() == 0


def test_colours_give_back_the_decibels():
    assert len(np.unique(colours(), axis=0)) == 256
    ramp = np.linspace(-RANGE_DB, 0, 64**2).reshape(64, 64)
    rgb = to_rgb(ramp)
    back, off = from_rgb(rgb)
    assert off == 0 and np.abs(back - ramp).max() <= RANGE_DB / 255 / 2 + 1e-9
    assert np.array_equal(to_rgb(back), rgb)
    luminance = colours() @ [0.299, 0.587, 0.114]
    assert np.diff(luminance).min() > -1 and luminance[-1] > 230  # grows, but for rounding
    assert from_rgb(np.full((8, 8, 3), [0, 255, 0], np.uint8))[1] > 100
    grainy = (rgb.astype(int) + np.random.default_rng(0).integers(-3, 4, rgb.shape)).clip(0, 255).astype(np.uint8)
    assert np.abs(from_rgb(grainy)[0] - ramp).mean() < 0.5


def test_a_recording_is_a_function_of_seed_user_and_number():
    def made(seed: int, user: int, recording: int) -> np.ndarray:
        gait = simulate.draw_user(seed, user)
        return np.stack(simulate.simulate(RADAR, gait, seed, user, recording, 2, 64))

    first = made(1, 2, 3)
    assert np.array_equal(first, made(1, 2, 3)) and first.shape == (2, 64, 64)
    assert (first.min(), first.max()) == (-RANGE_DB, 0) or first.max() == 0
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert np.abs(made(*other) - first).mean() > 1
    column = round(1.0 / RADAR.column_s(64))  # the second picture begins a second later in the same walk
    assert np.corrcoef(first[0][:, column:].ravel(), first[1][:, :-column].ravel())[0, 1] > 0.85


def test_users_of_equal_gait_differ_in_nothing_that_is_equal():
    users = [simulate.draw_user(0, number, equal=True) for number in range(1, 9)]
    assert {(each.height_m, each.speed_mps, each.cycle_s) for each in users} == {(1.75, 1.25, users[0].cycle_s)}
    assert len({each.arms for each in users}) == 8
    assert simulate.draw_user(0, 3).arms == users[2].arms


#################################################################################
#                                 The commands                                  #
#################################################################################


def test_simulate_writes_recordings_and_held_out_ones_apart(ran, tmp_path):
    people = ["--users", "2", "--recordings", "2", "--held_out", "1"]
    flags = [*people, "--pictures_per_recording", "2", "--size", "32", "--output"]
    status, out, err = ran("simulate", *flags, tmp_path / "md")
    assert status == 0 and "2 users" in out, err
    found = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert sorted(found) == [
        *(f"md/user{user}/rec{rec:03}_{part:02}.png" for user in (1, 2) for rec in (1, 2) for part in (1, 2)),
        *(f"md_test/user{user}/rec003_{part:02}.png" for user in (1, 2) for part in (1, 2)),
    ]
    picture = Image.open(tmp_path / "md/user2/rec001_02.png")
    assert (picture.mode, picture.size) == ("RGB", (32, 32)) and from_rgb(np.asarray(picture))[1] == 0
    told = json.loads((tmp_path / "md/users.json").read_text())
    assert told["simulated"] and told["users"]["user1"]["speed_mps"] == simulate.draw_user(0, 1).speed_mps
    assert ran("simulate", *flags, tmp_path / "md")[0] == 0
    assert found == {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.png")}
    refused(ran("simulate", *flags, tmp_path / "md", "--seed", 1), "users.json", "other settings", "--output")
    ran("simulate", *flags, tmp_path / "more", "--users", 3)  # who else walks changes nobody's walk
    assert (tmp_path / "more/user2/rec001_02.png").read_bytes() == found["md/user2/rec001_02.png"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prf", 1000], ["--prf 1000", "folds over"]),
        (["--prf", 100], ["--prf"]),
        (["--size", 48], ["--size 48", "64"]),
        (["--users", 0], ["--users 0"]),
        (["--held_out", -1], ["--held_out -1"]),
    ],
)
def test_simulate_refuses_in_one_line(ran, tmp_path, flags, words):
    refused(ran("simulate", "--users", 1, "--recordings", 1, "--output", tmp_path / "md", *flags), *words)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("name", ["simulate", "evaluate"])
def test_help_imports_no_torch(name, tmp_path):
    arguments = [sys.executable, "-X", "importtime", FOLDER / f"{name}.py", "--help"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr
    assert "argparse" in done.stderr and "torch" not in done.stderr


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """md and md_test: 3 users of 8 and 3 recordings, two pictures each, 32 px."""
    root = tmp_path_factory.mktemp("real")
    parser = simulate.build_parser()
    flags = "--users 3 --recordings 8 --held_out 3 --pictures_per_recording 2 --size 32 --seed 4"
    simulate.main(parser.parse_args([*flags.split(), "--output", str(root / "md")]))
    return root


def judged(ran, real: Path, made: Path, report: Path) -> dict:
    """The figures of evaluate.py, each by its mean."""
    flags = ("--real_train", real / "md", "--real_test", real / "md_test", "--steps", 60, "--output", report)
    status, out, err = ran("evaluate", *flags, "--generated", made)
    assert status == 0, err
    assert report.with_suffix(".md").read_text().strip() in out
    tree = json.loads(report.read_text())
    assert tree["pictures"]["generated"] == len([path for path in made.rglob("*.png") if path.stem != "grid"])
    return {
        column: {name: value and value["mean"] for name, value in each.items()}
        for column, each in tree["figures"].items()
    }


def test_the_report_on_what_a_perfect_generator_would_make(ran, real, tmp_path):
    good = tmp_path / "good"  # in the layout of sample.py
    good.mkdir()
    Image.new("RGB", (99, 33)).save(good / "grid.png")
    for user in (1, 2, 3):
        for number in range(8):
            gait = simulate.draw_user(4, user)
            db = simulate.simulate(RADAR, gait, 4, user, 100 + number, 1, 32)[0]
            Image.fromarray(to_rgb(db)).save(good / f"user{user}_{number:03}.png")
    figures = judged(ran, real, good, tmp_path / "report.json")
    assert figures["real"]["recognised"] > 0.9 and figures["generated"]["recognised"] > 0.9
    assert figures["generated"]["teaches"] > 0.8 and figures["generated"]["copies"] < 0.2
    assert figures["generated"]["off_map"] == 0
    assert figures["generated"]["diversity_db"] == pytest.approx(figures["real"]["diversity_db"], rel=0.1)
    assert figures["generated"]["speed_mps"] == pytest.approx(figures["real"]["speed_mps"], abs=0.05)


def test_copies_and_swapped_users_are_known(real):
    users = ["user1", "user2", "user3"]
    train, test = (scores.read(real / name, users, 32, RADAR) for name in ("md", "md_test"))
    classifier = scores.train_classifier(train, 3, steps=60, seed=0)
    assert test.mean(classifier.hits(test)).mean > 0.9
    swapped = replace(test, user=(test.user + 1) % 3)
    assert swapped.mean(classifier.hits(swapped)).mean < 0.1
    figures = scores.measure(train, test, train, users, steps=1, seed=0)
    copied = {name: value.mean for name, value in figures["generated"].items()}
    assert (copied["nearest_db"], copied["copies"]) == (0, 1)
    assert (copied["speed_distance"], copied["steps_distance"]) == (0, 0)
    assert figures["real"]["copies"].mean <= 0.12 and figures["real"]["nearest_db"].mean > 1


def test_without_generated_pictures_and_with_a_broken_one(ran, real, tmp_path):
    shutil.copytree(real / "md_test", tmp_path / "test")
    (tmp_path / "test/user1/rec009_01.png").write_bytes(b"no picture")
    flags = ("--real_train", real / "md", "--real_test", tmp_path / "test", "--steps", 2)
    status, out, _ = ran("evaluate", *flags, "--output", tmp_path / "r.json")
    assert status == 1 and "skipped: " in out and "rec009_01.png" in out
    assert "generated" not in json.loads((tmp_path / "r.json").read_text())["figures"]


def test_the_autoencoders_own_loss_is_a_column(ran, real, tmp_path):
    flags = (
        "--real_train",
        real / "md",
        "--real_test",
        real / "md_test",
        "--steps",
        2,
        "--output",
        tmp_path / "r.json",
    )
    for codec, lossless in (("dct:f2c12", True), ("dct:f8c3", False)):
        assert ran("evaluate", *flags, "--autoencoder", codec)[0] == 0
        figures = json.loads((tmp_path / "r.json").read_text())["figures"]
        same = {name: figures["coded"][name] == figures["real"][name] for name in ("nearest_db", "off_map", "copies")}
        assert all(same.values()) if lossless else not any(same.values()), (codec, same)
    refused(ran("evaluate", *flags, "--autoencoder", "dct:f3"), "dct:f3")


def test_evaluate_refuses_in_one_line(ran, real, tmp_path):
    flags = ("--real_train", real / "md", "--real_test", real / "md_test", "--steps", 2)
    refused(ran("evaluate", *flags, "--output", tmp_path / "report.txt"), "report.txt", ".json")
    refused(ran("evaluate", *flags, "--generated", tmp_path / "none"), "none", "no such folder")
    (tmp_path / "bob").mkdir()
    refused(ran("evaluate", *flags, "--generated", tmp_path), "no pictures", "<user>_001.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "bob_001.png")
    refused(ran("evaluate", *flags, "--generated", tmp_path), "bob is no user", "user1, user2, user3")
    Image.new("RGB", (48, 48)).save(tmp_path / "bob/a.png")
    shutil.copytree(tmp_path / "bob", tmp_path / "two/a")
    shutil.copytree(tmp_path / "bob", tmp_path / "two/b")
    refused(ran("evaluate", "--real_train", tmp_path / "two", "--real_test", tmp_path), "48 x 48", "64")


def spectrograms(levels: list[float], user: list[int], recording: list[int]) -> scores.Spectrograms:
    """Flat pictures of these dB, whose speed is the level too."""
    values = torch.tensor(levels)
    pictures = values[:, None, None, None].expand(-1, 1, 16, 16)
    people, walks = torch.tensor(user), torch.tensor(recording)
    return scores.Spectrograms(pictures, people, walks, values.double(), values.double(), values)


def test_measures_on_known_values():
    some = spectrograms([0.0, 1.0, 4.0, 9.0, 9.0], user=[0, 0, 0, 1, 1], recording=[0, 0, 1, 2, 2])
    far = scores.diversity(some)  # recording 0 is compared with 1 only: 3.5 (4 and 3); user 1 has one recording
    assert far.mean == 3.5 and math.isnan(far.low)
    assert scores.diversity(some.part(some.user == 1)) is None
    assert some.mean(some.speed).mean == pytest.approx((0.5 + 4 + 9) / 3)
    shifted = spectrograms([2.0, 3.0, 6.0, 10.0], user=[0, 0, 0, 1], recording=[0, 1, 2, 3])
    assert scores.distance_by_user(shifted, some, lambda each: each.speed).mean == pytest.approx((2 + 1) / 2)
    fewer = scores.as_many(some, spectrograms([0.0, 0.0], user=[0, 0], recording=[0, 1]), seed=0)
    assert fewer.user.tolist() == [0, 0]


def test_copies_in_a_user_are_at_no_distance_whatever_their_number():
    """A generator that makes one picture over and over: above 25 rows cdist's own choice finds them apart."""
    one = -40 * torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    some = replace(spectrograms([0.0] * 30, user=[0] * 30, recording=list(range(30))), pictures=one.repeat(30, 1, 1, 1))
    assert scores.diversity(some) == Estimate(0, 0, 0)


def test_diversity_and_its_jackknife_by_hand():
    levels, user = [0.0, 1.0, 4.0, 9.0, 2.0, 2.0, 5.0, 6.0], [0, 0, 0, 0, 1, 1, 1, 1]
    recording = [0, 0, 1, 2, 3, 4, 4, 5]

    def by_hand(left_out: int | None) -> float:
        kept = [place for place in range(8) if recording[place] != left_out]
        values = {}
        for one in kept:
            others = [o for o in kept if user[o] == user[one] and recording[o] != recording[one]]
            far = sum(abs(levels[one] - levels[other]) for other in others) / len(others)
            values.setdefault(recording[one], []).append(far)
        return sum(sum(each) / len(each) for each in values.values()) / len(values)

    found, without = scores.diversity(spectrograms(levels, user, recording)), [by_hand(number) for number in range(6)]
    deviation = (5 * np.var(without)) ** 0.5
    assert found.mean == pytest.approx(by_hand(None))
    assert (found.low, found.high) == pytest.approx((found.mean - 1.96 * deviation, found.mean + 1.96 * deviation))


def test_the_interval_of_diversity_holds_the_truth_about_95_times_in_100():
    """One pixel of deviation 1: two are 2 / sqrt(pi) apart on average. Resampled pictures hold that 2 times in 3."""
    pixels, held = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)), 0
    for row in pixels:
        flat = spectrograms([0.0] * 40, user=[0] * 20 + [1] * 20, recording=list(range(40)))
        found = scores.diversity(replace(flat, pictures=row.view(40, 1, 1, 1)))
        held += found.low <= 2 / math.pi**0.5 <= found.high
    assert held / 200 > 0.89


def test_shares_have_wilsons_interval_over_recordings_and_few_recordings_have_none_for_values():
    some = spectrograms([float(n) for n in range(12)], user=[0] * 12, recording=[n // 2 for n in range(12)])
    assert some.mean(torch.ones(12, dtype=torch.bool)) == share(torch.ones(6, dtype=torch.bool))
    assert some.mean(some.speed) == bootstrap(torch.arange(6) * 2 + 0.5)
    few = some.part(torch.arange(8))
    assert few.mean(few.speed).mean == 3.5 and math.isnan(few.mean(few.speed).low)


def test_a_classifier_is_a_function_of_its_seed():
    known = spectrograms([-40.0, -5.0] * 4, user=[0, 1] * 4, recording=list(range(8)))
    one, two, other = (scores.train_classifier(known, 2, steps=20, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)
    assert one.hits(known).all()


#################################################################################
#                                  The pipeline                                 #
#################################################################################

TINY = ["--users", "2", "--recordings", "3", "--held_out", "1", "--set", "data.image_size=16"]
TINY += ["--set", "model.hidden_dim=24", "--set", "model.num_layers=1", "--set", "training.compile=false"]
TINY += ["--set", "training.stage1_epochs=2", "--set", "training.batch_size=8", "--set", "training.num_workers=0"]
TINY += ["--set", "data.val_fraction=0.34"]
PIPELINE = "examples/micro_doppler/run_pipeline.py"


@pytest.mark.slow
def test_the_pipeline_makes_pictures_of_every_user_and_measures_them(tmp_path):
    done = call(tmp_path, PIPELINE, "--quick", *TINY)
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "outputs/micro_doppler").iterdir()}
    assert made == {"grid.png", "samples.json"} | {
        f"user{user}_{number:03}.png" for user in (1, 2) for number in range(1, 5)
    }
    report = json.loads((tmp_path / "checkpoints/micro_doppler_quick/report.json").read_text())
    assert report["pictures"] == {"training": 24, "held-out": 8, "generated": 8} and "coded" in report["figures"]
    assert "look at outputs/micro_doppler/grid.png" in done.stdout
    meta = json.loads((tmp_path / "latents/micro_doppler_quick/meta.json").read_text())
    train, val = ({name.rpartition("_")[0] for name in meta["split"][side]} for side in ("train", "val"))
    assert train and val and not train & val and not meta["flip"]


@pytest.mark.slow
def test_the_pipeline_stops_at_the_first_command_that_fails(tmp_path):
    done = call(tmp_path, PIPELINE, "--quick", *TINY, "--set", "data.image_size=48")
    refused((done.returncode, done.stdout, done.stderr), "--size 48")
    assert "1/5" in done.stdout and "2/5" not in done.stdout
    done = call(tmp_path, PIPELINE)  # without the VA-VAE that its config names
    refused((done.returncode, done.stdout, done.stderr), "models/vavae", "no such file")
    assert not list(tmp_path.rglob("*.png"))
    done = call(tmp_path, PIPELINE, "--quick", "--held_out", "0")
    refused((done.returncode, done.stdout, done.stderr), "--held_out 0")
