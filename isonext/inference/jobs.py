"""What inference.py does: pictures transferred, a kept structure in other styles, the original of one back."""

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from isonext.data import images
from isonext.errors import UserError
from isonext.evaluation.metrics import ssim
from isonext.flow.certificate import digest, likely_cause
from isonext.flow.solvers import LatticeState
from isonext.flow.transfer import Inverted, Transfer, TransferSettings
from isonext.inference.inputs import (
    Batch,
    Job,
    find_jobs,
    load_batches,
    load_stored_latent,
    picture_path,
    plan_batches,
    skipping,
)
from isonext.inference.options import RestoreOptions, RestyleOptions, TransferOptions
from isonext.inference.plan import Plan, Target, open_pipeline, plan_restyle, plan_transfer
from isonext.inference.record import keep_record, record_of_run
from isonext.inference.report import Report, certificate_status, combine_reports, print_plan, print_report
from isonext.inference.structure_file import (
    Structure,
    fixed_bits,
    load_structure,
    refuse_other_bits,
    refuse_other_shape,
    save_structure,
)
from isonext.pipeline import Pipeline
from isonext.utils import distributed
from isonext.utils.device import deterministic
from isonext.utils.io import check_output, in_background

RECORD = "transfers.json"  # in the folder of results


#################################################################################
#                                 The three jobs                                #
#################################################################################


def transfer_pictures(options: TransferOptions) -> int:
    """A picture, a stored latent, or a folder of pictures, to another style; returns the exit status."""
    is_folder = options.input.is_dir()
    if not is_folder:
        distributed.refuse_several("one picture")
    left_out: Counter[str] = Counter()
    jobs = find_jobs(options.input, options.output, left_out)
    # What is left to do is seen before anybody does it.
    todo = distributed.from_main(
        [job for job in jobs if options.overwrite or not is_folder or not os.path.isfile(job.output)]
    )
    plan = plan_transfer(options)
    refuse_collisions(jobs, plan)
    skipped: list[str] | None = [] if is_folder else None
    if is_folder:
        check_output(options.output)
    with distributed.folder_lock(options.output) if is_folder else contextlib.nullcontext():
        if is_folder and distributed.is_main():
            remember(options, plan, jobs)
        batches = read_batches(todo, options, plan, skipped)
        started = time.perf_counter()
        with deterministic(plan.pipeline.device, options.certify or options.save_structure is not None):
            report = transfer_batches(batches, plan, math.ceil(len(todo) / distributed.world()), skipped)
        report.skipped = sorted(skipped or ())
        report = combine_reports(report, plan)
        seconds = time.perf_counter() - started

    print_plan(plan)
    present = f", {len(jobs) - len(todo)} were there already" if len(todo) < len(jobs) else ""
    print_report(report, plan, seconds, present)
    frames = ", the frames to folders beside it" if options.targets.interpolate else ""
    print(f"written to {options.output}{frames}")
    for reason in report.skipped:
        print(f"skipped: {reason}")
    if left_out:
        print(images.left_out_line(left_out))
    return certificate_status(plan, 1 if report.skipped else 0)


def remember(options: TransferOptions, plan: Plan, jobs: list[Job]) -> None:
    """As record.py, for a folder's results."""
    own: dict[str, Any] = {
        "source": plan.pipeline.spec.styles[plan.source],
        "targets": [target.title for target in plan.targets],
    }
    own |= {"size": options.size, "min_structure": options.min_structure}
    results = {path for job in jobs for path in result_paths(job, plan)}
    present = [path for path in results if os.path.lexists(path) and not path.is_dir()]
    record = record_of_run(plan.pipeline, plan.settings, own)
    keep_record(options.output / RECORD, record, present, results, options.overwrite)


def read_batches(todo: list[Job], options: TransferOptions, plan: Plan, skipped: list[str] | None) -> Iterable[Batch]:
    """This process's share of what is to be done; the network is compiled where that pays for a batch of them."""
    pipeline, is_folder = plan.pipeline, options.input.is_dir()
    batches: Iterable[Batch]
    if options.input.suffix == ".pt" and not is_folder:
        batches = [load_stored_latent(todo[0], pipeline, plan.compiles)]
        compiled = batches[0].compiled
    else:
        batch_size = options.network.batch_size if is_folder and options.min_structure is None else 1
        # One process reads the headers for all.
        planned = plan_batches(todo, options.size, batch_size, plan.compiles) if distributed.is_main() else None
        planned = distributed.from_main(planned)
        compiled = any(batch.compiled for batch in planned)
        on_sheet = 1 if len(plan.targets) == 1 else 1 + len(plan.targets)
        batches = load_batches(planned, pipeline, options.size, batch_size, skipped, on_sheet)
    if compiled:
        pipeline.compile()
    return batches


