"""What sample.py does: which samples, in which batches, made, saved, and laid out on a sheet."""

import argparse
import time
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from isonext.data import images
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.flow.transfer import TransferSettings
from isonext.inference.jobs import open_pipeline, settings_from
from isonext.pipeline import Pipeline
from isonext.utils import distributed
from isonext.utils.distributed import rank
from isonext.utils.io import in_background, remove_unfinished, written_whole
from isonext.utils.seeding import seeded

COLUMNS = 10  # of the sheet, at most


@dataclass
class Sample:
    number: int  # among all that are asked for: its noise is a function of the seed and this
    style: int
    path: Path


def sample(args: argparse.Namespace) -> int:
    """Everything that can be wrong with the flags is found before the first picture."""
    pipeline, trained = open_pipeline(args, pictures=args.num_samples or args.num_samples_per_style)
    settings = sampling_settings(args, trained, pipeline.spec)
    samples = plan_samples(args, pipeline.spec)
    batches = [samples[start : start + args.batch_size] for start in range(0, len(samples), args.batch_size)]
    # What is left to do is seen before anybody does it; a batch is made whole, since its bits may depend on its size.
    todo = distributed.from_main([args.overwrite or not all(each.path.exists() for each in batch) for batch in batches])
    batches = [batch for batch, left in zip(batches, todo, strict=True) if left]
    started = time.perf_counter()
    made = sum(
        distributed.gather(make(batches[rank() :: distributed.world()], pipeline, settings, args.seed, args.batch_size))
    )
    seconds = time.perf_counter() - started
    if distributed.is_main():
        remove_unfinished(args.output)
        images.save_picture(grid(samples, pipeline.spec), args.output / "grid.png")
        if args.npz:
            write_npz(samples, pipeline.spec.image_size, args.output / "samples.npz")
    distributed.gather(None)  # nobody leaves before the sheet is written
    guidance = "no guidance" if settings.cfg_scale == 1 else f"guidance {settings.cfg_scale:g}"
    rate = f"{made / seconds:.2f} pictures/s on {pipeline.device}" if made else "nothing to do"
    there = f", {len(samples) - made} were there already" if made < len(samples) else ""
    print(f"{settings.method}, {settings.num_steps} steps, {guidance}")
    print(f"{made} made, {rate}{there}\nwritten to {args.output}")
    return 0


def sampling_settings(args: argparse.Namespace, trained: dict, spec: LatentSpec) -> TransferSettings:
    if len(spec.styles) == 1:
        if args.cfg_scale not in (None, 1):
            raise UserError(
                f"--cfg_scale {args.cfg_scale:g}: {args.checkpoint} has one style, so there is nothing to guide "
                "towards; leave it out"
            )
        args.cfg_scale = 1.0
    settings = settings_from(args, trained, None)
    if settings.method == "flowedit":
        raise UserError("inference.method flowedit changes pictures, and here is none; give --method alf")
    return settings


def plan_samples(args: argparse.Namespace, spec: LatentSpec) -> list[Sample]:
    """Numbered through; a sample's number, and so its noise, does not depend on how many there are of a style."""
    styles = [spec.style_id(style) for style in args.styles] if args.styles else list(range(len(spec.styles)))
    if len(set(styles)) < len(styles):
        raise UserError(f"--styles {' '.join(args.styles)}: names a style twice")
    if args.num_samples:
        digits = max(5, len(str(args.num_samples)))
        return [
            Sample(number, styles[number % len(styles)], args.output / f"sample_{number + 1:0{digits}}.png")
            for number in range(args.num_samples)
        ]
    digits = max(3, len(str(args.num_samples_per_style)))
    return [
        Sample(place * len(spec.styles) + style, style, args.output / f"{spec.styles[style]}_{place + 1:0{digits}}.png")
        for style in styles
        for place in range(args.num_samples_per_style)
    ]


def make(batches: list[list[Sample]], pipeline: Pipeline, settings: TransferSettings, seed: int, size: int) -> int:
    """Make and save this process's batches; returns how many pictures that was."""
    side, total = pipeline.spec.image_size, sum(map(len, batches))
    quiet = None if distributed.is_main() else True
    with tqdm(total=total, desc="sampling", unit="picture", disable=quiet) as bar, in_background(4 * size) as submit:
        for batch in batches:
            # For a compiled network a batch is filled up: one shape, one graph.
            rows = batch + batch[-1:] * (size - len(batch) if pipeline.compiled else 0)
            style = torch.tensor([row.style for row in rows])
            latents = pipeline.sample(*noise_of(pipeline, seed, [row.number for row in rows]), style, settings)
            pixels = pipeline.decode(latents, side, side).cpu()
            for row, picture in zip(batch, pixels, strict=False):
                submit(images.save_picture, images.to_picture(picture), row.path)
            bar.update(len(batch))
    return total


def noise_of(pipeline: Pipeline, seed: int, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """White noise for the latents (B, C, *space) and for the layouts of an anchored base, each sample's its own."""
    shape, layout = (pipeline.spec.channels, *pipeline.spec.space), pipeline.base.power.shape
    generators = [seeded(seed, "sample", number) for number in numbers]
    noises, layouts = ([torch.randn(each, generator=g) for g in generators] for each in (shape, layout))
    return torch.stack(noises), torch.stack(layouts)


#################################################################################
#                               All of them together                            #
#################################################################################


def grid(samples: list[Sample], spec: LatentSpec) -> Image.Image:
    """The sheet: a row a style, or where there is one style rows of it; the first few samples of each."""
    rows = defaultdict(list)
    for each in samples:
        if len(rows[each.style]) < COLUMNS:
            rows[each.style].append(images.open_picture(each.path))
    return images.contact_sheet(list(rows.values()), names=[spec.styles[style] for style in rows])


def write_npz(samples: list[Sample], side: int, path: Path) -> None:
    """The layout that FID tools read, a picture at a time: tens of thousands need not fit the memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(samples), side, side, 3)}
    with written_whole(path) as beside, zipfile.ZipFile(beside, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for each in samples:
                file.write(np.asarray(images.open_picture(each.path)).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.array([each.style for each in samples]))
