"""Train the velocity field of all styles with the OT-CFM loss, on the latents that preprocess_latents.py wrote.

python train.py                                  # config.json, one process, GPU or CPU
python train.py --resume                         # go on from the newest checkpoint
python train.py --plan --vram 8                  # what it costs and how it fits 8 GiB; trains nothing
python train.py --stage 2 --init checkpoints/stage1_epoch200.pt      # transfers in one evaluation, taught by stage 1
torchrun --nproc_per_node 2 train.py             # the same run on two processes, GPUs or CPUs

Randomness is a function of (seed, step): stopping and going on changes nothing.
"""

import argparse

from isonext.config import load_config, named_autoencoder
from isonext.errors import UserError
from isonext.utils.cli import new_parser, run


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
    start.add_argument(
        "--plan", action="store_true", help="only print what a run costs, and the flags that make it fit"
    )
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), default=1, help="2 teaches --init's flow to transfer in one evaluation"
    )
    parser.add_argument(
        "--vram", type=float, metavar="GIB", help="memory of the card that --plan is for; by default this one's, or 8"
    )
    return parser


def main(args: argparse.Namespace) -> int:
    if args.plan:
        from isonext.training.memory_plan import print_plan

        print_plan(load_config(args.config, args.overrides), args.vram, args.stage)
        return 0
    if args.vram is not None:
        raise UserError("--vram is of --plan: python train.py --plan --vram 8")
    from isonext.training.trainer import train

    config = load_config(args.config, args.overrides)
    trainer = train(config, args.resume, args.init, named_autoencoder(args.overrides), stage=args.stage)
    return trainer.stopped


if __name__ == "__main__":
    run(main, build_parser())
