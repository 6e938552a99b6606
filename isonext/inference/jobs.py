"""What inference.py does: pictures transferred, a kept structure in other styles, the original of one back."""

import math
import time

import torch

from isonext.data import images
from isonext.errors import UserError
from isonext.flow.certificate import Certificate, digest, likely_cause
from isonext.flow.solvers import LatticeState
from isonext.flow.transfer import Inverted
from isonext.inference import inputs
from isonext.inference.batch import Report, result_paths, save_results, transfer_batches
from isonext.inference.inputs import Job
from isonext.inference.options import RestoreOptions, RestyleOptions, TransferOptions
from isonext.inference.plan import Plan, open_pipeline, plan_restyle, plan_transfer
from isonext.inference.structure_file import load_structure, refuse_other_bits
from isonext.utils import distributed
from isonext.utils.device import deterministic

#################################################################################
#                                 The three jobs                                #
#################################################################################


def transfer_pictures(options: TransferOptions) -> int:
    """A picture, a stored latent, or a folder of pictures, to another style; returns the exit status."""
    is_folder = options.input.is_dir()
    if not is_folder:
        distributed.refuse_several("one picture")
    jobs = inputs.find_jobs(options.input, options.output)
    # What is left to do is seen before anybody does it.
    todo = distributed.from_main([job for job in jobs if options.overwrite or not is_folder or not job.output.exists()])
    plan = plan_transfer(options, len(todo))
    refuse_collisions(jobs, plan)
    skipped: list[str] | None = [] if is_folder else None
    if options.input.suffix == ".pt" and not is_folder:
        batches = iter([inputs.load_stored_latent(todo[0], plan.pipeline)])
    else:
        batch_size = options.batch_size if is_folder and options.min_structure is None else 1
        batches = inputs.load_batches(todo, plan.pipeline, options.size, batch_size, skipped)
    started = time.perf_counter()
    with deterministic(plan.pipeline.device, options.certify or options.save_structure is not None):
        report = transfer_batches(batches, plan, math.ceil(len(todo) / distributed.world()))
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
    return certificate_status(plan, 1 if report.skipped else 0)


def combine_reports(report: Report, plan: Plan) -> Report:
    """The report of all processes together, and in the plan their certificate."""
    (report, plan.certificate), *others = distributed.gather((report, plan.certificate))
    for other, certificate in others:
        report.include(other)
        if certificate:
            plan.certificate.include(certificate)
    return report


def refuse_collisions(jobs: list[Job], plan: Plan) -> None:
    """No result may take the place of an input, or of another result."""
    taken = {job.source.resolve(): job.source for job in jobs}
    for job in jobs:
        for path in result_paths(job, plan):
            other = taken.setdefault(path.resolve(), job.source)
            if other is not job.source or path.resolve() == job.source.resolve():
                raise UserError(
                    f"{path}: would be written for {job.source}, but belongs to {other}; rename one of them"
                )


def restyle_structure(options: RestyleOptions) -> int:
    """Other styles of a kept structure, without its picture; returns the exit status."""
    distributed.refuse_several("one picture")
    job = Job(options.structure, inputs.picture_path(options.output))
    structure = load_structure(options.structure)
    plan = plan_restyle(options, structure)
    refuse_other_bits(structure, plan.pipeline, options.structure, ("checkpoint",))
    state = move(structure.start, plan.pipeline.device)
    started = time.perf_counter()
    with deterministic(plan.pipeline.device, options.certify):
        inverted = Inverted(state, 0)
        transfers = [
            plan.pipeline.generate(inverted, plan.source, target.style, plan.settings) for target in plan.targets
        ]
        for transfer, target in zip(transfers, plan.targets, strict=True):
            if plan.certificate:
                back = plan.pipeline.undo(transfer.end, plan.source, target.style, plan.settings)[0]
                plan.certificate.compare(state, back)
    results = [plan.pipeline.decode(transfer.latents, *structure.size)[0].cpu() for transfer in transfers]
    save_results(job, None, results, plan)
    seconds = time.perf_counter() - started
    print_plan(plan)
    report = Report(1, sum(transfer.nfe for transfer in transfers))
    print_report(report, plan, seconds, " without inverting again")
    print(f"written to {options.output}")
    return certificate_status(plan, 0)


def restore_picture(options: RestoreOptions) -> int:
    """The transferred latents of a structure file back to the original's, bit for bit; returns the exit status."""
    distributed.refuse_several("one picture")
    output, structure = inputs.picture_path(options.output), load_structure(options.structure)
    pipeline, _ = open_pipeline(options.network, 1, structure)
    refuse_other_bits(structure, pipeline, options.structure)
    source, target = (pipeline.spec.style_id(name) for name in (structure.source, structure.target))
    with deterministic(pipeline.device):
        start, picture = pipeline.undo(move(structure.end, pipeline.device), source, target, structure.settings)
    certificate = Certificate()
    certificate.compare(move(structure.start, pipeline.device), start)
    if not certificate.exact:
        print(f"{certificate.line(likely_cause(structure.settings))}\nnothing was written")
        return 3
    if digest(picture) != structure.original:  # the structure came back, the leg from there to the picture did not
        print(f"certificate: NOT exact: other latents than the original's; {likely_cause(structure.settings)}")
        print("nothing was written")
        return 3
    images.save_picture(images.to_picture(pipeline.decode(picture.x, *structure.size)[0]), output)
    print(f"{structure.target} -> {structure.source}: back at the original's latents, written to {output}")
    print(f"certificate: exact (0 of {certificate.elements} elements differ), sha256 {digest(picture)}")
    return 0


def move(state: LatticeState, device: torch.device) -> LatticeState:
    return LatticeState(state.position.to(device), state.defect.to(device))


#################################################################################
#                                What is reported                               #
#################################################################################


def print_plan(plan: Plan) -> None:
    settings, styles = plan.settings, plan.pipeline.spec.styles
    titles = plan.targets[0].title if len(plan.targets) == 1 else f"{len(plan.targets)} styles"
    guidance = "no guidance" if settings.cfg_scale == 1 else f"{settings.guidance} guidance {settings.cfg_scale:g}"
    strength = f"strength {round(1 - settings.grid[0], 2):g}"
    strength = strength if plan.min_structure is None else f"structure {plan.min_structure:g} or more"
    legs = f"{settings.method}, {settings.num_steps} steps a leg"
    print(f"{styles[plan.source]} -> {titles}: {legs}, {guidance}, {strength}")


def print_report(report: Report, plan: Plan, seconds: float, remark: str) -> None:
    if report.done:
        picture_s = seconds / report.done
        print(f"{report.done} made, {report.nfe} network evaluations and {picture_s:.2f} s a picture on "
              f"{plan.pipeline.device}{remark}")  # fmt: skip
    else:
        print(f"0 made{remark}")
    for note in report.notes:
        print(note)
    if plan.settings.inversion == "fixed_point":
        verdict = f"all of them within {plan.settings.tolerance:g}"
        if report.unsolved:
            verdict = f"not certified, {len(report.unsolved)} did not converge: {', '.join(report.unsolved)}"
        print(f"fixed point: largest residual {report.residual:.2g}, {verdict}")


def certificate_status(plan: Plan, status: int) -> int:
    if plan.certificate is None:
        return status
    print(plan.certificate.line(likely_cause(plan.settings)))
    return status if plan.certificate.exact or not plan.certificate.elements else 3
