"""A picture or a folder of them, as batches for the network; results are saved while the next batch is made.

Reading and writing pictures run in threads beside the network, so that it does not wait for them.
"""

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from isonext.data import images
from isonext.data.pt_store import read_latent
from isonext.data.store import read_meta
from isonext.errors import UserError, first_line, is_out_of_memory
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
    compiled: bool = False  # for a compiled network
    decoded: Tensor | None = None  # (B, 3, height, width): the latents, once somebody wanted to see them

    def decode(self, pipeline: Pipeline) -> Tensor:
        if self.decoded is None:
            self.decoded = pipeline.decode(self.latents, *self.size)
        return self.decoded


@dataclass
class PlannedBatch:
    """Jobs of one size, before their pictures are read."""

    jobs: list[Job]
    compiled: bool


# Whether the network is compiled for pictures of a size (width, height), of which full batches hold so many; 0: for a
# batch that is not full.
Compiles = Callable[[tuple[int, int], int], bool]


def never(size: tuple[int, int], pictures: int) -> bool:
    return False


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


def group_by_size(jobs: list[Job], resize: int | None) -> dict[tuple[int, int] | None, list[Job]]:
    """Width and height, by the headers of the files -> the jobs of that size; those without a header come last, as
    None's. Sizes and jobs keep their order."""

    def size_of(job: Job) -> tuple[int, int] | None:
        size = images.picture_size(job.source)
        return images.resized(size, resize) if size and resize else size

    groups: dict[tuple[int, int] | None, list[Job]] = {}
    sizes = ahead(size_of, jobs, 4 * THREADS)
    for job, size in tqdm(zip(jobs, sizes, strict=True), "sizes", len(jobs), leave=False, disable=None):
        groups.setdefault(size, []).append(job)
    if headless := groups.pop(None, None):
        groups[None] = headless
    return groups


def plan_batches(
    jobs: list[Job],
    resize: int | None,  # pixels of the short side
    batch_size: int,
    compiles: Compiles = never,
) -> list[PlannedBatch]:
    """Batches of one size, full but for each size's last; pictures without a header one by one."""
    batches = []
    for size, group in group_by_size(jobs, resize).items():
        if size is None:
            batches += [PlannedBatch([job], False) for job in group]
            continue
        whole = len(group) // batch_size * batch_size
        batches += [PlannedBatch(group[n : n + batch_size], compiles(size, whole)) for n in range(0, whole, batch_size)]
        if rest := group[whole:]:
            batches.append(PlannedBatch(rest, compiles(size, 0)))
    return batches


def load_batches(
    batches: list[PlannedBatch],  # of all processes
    pipeline: Pipeline,
    resize: int | None,  # pixels of the short side
    batch_size: int,
    skipped: list[str] | None,  # is told of bad pictures; None raises instead
    on_sheet: int = 1,  # pictures that a result shows, see `images.strip`
) -> Iterator[Batch]:
    """This process's share of the batches, read. Those for a compiled network are filled up: one shape, one graph.

    Batches are planned before they are shared out and read: a picture's bits may depend on the size of its batch.
    """
    own = batches[rank() :: distributed.world()]
    numbered = ((number, job) for number, batch in enumerate(own) for job in batch.jobs)

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

    for (number, (width, height)), group in groupby(good(), key=lambda item: (item[0], item[2].size)):
        _, jobs, pictures = zip(*group, strict=True)
        compiled, latents = own[number].compiled and pipeline.compiled, None
        with skipping(jobs, "encoded", skipped):
            rows = [images.to_bytes(picture) for picture in pictures]
            rows += rows[-1:] * (batch_size - len(rows) if compiled else 0)
            latents = pipeline.encode(images.to_pixels(torch.stack(rows)))
        if latents is not None:
            yield Batch(list(jobs), latents, (height, width), compiled)


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
        advice = "; a smaller --size or --batch_size takes less" if is_out_of_memory(error) else ""
        skipped += [f"{job.source}: cannot be {verb} ({first_line(error)}){advice}" for job in jobs]


def load_stored_latent(job: Job, pipeline: Pipeline, compiles: Compiles = never) -> Batch:
    """A latent of the store as a batch of one."""
    latent = read_latent(job.source)["latent"]
    _check_autoencoder(job.source, pipeline)
    if len(latent) != pipeline.spec.channels:
        raise UserError(f"{job.source}: has {len(latent)} channels, the checkpoint's latents {pipeline.spec.channels}")
    height, width = (side * pipeline.spec.factor for side in latent.shape[1:])
    pipeline.check_size(job.source, (width, height))
    latents = pipeline.spec.standardise(latent[None].to(pipeline.device))
    return Batch([job], latents, (height, width), compiles((width, height), 1))


def _check_autoencoder(path: Path, pipeline: Pipeline) -> None:
    """UserError where the latent lies in a store of another autoencoder than the checkpoint's."""
    place = path.resolve()
    for root in place.parents:
        try:
            meta = read_meta(root)
        except UserError:  # other programs have files called meta.json, too
            continue
        if meta is None or place.relative_to(root).parts[0] not in meta.latents.styles:
            continue
        if not meta.latents.has_autoencoder_of(pipeline.spec):
            there, here = meta.latents.autoencoder_beside(pipeline.spec), pipeline.spec.autoencoder_beside(meta.latents)
            raise UserError(f"{path}: the store {root} has autoencoder {there}, the checkpoint {here}")
