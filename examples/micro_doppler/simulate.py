"""Micro-Doppler without a radar: spectrograms of simulated people who walk towards a simulated 24 GHz radar.

python examples/micro_doppler/simulate.py --users 10 --recordings 40 --held_out 10

It writes raw_data/micro_doppler/user1/rec001_01.png ..., and the held-out recordings to raw_data/micro_doppler_test.
Pictures of one recording overlap in time: split by the part of the name before the `_`, never by picture.
Everything is a function of (seed, user, recording); users.json beside the folders says who walks how.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from isonext.errors import UserError
from isonext.utils.cli import new_parser, run
from radar import CELLS, PICTURE_S, RADAR_HEIGHT_M, SIZES, Radar, decibels, echo, reduced, spectrogram, to_rgb
from walker import Array, Body, Gait, walk

EQUAL = {"height_m": 1.75, "speed_mps": 1.25, "stride": 1.0}  # with --equal_gait
HOP_S = 1.0  # between the pictures of a recording: they share two of their three seconds


@dataclass(frozen=True)
class Recording:
    """What differs from walk to walk of the same person."""

    gait: Gait  # of that day
    start: float  # phase in cycles
    heading: float  # radians between the way and the line to the radar, at the end of the recording
    nearest_m: float  # distance to the radar at the end
    hurry: Array  # (2, 3) amplitude and phase of slow changes of speed, at 1, 2 and 3 times 0.15 Hz
    snr_db: float  # of the whole echo over the receiver's noise


def draw_user(seed: int, user: int, equal: bool = False) -> Gait:
    """Who walks how: the ranges are those of healthy adults, and a little wider at the arms."""
    draw = np.random.default_rng([seed, user]).uniform
    gait = Gait(
        height_m=draw(1.55, 1.95),
        speed_mps=draw(0.95, 1.35),
        stride=draw(0.92, 1.08),
        legs=draw(0.92, 1.08),
        knees=draw(0.78, 1.0),
        arms=draw(0.4, 1.5),
        elbows_deg=draw(-5, 40),
        leg_asymmetry=draw(-0.1, 0.1),
        arm_asymmetry=draw(-0.35, 0.35),
        lag=draw(-0.04, 0.04),
        girth=draw(0.8, 1.25),
    )
    gait = replace(gait, **EQUAL) if equal else gait
    return replace(gait, legs=gait.legs * gait.stride)  # a longer stride needs legs that swing further


def draw_recording(gait: Gait, seed: int, user: int, recording: int) -> tuple[Recording, np.random.Generator]:
    """A walk of somebody, and the generator that its noise comes from."""
    random = np.random.default_rng([seed, user, recording])
    varied = ("speed_mps", "legs", "knees", "arms")
    factors = {name: getattr(gait, name) * random.uniform(0.95, 1.05) for name in varied}
    today = replace(gait, **factors, elbows_deg=gait.elbows_deg + random.normal(0, 3))
    drawn = Recording(
        gait=today,
        start=random.uniform(),
        heading=np.radians(random.uniform(-20, 20)),
        nearest_m=random.uniform(4, 8),
        hurry=np.stack([random.normal(0, 0.02, 3), random.uniform(0, 2 * np.pi, 3)]),
        snr_db=random.uniform(18, 28),
    )
    return drawn, random


def path_of(recording: Recording, times: Array) -> tuple[Array, Array]:
    """Phase (T,) in cycles and way (T,) in m: both hurry and dawdle together, so that steps keep their length."""
    rates = 2 * np.pi * 0.15 * np.arange(1, 4)[:, None]
    amplitude, shift = recording.hurry[..., None]
    paced = times + (amplitude / rates * (np.sin(rates * times + shift) - np.sin(shift))).sum(0)
    return recording.start + paced / recording.gait.cycle_s, recording.gait.speed_mps * paced


def place(body: Body, recording: Recording) -> Body:
    """The body with the radar at the origin: it ends `nearest_m` away, and `heading` off the line to the radar."""
    end = body.centres[-1, :, 0].mean()
    ahead, aside = recording.nearest_m * np.cos(recording.heading), recording.nearest_m * np.sin(recording.heading)
    return replace(body, centres=body.centres - [end + ahead, aside, RADAR_HEIGHT_M])


def simulate(radar: Radar, gait: Gait, seed: int, user: int, recording: int, pictures: int, size: int) -> list[Array]:
    """The pictures of one recording in dB (size, size)."""
    drawn, random = draw_recording(gait, seed, user, recording)
    pulses, hop = radar.picture_pulses, round(HOP_S * radar.prf_hz)
    times = np.arange(pulses + hop * (pictures - 1)) / radar.prf_hz
    signal = echo(radar, place(walk(drawn.gait, *path_of(drawn, times)), drawn))
    noise = random.normal(size=(2, len(times))) / 2**0.5
    level = np.sqrt((np.abs(signal) ** 2).mean() / 10 ** (drawn.snr_db / 10))
    signal += level * (noise[0] + 1j * noise[1])
    parts = [signal[hop * number : hop * number + pulses] for number in range(pictures)]
    return [decibels(reduced(spectrogram(part), size)) for part in parts]


#################################################################################
#                                   The command                                 #
#################################################################################


def check(args: argparse.Namespace) -> Radar:
    for name in ("users", "recordings", "pictures_per_recording"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    for name in ("seed", "held_out"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be 0 or more")
    if args.size not in SIZES:
        raise UserError(f"--size {args.size}: must be one of {', '.join(map(str, SIZES))}")
    if not (args.carrier_ghz > 0 and args.prf >= 2 * CELLS / PICTURE_S):
        raise UserError("--carrier_ghz, --prf: a carrier above 0 and a PRF of 171 Hz or more are needed")
    return Radar(args.carrier_ghz * 1e9, args.prf)


def write_users(folder: Path, args: argparse.Namespace, users: dict[str, Gait]) -> None:
    """users.json. Where one of other settings lies, its pictures would mix with the new ones: an error."""
    from isonext.utils.io import written_whole

    kept = ("seed", "size", "pictures_per_recording", "equal_gait", "prf", "carrier_ghz", "users", "recordings",
            "held_out")  # fmt: skip
    tree = {"simulated": True, "settings": {name: getattr(args, name) for name in kept},
            "users": {name: asdict(gait) | {"cycle_s": gait.cycle_s} for name, gait in users.items()}}  # fmt: skip
    text, path = json.dumps(tree, indent=1) + "\n", folder / "users.json"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: is of other settings; delete {folder} or choose another --output")
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def main(args: argparse.Namespace) -> None:
    from PIL import Image
    from tqdm import tqdm

    from isonext.data.images import save_picture

    radar = check(args)
    users = {f"user{number}": draw_user(args.seed, number, args.equal_gait) for number in range(1, args.users + 1)}
    test = args.output.with_name(args.output.name + "_test")
    for folder in [args.output] + [test] * bool(args.held_out):
        write_users(folder, args, users)
    total = args.recordings + args.held_out
    with tqdm(total=args.users * total * args.pictures_per_recording, unit="picture", disable=None) as bar:
        for number, (name, gait) in enumerate(users.items(), 1):
            for recording in range(1, total + 1):
                folder = (args.output if recording <= args.recordings else test) / name
                made = simulate(radar, gait, args.seed, number, recording, args.pictures_per_recording, args.size)
                for part, db in enumerate(made, 1):
                    save_picture(Image.fromarray(to_rgb(db)), folder / f"rec{recording:03}_{part:02}.png")
                    bar.update()
    held = f", {args.held_out} held-out ones in {test}" if args.held_out else ""
    print(f"{args.users} users: {args.recordings} recordings each in {args.output}{held}")


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Simulated micro-Doppler spectrograms of people who walk towards a radar.", config=False)
    parser.add_argument("--users", type=int, default=10, help="how many people")
    parser.add_argument("--recordings", type=int, default=40, help="walks of each")
    parser.add_argument("--held_out", type=int, default=0, help="further walks of each, written to OUTPUT_test")
    parser.add_argument("--pictures_per_recording", type=int, default=4, help="of 3 s, 1 s apart")
    parser.add_argument("--output", type=Path, default=Path("raw_data/micro_doppler"), help="a folder a user")
    parser.add_argument("--size", type=int, default=256, help="pixels a side: 256, or less for runs on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the people and their walks")
    parser.add_argument("--equal_gait", action="store_true", help="all of one height, speed and cadence: harder")
    parser.add_argument("--prf", type=float, default=2000.0, help="pulses a second")
    parser.add_argument("--carrier_ghz", type=float, default=24.0, help="of the radar")
    return parser


if __name__ == "__main__":
    run(main, build_parser())
