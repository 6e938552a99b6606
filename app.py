"""A page in the browser: transfer pictures, train, sample. For people who would rather drag a picture than type flags.

python app.py                              # http://127.0.0.1:7860, for this machine alone
python app.py --runs checkpoints --pictures raw_data
python app.py --host 0.0.0.0               # for everybody in the network: the page asks for no password

It needs pip install -r requirements/app.txt.
"""

import argparse
from pathlib import Path

from isonext.app.options import AppOptions
from isonext.utils.cli import add_device_flags, new_parser, run


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("A page in the browser to transfer pictures, train and sample.", config=False)
    add = parser.add_argument
    add("--runs", type=Path, default=Path("checkpoints"), help="below it checkpoints are found and trainings write")
    add("--pictures", type=Path, default=Path("raw_data"), help="below it lie the folders that may be trained on")
    add("--host", default="127.0.0.1", help="0.0.0.0: the page is there for everybody in the network")
    add("--port", type=int, help="by default the first that is free from 7860 on")
    add("--share", action="store_true", help="also an address at gradio.live that everybody can open for some days")
    add_device_flags(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    options = AppOptions(args.runs, args.pictures, args.device, args.host, args.port, args.share)
    from isonext.app.server import serve  # torch and gradio take seconds: not before the flags are read

    return serve(options)


if __name__ == "__main__":
    run(main, build_parser())