def restyle_structure(options: RestyleOptions) -> int:
    """Other styles of a kept structure, without its picture; returns the exit status."""
    distributed.refuse_several("one picture")
    job = Job(options.structure, picture_path(options.output))
    structure = load_structure(options.structure)
    images.refuse_unwritable(job.output, structure.size[::-1])
    plan = plan_restyle(options, structure)
    refuse_other_bits(structure, plan.pipeline, options.structure, ("checkpoint", "autoencoder"))
    refuse_other_shape(structure, plan.pipeline, options.structure)
    pipeline, source, settings = plan.pipeline, plan.source, plan.settings
    started = time.perf_counter()
    with deterministic(pipeline.device, options.certify):
        inverted = where_transfers_begin(structure, pipeline)
        transfers = [pipeline.generate(inverted, source, target.style, settings) for target in plan.targets]
        for transfer, target in zip(transfers, plan.targets, strict=True):
            if plan.certificate:
                back = pipeline.undo(transfer, source, target.style, settings)[0]
                plan.certificate.compare(inverted.state, back)
                plan.certificate.weigh(transfer.start, transfer.end)
    results = [pipeline.decode(transfer.latents, *structure.size)[0].cpu() for transfer in transfers]
    save_results(job, None, results, plan)
    seconds = time.perf_counter() - started
    print_plan(plan)
    report = Report(1, inverted.nfe + sum(transfer.nfe - inverted.nfe for transfer in transfers))
    print_report(report, plan, seconds, " by way of the picture" if inverted.nfe else " without inverting again")
    print(f"written to {options.output}")
    return certificate_status(plan, 0)


def restore_picture(options: RestoreOptions) -> int:
    """A structure file back to its original's latents, bit for bit; returns the exit status."""
    distributed.refuse_several("one picture")
    output, structure = picture_path(options.output), load_structure(options.structure)
    images.refuse_unwritable(output, structure.size[::-1])
    pipeline, _ = open_pipeline(options.network, structure)
    refuse_other_bits(structure, pipeline, options.structure)
    refuse_other_shape(structure, pipeline, options.structure)
    with deterministic(pipeline.device):
        picture = restored(structure, pipeline)
    if digest(picture) != structure.original:
        print(f"certificate: NOT exact: other latents than the original's; {likely_cause(structure.settings)}")
        print("nothing was written")
        return 3
    images.save_picture(images.to_picture(pipeline.decode(picture.x, *structure.size)[0]), output)
    print(f"{structure.source}: back at the original's latents, written to {output}")
    print(f"certificate: exact (0 of {picture.position.numel()} elements differ), sha256 {digest(picture)}")
    return 0


def restored(structure: Structure, pipeline: Pipeline) -> LatticeState:
    """The picture that a structure came from."""
    source = pipeline.spec.style_id(structure.source)
    target = pipeline.spec.style_id(structure.target) if structure.settings.method == "map" else source
    picture = pipeline.restore(move(structure.state, pipeline.device), source, structure.settings, target)
    assert isinstance(picture, LatticeState)  # as the structure is one
    return picture


def where_transfers_begin(structure: Structure, pipeline: Pipeline) -> Inverted:
    """At the structure; for map, at the picture, which its two evaluations a step lead back to."""
    if structure.settings.method == "map":
        return Inverted(restored(structure, pipeline), 2 * structure.settings.num_steps)
    return Inverted(move(structure.state, pipeline.device), 0)


def move(state: LatticeState, device: torch.device) -> LatticeState:
    return LatticeState(state.position.to(device), state.defect.to(device))


#################################################################################
#                               Batches of pictures                             #
#################################################################################


def transfer_batches(
    batches: Iterable[Batch],
    plan: Plan,
    total: int,  # pictures, for the bar
    skipped: list[str] | None,  # is told of pictures that cannot be transferred or saved; None raises instead
) -> Report:
    """Transfer and save every batch; the next one is read and the last one is written meanwhile."""
    report, pipeline = Report(), plan.pipeline
    saved: list[Job] = []

    def save(job: Job, before: Tensor | None, results: list[Tensor]) -> None:
        with skipping([job], "saved", skipped):
            save_results(job, before, results, plan)
            saved.append(job)

    with_before, quiet = plan.compare or len(plan.targets) > 1, None if distributed.is_main() else True
    with tqdm(total=total, desc="transfer", unit="picture", disable=quiet) as bar, in_background(32) as submit:
        for batch in batches:
            with skipping(batch.jobs, "transferred", skipped):
                with pipeline.compiled_or_not(batch.compiled):
                    transfers = transfer_batch(batch, plan, report)
                results = [pipeline.decode(transfer.latents, *batch.size).cpu() for transfer in transfers]
                before = batch.decode(pipeline).cpu() if with_before else None
                for row, job in enumerate(batch.jobs):
                    picture = None if before is None else before[row]
                    submit(save, job, picture, [result[row] for result in results])
            bar.update(len(batch.jobs))
    report.done = len(saved)
    return report


