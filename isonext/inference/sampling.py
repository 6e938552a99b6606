"""What sample.py does: which samples, in which batches, made, saved, and laid out on a sheet."""

import math
import re
import time
import zipfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from isonext.data import images
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.flow.base import Base
from isonext.flow.transfer import TransferSettings
from isonext.inference.options import SampleOptions
from isonext.inference.plan import compile_where_it_pays, is_worth_compiling, open_pipeline, resolve_settings
from isonext.inference.record import keep_record, record_of_run
from isonext.pipeline import Pipeline, of_teacher
from isonext.utils import distributed
from isonext.utils.distributed import rank
from isonext.utils.io import in_background, remove_unfinished, written_whole
from isonext.utils.schema import placed
from isonext.utils.seeding import seeded

COLUMNS = 10  # of the sheet, at most
SHEET, PACKED, RECORD = "grid.png", "samples.npz", "samples.json"
MOST_SAMPLES = 10**6  # of a run: they are planned before the first is made


@dataclass
class Sample:
    number: int  # among all that are asked for: its noise is a function of the seed and this
    style: int
    path: Path


def sample_pictures(options: SampleOptions) -> int:
    """Everything that can be wrong with the options is found before the first picture; returns the exit status."""
    pipeline, trained = open_pipeline(options.network)
    settings = sampling_settings(options, trained, pipeline.spec, pipeline.base)
    samples = plan_samples(options, pipeline.spec)
    size = options.network.batch_size
    evaluations = len(samples) // size * size * settings.num_steps  # at least, in full batches
    pays = is_worth_compiling(trained, pipeline, pipeline.spec.space, evaluations)
    compile_where_it_pays(pipeline, options.network.compile, pays)
    with distributed.folder_lock(options.output):
        if distributed.is_main():
            remember(options, record_of(options, pipeline, settings), samples, pipeline.spec.styles)
        done, seconds = make_pictures(options, pipeline, settings, samples)
    guidance = "no guidance" if settings.cfg_scale == 1 else f"guidance {settings.cfg_scale:g}"
    rate = f"{done / seconds:.2f} pictures/s on {pipeline.device}" if done else "nothing to do"
    there = f", {len(samples) - done} were there already" if done < len(samples) else ""
    print(f"{settings.method}, {settings.num_steps} steps, {guidance}")
    print(f"{done} made, {rate}{there}\nwritten to {options.output}")
    return 0


def make_pictures(
    options: SampleOptions, pipeline: Pipeline, settings: TransferSettings, samples: list[Sample]
) -> tuple[int, float]:
    """What is missing of the samples, and what all of them together make; how many pictures in how many seconds."""
    size = options.network.batch_size
    batches = [samples[start : start + size] for start in range(0, len(samples), size)]
    # What is left to do is seen before anybody does it; a batch is made whole, since its bits may depend on its size.
    todo = distributed.from_main(
        [options.overwrite or not all(sample.path.exists() for sample in batch) for batch in batches]
    )
    batches = [batch for batch, left in zip(batches, todo, strict=True) if left]
    started = time.perf_counter()
    own = sample_batches(batches[rank() :: distributed.world()], pipeline, settings, options.seed, size)
    done = sum(distributed.gather(own))
    seconds = time.perf_counter() - started
    if distributed.is_main():
        remove_unfinished(options.output)
        images.save_picture(draw_sheet(samples, pipeline.spec), options.output / SHEET)
        if options.npz:
            write_npz(samples, pipeline.spec.image_size, options.output / PACKED)
    distributed.gather(None)  # nobody leaves before the sheet is written
    return done, seconds


def sampling_settings(options: SampleOptions, trained: dict, spec: LatentSpec, base: Base) -> TransferSettings:
    """Those of `resolve_settings`; guidance, if any, is against the null style, and of one style there is none."""
    flags = options.settings.flags | {"guidance": "null", "inversion": "explicit"}
    if len(spec.styles) == 1:
        if flags.get("cfg_scale", 1) != 1:
            raise UserError(
                f"--cfg_scale {flags['cfg_scale']:g}: {options.network.checkpoint} has one style, so there is nothing "
                "to guide towards; leave it out"
            )
        flags["cfg_scale"] = 1.0
    if trained["inference"]["method"] == "map":  # of stage 2: samples are of its teacher
        trained = trained | {"inference": of_teacher(trained["inference"])}
    settings = resolve_settings(replace(options.settings, flags=flags), trained, options.network.checkpoint)
    if not base.can_sample:
        raise UserError(
            f"{options.network.checkpoint}: its base, written by an earlier version, has no layouts to draw from; it "
            "serves transfers; train anew, or with training.anchor_strength=0, for samples"
        )
    if settings.method in ("flowedit", "map"):
        raise UserError(f"inference.method {settings.method} changes pictures, and here is none; give --method alf")
    return settings


