"""Generate pictures from noise, by class: integrate the flow from its base to data under each style asked for.

python sample.py --checkpoint checkpoints/stage1_epoch200.pt --styles 1 2 3 --num_samples_per_style 4 \\
    --cfg_scale 4.0 --num_steps 250 --output out/

Writes <style>_001.png, ... and grid.png (rows styles, columns samples); with --num_samples N it writes
sample_00001.png, ..., the styles in turn. The noise of a sample is a function of --seed and its number, so one process
and many (torchrun) write the same files. A second run makes only what is missing.
"""

import argparse
from pathlib import Path

from isonext.config import SETTINGS, InferenceConfig, named_autoencoder
from isonext.inference.options import NetworkOptions, SampleOptions, SettingsOptions
from isonext.utils.cli import add_device_flags, new_parser, run

OF_A_TRANSFER = ("guidance", "inversion", "tolerance", "noise_samples")  # keys that are no flags of this command
OF_PICTURES = ("flowedit", "map")  # methods that need one to begin with
FLAGS = tuple(name for name in SETTINGS if name not in OF_A_TRANSFER)
METHODS = tuple(
    name for name in InferenceConfig.__dataclass_fields__["method"].metadata["choices"] if name not in OF_PICTURES
)


def read_options(args: argparse.Namespace) -> SampleOptions:
    """What is asked for; the options refuse values out of range."""
    flags = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    return SampleOptions(
        NetworkOptions(
            args.checkpoint,
            args.device,
            args.precision,
            args.compile,
            args.tile,
            args.batch_size,
            named_autoencoder(args.overrides),
        ),
        SettingsOptions(args.config, tuple(args.overrides), flags),
        args.output,
        styles=tuple(args.styles or ()),
        num_samples_per_style=args.num_samples_per_style,
        num_samples=args.num_samples,
        seed=args.seed,
        npz=args.npz,
        overwrite=args.overwrite,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Generate pictures from noise. Defaults come from the checkpoint's config.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="a stage1_epoch*.pt of train.py, or a folder of export.py")
    add("--output", required=True, type=Path, help="a folder")
    add("--styles", nargs="+", metavar="STYLE", help="names or ids of the styles to make; by default all")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--num_samples_per_style", type=int, default=4, help="of each style, named after it")
    count.add_argument("--num_samples", type=int, help="in all, numbered through, the styles in turn")
    add("--seed", type=int, default=0, help="of the noise")
    add("--config", help="take the inference section from this config, not from the checkpoint")
    add("--method", choices=METHODS, help="the solver")
    add("--num_steps", type=int, help="solver steps")
    add("--time_grid", choices=("uniform", "cosine"), help="cosine is finer towards both ends")
    add("--shift", type=float, dest="time_shift", help="s: a time t becomes s t / (1 + (s - 1) t)")
    add("--cfg_scale", type=float, help="classifier-free guidance, against the null style; 1 is none")
    add("--cfg_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="t where guidance acts")
    add("--cfg_rescale", type=float, help="0 to 1: how far guidance's gain in contrast is taken back")
    add("--latent_clamp", type=float, help="bound of the final latent, in standard deviations")
    add("--batch_size", type=int, default=16, help="pictures at once")
    add("--tile", type=int, default=1024, help="pixels: a VAE decodes larger pictures in tiles; 0: never")
    add("--npz", action="store_true", help="also samples.npz: arr_0 (N, H, W, 3) uint8 and arr_1 (N,) style ids")
    add("--overwrite", action="store_true", help="make what is there already anew")
    add(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: as trained, BF16 where the device has it",
    )
    add("--compile", choices=("auto", "on", "off"), default="auto", help="auto: for as many as pay for it")
    add_device_flags(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    options = read_options(args)
    from isonext.inference.sampling import sample_pictures  # torch takes seconds: not before the flags are read

    return sample_pictures(options)


if __name__ == "__main__":
    run(main, build_parser())
