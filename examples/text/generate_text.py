"""Write sentences from latents alone, by a text model and, where a checkpoint is given, its head.

python examples/text/generate_text.py --mode denoise --t_start 0.3 --checkpoint checkpoints/vq_head/best.pt
python examples/text/generate_text.py --mode sample --num_samples 10 --class_name farm

    reconstruct   a sentence's own latents, decoded: the ceiling
    denoise       its latents noised to t_start, carried on to t = 1 by the flow, decoded
    roundtrip     its latents inverted to structure and generated again by the reversible solver: exact
    sample        from noise, of a class, or of all classes in turn

Shapes and heads come from the files. Writes a JSON list of {"id", "reference", "prediction"}; a sample has no reference
but a class.
"""

import argparse

from isonext.errors import UserError
from isonext.utils.cli import add_device_flags, new_parser, run

MODES = ("reconstruct", "denoise", "roundtrip", "sample")


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Write sentences from latents.", config=False)
    parser.add_argument("--model_path", default="models/text", help="folder of autoencoder and flow, or of OmniFlow")
    parser.add_argument("--checkpoint", metavar="FILE", help="a head of train_text.py; without it there is none")
    parser.add_argument("--data_config", default="examples/text/data_config.json", help="the sources of references")
    parser.add_argument("--output", default="predictions.json", help="the file to write")
    parser.add_argument("--mode", choices=MODES, default="denoise", help="where the latents come from")
    parser.add_argument("--split", choices=("val", "train"), default="val", help="of the references")
    parser.add_argument(
        "--num_samples", type=int, default=200, help="sentences, at most as many as there are references"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="sentences at once")
    parser.add_argument("--t_start", type=float, default=0.3, help="denoise: from 0, all noise, to 1, none")
    parser.add_argument("--num_steps", type=int, default=20, help="solver steps a leg")
    parser.add_argument("--class_name", help="sample: the class; by default all in turn")
    parser.add_argument("--cfg_scale", type=float, default=1.0, help="denoise, sample: guidance against the null class")
    parser.add_argument("--without", nargs="+", choices=("codes", "refiner"), default=[], help="parts switched off")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    add_device_flags(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    for name in ("num_samples", "batch_size", "num_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    if not 0 <= args.t_start <= 1:
        raise UserError(f"--t_start {args.t_start}: must be from 0 to 1")
    if args.class_name is not None and args.mode != "sample":
        raise UserError(f"--class_name is of --mode sample; in {args.mode} the references have classes")
    if args.without and not args.checkpoint:
        raise UserError("--without needs a --checkpoint, whose head has the parts")
    from textflow.writing import write_predictions

    write_predictions(args)


if __name__ == "__main__":
    run(main, build_parser())
