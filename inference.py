"""Transfer pictures from one style to another: invert along the flow to their structure, generate again.

python inference.py --checkpoint checkpoints/stage1_epoch200.pt --input test.jpg \\
    --source_style photo --target_style monet --output result.png

The input is a picture, a latent of the store (.pt), or a folder; a folder's results keep its names, and a second run
makes only what is missing. A structure kept with --save_structure gives other styles (--from_structure) or the
original (--restore) without the input.
"""

import argparse
from pathlib import Path

from isonext.config import OF_THE_LEGS, SETTINGS, InferenceConfig, named_autoencoder
from isonext.errors import UserError
from isonext.inference.options import (
    NetworkOptions,
    RestoreOptions,
    RestyleOptions,
    SettingsOptions,
    TargetOptions,
    TransferOptions,
    check_range,
)
from isonext.utils.cli import add_device_flags, new_parser, run

OF_A_PICTURE = ("input", "source_style", "save_structure", "min_structure", "strength", "size", "config", "overrides")


def read_options(args: argparse.Namespace) -> TransferOptions | RestyleOptions | RestoreOptions:
    """What is asked for. The options refuse values out of range; flags that do not go together are refused here."""
    check_combination(args)
    network = NetworkOptions(
        args.checkpoint,
        args.device,
        args.precision,
        args.compile,
        args.tile,
        args.batch_size,
        named_autoencoder(args.overrides),
    )
    check_range("tile", args.tile, 0)
    if 0 < args.tile < 64:
        raise UserError(f"--tile {args.tile}: must be 64 or more, or 0 for no tiles")
    flags = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    strength = 1.0 if args.strength is None else args.strength
    settings = SettingsOptions(args.config, tuple(args.overrides), flags, strength, args.seed)
    targets = TargetOptions(args.target_style, args.interpolate and tuple(args.interpolate), args.frames)
    if args.restore:
        return RestoreOptions(network, args.restore, args.output)
    if args.from_structure:
        return RestyleOptions(network, settings, targets, args.from_structure, args.output, args.certify)
    return TransferOptions(
        network,
        settings,
        targets,
        args.input,
        args.output,
        args.source_style,
        size=args.size,
        min_structure=args.min_structure,
        certify=args.certify,
        save_structure=args.save_structure,
        compare=args.compare,
        overwrite=args.overwrite,
    )


def check_combination(args: argparse.Namespace) -> None:
    """UserError where a flag is missing, or does not go with the thing to do."""
    barred: tuple[str, ...] = ()
    if args.restore:
        barred = ("target_style", "interpolate", "from_structure", *OF_A_PICTURE, *SETTINGS)
    elif args.from_structure:
        barred = (*OF_A_PICTURE, *OF_THE_LEGS)
    else:
        for name in ("input", "source_style"):
            if getattr(args, name) is None:
                raise UserError(f"--{name} is missing (only --from_structure and --restore go without it)")
    others = [text for text in args.overrides if not text.startswith("autoencoder.name=")]  # that may have moved
    for name in barred:
        if (others if name == "overrides" else getattr(args, name)) not in (None, []):
            other = "restore" if args.restore else "from_structure"
            flag = {"overrides": "set"}.get(name, name)
            raise UserError(f"--{flag} does not go with --{other}: the structure file fixes it")
    if not args.restore and (args.target_style is None) == (args.interpolate is None):
        raise UserError("give either --target_style STYLE (or all), or --interpolate A B")
    if args.compare and (args.restore or args.from_structure):
        raise UserError("--compare shows --input beside its transfer, and here is no --input")


def allowed(setting: str) -> tuple[str, ...]:
    return InferenceConfig.__dataclass_fields__[setting].metadata["choices"]


def number_or_auto(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be a number or auto") from None


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Transfer pictures from one style to another. Defaults come from the checkpoint's config.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="a stage1_*.pt or stage2_*.pt of train.py, or a folder of export.py")
    add("--input", type=Path, help="a picture, a .pt of the latent store, or a folder")
    add("--output", required=True, type=Path, help="a picture file, or a folder for a folder")
    add("--source_style", help="id or name of the input's style")
    add("--target_style", help="id or name of the style to give it, or all: each of them, and a sheet")
    add("--interpolate", nargs=2, metavar=("A", "B"), help="instead: frames on the way from style A to style B")
    add("--frames", type=int, default=9, help="of --interpolate, both ends included")
    add("--config", help="take the inference section from this config, not from the checkpoint")
    add("--method", choices=allowed("method"), help="alf and map (stage 2) are exact; flowedit has no inversion")
    add("--num_steps", type=int, help="solver steps a leg")
    add("--time_grid", choices=allowed("time_grid"), help="cosine is finer towards both ends")
    add("--time_shift", type=float, help="above 1 finer towards the picture, below 1 towards structure")
    add("--inversion", choices=allowed("inversion"), help="solve for the inverse of euler, ..., rk4")
    add("--tolerance", type=float, help="largest residual of a fixed point that counts as solved")
    add(
        "--cfg_scale",
        type=number_or_auto,
        metavar="W",
        help="guidance of the generation leg; 1 is none; auto: as measured",
    )
    add("--cfg_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="t where guidance acts")
    add("--cfg_rescale", type=float, help="0 to 1: how far guidance's gain in contrast is taken back")
    add("--guidance", choices=allowed("guidance"), help="contrast with the source or the null style")
    add("--strength", type=float, help="0 keeps the picture, 1 (the default) is the full transfer")
    add("--min_structure", type=float, help="find the largest strength that keeps this SSIM to the picture")
    add("--latent_clamp", type=float, help="bound of the final latent, in standard deviations")
    add("--noise_samples", type=int, help="noises of flowedit, of which it takes the mean")
    add("--certify", action="store_true", help="run back and compare integers; exit status 3 if any differs")
    add("--save_structure", type=Path, metavar="FILE", help="keep the structure in FILE.safetensors")
    add("--from_structure", type=Path, metavar="FILE", help="another style of a kept structure; no --input")
    add("--restore", type=Path, metavar="FILE", help="the original of a kept structure, bit for bit; no --input")
    add("--size", type=int, help="resize to this short side first; by default nothing is resized")
    add("--batch_size", type=int, default=8, help="pictures at once, for a folder")
    add("--tile", type=int, default=1024, help="pixels: a VAE takes larger pictures in tiles; 0: never")
    add(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: as trained, BF16 where the device has it",
    )
    add("--compile", choices=("auto", "on", "off"), default="auto", help="auto: for sizes whose pictures pay for it")
    add("--compare", action="store_true", help="also write NAME_compare.png: before and after")
    add("--overwrite", action="store_true", help="make the results of a folder anew")
    add("--seed", type=int, default=0, help="of flowedit's noise; the other methods draw none")
    add_device_flags(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    options = read_options(args)
    from isonext.inference import jobs  # torch takes seconds to import: not before the flags are known to be good

    if isinstance(options, TransferOptions):
        return jobs.transfer_pictures(options)
    if isinstance(options, RestyleOptions):
        return jobs.restyle_structure(options)
    return jobs.restore_picture(options)


if __name__ == "__main__":
    run(main, build_parser())
