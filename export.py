"""A model to give away: the averaged network of a checkpoint, with what transfers need, and nothing of its training.

python export.py --checkpoint checkpoints/stage1_epoch200.pt --output models/painter --license mit
python export.py --checkpoint checkpoints/stage1_epoch200.pt --output models/painter_onnx --format onnx

The first folder is taken wherever a checkpoint is (inference.py, evaluate.py, sample.py, train.py --init), and by
`FlowStylePipeline.from_pretrained` in Python. The second holds files for ONNX Runtime.
"""

import argparse
from pathlib import Path

from isonext.config import named_autoencoder
from isonext.export.options import FORMATS, ExportOptions
from isonext.utils.cli import new_parser, run


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Write a model to give away. --set inference.KEY=VALUE changes the settings that go along.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="a stage1_epoch*.pt of train.py, or a folder of export.py")
    add("--output", required=True, type=Path, help="a folder that is not there yet")
    add("--format", choices=FORMATS, default="safetensors", help="onnx: files for ONNX Runtime")
    add("--pictures", type=Path, help="one folder a style: three of them become the samples of the model card")
    add("--license", default="", help="the licence that the model card states, such as mit")
    add("--opset", type=int, help="version of ONNX's operators; by default the exporter's own choice")
    return parser


def main(args: argparse.Namespace) -> int:
    options = ExportOptions(
        args.checkpoint,
        args.output,
        args.format,
        args.pictures,
        args.license,
        args.opset,
        tuple(args.overrides),
        named_autoencoder(args.overrides),
    )
    from isonext.export.folder import export

    return export(options)


if __name__ == "__main__":
    run(main, build_parser())
