"""What the page does with pictures, apart from the page: one job at a time, on one thread, as inference.py would do it.

Everything a browser says is checked here: a checkpoint is looked up among those that are found, a picture is decoded
within limits, numbers are those that inference.py takes.
"""

import contextlib
import hashlib
import secrets
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from isonext.app.guess import style_losses
from isonext.app.recent import Recent, remember_inversions
from isonext.app.runs import find_checkpoint
from isonext.app.trainings import under_way
from isonext.data import images
from isonext.data.deep_png import save_deep
from isonext.data.store import fingerprint
from isonext.errors import UserError, first_line, is_out_of_memory
from isonext.flow.certificate import digest, likely_cause
from isonext.flow.transfer import EXACT
from isonext.inference.inputs import Batch, Job
from isonext.inference.jobs import generate_targets, original_of, restored_line, transfer_batch
from isonext.inference.options import (
    NetworkOptions,
    RestyleOptions,
    SampleOptions,
    SettingsOptions,
    TargetOptions,
    TransferOptions,
)
from isonext.inference.plan import Plan, open_pipeline, plan_restyle_with, plan_with
from isonext.inference.report import Report
from isonext.inference.sampling import SHEET, draw_sheet, plan_samples, sample_batches, sampling_settings
from isonext.inference.structure_file import SUFFIX, Structure, fixed_bits, load_structure
from isonext.pipeline import Pipeline
from isonext.utils.device import allow_tf32, deterministic

Result = TypeVar("Result")
MOST_PIXELS = 2**25  # of a picture that the page takes; a folder of larger ones is for inference.py
LONGEST_STEM = 60  # letters of an upload's name that its results keep
MOST_STEPS = 200  # a leg: more would keep everybody in line
KEEP_S = 4 * 3600  # results
MOST_SAMPLES, AT_ONCE = 64, 16  # pictures of a job, and of a batch
LOADED, ENCODED = 2, 4  # checkpoints and pictures that are kept ready


@dataclass
class Loaded:
    """A checkpoint made ready, and what its file was then."""

    name: str  # what the page calls it
    path: Path
    pipeline: Pipeline
    trained: dict  # the config it was trained by
    bits: dict[str, str | bool | int]  # of its file and of this machine, for structure files

    @property
    def styles(self) -> list[str]:
        return self.pipeline.spec.styles

    @property
    def steps(self) -> int:
        return self.trained["inference"]["num_steps"]


@dataclass(frozen=True)
class Order:
    """A transfer that was asked for."""

    checkpoint: str
    picture: Path
    source: str
    target: str  # or "all"
    strength: float = 1.0
    size: int | None = None  # pixels of the short side; None: as it is
    flags: dict[str, Any] = field(default_factory=dict)  # of the inference section
    min_structure: float | None = None
    certify: bool = True  # and keep the structure, where the method has one that is exact
    deep: bool = False  # 16 bits a channel


@dataclass
class Outcome:
    """The files and the sentences of a transfer."""

    before: Path | None
    after: list[tuple[Path, str]]  # one a target, and its style
    lines: list[str]
    structure: Path | None = None
    nfe: int = 0  # network evaluations that it took


@dataclass
class Encoded:
    """A picture as latents, and as the autoencoder alone gives it back."""

    latents: Tensor
    size: tuple[int, int]  # height, width
    before: Path