def transfer_batch(batch: Batch, plan: Plan, report: Report) -> list[Transfer]:
    """The transfers of a batch, one a target; certified, and the structure saved, where that was asked for."""
    pipeline, source, settings = plan.pipeline, plan.source, plan.settings
    cuts, shared = [settings] * len(plan.targets), 0  # each target's settings, the evaluations that all of them share
    if plan.min_structure is not None:
        found = [find_strength(batch, plan, target, report) for target in plan.targets]
        transfers, cuts = [transfer for transfer, _ in found], [cut for _, cut in found]
    elif settings.method == "flowedit":
        transfers = [pipeline.transfer(batch.latents, source, target.style, settings) for target in plan.targets]
    else:
        inverted = pipeline.invert(batch.latents, source, settings)
        transfers = [pipeline.generate(inverted, source, target.style, settings) for target in plan.targets]
        shared = inverted.nfe
    report.nfe = shared + sum(transfer.nfe - shared for transfer in transfers)
    note_residual(batch, transfers[0], settings, report)
    if plan.certificate:
        for transfer, target, cut in zip(transfers, plan.targets, cuts, strict=True):
            back = pipeline.undo(transfer, source, target.style, cut)[1]
            plan.certificate.compare(LatticeState.at_picture(batch.latents), back, len(batch.jobs))
            plan.certificate.weigh(transfer.start, transfer.end, count=len(batch.jobs))
    if plan.save_structure:
        structure = describe_structure(batch, plan, transfers[0], cuts[0])
        save_structure(structure, plan.save_structure)
    return transfers


def describe_structure(batch: Batch, plan: Plan, transfer: Transfer, settings: TransferSettings) -> Structure:
    """What the structure file of a picture on its way to its one target says."""
    state = transfer.end if settings.method == "map" else transfer.start
    assert isinstance(state, LatticeState)  # of an exact method, which alone may be asked for it
    return Structure(
        state=state,
        source=plan.pipeline.spec.styles[plan.source],
        target=plan.targets[0].title,
        settings=settings,
        size=batch.size,
        original=digest(LatticeState.at_picture(batch.latents)),
        bits=fixed_bits(plan.pipeline),
    )


def find_strength(batch: Batch, plan: Plan, target: Target, report: Report) -> tuple[Transfer, TransferSettings]:
    """--min_structure: the strongest transfer whose SSIM to the picture, both decoded, is the floor or more."""
    pipeline, floor = plan.pipeline, plan.min_structure
    assert floor is not None
    enlarge = math.ceil(11 / min(batch.size))  # SSIM's window is 11 pixels wide

    def seen(pixels: Tensor) -> Tensor:
        return F.interpolate(pixels.clamp(-1, 1), scale_factor=enlarge)

    before = seen(batch.decode(pipeline))

    def score(latents: Tensor) -> float:
        return ssim(seen(pipeline.decode(latents, *batch.size)), before).item()

    transfer, cut, tried = pipeline.keep_structure(
        batch.latents, plan.source, target.style, plan.settings, score, floor
    )
    reached = dict(tried)[cut.reached]
    trials = ", ".join(f"{strength:.2f}: {value:.3f}" for strength, value in sorted(tried))
    report.notes.append(
        f"{batch.jobs[0].source} as {target.title}: strength {cut.reached:.2f} keeps structure {reached:.3f} "
        f"(tried {trials})"
    )
    return transfer, cut


def note_residual(batch: Batch, transfer: Transfer, settings: TransferSettings, report: Report) -> None:
    if transfer.residual is None:
        return
    for job, residual in zip(batch.jobs, transfer.residual.tolist(), strict=False):
        report.residual = max(report.residual, residual)
        if not residual <= settings.tolerance:
            report.unsolved.append(str(job.source))


#################################################################################
#                                Files of results                               #
#################################################################################


def result_paths(job: Job, plan: Plan) -> list[Path]:
    """Every file that `save_results` writes for a job; the last one is its output."""
    paths = [target.path(job.output) for target in plan.targets] if len(plan.targets) > 1 else []
    if plan.compare:
        paths.append(compare_path(job))
    return [*paths, job.output]


def compare_path(job: Job) -> Path:
    return job.output.with_name(f"{job.output.stem}_compare.png")


def refuse_collisions(jobs: list[Job], plan: Plan) -> None:
    """No result may take the place of an input, or of another result."""
    taken = {os.path.realpath(job.source): job.source for job in jobs}
    for job in jobs:
        for path in result_paths(job, plan):
            real = os.path.realpath(path)
            other = taken.setdefault(real, job.source)
            if other is not job.source or real == os.path.realpath(job.source):
                raise UserError(
                    f"{path}: would be written for {job.source}, but belongs to {other}; rename one of them"
                )


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
