"""Which solver comes back, and which is near the truth?

python benchmarks/solvers.py --checkpoint checkpoints/emoji/stage1_epoch16.pt --data raw_data/emoji_test

For every method and number of steps, on one batch of pictures of style A, unguided, in the checkpoint's precision:

    NFE            network evaluations of a leg (a solved inversion costs more than its generation: both are given)
    ms             of a leg and a picture
    back           picture -> structure -> picture, both under A: root mean square and largest error, in deviations of
                   the latents, and PSNR of the decoded pictures
    a-b-a          the transfer run backwards to its picture: root mean square error
    alone          the same from the transferred latents alone: of alf without the defects of its legs
    picture        the same from the transferred picture alone: decoded, 8 bits a colour, encoded again
    transfer error against RK4 with 100 steps in float32: root mean square
    differ         latent elements that a-b-a changes, on the lattice

Then the same transfer error of `alf` for other time grids. Times are of one run each, in turn; the last line is JSON.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from isonext.data import images
from isonext.errors import UserError
from isonext.evaluation.metrics import psnr
from isonext.flow.certificate import Certificate
from isonext.flow.solvers import LatticeState
from isonext.flow.transfer import Transfer, TransferSettings, latents_of
from isonext.pipeline import Pipeline, load_pipeline
from isonext.utils.cli import add_device_flags, new_parser, run
from isonext.utils.device import allow_tf32, device_name, pick_device

METHODS = ("alf", "euler", "midpoint", "heun", "rk4", "euler+fixed_point", "rk4+fixed_point")
GRIDS = ("uniform", "cosine", "uniform:0.25", "uniform:0.5", "uniform:2", "uniform:4")


@dataclass
class Row:
    method: str
    steps: int
    nfe: str  # of a leg, or of both where they differ
    ms: float
    back_rms: float
    back_max: float
    back_db: float  # mean over pictures; infinite where nothing is lost
    aba_rms: float
    alone_rms: float
    picture_rms: float
    transfer_rms: float
    differ: int
    elements: int


def load_batch(pipeline: Pipeline, folder: Path, count: int) -> tuple[Tensor, tuple[int, int]]:
    """The first `count` pictures of a folder as latents, and their size in pixels."""
    names, size = images.find_pictures(folder)[:count], pipeline.spec.image_size
    if not names:
        raise UserError(f"{folder}: no pictures; --data needs a folder for each style")
    pictures = [images.open_square(folder / name, size) for name in names]
    return pipeline.encode(images.to_pixels(torch.stack([images.to_bytes(each) for each in pictures]))), (size, size)


def settings(guidance: TransferSettings, method: str, steps: int, grid: str = "uniform") -> TransferSettings:
    """Those of a row; `guidance` has what all rows share."""
    method, _, inversion = method.partition("+")
    grid, _, shift = grid.partition(":")
    inversion, shift = inversion or "explicit", float(shift or 1)
    return replace(guidance, method=method, num_steps=steps, inversion=inversion, time_grid=grid, time_shift=shift)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def measure(
    pipeline: Pipeline,
    x1: Tensor,
    size: tuple[int, int],
    styles: tuple[int, int],
    settings: TransferSettings,
    reference: Tensor,
) -> Row:
    a, b = styles
    started = time.perf_counter()
    inverted = pipeline.invert(x1, a, settings)
    made = pipeline.generate(inverted, a, b, settings)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    seconds = time.perf_counter() - started
    back = latents_of(pipeline.generate(inverted, a, a, settings).end)
    returned, certificate = pipeline.undo(made, a, b, settings)[1], Certificate()
    certificate.compare(LatticeState.at_picture(x1), returned)
    generation = made.nfe - inverted.nfe

    def undone_from(latents: Tensor) -> Tensor:
        """What comes back from no more than these: a transfer whose legs have left no defects."""
        end = LatticeState.at_picture(latents) if settings.method == "alf" else latents
        return latents_of(pipeline.undo(Transfer(latents, 0, end, end), a, b, settings)[1])

    return Row(
        method=settings.method + ("+fixed_point" if settings.inversion == "fixed_point" else ""),
        steps=settings.num_steps,
        nfe=f"{generation}" if generation == inverted.nfe else f"{inverted.nfe}, {generation}",
        ms=seconds / 2 / len(x1) * 1e3,
        back_rms=rms(back - on_lattice(x1, settings)),
        back_max=(back - on_lattice(x1, settings)).abs().max().item(),
        back_db=psnr(pipeline.decode(back, *size), pipeline.decode(on_lattice(x1, settings), *size)).mean().item(),
        aba_rms=rms(latents_of(returned) - on_lattice(x1, settings)),
        alone_rms=rms(undone_from(made.latents) - on_lattice(x1, settings)),
        picture_rms=rms(undone_from(seen_again(pipeline, made.latents, size)) - on_lattice(x1, settings)),
        transfer_rms=rms(made.latents - reference),
        differ=certificate.differing,
        elements=certificate.elements,
    )


def seen_again(pipeline: Pipeline, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """The latents of the pictures that these are decoded to, in 8 bits a colour."""
    pixels = pipeline.decode(latents, *size).clamp(-1, 1)
    return pipeline.encode(((pixels + 1) * 127.5).round() / 127.5 - 1)


def on_lattice(x1: Tensor, settings: TransferSettings) -> Tensor:
    """What the method was given: alf starts from the nearest lattice point, 5e-7 away at most."""
    return LatticeState.at_picture(x1).x if settings.method == "alf" else x1


def show(rows: list[Row]) -> None:
    titles = ("method", "steps", "NFE", "ms", "back rms", "back max", "back dB", "a-b-a rms", "alone rms")
    titles += ("picture rms", "transfer error", "differ")
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for row in rows:
        back = "exact" if row.back_rms == 0 else f"{row.back_rms:.2g}"
        cells = (
            *(row.method, row.steps, row.nfe, f"{row.ms:.0f}", back, f"{row.back_max:.2g}", f"{row.back_db:.1f}"),
            *(f"{row.aba_rms:.2g}", f"{row.alone_rms:.2g}", f"{row.picture_rms:.2g}", f"{row.transfer_rms:.3f}"),
            f"{row.differ} of {row.elements}",
        )
        print(f"| {' | '.join(map(str, cells))} |")


def main(args: argparse.Namespace) -> int:
    pipeline, config = load_pipeline(args.checkpoint, pick_device(args.device))
    bf16 = pipeline.bf16 if args.precision == "auto" else args.precision == "bf16"
    a, b = (pipeline.spec.style_id(style) for style in (args.source_style, args.target_style))
    x1, size = load_batch(pipeline, args.data / pipeline.spec.styles[a], args.pictures)
    if config.training.compile:
        pipeline.compile()

    guidance = TransferSettings(cfg_scale=args.cfg_scale, cfg_interval=tuple(args.cfg_interval))

    def in_precision(wanted: bool) -> None:
        pipeline.bf16 = wanted
        allow_tf32(config.training.tf32 and wanted)
        pipeline.transfer(x1, a, b, settings(guidance, "euler", 1))  # so that compiling is not timed

    in_precision(False)
    reference, half = (pipeline.transfer(x1, a, b, settings(guidance, "rk4", steps)).latents for steps in (100, 50))
    rows = []
    for solved in (False, True):  # a solved inversion is float32's
        in_precision(bf16 and not solved)
        chosen = [method for method in args.methods if ("+" in method) is solved]
        for method in tqdm(chosen, desc="methods", disable=None):
            rows += [measure(pipeline, x1, size, (a, b), settings(guidance, method, n), reference) for n in args.steps]
    in_precision(bf16)

    def grid_error(grid: str, steps: int) -> float:
        return rms(pipeline.transfer(x1, a, b, settings(guidance, "alf", steps, grid)).latents - reference)

    grids = {grid: {n: grid_error(grid, n) for n in (10, 20)} for grid in tqdm(args.grids, desc="grids", disable=None)}
    report(args, pipeline, (x1, a, b), rows, grids, rms(half - reference))
    return 0


def report(
    args: argparse.Namespace,
    pipeline: Pipeline,
    batch: tuple[Tensor, int, int],  # latents, source, target
    rows: list[Row],
    grids: dict[str, dict[int, float]],
    half_rms: float,  # of the reference with half of its steps
) -> None:
    (x1, a, b), bf16 = batch, pipeline.bf16
    name, styles = device_name(pipeline.device), pipeline.spec.styles
    precision, mode = "bf16" if bf16 else "fp32", "compiled" if pipeline.compiled else "eager"
    guided = "unguided" if args.cfg_scale == 1 else f"scale {args.cfg_scale:g} for t in {args.cfg_interval}"
    print(f"{name}; {len(x1)} pictures {styles[a]} -> {styles[b]}, {guided}, latents {tuple(x1.shape[1:])}, "
          f"{precision} (fixed_point: fp32), {mode}")  # fmt: skip
    print(f"the reference (RK4, 100 steps, fp32) is {half_rms:.1g} rms from its own 50 steps\n")
    show(rows)
    print("\n| time grid of alf | transfer error, 10 steps | 20 steps |\n| --- | --- | --- |")
    for grid, errors in grids.items():
        print(f"| {grid} | {errors[10]:.3f} | {errors[20]:.3f} |")
    for row in rows:
        row.back_db = min(row.back_db, 999.0)  # JSON has no infinity
    table = [asdict(row) for row in rows]
    result = {"device": name, "pictures": len(x1), "precision": precision, "rows": table}
    result |= {"cfg_scale": args.cfg_scale, "cfg_interval": args.cfg_interval}
    print(json.dumps(result | {"reference_half_rms": half_rms, "grids": grids}))


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Compare the solvers on a checkpoint: cost, way back, distance to the truth.", config=False)
    parser.add_argument("--checkpoint", required=True, help="a stage1_epoch*.pt of train.py")
    parser.add_argument("--data", required=True, type=Path, help="held-out pictures, one folder a style")
    parser.add_argument("--source_style", default="0", help="id or name")
    parser.add_argument("--target_style", default="1", help="id or name")
    parser.add_argument("--pictures", type=int, default=16, help="in the one batch")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20], help="a leg")
    parser.add_argument("--cfg_scale", type=float, default=1.0, help="guidance of the generation leg")
    parser.add_argument("--cfg_interval", type=float, nargs=2, default=[0.2, 0.8], help="t where guidance acts")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD", help="to compare")
    parser.add_argument("--grids", nargs="+", default=GRIDS, metavar="KIND:SHIFT", help="time grids for alf")
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: as trained, BF16 where the device has it",
    )
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, build_parser())
