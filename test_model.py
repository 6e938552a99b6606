"""The smoke check a newcomer runs first: network, loss, exact inversion, memory and speed on this machine.

python test_model.py        # within a minute on a CPU; exit status 1 if a check fails
"""

import argparse

from isonext.utils.cli import add_device_flags, new_parser, run


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Check on this machine: architecture, loss, exact inversion, memory, speed.", config=False)
    add_device_flags(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    from isonext.evaluation.self_check import run_checks
    from isonext.utils.device import pick_device

    return run_checks(pick_device(args.device))


if __name__ == "__main__":
    run(main, build_parser())