class Studio:
    """Does the jobs. `runs` is where checkpoints are found, `results` where files for download go."""

    def __init__(self, runs: Path, results: Path, device: str = "auto") -> None:
        self.runs, self.results, self.device = runs, results, device
        self.thread = ThreadPoolExecutor(1, "device")  # one job at a time, and always the same kernels
        self.loaded, self.encoded = Recent(LOADED), Recent(ENCODED)

    def do(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """`work(*arguments)` on the device's thread; what goes wrong is a UserError of one sentence."""
        try:
            return self.thread.submit(self._alone, work, *arguments).result()
        except UserError:
            raise
        except FloatingPointError as error:
            raise UserError(first_line(error)) from None
        except Exception as error:
            if is_out_of_memory(error):
                self.release()
                raise UserError("the device is out of memory; a smaller size takes less") from None
            traceback.print_exc()
            raise UserError(f"{type(error).__name__}: {first_line(error)}; the server's terminal shows more") from None

    def _alone(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """A training takes what memory there is: nothing goes on beside it."""
        if busy := under_way(self.runs):
            raise UserError(f"{busy.title}: is being trained and has the device; stop it in the tab Train, or wait")
        remove_old(self.results)
        return work(*arguments)

    def release(self) -> None:
        """Let go of networks and latents: somebody else wants the memory."""
        self.loaded.values.clear()
        self.encoded.values.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def open(self, name: str) -> Loaded:
        """The checkpoint that the page calls `name`; loaded anew where its file is another one by now."""
        path = find_checkpoint(self.runs, name)

        def load() -> Loaded:
            pipeline, trained = open_pipeline(self._network(path))
            remember_inversions(pipeline)
            return Loaded(name, path, pipeline, trained, fixed_bits(pipeline))

        found: Loaded = self.loaded.get((path, *fingerprint(path)), load)
        allow_tf32(found.trained["training"]["tf32"])  # one switch for all networks
        return found

    def _network(self, path: Path) -> NetworkOptions:
        return NetworkOptions(str(path), self.device, compile="off", batch_size=1)

    #############################################################################
    #                                 Transfers                                 #
    #############################################################################

    def transfer(self, order: Order) -> Outcome:
        """A picture in one style or in all of them."""
        loaded = self.open(order.checkpoint)
        encoded = self.encode(loaded, order.picture, order.size)
        folder, stem = self._new_folder(), _stem(order.picture)
        plan = self._plan(loaded, order, folder / f"{stem}.png")
        job, report = Job(Path(order.picture.name), folder / f"{stem}.png"), Report()
        with deterministic(loaded.pipeline.device):
            transfers = transfer_batch(Batch([job], encoded.latents, encoded.size), plan, report)
        pixels = [loaded.pipeline.decode(transfer.latents, *encoded.size)[0].cpu() for transfer in transfers]
        after = self._save(pixels, plan, job.output, order.deep)
        return Outcome(encoded.before, after, _lines(plan, report), plan.save_structure, report.nfe)

    def _plan(self, loaded: Loaded, order: Order, output: Path) -> Plan:
        method = order.flags.get("method", loaded.trained["inference"]["method"])
        exact, one = order.certify and method in EXACT, order.target != "all"
        if not one and len(loaded.styles) > MOST_SAMPLES:
            raise UserError(
                f"{len(loaded.styles)} styles: at most {MOST_SAMPLES} at once here; inference.py makes more"
            )
        options = TransferOptions(
            self._network(loaded.path),
            SettingsOptions(flags=order.flags, strength=order.strength),
            TargetOptions(order.target),
            order.picture,
            output,
            order.source,
            min_structure=order.min_structure,
            certify=exact,
            save_structure=output.with_suffix(SUFFIX) if exact and one else None,
        )
        plan = plan_with(loaded.pipeline, loaded.trained, options)
        plan.bits = loaded.bits
        return plan

    def encode(self, loaded: Loaded, path: Path, size: int | None) -> Encoded:
        """A picture of the browser's as latents; one that cannot be read is named without the server's path."""
        key = loaded.path, *fingerprint(loaded.path), hashlib.sha256(path.read_bytes()).hexdigest(), size

        def make() -> Encoded:
            picture = open_upload(path, size)
            loaded.pipeline.check_size(Path(path.name), picture.size)
            latents = loaded.pipeline.encode(images.to_pixels(images.to_bytes(picture))[None])
            sides = picture.size[1], picture.size[0]
            before = self._new_folder() / f"{_stem(path)}.png"
            images.save_picture(images.to_picture(loaded.pipeline.decode(latents, *sides)[0]), before)
            return Encoded(latents, sides, before)

        found: Encoded = self.encoded.get(key, make)
        if not found.before.exists():  # the server cleans up after some hours
            del self.encoded.values[key]
            found = self.encoded.get(key, make)
        return found

    def guess(self, checkpoint: str, path: Path) -> list[tuple[str, float]]:
        """(style, loss) of a picture, the most likely style first; [] where there are too many to try."""
        loaded = self.open(checkpoint)
        side = loaded.pipeline.spec.image_size
        picture = images.square(open_upload(path, None), side)
        latents = loaded.pipeline.encode(images.to_pixels(images.to_bytes(picture))[None])
        losses = zip(loaded.styles, style_losses(loaded.pipeline, latents), strict=False)
        return sorted(losses, key=lambda pair: pair[1])

    #############################################################################
    #                                  Samples                                  #
    #############################################################################

    def sample(
        self, checkpoint: str, styles: list[str], count: int, seed: int, flags: dict[str, Any]
    ) -> tuple[Path, list[tuple[Path, str]]]:
        """`count` pictures of each style from noise: the sheet, and (path, style) of each."""
        loaded, folder = self.open(checkpoint), self._new_folder()
        spec, size = loaded.pipeline.spec, min(AT_ONCE, count * len(styles or loaded.styles))
        options = SampleOptions(
            *(self._network(loaded.path), SettingsOptions(flags=flags), folder, tuple(styles)),
            num_samples_per_style=count,
            seed=seed,
        )
        settings = sampling_settings(options, loaded.trained, spec, loaded.pipeline.base)
        samples = plan_samples(options, spec)
        if len(samples) > MOST_SAMPLES:
            raise UserError(f"{len(samples)} samples: at most {MOST_SAMPLES} at once here; sample.py makes more")
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        sample_batches(batches, loaded.pipeline, settings, seed, size)
        images.save_picture(draw_sheet(samples, spec), folder / SHEET)
        return folder / SHEET, [(sample.path, spec.styles[sample.style]) for sample in samples]

    #############################################################################
    #                              Structure files                              #
    #############################################################################

    def restyle(self, checkpoint: str, file: Path, target: str, flags: dict[str, Any], deep: bool = False) -> Outcome:
        """A kept structure in another style; `flags` are those of guidance."""
        structure = read_structure(file)
        loaded = self._open_for(checkpoint, structure)
        output = self._new_folder() / f"{_stem(file)}.png"
        options = RestyleOptions(
            *(self._network(loaded.path), SettingsOptions(flags=flags), TargetOptions(target)),
            *(Path(file.name), output, structure.settings.method in EXACT),
        )
        plan = plan_restyle_with(loaded.pipeline, loaded.trained, options, structure)
        _, transfers = generate_targets(structure, plan)
        pixels = [loaded.pipeline.decode(transfer.latents, *structure.size)[0].cpu() for transfer in transfers]
        nfe = sum(transfer.nfe for transfer in transfers)
        return Outcome(None, self._save(pixels, plan, output, deep), _lines(plan, Report()), nfe=nfe)

    def restore(self, checkpoint: str, file: Path, deep: bool = False) -> Outcome:
        """The original of a kept structure, equal to the bit, or a UserError that says why not."""
        structure = read_structure(file)
        loaded = self._open_for(checkpoint, structure)
        picture = original_of(structure, loaded.pipeline, Path(file.name))
        if digest(picture) != structure.original:
            raise UserError(
                f"certificate: NOT exact: other latents than the original's; {likely_cause(structure.settings)}"
            )
        pixels = loaded.pipeline.decode(picture.x, *structure.size)[0].cpu()
        output = self._new_folder() / f"{_stem(file)}.png"
        save_pixels(pixels, output, deep)
        return Outcome(None, [(output, structure.source)], [restored_line(picture)])

    def _open_for(self, checkpoint: str, structure: Structure) -> Loaded:
        """The checkpoint as the structure was made by it: in its precision, and compiled or not."""
        loaded = self.open(checkpoint)
        precision = "bf16" if loaded.pipeline.bf16 else "fp32"
        if structure.bits["precision"] == precision and structure.bits["compiled"] == loaded.pipeline.compiled:
            return loaded
        network = NetworkOptions(str(loaded.path), self.device, batch_size=1)
        pipeline, trained = open_pipeline(network, structure)
        return replace(loaded, pipeline=pipeline, trained=trained)

    #############################################################################
    #                                   Files                                   #
    #############################################################################

    def _new_folder(self) -> Path:
        """A folder for results, of a name that nobody can guess: gradio shows a file to everyone who knows its name."""
        self.results.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=secrets.token_hex(16), dir=self.results))

    def _save(self, pixels: list[Tensor], plan: Plan, output: Path, deep: bool) -> list[tuple[Path, str]]:
        """One file a target: (path, style)."""
        after = []
        for part, target in zip(pixels, plan.targets, strict=True):
            path = target.path(output)
            save_pixels(part, path, deep)
            after.append((path, target.title))
        return after


