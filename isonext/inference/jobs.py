"""What inference.py can be asked for: a transfer of pictures, other styles of a kept structure, the original back."""

import argparse
import math
import time
from dataclasses import replace

import torch

from isonext.config import OF_THE_LEGS, SETTINGS, apply_overrides, config_from_dict, config_to_dict, load_config
from isonext.data import images
from isonext.errors import UserError
from isonext.flow.certificate import Certificate, digest, likely_cause
from isonext.flow.solvers import LatticeState
from isonext.flow.transfer import Inverted, TransferSettings
from isonext.inference import inputs
from isonext.inference.batch import Plan, Report, Target, results_of, save, work_off
from isonext.inference.inputs import Job
from isonext.inference.structure_file import SUFFIX, Structure, load_structure, refuse_other_bits
from isonext.pipeline import Pipeline, load_pipeline, transfer_settings
from isonext.utils import distributed
from isonext.utils.device import allow_tf32, deterministic, pick_device

COMPILE_FROM = 100  # pictures in a folder that make up for the time that compiling takes


#################################################################################
#                                The three ways in                              #
#################################################################################


def transfer_input(args: argparse.Namespace) -> int:
    """--input: a picture, a stored latent, or a folder."""
    is_folder = args.input.is_dir()
    if not is_folder:
        distributed.refuse_several("one picture")
    jobs = inputs.find_jobs(args.input, args.output)
    # What is left to do is seen before anybody does it.
    todo = distributed.from_main([job for job in jobs if args.overwrite or not is_folder or not job.output.exists()])
    plan = make_plan(args, len(todo))
    refuse_collisions(jobs, plan)
    skipped: list[str] | None = [] if is_folder else None
    if args.input.suffix == ".pt" and not is_folder:
        batches = iter([inputs.load_stored_latent(todo[0], plan.pipeline)])
    else:
        batch_size = 1 if args.min_structure is not None else args.batch_size
        batches = inputs.load_batches(todo, plan.pipeline, args.size, batch_size if is_folder else 1, skipped)
    started = time.perf_counter()
    with deterministic(plan.pipeline.device, args.certify or args.save_structure is not None):
        report = work_off(batches, plan, math.ceil(len(todo) / distributed.world()))
    report.skipped = sorted(skipped or ())
    report = of_all(report, plan)
    seconds = time.perf_counter() - started

    print_plan(plan)
    kept = f", {len(jobs) - len(todo)} were there already" if len(todo) < len(jobs) else ""
    print_made(report, plan, seconds, kept)
    print(f"written to {args.output}" + (", the frames to folders beside it" if args.interpolate else ""))
    for reason in report.skipped:
        print(f"skipped: {reason}")
    return certificate_status(plan, 1 if report.skipped else 0)


def of_all(report: Report, plan: Plan) -> Report:
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
        for path in results_of(job, plan):
            other = taken.setdefault(path.resolve(), job.source)
            if other is not job.source or path.resolve() == job.source.resolve():
                raise UserError(
                    f"{path}: would be written for {job.source}, but belongs to {other}; rename one of them"
                )


def transfer_structure(args: argparse.Namespace) -> int:
    """--from_structure: other styles of a kept structure, without its picture."""
    distributed.refuse_several("one picture")
    job, kept = Job(args.from_structure, inputs.picture_path(args.output)), load_structure(args.from_structure)
    plan = make_plan(args, 1, kept)
    refuse_other_bits(kept, plan.pipeline, args.from_structure, ("checkpoint",))
    state = move(kept.start, plan.pipeline.device)
    started = time.perf_counter()
    with deterministic(plan.pipeline.device, args.certify):
        inverted = Inverted(state, 0)
        made = [plan.pipeline.generate(inverted, plan.source, target.style, plan.settings) for target in plan.targets]
        for transfer, target in zip(made, plan.targets, strict=True):
            if plan.certificate:
                back = plan.pipeline.undo(transfer.end, plan.source, target.style, plan.settings)[0]
                plan.certificate.compare(state, back)
    results = [plan.pipeline.decode(transfer.latents, *kept.size)[0].cpu() for transfer in made]
    save(job, None, results, plan)
    seconds = time.perf_counter() - started
    print_plan(plan)
    print_made(Report(1, sum(transfer.nfe for transfer in made)), plan, seconds, " without inverting again")
    print(f"written to {args.output}")
    return certificate_status(plan, 0)


def restore(args: argparse.Namespace) -> int:
    """--restore: the transferred latents of a structure file back to the original's, bit for bit."""
    distributed.refuse_several("one picture")
    output, kept = inputs.picture_path(args.output), load_structure(args.restore)
    pipeline, _ = open_pipeline(args, kept)
    refuse_other_bits(kept, pipeline, args.restore)
    source, target = (pipeline.spec.style_id(name) for name in (kept.source, kept.target))
    with deterministic(pipeline.device):
        start, picture = pipeline.undo(move(kept.end, pipeline.device), source, target, kept.settings)
    certificate = Certificate()
    certificate.compare(move(kept.start, pipeline.device), start)
    if not certificate.exact:
        print(f"{certificate.line(likely_cause(kept.settings))}\nnothing was written")
        return 3
    if digest(picture) != kept.original:  # the structure came back, the leg from there to the picture did not
        print(f"certificate: NOT exact: other latents than the original's; {likely_cause(kept.settings)}")
        print("nothing was written")
        return 3
    images.save_picture(images.to_picture(pipeline.decode(picture.x, *kept.size)[0]), output)
    print(f"{kept.target} -> {kept.source}: back at the original's latents, written to {output}")
    print(f"certificate: exact (0 of {certificate.elements} elements differ), sha256 {digest(picture)}")
    return 0


