"""A picture or a folder of them, as batches for the network; results are saved while the next batch is made.

Reading and writing pictures run in threads beside the network, so that it does not wait for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from isonext.data import images
from isonext.data.pt_store import read_latent
from isonext.data.store import read_meta
from isonext.errors import UserError
from isonext.pipeline import Pipeline
from isonext.utils import distributed
from isonext.utils.distributed import rank
from isonext.utils.io import THREADS, ahead


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


def find_jobs(source: Path, output: Path) -> list[Job]:
    """A file to a file, or every picture below a folder to the same name below another."""
    if not source.exists():
        raise UserError(f"--input {source}: no such file or folder")
    if output.resolve().is_relative_to(source.resolve()):  # the same file, the same folder, or one inside it
        raise UserError(f"--output {output}: lies on or in --input, which would be overwritten; choose another place")
    if not source.is_dir():
        return [Job(source, picture_path(output))]
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file, but --input is a folder; give a folder")
    pictures = images.find_pictures(source)
    if not pictures:
        raise UserError(f"--input {source}: holds no pictures ({' '.join(images.SUFFIXES)})")
    return [Job(source / name, output / name) for name in pictures]


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
) -> Iterator[Batch]:
    """This process's share of the batches of pictures of one size. For a compiled network they are filled up: one
    shape, one graph.

    Batches are planned before they are shared out and read: a picture's bits may depend on the size of its batch.
    """
    own = islice(plan_batches(jobs, resize, batch_size), rank(), None, distributed.world())
    numbered = ((number, job) for number, batch in enumerate(own) for job in batch)

    def read(item: tuple[int, Job]) -> tuple[int, Job, Image.Image | UserError]:
        try:
            picture = images.open_picture(item[1].source)
            picture = images.resize_short_side(picture, resize) if resize else picture
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
        rows = [images.to_bytes(picture) for picture in pictures]
        rows += rows[-1:] * (batch_size - len(rows) if pipeline.compiled else 0)
        latents = pipeline.encode(images.to_pixels(torch.stack(rows)))
        yield Batch(list(batch), latents, (height, width))


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
