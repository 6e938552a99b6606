"""Everything in one command: simulate people who walk, preprocess, train, sample, and measure what was generated.

python examples/micro_doppler/run_pipeline.py --quick        # 5 people, 64 px, no download: minutes on two CPU cores
python examples/micro_doppler/run_pipeline.py                # 256 px, a VA-VAE: for a GPU

It runs the commands that it prints, one after the other, and stops at the first that fails; run again, it goes on
where it stood. Without --quick it needs the autoencoder that configs/micro_doppler.json names.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from isonext.config import Config, load_config
from isonext.errors import UserError
from isonext.utils.cli import new_parser, run

ROOT = Path(__file__).resolve().parents[2]
PICTURES = 4  # of a recording


def commands(args: argparse.Namespace, config_path: Path, config: Config) -> list[list[str]]:
    """The five commands, each as its words. As many pictures of each user are generated as are held out."""
    real, output, codec = Path(config.data.raw_data_root), args.output, config.autoencoder.name
    report = Path(config.checkpoint.save_dir) / "report.json"
    checkpoint = Path(config.checkpoint.save_dir) / f"stage1_epoch{config.training.stage1_epochs}.pt"
    shared = ["--config", config_path, *(word for each in args.overrides for word in ("--set", each))]
    here = Path(__file__).resolve().parent
    people = ["--users", args.users, "--recordings", args.recordings, "--held_out", args.held_out]
    sizes = ["--pictures_per_recording", PICTURES, "--size", config.data.image_size, "--seed", args.seed]
    made = ["--num_samples_per_style", PICTURES * args.held_out, "--batch_size", 64, "--seed", args.seed]
    sets = ["--real_train", real, "--real_test", real.with_name(f"{real.name}_test"), "--generated", output]
    plan = [
        [here / "simulate.py", *people, *sizes, "--output", real],
        [ROOT / "preprocess_latents.py", *shared],
        [ROOT / "train.py", *shared, "--resume"],
        [ROOT / "sample.py", "--checkpoint", checkpoint, *made, "--output", output],
        [here / "evaluate.py", *sets, "--autoencoder", codec, "--output", report, "--seed", args.seed],
    ]
    return [[str(word) for word in words] for words in plan]


def check_autoencoder(name: str) -> None:
    """UserError if it cannot be loaded: better now than after an hour's simulation."""
    import torch

    from isonext.data.autoencoder import load_autoencoder

    load_autoencoder(name, torch.device("cpu"))


def main(args: argparse.Namespace) -> int:
    for name in ("users", "recordings", "held_out"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    path = args.config or ROOT / "configs" / f"micro_doppler{'_quick' * args.quick}.json"
    config = load_config(path, args.overrides)
    check_autoencoder(config.autoencoder.name)
    started = time.perf_counter()
    for number, words in enumerate(commands(args, path, config), 1):
        print(f"\n{number}/5  python {shlex.join(words)}")
        begun = time.perf_counter()
        if status := subprocess.run([sys.executable, *words]).returncode:
            return status
        print(f"({time.perf_counter() - begun:.0f} s)")
    print(f"\nlook at {args.output / 'grid.png'}: a row a user   ({time.perf_counter() - started:.0f} s)")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Simulate, preprocess, train, sample and evaluate micro-Doppler spectrograms.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="configs/micro_doppler_quick.json: for two CPU cores")
    kind.add_argument("--config", type=Path, help="in place of configs/micro_doppler.json")
    parser.add_argument("--users", type=int, default=5, help="how many people")
    parser.add_argument("--recordings", type=int, default=40, help="walks of each to learn from, of four pictures")
    parser.add_argument("--held_out", type=int, default=10, help="further walks of each to compare with")
    parser.add_argument("--output", type=Path, default=Path("outputs/micro_doppler"), help="generated pictures")
    parser.add_argument("--seed", type=int, default=0, help="of people, noise and classifiers")
    return parser


if __name__ == "__main__":
    run(main, build_parser())
