"""A batch of pictures: transferred, certified, its structure and its results saved; and the report of it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from isonext.data import images
from isonext.evaluation.metrics import ssim
from isonext.flow.certificate import digest
from isonext.flow.solvers import LatticeState
from isonext.flow.transfer import Transfer, TransferSettings
from isonext.inference.inputs import Job, Loaded
from isonext.inference.plan import Plan, Target
from isonext.inference.structure_file import Structure, fixed_bits, save_structure
from isonext.utils import distributed
from isonext.utils.io import in_background


@dataclass
class Report:
    """What came of it."""

    done: int = 0
    nfe: int = 0  # network evaluations a picture, of the last batch
    notes: list[str] = field(default_factory=list)
    unsolved: list[str] = field(default_factory=list)  # pictures whose fixed point did not converge
    residual: float = 0.0
    skipped: list[str] = field(default_factory=list)  # one line a bad picture

    def include(self, other: "Report") -> None:
        """Take in another process's."""
        self.done += other.done
        self.nfe = self.nfe or other.nfe
        self.residual = max(self.residual, other.residual)
        for name in ("notes", "unsolved", "skipped"):
            setattr(self, name, sorted(getattr(self, name) + getattr(other, name)))


#################################################################################
#                                   One batch                                   #
#################################################################################


def transfer_batch(batch: Loaded, plan: Plan, report: Report) -> list[Transfer]:
    """The transfers of a batch, one a target; certified, and the structure saved, where that was asked for."""
    pipeline, source, settings = plan.pipeline, plan.source, plan.settings
    cuts, shared = [settings] * len(plan.targets), 0
    if plan.min_structure is not None:
        found = [find_strength(batch, plan, target, report) for target in plan.targets]
        transfers, cuts = [transfer for transfer, _ in found], [cut for _, cut in found]
    elif settings.method == "flowedit":
        transfers = [pipeline.transfer(batch.latents, source, target.style, settings) for target in plan.targets]
    else:
        inverted = pipeline.invert(batch.latents, source, settings)
        transfers = [pipeline.generate(inverted, source, target.style, settings) for target in plan.targets]
        shared = inverted.nfe
    note_residual(batch, transfers[0], settings, report)
    for transfer, target, cut in zip(transfers, plan.targets, cuts, strict=True):
        if plan.certificate:
            back = pipeline.undo(transfer.end, source, target.style, cut)[1]
            plan.certificate.compare(LatticeState.at_picture(batch.latents), back, len(batch.jobs))
    if plan.save_structure:
        names = pipeline.spec.styles[source], plan.targets[0].title
        original, bits, (first, *_) = digest(LatticeState.at_picture(batch.latents)), fixed_bits(pipeline), transfers
        structure = Structure(first.start, first.end, *names, cuts[0], batch.size, original, bits)
        save_structure(structure, plan.save_structure)
    report.nfe = shared + sum(transfer.nfe - shared for transfer in transfers)
    return transfers


def find_strength(batch: Loaded, plan: Plan, target: Target, report: Report) -> tuple[Transfer, TransferSettings]:
    """--min_structure: the strongest transfer whose SSIM to the picture, both decoded, is the floor or more."""
    pipeline = plan.pipeline
    enlarge = math.ceil(11 / min(batch.size))  # SSIM's window is 11 pixels wide

    def decoded(latents: Tensor) -> Tensor:
        return F.interpolate(pipeline.decode(latents, *batch.size).clamp(-1, 1), scale_factor=enlarge)

    before = decoded(batch.latents)

    def score(latents: Tensor) -> float:
        return ssim(decoded(latents), before).item()

    transfer, cut, tried = pipeline.keep_structure(
        batch.latents, plan.source, target.style, plan.settings, score, plan.min_structure
    )
    reached = dict(tried)[1 - cut.grid[0]]
    trials = ", ".join(f"{strength:.2f}: {value:.3f}" for strength, value in sorted(tried))
    report.notes.append(
        f"{batch.jobs[0].source} as {target.title}: strength {1 - cut.grid[0]:.2f} keeps structure {reached:.3f} "
        f"(tried {trials})"
    )
    return transfer, cut


def note_residual(batch: Loaded, transfer: Transfer, settings: TransferSettings, report: Report) -> None:
    if transfer.residual is None:
        return
    for job, residual in zip(batch.jobs, transfer.residual.tolist(), strict=False):
        report.residual = max(report.residual, residual)
        if not residual <= settings.tolerance:
            report.unsolved.append(str(job.source))


def result_paths(job: Job, plan: Plan) -> list[Path]:
    """Every file that `save_results` writes for a job; the last one is its output."""
    paths = [target.path(job.output) for target in plan.targets] if len(plan.targets) > 1 else []
    if plan.compare:
        paths.append(compare_path(job))
    return [*paths, job.output]


def compare_path(job: Job) -> Path:
    return job.output.with_name(f"{job.output.stem}_compare.png")


def save_results(job: Job, before: Tensor | None, results: list[Tensor], plan: Plan) -> None:
    """Write the results of one picture: one picture; or one a target, and `job.output` is the sheet of them all."""
    pictures = [images.to_picture(pixels) for pixels in results]
    source = [] if before is None else [images.to_picture(before)]
    titles = [plan.pipeline.spec.styles[plan.source]] * len(source) + [target.title for target in plan.targets]
    final = pictures[0]
    if plan.compare:
        sheet = images.contact_sheet([source + pictures], titles)
        images.save_picture(sheet, compare_path(job))
    if len(plan.targets) > 1:
        for target, picture in zip(plan.targets, pictures, strict=True):
            images.save_picture(picture, target.path(job.output))
        final = images.strip(source + pictures, titles)
    images.save_picture(final, job.output)  # last: a result that is there says that its job is done


def transfer_batches(batches: Iterable[Loaded], plan: Plan, total: int) -> Report:
    """Transfer and save every batch; the next one is read and the last one is written meanwhile."""
    report, pipeline = Report(), plan.pipeline
    with_before, quiet = plan.compare or len(plan.targets) > 1, None if distributed.is_main() else True
    with tqdm(total=total, desc="transfer", unit="picture", disable=quiet) as bar, in_background(32) as submit:
        for batch in batches:
            transfers = transfer_batch(batch, plan, report)
            results = [pipeline.decode(transfer.latents, *batch.size).cpu() for transfer in transfers]
            before = pipeline.decode(batch.latents, *batch.size).cpu() if with_before else None
            for row, job in enumerate(batch.jobs):
                submit(
                    save_results,
                    job,
                    None if before is None else before[row],
                    [result[row] for result in results],
                    plan,
                )
            report.done += len(batch.jobs)
            bar.update(len(batch.jobs))
    return report