def move(state: LatticeState, device: torch.device) -> LatticeState:
    return LatticeState(state.position.to(device), state.defect.to(device))


#################################################################################
#                                  What is asked                                #
#################################################################################


def open_pipeline(args: argparse.Namespace, kept: Structure | None = None, pictures: int = 1) -> tuple[Pipeline, dict]:
    """The pipeline in the precision asked for (that of a kept structure, if there is one), and its config as a tree."""
    pipeline, config = load_pipeline(args.checkpoint, pick_device(args.device))
    precision = kept.bits["precision"] if kept and args.precision == "auto" else args.precision
    if precision != "auto":
        pipeline.bf16 = precision == "bf16"
    allow_tf32(config.training.tf32)
    pipeline.tile = args.tile or None
    worth_it = kept.bits["compiled"] if kept else config.training.compile and pictures >= COMPILE_FROM
    if args.compile == "on" or (args.compile == "auto" and worth_it):
        pipeline.compile()
    return pipeline, config_to_dict(config)


def make_plan(args: argparse.Namespace, pictures: int, kept: Structure | None = None) -> Plan:
    """Everything that can be wrong with the flags is found here, before the first picture."""
    pipeline, trained = open_pipeline(args, kept, pictures)
    settings = settings_from(args, trained, kept.settings if kept else None)
    if settings.inversion == "fixed_point" and args.precision == "bf16":
        raise UserError("--inversion fixed_point works in float32: BF16 is too coarse to be solved for")
    source = pipeline.spec.style_id(kept.source if kept else args.source_style)
    plan = Plan(pipeline, source, find_targets(args, pipeline), settings, args.min_structure, args.compare)
    plan.keep = args.save_structure
    if plan.keep and plan.keep.suffix != SUFFIX:
        raise UserError(f"--save_structure {plan.keep}: give a file name ending in {SUFFIX}")
    plan.certificate = Certificate() if args.certify else None
    if settings.method == "flowedit" and (args.certify or args.min_structure is not None):
        raise UserError("--method flowedit has no inversion, so neither --certify nor --min_structure applies to it")
    if plan.keep and settings.method != "alf":
        raise UserError(f"--save_structure: {settings.method} leaves none that is exact; use --method alf")
    return plan


def find_targets(args: argparse.Namespace, pipeline: Pipeline) -> list[Target]:
    styles = pipeline.spec.styles
    if args.interpolate:
        a, b = (pipeline.spec.style_id(style) for style in args.interpolate)
        shares = [number / (args.frames - 1) for number in range(args.frames)]
        digits = len(str(args.frames - 1))
        return [
            Target(f"{number:0{digits}}", f"{share:.2f}", pipeline.between(a, b, share), is_frame=True)
            for number, share in enumerate(shares)
        ]
    if args.target_style == "all" and "all" not in styles:
        return [Target(style, style, number) for number, style in enumerate(styles)]
    number = pipeline.spec.style_id(args.target_style)
    return [Target(styles[number], styles[number], number)]


def settings_from(args: argparse.Namespace, trained: dict, kept: TransferSettings | None) -> TransferSettings:
    """The checkpoint's (or --config's) inference section, under --set, under the flags; checked like any config.

    A kept structure brings the settings of its legs along; only the guidance of a new generation leg is free.
    """
    tree = config_to_dict(load_config(args.config)) if args.config else trained
    tree = apply_overrides(tree, args.overrides)
    for name in SETTINGS:
        if getattr(args, name) is not None:
            tree["inference"][name] = getattr(args, name)
    strength = 1.0 if args.strength is None else args.strength
    settings = transfer_settings(config_from_dict(tree, where="inference settings").inference, strength, args.seed)
    if kept:
        legs = {name: getattr(kept, name) for name in (*OF_THE_LEGS, "strength", "skip")}
        settings = replace(settings, **legs)
    if settings.guidance == "null" and settings.cfg_scale != 1 and trained["training"]["label_drop_prob"] == 0:
        raise UserError(
            f"{args.checkpoint}: trained with label_drop_prob 0, so it has no null style to guide against; "
            "use --guidance source or --cfg_scale 1"
        )
    return settings


#################################################################################
#                                What is reported                               #
#################################################################################


def print_plan(plan: Plan) -> None:
    settings, styles = plan.settings, plan.pipeline.spec.styles
    titles = plan.targets[0].title if len(plan.targets) == 1 else f"{len(plan.targets)} styles"
    guidance = "no guidance" if settings.cfg_scale == 1 else f"{settings.guidance} guidance {settings.cfg_scale:g}"
    strength = f"strength {round(1 - settings.grid[0], 2):g}"
    strength = strength if plan.floor is None else f"structure {plan.floor:g} or more"
    legs = f"{settings.method}, {settings.num_steps} steps a leg"
    print(f"{styles[plan.source]} -> {titles}: {legs}, {guidance}, {strength}")


def print_made(report: Report, plan: Plan, seconds: float, kept: str) -> None:
    if report.done:
        each = seconds / report.done
        print(f"{report.done} made, {report.nfe} network evaluations and {each:.2f} s a picture on "
              f"{plan.pipeline.device}{kept}")  # fmt: skip
    else:
        print(f"0 made{kept}")
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