def save_pixels(pixels: Tensor, path: Path, deep: bool) -> None:
    """(3, H, W) in [-1, 1] as a PNG of 8 or 16 bits a channel."""
    if deep:
        save_deep(pixels, path)
    else:
        images.save_picture(images.to_picture(pixels), path)


def open_upload(path: Path, size: int | None) -> Image.Image:
    """A picture that a browser sent, within the page's limits; `size`: pixels of the short side, if not its own."""
    try:
        found = images.picture_size(path)
        if found and found[0] * found[1] > MOST_PIXELS:
            raise UserError(
                f"{path}: has {found[0]} x {found[1]} pixels, this page takes at most {MOST_PIXELS}; reduce it"
            )
        with images.one_picture(path):
            picture = images.open_picture(path)
            if size:
                images.refuse_enlarged(picture.size, size)
                picture = images.resize_short_side(picture, size)
            return picture
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from None


def read_structure(file: Path) -> Structure:
    """A structure file that a browser sent, named without the server's path."""
    try:
        structure = load_structure(file)
    except UserError as error:
        raise UserError(str(error).replace(str(file), file.name)) from None
    if structure.settings.num_steps > MOST_STEPS:
        raise UserError(f"{file.name}: has {structure.settings.num_steps} steps a leg, this page takes {MOST_STEPS}")
    return structure


def remove_old(folder: Path) -> None:
    """Delete the folders of results that nobody will ask for any more."""
    for old in folder.glob("*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > KEEP_S:
                shutil.rmtree(old)


def _stem(path: Path) -> str:
    return path.stem[:LONGEST_STEM] or "picture"


def _lines(plan: Plan, report: Report) -> list[str]:
    """The certificate, and what else there is to say."""
    lines = list(report.notes)
    if plan.certificate:
        lines.append(plan.certificate.line(likely_cause(plan.settings)))
    return lines