def plan_samples(options: SampleOptions, spec: LatentSpec) -> list[Sample]:
    """Numbered through; a sample's number, and so its noise, does not depend on how many there are of a style."""
    styles = [spec.style_id(style) for style in options.styles] if options.styles else list(range(len(spec.styles)))
    if len(set(styles)) < len(styles):
        raise UserError(f"--styles {' '.join(options.styles)}: names a style twice")
    count = options.num_samples or options.num_samples_per_style * len(styles)
    if count > MOST_SAMPLES:
        raise UserError(f"{count} samples: at most {MOST_SAMPLES} in one run; give --num_samples, or several --seed")
    if options.num_samples:
        digits = max(5, len(str(options.num_samples)))
        return [
            Sample(number, styles[number % len(styles)], options.output / f"sample_{number + 1:0{digits}}.png")
            for number in range(options.num_samples)
        ]
    digits = max(3, len(str(options.num_samples_per_style)))
    return [
        Sample(
            place * len(spec.styles) + style,
            style,
            placed(options.output, f"{spec.styles[style]}_{place + 1:0{digits}}.png"),
        )
        for style in styles
        for place in range(options.num_samples_per_style)
    ]


def sample_batches(
    batches: list[list[Sample]], pipeline: Pipeline, settings: TransferSettings, seed: int, size: int
) -> int:
    """Generate and save this process's batches; returns how many pictures that was."""
    side, total = pipeline.spec.image_size, sum(map(len, batches))
    quiet = None if distributed.is_main() else True
    with tqdm(total=total, desc="sampling", unit="picture", disable=quiet) as bar, in_background(4 * size) as submit:
        for batch in batches:
            # For a compiled network a batch is filled up: one shape, one graph.
            rows = batch + batch[-1:] * (size - len(batch) if pipeline.compiled else 0)
            style = torch.tensor([row.style for row in rows])
            latents = pipeline.sample(*draw_noise(pipeline, seed, [row.number for row in rows]), style, settings)
            pixels = pipeline.decode(latents, side, side).cpu()
            for row, picture in zip(batch, pixels, strict=False):
                submit(images.save_picture, images.to_picture(picture), row.path)
            bar.update(len(batch))
    return total


def draw_noise(pipeline: Pipeline, seed: int, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """White noise (B, C, *space), and places (B,) among the layouts of an anchored base, each sample's its own."""
    shape = (pipeline.spec.channels, *pipeline.spec.space)
    generators = [seeded(seed, "sample", number) for number in numbers]
    noises = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.stack(noises), torch.cat([torch.rand(1, generator=generator) for generator in generators])


#################################################################################
#                            What made a folder's pictures                      #
#################################################################################


def record_of(options: SampleOptions, pipeline: Pipeline, settings: TransferSettings) -> dict:
    """All that decides what a sample of a name shows; the size of a batch, which rounds, does not."""
    own = {"seed": options.seed, "styles": list(options.styles) if options.num_samples else None}
    return record_of_run(pipeline, settings, own)


def remember(options: SampleOptions, record: dict, samples: list[Sample], styles: list[str]) -> None:
    """As record.py, for the samples of all styles, the sheet and the packed file."""
    names = "|".join(map(re.escape, ("sample", *styles)))
    present = [path for path in options.output.glob("*.png") if re.fullmatch(rf"({names})_\d+\.png", path.name)]
    whole = [options.output / name for name in (SHEET, PACKED)]
    present += [path for path in whole if path.exists()]
    keep_record(options.output / RECORD, record, present, {*(s.path for s in samples), *whole}, options.overwrite)


#################################################################################
#                               All of them together                            #
#################################################################################


def draw_sheet(samples: list[Sample], spec: LatentSpec) -> Image.Image:
    """The sheet: a row a style, or where there is one style rows of it; the first few samples of each."""
    rows: dict[int, list[Image.Image]] = defaultdict(list)
    for sample in samples:
        if len(rows[sample.style]) < COLUMNS:
            rows[sample.style].append(images.open_picture(sample.path))
    return images.contact_sheet(list(rows.values()), names=[spec.styles[style] for style in rows])


def write_npz(samples: list[Sample], side: int, path: Path) -> None:
    """The layout that FID tools read, a picture at a time: tens of thousands need not fit the memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(samples), side, side, 3)}
    with written_whole(path) as beside:
        with zipfile.ZipFile(beside, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for sample in samples:
                    file.write(_pixels(sample.path, side).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.array([sample.style for sample in samples]))
        check_npz(beside, (len(samples), side, side, 3))


def _pixels(path: Path, side: int) -> np.ndarray:
    """A picture (side, side, 3) uint8; a UserError where it is of another size."""
    picture = images.open_picture(path)
    if picture.size != (side, side):
        width, height = picture.size
        raise UserError(f"{path}: is {width} x {height} pixels, but samples have {side} x {side}; delete it")
    return np.asarray(picture)


def check_npz(path: Path, shape: tuple[int, ...]) -> None:
    """UserError where a packed file does not hold as many bytes of pictures as its header says."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        found, _, kind = np.lib.format.read_array_header_1_0(file)
        size = archive.getinfo("arr_0.npy").file_size - file.tell()
    if found != shape or size != math.prod(shape) * kind.itemsize:
        raise UserError(f"{path.parent}: the pictures could not be packed whole; run it again")
