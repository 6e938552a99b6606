"""Transfer pictures from one style to another: invert along the flow to their structure, generate again.

python inference.py --checkpoint checkpoints/stage1_epoch200.pt --input test.jpg \\
    --source_style 0 --target_style 1 --output result.png --num_steps 20 --cfg_scale 2.0

The input is a picture, a latent of the store (.pt), or a folder; a folder's results keep its names, and a second run
makes only what is missing.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import images
from cli import UserError, add_device_flags, allow_tf32, new_parser, pick_device, run
from config import apply_overrides, config_from_dict, config_to_dict, load_config
from latents import read_latent
from pipeline import Pipeline, load_pipeline, transfer_settings
from solvers import METHODS, TransferSettings


@dataclass
class Job:
    """One input and where its result goes."""

    source: Path
    output: Path


@dataclass
class Loaded:
    """A batch of inputs of one size, ready for the network."""

    jobs: list[Job]
    latents: Tensor  # (B, C, h, w) standardised
    size: tuple[int, int]  # of the pictures: height, width


def find_jobs(source: Path, output: Path) -> list[Job]:
    """A file to a file, or every picture below a folder to the same name below another."""
    if not source.exists():
        raise UserError(f"--input {source}: no such file or folder")
    if output.resolve().is_relative_to(source.resolve()):  # the same file, the same folder, or one inside it
        raise UserError(f"--output {output}: lies on or in --input, which would be overwritten; choose another place")
    if not source.is_dir():
        if output.is_dir():
            raise UserError(f"--output {output}: is a folder, but --input is one file; give a file name")
        if output.suffix.lower() not in images.SUFFIXES:
            raise UserError(f"--output {output}: give a file name ending in one of {' '.join(images.SUFFIXES)}")
        return [Job(source, output)]
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file, but --input is a folder; give a folder")
    pictures = images.find_pictures(source)
    if not pictures:
        raise UserError(f"--input {source}: holds no pictures ({' '.join(images.SUFFIXES)})")
    return [Job(source / name, output / name) for name in pictures]


def load_batches(
    jobs: list[Job], pipeline: Pipeline, resize: int | None, batch_size: int, skipped: list[str] | None
) -> Iterator[Loaded]:
    """Batches of pictures of one size; a bad picture is noted in `skipped`, or raises where that is None."""

    def sizes_and_pictures() -> Iterator[tuple[tuple[int, int], Job, Image.Image]]:
        for job in jobs:
            try:
                picture = images.open_picture(job.source)
            except UserError as error:
                if skipped is None:
                    raise
                skipped.append(str(error))
                continue
            picture = images.resize_short_side(picture, resize) if resize else picture
            yield (picture.height, picture.width), job, picture

    for size, group in groupby(sizes_and_pictures(), key=lambda item: item[0]):
        while chunk := [item for item, _ in zip(group, range(batch_size), strict=False)]:
            pixels = images.to_pixels(torch.stack([images.to_bytes(picture) for _, _, picture in chunk]))
            yield Loaded([job for _, job, _ in chunk], pipeline.encode(pixels), size)


def load_stored_latent(job: Job, pipeline: Pipeline) -> Loaded:
    """A latent of the store as a batch of one."""
    latent = read_latent(job.source)["latent"]
    if len(latent) != pipeline.spec.channels:
        raise UserError(f"{job.source}: has {len(latent)} channels, the checkpoint's latents {pipeline.spec.channels}")
    size = tuple(side * pipeline.spec.factor for side in latent.shape[1:])
    return Loaded([job], pipeline.spec.standardise(latent[None].to(pipeline.device)), size)


def transfer_batch(
    batch: Loaded, pipeline: Pipeline, source: int, target: int, how: TransferSettings, compare: bool
) -> int:
    """Transfer and save one batch; returns the network evaluations a picture."""
    made = pipeline.transfer(batch.latents, source, target, how)
    results = pipeline.decode(made.latents, *batch.size)
    before = pipeline.decode(batch.latents, *batch.size) if compare else results
    for job, old, new in zip(batch.jobs, before, results, strict=True):
        picture = images.to_picture(new)
        if compare:
            titles = [pipeline.spec.styles[source], pipeline.spec.styles[target]]
            sheet = images.contact_sheet([[images.to_picture(old), picture]], titles)
            images.save_picture(sheet, job.output.with_name(f"{job.output.stem}_compare.png"))
        images.save_picture(picture, job.output)  # last: a result that is there says that its job is done
    return made.nfe


#################################################################################
#                                  The command                                  #
#################################################################################


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Transfer pictures from one style to another. Defaults come from the checkpoint's config.")
    parser.add_argument("--checkpoint", required=True, help="a stage1_epoch*.pt of train.py")
    parser.add_argument("--input", required=True, type=Path, help="a picture, a .pt of the latent store, or a folder")
    parser.add_argument("--output", required=True, type=Path, help="a picture file, or a folder for a folder")
    parser.add_argument("--source_style", required=True, help="id or name of the input's style")
    parser.add_argument("--target_style", required=True, help="id or name of the style to give it")
    parser.add_argument("--config", help="take the inference section from this config, not from the checkpoint")
    parser.add_argument("--method", choices=METHODS, help="ODE solver; alf is reversible bit for bit")
    parser.add_argument("--num_steps", type=int, help="solver steps a leg")
    parser.add_argument("--cfg_scale", type=float, help="guidance of the generation leg; 1 is none")
    parser.add_argument("--cfg_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="t where guidance acts")
    parser.add_argument("--guidance", choices=("source", "null"), help="contrast with the source or the null style")
    parser.add_argument("--strength", type=float, default=1.0, help="0 keeps the picture, 1 is the full transfer")
    parser.add_argument("--latent_clamp", type=float, help="bound of the final latent, in standard deviations")
    parser.add_argument("--size", type=int, help="resize to this short side first; by default nothing is resized")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures at once, for a folder")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: as trained")
    parser.add_argument("--compare", action="store_true", help="also write NAME_compare.png: before and after")
    parser.add_argument("--overwrite", action="store_true", help="make the results of a folder anew")
    parser.add_argument("--seed", type=int, default=0, help="for what is random; a transfer by itself is not")
    add_device_flags(parser)
    return parser


def settings_from(args: argparse.Namespace, trained: dict) -> TransferSettings:
    """The checkpoint's (or --config's) inference section, under --set, under the flags; checked like any config."""
    tree = config_to_dict(load_config(args.config)) if args.config else trained
    tree = apply_overrides(tree, args.overrides)
    for name in ("method", "num_steps", "cfg_scale", "cfg_interval", "guidance", "latent_clamp"):
        if getattr(args, name) is not None:
            tree["inference"][name] = getattr(args, name)
    config = config_from_dict(tree, where="inference settings")
    if not 0 <= args.strength <= 1:
        raise UserError(f"--strength {args.strength}: must be from 0 to 1")
    how = transfer_settings(config.inference, args.strength)
    if how.guidance == "null" and how.cfg_scale != 1 and trained["training"]["label_drop_prob"] == 0:
        raise UserError(
            f"{args.checkpoint}: trained with label_drop_prob 0, so it has no null style to guide against; "
            "use --guidance source or --cfg_scale 1"
        )
    return how


def prepare(args: argparse.Namespace) -> tuple[Pipeline, TransferSettings, int, int]:
    """Everything that can be wrong with the flags is found here, before the first picture."""
    for name in ("size", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    torch.manual_seed(args.seed)
    pipeline, config = load_pipeline(args.checkpoint, pick_device(args.device))
    allow_tf32(config.training.tf32)
    pipeline.bf16 = {"auto": config.training.use_amp, "bf16": True, "fp32": False}[args.precision]
    source, target = (pipeline.spec.style_id(style) for style in (args.source_style, args.target_style))
    return pipeline, settings_from(args, config_to_dict(config)), source, target


def main(args: argparse.Namespace) -> int:
    jobs = find_jobs(args.input, args.output)
    pipeline, how, source, target = prepare(args)
    is_folder = args.input.is_dir()
    todo = [job for job in jobs if args.overwrite or not is_folder or not job.output.exists()]
    skipped: list[str] | None = [] if is_folder else None
    if args.input.suffix == ".pt":
        batches = iter([load_stored_latent(todo[0], pipeline)])
    else:
        batches = load_batches(todo, pipeline, args.size, args.batch_size, skipped)
    done, nfe, started = 0, 0, time.perf_counter()
    with tqdm(total=len(todo), desc="transfer", unit="picture", disable=None) as bar:
        for batch in batches:
            nfe = transfer_batch(batch, pipeline, source, target, how, args.compare)
            done += len(batch.jobs)
            bar.update(len(batch.jobs))
    seconds = (time.perf_counter() - started) / max(1, done)

    styles = f"{pipeline.spec.styles[source]} -> {pipeline.spec.styles[target]}"
    guidance = "no guidance" if how.cfg_scale == 1 else f"{how.guidance} guidance {how.cfg_scale:g}"
    print(f"{styles}: {how.method}, {how.num_steps} steps a leg, {guidance}, strength {how.strength:g}")
    kept = f", {len(jobs) - len(todo)} were there already" if len(todo) < len(jobs) else ""
    if done:
        print(f"{done} made, {nfe} network evaluations and {seconds:.2f} s a picture on {pipeline.device}{kept}")
    else:
        print(f"0 made{kept}")
    print(f"written to {args.output}")
    for reason in skipped or ():
        print(f"skipped: {reason}")
    return 1 if skipped else 0


if __name__ == "__main__":
    run(main, build_parser())
