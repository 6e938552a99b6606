"""Transfer pictures from one style to another: invert along the flow to their structure, generate again.

python inference.py --checkpoint checkpoints/stage1_epoch200.pt --input test.jpg \\
    --source_style 0 --target_style 1 --output result.png --num_steps 20 --cfg_scale 2.0

The input is a picture, a latent of the store (.pt), or a folder; a folder's results keep its names, and a second run
makes only what is missing. A structure kept with --save_structure gives other styles (--from_structure) or the
original (--restore) without the input.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import album
import images
from album import Job
from cli import UserError, add_device_flags, allow_tf32, deterministic, new_parser, pick_device, run
from config import apply_overrides, config_from_dict, config_to_dict, load_config
from pipeline import Pipeline, load_pipeline, transfer_settings
from solvers import LatticeState
from structure import SUFFIX, Certificate, Structure, digest, likely_cause, load_structure, refuse_other_bits
from studio import Plan, Report, Target, results_of, save, work_off
from transfers import METHODS, Inverted, TransferSettings

COMPILE_FROM = 100  # pictures in a folder that make up for the time that compiling takes


#################################################################################
#                                The three ways in                              #
#################################################################################


def transfer_input(args: argparse.Namespace) -> int:
    """--input: a picture, a stored latent, or a folder."""
    jobs = album.find_jobs(args.input, args.output)
    is_folder = args.input.is_dir()
    todo = [job for job in jobs if args.overwrite or not is_folder or not job.output.exists()]
    plan = make_plan(args, len(todo))
    refuse_collisions(jobs, plan)
    skipped: list[str] | None = [] if is_folder else None
    if args.input.suffix == ".pt" and not is_folder:
        batches = iter([album.load_stored_latent(todo[0], plan.pipeline)])
    else:
        batch_size = 1 if args.min_structure is not None else args.batch_size
        batches = album.load_batches(todo, plan.pipeline, args.size, batch_size if is_folder else 1, skipped)
    started = time.perf_counter()
    with deterministic(plan.pipeline.device, args.certify or args.save_structure is not None):
        report = work_off(batches, plan, len(todo))
    seconds = time.perf_counter() - started

    print_plan(plan)
    kept = f", {len(jobs) - len(todo)} were there already" if len(todo) < len(jobs) else ""
    print_made(report, plan, seconds, kept)
    print(f"written to {args.output}" + (", the frames to folders beside it" if args.interpolate else ""))
    for reason in skipped or ():
        print(f"skipped: {reason}")
    return certificate_status(plan, 1 if skipped else 0)


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
    job, kept = Job(args.from_structure, album.picture_path(args.output)), load_structure(args.from_structure)
    plan = make_plan(args, 1, kept)
    refuse_other_bits(kept, plan.pipeline, args.from_structure, ("checkpoint",))
    state = move(kept.start, plan.pipeline.device)
    started = time.perf_counter()
    with deterministic(plan.pipeline.device, args.certify):
        inverted = Inverted(state, 0)
        made = [plan.pipeline.generate(inverted, plan.source, target.style, plan.how) for target in plan.targets]
        for transfer, target in zip(made, plan.targets, strict=True):
            if plan.certificate:
                back = plan.pipeline.undo(transfer.end, plan.source, target.style, plan.how)[0]
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
    output, kept = album.picture_path(args.output), load_structure(args.restore)
    pipeline, _ = open_pipeline(args, kept)
    refuse_other_bits(kept, pipeline, args.restore)
    source, target = (pipeline.spec.style_id(name) for name in (kept.source, kept.target))
    with deterministic(pipeline.device):
        start, picture = pipeline.undo(move(kept.end, pipeline.device), source, target, kept.how)
    certificate = Certificate()
    certificate.compare(move(kept.start, pipeline.device), start)
    if not certificate.exact:
        print(f"{certificate.line(likely_cause(kept.how))}\nnothing was written")
        return 3
    if digest(picture) != kept.original:  # the structure came back, the leg from there to the picture did not
        print(
            f"certificate: NOT exact: other latents than the original's; {likely_cause(kept.how)}\nnothing was written"
        )
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
    how = settings_from(args, trained, kept.how if kept else None)
    if how.inversion == "fixed_point" and args.precision == "bf16":
        raise UserError("--inversion fixed_point works in float32: BF16 is too coarse to be solved for")
    source = pipeline.spec.style_id(kept.source if kept else args.source_style)
    plan = Plan(pipeline, source, find_targets(args, pipeline), how, args.min_structure, args.compare)
    plan.keep = args.save_structure
    plan.certificate = Certificate() if args.certify else None
    if how.method == "flowedit" and (args.certify or args.min_structure is not None):
        raise UserError("--method flowedit has no inversion, so neither --certify nor --min_structure applies to it")
    if plan.keep and how.method != "alf":
        raise UserError(f"--save_structure: {how.method} leaves none that is exact; use --method alf")
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


SETTINGS = (
    *("method", "num_steps", "time_grid", "time_shift", "inversion", "tolerance", "cfg_scale", "cfg_interval"),
    *("cfg_rescale", "guidance", "latent_clamp", "noise_samples"),
)
OF_A_PICTURE = (
    *("input", "source_style", "save_structure", "min_structure", "strength", "size", "config", "overrides"),
)
OF_THE_LEGS = ("method", "num_steps", "time_grid", "time_shift", "inversion", "tolerance", "noise_samples")


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
    how = transfer_settings(config_from_dict(tree, where="inference settings").inference, strength, args.seed)
    if kept:
        legs = {name: getattr(kept, name) for name in (*OF_THE_LEGS, "strength", "skip")}
        how = replace(how, **legs)
    if how.guidance == "null" and how.cfg_scale != 1 and trained["training"]["label_drop_prob"] == 0:
        raise UserError(
            f"{args.checkpoint}: trained with label_drop_prob 0, so it has no null style to guide against; "
            "use --guidance source or --cfg_scale 1"
        )
    return how


def check_flags(args: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    """Which of the three ways in is meant; flags that do not go together, or lie out of range, are refused."""
    limits = {"size": (1, None), "batch_size": (1, None), "tile": (0, None), "frames": (2, 10_000)}
    limits |= {"strength": (0, 1), "min_structure": (-1, 1), "seed": (0, 2**63 - 1)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            raise UserError(f"--{name} {value}: must be {f'from {low} to {high}' if high else f'{low} or more'}")
    if 0 < args.tile < 64:
        raise UserError(f"--tile {args.tile}: must be 64 or more, or 0 for no tiles")
    if args.restore:
        way, needed = restore, ()
        barred = (*("target_style", "interpolate", "from_structure"), *OF_A_PICTURE, *SETTINGS)
    elif args.from_structure:
        way, needed, barred = transfer_structure, (), (*OF_A_PICTURE, *OF_THE_LEGS)
    else:
        way, needed, barred = transfer_input, ("input", "source_style"), ()
    for name in needed:
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing (only --from_structure and --restore go without it)")
    for name in barred:
        if getattr(args, name) not in (None, []):
            other = "restore" if args.restore else "from_structure"
            flag = {"overrides": "set"}.get(name, name)
            raise UserError(f"--{flag} does not go with --{other}: the structure file fixes it")
    if way is not restore and (args.target_style is None) == (args.interpolate is None):
        raise UserError("give either --target_style STYLE (or all), or --interpolate A B")
    several = args.interpolate is not None or args.target_style == "all"
    if args.compare and way is not transfer_input:
        raise UserError("--compare shows --input beside its transfer, and here is no --input")
    if args.compare and several:
        raise UserError("--compare is for one target; the sheet of several shows the picture already")
    if args.save_structure:
        if several or args.input.is_dir():
            raise UserError("--save_structure keeps one picture's way to one style; give one picture and one target")
        if args.save_structure.suffix != SUFFIX:
            raise UserError(f"--save_structure {args.save_structure}: give a file name ending in {SUFFIX}")
    return way


#################################################################################
#                                What is reported                               #
#################################################################################


def print_plan(plan: Plan) -> None:
    how, styles = plan.how, plan.pipeline.spec.styles
    titles = plan.targets[0].title if len(plan.targets) == 1 else f"{len(plan.targets)} styles"
    guidance = "no guidance" if how.cfg_scale == 1 else f"{how.guidance} guidance {how.cfg_scale:g}"
    strength = f"strength {round(1 - how.grid[0], 2):g}" if plan.floor is None else f"structure {plan.floor:g} or more"
    print(f"{styles[plan.source]} -> {titles}: {how.method}, {how.num_steps} steps a leg, {guidance}, {strength}")


def print_made(report: Report, plan: Plan, seconds: float, kept: str) -> None:
    if report.done:
        each = seconds / report.done
        print(f"{report.done} made, {report.nfe} network evaluations and {each:.2f} s a picture on "
              f"{plan.pipeline.device}{kept}")  # fmt: skip
    else:
        print(f"0 made{kept}")
    for note in report.notes:
        print(note)
    if plan.how.inversion == "fixed_point":
        verdict = f"all of them within {plan.how.tolerance:g}"
        if report.unsolved:
            verdict = f"not certified, {len(report.unsolved)} did not converge: {', '.join(report.unsolved)}"
        print(f"fixed point: largest residual {report.residual:.2g}, {verdict}")


def certificate_status(plan: Plan, status: int) -> int:
    if plan.certificate is None:
        return status
    print(plan.certificate.line(likely_cause(plan.how)))
    return status if plan.certificate.exact or not plan.certificate.elements else 3


#################################################################################
#                                  The command                                  #
#################################################################################


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Transfer pictures from one style to another. Defaults come from the checkpoint's config.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="a stage1_epoch*.pt of train.py")
    add("--input", type=Path, help="a picture, a .pt of the latent store, or a folder")
    add("--output", required=True, type=Path, help="a picture file, or a folder for a folder")
    add("--source_style", help="id or name of the input's style")
    add("--target_style", help="id or name of the style to give it, or all: each of them, and a sheet")
    add("--interpolate", nargs=2, metavar=("A", "B"), help="instead: frames on the way from style A to style B")
    add("--frames", type=int, default=9, help="of --interpolate, both ends included")
    add("--config", help="take the inference section from this config, not from the checkpoint")
    add("--method", choices=METHODS, help="alf is reversible bit for bit; flowedit does without an inversion")
    add("--num_steps", type=int, help="solver steps a leg")
    add("--time_grid", choices=("uniform", "cosine"), help="cosine is finer towards both ends")
    add("--time_shift", type=float, help="above 1 finer towards the picture, below 1 towards structure")
    add("--inversion", choices=("explicit", "fixed_point"), help="solve for the inverse of euler, ..., rk4")
    add("--tolerance", type=float, help="largest residual of a fixed point that counts as solved")
    add("--cfg_scale", type=float, help="guidance of the generation leg; 1 is none")
    add("--cfg_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="t where guidance acts")
    add("--cfg_rescale", type=float, help="0 to 1: how far guidance's gain in contrast is taken back")
    add("--guidance", choices=("source", "null"), help="contrast with the source or the null style")
    add("--strength", type=float, help="0 keeps the picture, 1 (the default) is the full transfer")
    add("--min_structure", type=float, help="find the largest strength that keeps this SSIM to the picture")
    add("--latent_clamp", type=float, help="bound of the final latent, in standard deviations")
    add("--noise_samples", type=int, help="noises of flowedit, of which it takes the mean")
    add("--certify", action="store_true", help="run back and compare integers; exit status 3 if any differs")
    add("--save_structure", type=Path, metavar="FILE", help=f"keep the structure in FILE{SUFFIX}")
    add("--from_structure", type=Path, metavar="FILE", help="another style of a kept structure; no --input")
    add("--restore", type=Path, metavar="FILE", help="the original of a kept structure, bit for bit; no --input")
    add("--size", type=int, help="resize to this short side first; by default nothing is resized")
    add("--batch_size", type=int, default=8, help="pictures at once, for a folder")
    add("--tile", type=int, default=1024, help="pixels: a VAE takes larger pictures in tiles; 0: never")
    add(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: as trained, BF16 where the device has it",
    )
    add("--compile", choices=("auto", "on", "off"), default="auto", help=f"auto: from {COMPILE_FROM} pictures on")
    add("--compare", action="store_true", help="also write NAME_compare.png: before and after")
    add("--overwrite", action="store_true", help="make the results of a folder anew")
    add("--seed", type=int, default=0, help="of flowedit's noise; the other methods draw none")
    add_device_flags(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    return check_flags(args)(args)


if __name__ == "__main__":
    run(main, build_parser())
