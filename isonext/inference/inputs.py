"""A picture or a folder of them, as batches for the network; results are saved while the next batch is made.

Reading and writing pictures run in threads beside the network, so that it does not wait for them.
"""

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from isonext.data import images
from isonext.data.pt_store import read_latent
from isonext.data.store import read_meta
from isonext.errors import UserError, first_line
from isonext.pipeline import Pipeline
from isonext.utils import distributed
from isonext.utils.distributed import rank
from isonext.utils.io import THREADS, ahead

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass
class Job:
    """One input and where its result goes."""

    source: Path
    output: Path


@dataclass
class Batch:
    """A batch of inputs of one size, ready for the network; `latents` may have more rows than there are jobs."""

    jobs: list[Job]
    latents: Tensor  # (B, C, h, w) standardised
    size: tuple[int, int]  # of the pictures: height, width


def find_jobs(source: Path, output: Path, left_out: Counter[str] | None = None) -> list[Job]:
    """A file to a file, or every picture below a folder to the same name below another (see `result_name`).

    `left_out` is told of other files as by `images.find_pictures`.
    """
    if not source.exists():
        raise UserError(f"--input {source}: no such file or folder")
    if real(output).is_relative_to(real(source)):  # the same file, the same folder, or one inside it
        raise UserError(f"--output {output}: lies on or in --input, which would be overwritten; choose another place")
    if not source.is_dir():
        return [Job(source, picture_path(output))]
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file, but --input is a folder; give a folder")
    pictures = images.find_pictures(source, left_out)
    if not pictures:
        raise UserError(f"--input {source}: holds no pictures ({' '.join(images.READABLE)})")
    for folder in {source / name.parent for name in pictures}:
        if real(folder).is_relative_to(real(output)):
            raise UserError(f"--output {output}: {folder} of --input lies there, by a link; choose another place")
    return [Job(source / name, output / result_name(name)) for name in pictures]


def real(path: Path) -> Path:
    """`path.resolve()`, which raises where links lead in a circle."""
    return Path(os.path.realpath(path))


def result_name(name: Path) -> Path:
    """The same, with `.png` behind it where its suffix is one that is read but not written."""
    return name if name.suffix.lower() in images.SUFFIXES else name.with_name(f"{name.name}.png")


def picture_path(output: Path) -> Path:
    """`output`, if a picture can be written there."""
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder, but one picture is made; give a file name")
    if output.suffix.lower() not in images.SUFFIXES:
        raise UserError(f"--output {output}: give a file name ending in one of {' '.join(images.SUFFIXES)}")
    return output


def plan_batches(jobs: list[Job], resize: int | None, batch_size: int) -> Iterator[list[Job]]:
    """Neighbours of one size, by the headers of their files; those without a header come last, one by one."""
    headless = []

    def size_of(job: Job) -> tuple[int, int] | None:
        size = images.picture_size(job.source)
        return images.resized(size, resize) if size and resize else size

    def sized() -> Iterator[tuple[Job, tuple[int, int]]]:
        for job, size in zip(jobs, ahead(size_of, jobs, batch_size + THREADS), strict=True):
            if size:
                yield job, size
            else:
                headless.append([job])

    for _, group in groupby(sized(), key=lambda item: item[1]):
        while chunk := list(islice(group, batch_size)):
            yield [job for job, _ in chunk]
    yield from headless


def load_batches(
    jobs: list[Job],
    pipeline: Pipeline,
    resize: int | None,  # pixels of the short side
    batch_size: int,
    skipped: list[str] | None,  # is told of bad pictures; None raises instead
    on_sheet: int = 1,  # pictures that a result shows, see `images.strip`
) -> Iterator[Batch]:
    """This process's share of the batches of pictures of one size. For a compiled network they are filled up: one
    shape, one graph.

    Batches are planned before they are shared out and read: a picture's bits may depend on the size of its batch.
    """
    own = islice(plan_batches(jobs, resize, batch_size), rank(), None, distributed.world())
    numbered = ((number, job) for number, batch in enumerate(own) for job in batch)

    def read(item: tuple[int, Job]) -> tuple[int, Job, Image.Image | UserError]:
        try:
            picture = read_picture(item[1], resize, on_sheet)
            pipeline.check_size(item[1].source, picture.size)
            return *item, picture
        except UserError as error:
            return *item, error

    def good() -> Iterator[tuple[int, Job, Image.Image]]:
        for number, job, picture in ahead(read, numbered, batch_size + THREADS):
            if not isinstance(picture, UserError):
                yield number, job, picture
            elif skipped is None:
                raise picture
            else:
                skipped.append(str(picture))

    for (_, (width, height)), group in groupby(good(), key=lambda item: (item[0], item[2].size)):
        _, batch, pictures = zip(*group, strict=True)
        latents = None
        with skipping(batch, "encoded", skipped):
            rows = [images.to_bytes(picture) for picture in pictures]
            rows += rows[-1:] * (batch_size - len(rows) if pipeline.compiled else 0)
            latents = pipeline.encode(images.to_pixels(torch.stack(rows)))
        if latents is not None:
            yield Batch(list(batch), latents, (height, width))


def read_picture(job: Job, resize: int | None, on_sheet: int) -> Image.Image:
    """The picture of a job at the size that is asked for; UserError where it or its result would be of no use."""
    with images.one_picture(job.source):
        picture = images.open_picture(job.source)
        if resize:
            images.refuse_enlarged(picture.size, resize)
            picture = images.resize_short_side(picture, resize)
        try:
            images.refuse_unwritable(job.output, images.strip_size(picture.size, on_sheet))
        except UserError as error:
            raise UserError(f"{job.source}: its result {error}") from None
        return picture


@contextlib.contextmanager
def skipping(jobs: Sequence[Job], verb: str, skipped: list[str] | None) -> Iterator[None]:
    """Within, what goes wrong is a line for each of the jobs, pictures of a folder; where that is None, it is raised.

    What a disk does not take is not the picture's fault, and the next one would fare no better.
    """
    try:
        yield
    except Exception as error:
        if skipped is None or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
            raise
        less = isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in str(error)
        advice = "; a smaller --size or --batch_size takes less" if less else ""
        skipped += [f"{job.source}: cannot be {verb} ({first_line(error)}){advice}" for job in jobs]


def load_stored_latent(job: Job, pipeline: Pipeline) -> Batch:
    """A latent of the store as a batch of one."""
    latent = read_latent(job.source)["latent"]
    _check_autoencoder(job.source, pipeline)
    if len(latent) != pipeline.spec.channels:
        raise UserError(f"{job.source}: has {len(latent)} channels, the checkpoint's latents {pipeline.spec.channels}")
    size = tuple(side * pipeline.spec.factor for side in latent.shape[1:])
    pipeline.check_size(job.source, size[::-1])
    return Batch([job], pipeline.spec.standardise(latent[None].to(pipeline.device)), size)


def _check_autoencoder(path: Path, pipeline: Pipeline) -> None:
    """UserError where the latent lies in a store of another autoencoder than the checkpoint's."""
    root = next((folder for folder in path.resolve().parents if (folder / "meta.json").exists()), None)
    meta = read_meta(root) if root else None
    if meta and not meta.latents.has_autoencoder_of(pipeline.spec):
        there, here = meta.latents.autoencoder_beside(pipeline.spec), pipeline.spec.autoencoder_beside(meta.latents)
        raise UserError(f"{path}: the store {root} has autoencoder {there}, the checkpoint {here}")
