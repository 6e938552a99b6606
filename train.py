"""Train the velocity field of all styles with the OT-CFM loss, on the latents that preprocess_latents.py wrote.

python train.py                                  # config.json, one process, GPU or CPU
python train.py --resume                         # go on from the newest checkpoint
torchrun --nproc_per_node 2 train.py             # the same run on two processes, GPUs or CPUs

Randomness is a function of (seed, step): stopping and going on changes nothing.
"""

import argparse

from cli import new_parser, run
from config import load_config


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Train the velocity field of all styles on a latent store.")
    parser.add_argument("--config", default="config.json", help="the JSON config")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        metavar="CHECKPOINT",
        help="go on from the newest checkpoint in checkpoint.save_dir, or from the one given",
    )
    start.add_argument(
        "--init", metavar="CHECKPOINT", help="start from the weights of another run; new styles get new embeddings"
    )
    return parser


def main(args: argparse.Namespace) -> int:
    from trainer import train  # torch takes seconds to import, and --help should not

    trainer = train(load_config(args.config, args.overrides), args.resume, args.init)
    return 0 if trainer.step == trainer.total_steps else 130


if __name__ == "__main__":
    run(main, build_parser())
