"""Train a flow over text latents: the autoencoder, the flow, then a head between the flow and the frozen decoder.

python examples/text/train_text.py --shape quick          # models/text on the built-in grammar: minutes on a CPU
python examples/text/train_text.py --use_text_decoder_head --use_vq_codebook --output_dir checkpoints/vq_head

A stage whose file is there already is not trained again; one that was stopped goes on from where it stood.
"""

import argparse

from isonext.errors import UserError
from isonext.utils.cli import add_device_flags, new_parser, run

STAGES = ("autoencoder", "flow", "head", "all")


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Train a flow over text latents, and heads on it.", config=False)
    parser.add_argument(
        "--stage", choices=STAGES, default="all", help="all: what is missing of the model, then the head"
    )
    parser.add_argument("--model_path", default="models/text", help="folder of autoencoder and flow, or of OmniFlow")
    parser.add_argument("--data_config", default="examples/text/data_config.json", help="the sources of sentences")
    model = parser.add_argument_group("the model, where it is made")
    model.add_argument("--shape", choices=("omniflow", "quick"), default="omniflow", help="32 latents, or 8 for a CPU")
    model.add_argument("--latents", type=int, help="latents a sentence, in place of the shape's")
    model.add_argument("--max_tokens", type=int, help="longest sentence, in place of the shape's")
    model.add_argument("--autoencoder_steps", type=int, help="in place of the shape's")
    model.add_argument("--flow_steps", type=int, help="in place of the shape's")
    model.add_argument("--t5", metavar="FOLDER", help="a T5 whose frozen encoder reads the sentences")
    head = parser.add_argument_group("the head")
    head.add_argument("--use_text_decoder_head", action="store_true", help="the MLP head")
    head.add_argument("--text_decoder_head_dim", type=int, default=64, help="must be the latents' width")
    head.add_argument("--use_vq_codebook", action="store_true", help="8192 codes behind the MLP head")
    head.add_argument("--use_latent_refiner", action="store_true", help="a small MLP behind all that")
    head.add_argument("--latent_refiner_hidden_dim", type=int, default=256, help="its width")
    head.add_argument("--latent_refiner_layers", type=int, default=2, help="its hidden layers")
    head.add_argument("--output_dir", default="checkpoints/text_head", help="best.pt, last.pt and the log of the head")
    for name, default, text in (
        ("batch_size", 8, "sentences a step of the head"),
        ("num_epochs", 1, "passes over the training sentences"),
        ("log_interval", 100, "steps from one line of the log to the next"),
        ("eval_interval", 500, "steps from one validation to the next"),
        ("save_interval", 2000, "steps from one saved state to the next"),
        ("seed", 0, "of all randomness of the head"),
    ):
        head.add_argument(f"--{name}", type=int, default=default, help=text)
    add_device_flags(parser)
    head.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of the head")
    return parser


def main(args: argparse.Namespace) -> None:
    for name in ("batch_size", "num_epochs", "latent_refiner_hidden_dim", "latent_refiner_layers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    if not args.lr > 0:
        raise UserError(f"--lr {args.lr}: must be above 0")
    from textflow.run import train

    train(args)


if __name__ == "__main__":
    run(main, build_parser())
