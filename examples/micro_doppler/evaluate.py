"""Are generated micro-Doppler spectrograms like the real ones, of the right person, various, and not copies?

python examples/micro_doppler/evaluate.py --real_train raw_data/micro_doppler --real_test raw_data/micro_doppler_test \
    --generated outputs/micro_doppler --output report.json

Without --generated it tells what real pictures reach; --autoencoder adds what is left of them after coding, which is
the best that can be generated. Prints a table; writes it as report.md beside report.json.
"""

import argparse
from pathlib import Path

from isonext.utils.cli import new_parser, run


def main(args: argparse.Namespace) -> int:
    from scores import evaluate  # torch takes seconds to import, and --help should not

    return evaluate(args)


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Measure generated micro-Doppler spectrograms against real ones.", config=False)
    parser.add_argument("--real_train", type=Path, required=True, help="what the generator learnt: a folder a user")
    parser.add_argument("--real_test", type=Path, required=True, help="held-out recordings of the same users")
    parser.add_argument("--generated", type=Path, help="a folder a user, or <user>_001.png ... (grid.png is ignored)")
    parser.add_argument("--autoencoder", help="a column more: the held-out pictures encoded and decoded by this one")
    parser.add_argument("--output", type=Path, default=Path("report/micro_doppler.json"), help="the report")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the user classifiers")
    parser.add_argument("--seed", type=int, default=0, help="of the classifiers")
    return parser


if __name__ == "__main__":
    run(main, build_parser())
