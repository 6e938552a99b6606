"""Which head helps: no head, MLP head, + refiner, VQ head, VQ head + refiner, three seeds each, one table.

python examples/text/run_experiment.py --quick        # at most 15 minutes on two CPU cores
python examples/text/run_experiment.py --data_config data/text/data_config.json --output outputs/text_captions

Autoencoder and flow are trained once; a seed is that of a head's training, and of the noise that sentences are taken
back to. What is there already is not done again: a run that was stopped goes on where it stood.
"""

import argparse
from pathlib import Path

from isonext.errors import UserError
from isonext.utils.cli import add_device_flags, new_parser, run


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Train and score a text flow without a head and with four.", config=False)
    parser.add_argument("--quick", action="store_true", help="small networks, for two CPU cores")
    parser.add_argument("--data_config", default="examples/text/data_config.json", help="the sources of sentences")
    parser.add_argument("--output", default="outputs/text_experiment", help="models, predictions, results.json")
    parser.add_argument("--seeds", type=int, default=3, help="seeds a head")
    parser.add_argument("--t_start", type=float, default=0.3, help="where a sentence goes on from: 0 is all noise")
    add_device_flags(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: must be 1 or more")
    if not 0 <= args.t_start <= 1:
        raise UserError(f"--t_start {args.t_start}: must be from 0 to 1")
    from isonext.utils.device import allow_tf32, pick_device
    from textflow.experiment import experiment, quick_plan, whole_plan

    device = pick_device(args.device)
    allow_tf32(True)
    plan = quick_plan() if args.quick else whole_plan()
    experiment(plan, args.data_config, Path(args.output), args.seeds, args.t_start, device)


if __name__ == "__main__":
    run(main, build_parser())
