"""Measure a checkpoint on held-out pictures: is the style right, is the picture still the same.

python evaluate.py --checkpoint checkpoints/stage1_epoch200.pt --data raw_data/test --pairs --output report/

`--data` holds one folder a style. With `--pairs`, files of the same name are the same picture in every style.
"""

import argparse
import json
import math
import re
from dataclasses import asdict, dataclass
from itertools import chain, permutations, product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import images
from cli import UserError, add_device_flags, new_parser, pick_device, run
from config import apply_overrides, config_from_dict, config_to_dict
from files import written_whole
from metrics import StyleClassifier, psnr, ssim, train_style_classifier
from pipeline import Pipeline, load_pipeline, transfer_settings
from solvers import LATTICE, LatticeState
from structure import Certificate
from transfers import TransferSettings

LOSSLESS = 100.0  # dB: what equal pictures count for in a mean; JSON has no infinity


@dataclass
class PairFigures:
    """What one direction of transfer reached, as means over the test pictures."""

    source: str
    target: str
    pictures: int
    style_success: float  # share that the classifier takes for the target style
    source_taken_for_target: float  # the same before the transfer: the floor
    ssim_to_source: float
    ssim_to_pair: float | None  # with --pairs
    source_ssim_to_pair: float | None  # the same before the transfer: what doing nothing gives
    psnr_to_pair: float | None  # dB
    source_psnr_to_pair: float | None
    round_trip_differing: int | None  # latent elements that a transfer and its undoing change; None for flowedit
    round_trip_elements: int
    round_trip_max: float  # the largest change, in deviations of the latents


@dataclass
class Ruler:
    """What every setting is measured with."""

    test: dict[str, dict[str, Tensor]]  # style -> picture's name -> pixels
    classifier: StyleClassifier
    classifier_accuracy: float  # on held-out pictures: the ceiling of style_success
    reconstruction_psnr: float  # of the autoencoder alone, dB: the ceiling of every picture-level figure


@dataclass
class Evaluation:
    settings: TransferSettings
    pairs: list[PairFigures]
    sheets: dict[tuple[str, str], list[list[Tensor]]]  # direction -> rows of (source, transfer[, true pair])


def load_styles(root: Path, styles: list[str], size: int, limit: int | None) -> dict[str, dict[str, Tensor]]:
    """Style -> file name without suffix -> pixels (3, size, size); every style must be there, bad pictures are not."""
    loaded: dict[str, dict[str, Tensor]] = {}
    for style in styles:
        names = images.find_pictures(root / style)[:limit]
        loaded[style] = {}
        for name in names:
            try:
                picture = images.square(images.open_picture(root / style / name), size)
            except UserError as error:
                print(f"skipped: {error}")
                continue
            loaded[style][name.with_suffix("").as_posix()] = images.to_pixels(images.to_bytes(picture))
        if not loaded[style]:
            raise UserError(f"{root / style}: no pictures of style {style}; --data needs a folder for each style")
    return loaded


def make_ruler(pipeline: Pipeline, train_root: Path, test_root: Path, limit: int | None = None) -> Ruler:
    """Read both roots (one folder a style), at most `limit` test pictures a style, and train the style classifier."""
    styles, size = pipeline.spec.styles, pipeline.spec.image_size
    test = load_styles(test_root, styles, size, limit)
    classifier = fit_classifier(pipeline, load_styles(train_root, styles, size, None))
    stacked = {style: torch.stack(list(test[style].values())) for style in styles}
    rebuilt = {style: _through_codec(pipeline, stacked[style]) for style in styles}
    hits = [(classifier.predict(rebuilt[style]) == number).float() for number, style in enumerate(styles)]
    floor = torch.cat([psnr(stacked[style], rebuilt[style]) for style in styles]).clamp_max(LOSSLESS)
    return Ruler(test, classifier, torch.cat(hits).mean().item(), floor.mean().item())


def evaluate(
    pipeline: Pipeline,
    ruler: Ruler,
    how: TransferSettings,
    pairs: bool,
    quiet: bool | None = None,
    directions: list[tuple[str, str]] | None = None,  # all ordered pairs if None
) -> Evaluation:
    """Transfer the test pictures of every style to every other and measure."""
    result = Evaluation(how, [], {})
    directions = directions or list(permutations(pipeline.spec.styles, 2))
    for source, target in tqdm(directions, desc="evaluating", unit="direction", disable=quiet):
        figures, rows = evaluate_direction(pipeline, ruler, source, target, how, pairs)
        result.pairs.append(figures)
        result.sheets[source, target] = rows
    return result


def fit_classifier(pipeline: Pipeline, train: dict[str, dict[str, Tensor]]) -> StyleClassifier:
    """Learns from pictures that went through the codec, so that its blur does not pass for a style."""
    pixels = [_through_codec(pipeline, torch.stack(list(train[style].values()))) for style in pipeline.spec.styles]
    labels = [torch.full((len(part),), number) for number, part in enumerate(pixels)]
    return train_style_classifier(torch.cat(pixels), torch.cat(labels), len(pixels))


def evaluate_direction(
    pipeline: Pipeline, ruler: Ruler, source: str, target: str, how: TransferSettings, pairs: bool
) -> tuple[PairFigures, list[list[Tensor]]]:
    test, classifier = ruler.test, ruler.classifier
    names = [name for name in test[source] if not pairs or name in test[target]]
    if not names:
        raise UserError(f"--pairs: no file name of {source} is one of {target} as well")
    sources = torch.stack([test[source][name] for name in names])
    truth = torch.stack([test[target][name] for name in names]) if pairs else None
    a, b = (pipeline.spec.styles.index(style) for style in (source, target))
    made, trips = [], Certificate()
    for part in sources.split(32):
        latents = pipeline.encode(part)
        transfer = pipeline.transfer(latents, a, b, how)
        made.append(pipeline.decode(transfer.latents, *part.shape[-2:]).clamp(-1, 1).cpu())
        if transfer.end is not None:
            trips.compare(LatticeState.at_picture(latents), pipeline.undo(transfer.end, a, b, how)[1])
    results = torch.cat(made)
    figures = PairFigures(
        source=source,
        target=target,
        pictures=len(names),
        style_success=_mean(classifier.predict(results) == b),
        source_taken_for_target=_mean(classifier.predict(sources) == b),
        ssim_to_source=_mean(ssim(results, sources)),
        ssim_to_pair=_mean(ssim(results, truth)) if pairs else None,
        source_ssim_to_pair=_mean(ssim(sources, truth)) if pairs else None,
        psnr_to_pair=_mean(psnr(results, truth).clamp_max(LOSSLESS)) if pairs else None,
        source_psnr_to_pair=_mean(psnr(sources, truth).clamp_max(LOSSLESS)) if pairs else None,
        round_trip_differing=trips.differing if trips.elements else None,
        round_trip_elements=trips.elements,
        round_trip_max=trips.largest * LATTICE,
    )
    columns = [sources, results] + ([truth] if pairs else [])
    return figures, [list(row) for row in zip(*columns, strict=True)]


def _through_codec(pipeline: Pipeline, pixels: Tensor) -> Tensor:
    parts = [pipeline.decode(pipeline.encode(part), *part.shape[-2:]) for part in pixels.split(32)]
    return torch.cat(parts).clamp(-1, 1).cpu()


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


#################################################################################
#                                    Reports                                    #
#################################################################################


def figures_table(ruler: Ruler, results: list[Evaluation]) -> str:
    """The figures as a Markdown table: a line a direction, or for several settings a line a setting."""
    lines = [
        f"classifier accuracy on held-out pictures (ceiling of style success): {ruler.classifier_accuracy:.3f}",
        f"autoencoder alone (ceiling of every picture-level figure): {ruler.reconstruction_psnr:.1f} dB",
        "",
    ]
    if len(results) == 1:
        head = "direction | pictures | style success (before) | SSIM to source | SSIM to pair (before) "
        head += "| PSNR to pair (before) | round trip"
        lines += [f"| {head} |", f"|{' --- |' * 7}"]
        return "\n".join(lines + [f"| {_figures_row(figures)} |" for figures in results[0].pairs])
    lines += ["Mean over the directions, and the lowest of them:", ""]
    lines += ["| setting | style success | SSIM to source | round trip |", "| --- | --- | --- | --- |"]
    for result in results:
        columns = ([pair.style_success for pair in result.pairs], [pair.ssim_to_source for pair in result.pairs])
        cells = [f"{sum(column) / len(column):.3f}, {min(column):.3f}" for column in columns]
        differing = [pair.round_trip_differing for pair in result.pairs]
        trip = "none" if None in differing else f"{sum(differing)} differ"
        setting = _differences(result.settings, [each.settings for each in results])
        lines.append(f"| {setting} | {' | '.join(cells)} | {trip} |")
    return "\n".join(lines)


def _figures_row(p: PairFigures) -> str:
    to_pair, trip = ("-", "-"), "none"
    if p.ssim_to_pair is not None:
        to_pair = (
            f"{p.ssim_to_pair:.3f} ({p.source_ssim_to_pair:.3f})",
            f"{p.psnr_to_pair:.1f} dB ({p.source_psnr_to_pair:.1f} dB)",
        )
    if p.round_trip_differing is not None:
        trip = f"{p.round_trip_differing} of {p.round_trip_elements} differ, max {p.round_trip_max:.2g}"
    success = f"{p.style_success:.3f} ({p.source_taken_for_target:.3f})"
    return (
        f"{p.source} -> {p.target} | {p.pictures} | {success} | {p.ssim_to_source:.3f} | {' | '.join(to_pair)} | {trip}"
    )


def _differences(how: TransferSettings, among: list[TransferSettings]) -> str:
    """What tells one setting from the others."""
    varied = [name for name in asdict(how) if len({getattr(each, name) for each in among}) > 1]
    return ", ".join(f"{name} {getattr(how, name)}" for name in varied)


def save_sheet(rows: list[list[Tensor]], titles: list[str], path: Path, count: int = 32, across: int = 4) -> None:
    """A contact sheet of `count` rows spread evenly over all, `across` of them side by side."""
    step = max(1, len(rows) // count)
    chosen = rows[::step][:count]
    across = min(across, len(chosen))
    lines = [list(chain(*chosen[start : start + across])) for start in range(0, len(chosen), across)]
    zoom = max(1, 96 // chosen[0][0].shape[-1])
    pictures = [[images.to_picture(pixels) for pixels in line] for line in lines]
    images.save_picture(images.contact_sheet(pictures, titles * across, zoom), path)


def write_report(ruler: Ruler, results: list[Evaluation], folder: Path) -> None:
    """metrics.json (a list, an entry a setting), report.md, and contact sheets where there is one setting."""
    ceilings = {"classifier_accuracy": ruler.classifier_accuracy, "reconstruction_psnr": ruler.reconstruction_psnr}
    measured = [
        {"settings": asdict(result.settings), "pairs": [asdict(pair) for pair in result.pairs]} for result in results
    ]
    with written_whole(folder / "metrics.json") as beside:
        beside.write_text(json.dumps(ceilings | {"results": measured}, indent=1), encoding="utf-8")
    with written_whole(folder / "report.md") as beside:
        text = "\n".join(str(result.settings) for result in results)
        beside.write_text(f"{text}\n\n{figures_table(ruler, results)}\n", encoding="utf-8")
    if len(results) > 1:
        return
    for (source, target), rows in results[0].sheets.items():
        titles = [source, f"as {target}"] + (["true pair"] if len(rows[0]) == 3 else [])
        save_sheet(rows, titles, folder / f"{source}_to_{target}.png")


#################################################################################
#                                  The command                                  #
#################################################################################


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Measure a checkpoint on held-out pictures. --set inference.KEY=VALUE changes the settings.")
    parser.add_argument("--checkpoint", required=True, help="a stage1_epoch*.pt of train.py")
    parser.add_argument("--data", required=True, type=Path, help="held-out pictures, one folder a style")
    parser.add_argument(
        "--train_data", type=Path, help="pictures the classifier learns from; by default data.raw_data_root"
    )
    parser.add_argument("--pairs", action="store_true", help="files of one name are one picture in every style")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder of the report")
    parser.add_argument("--strength", type=float, default=1.0, help="0 keeps the picture, 1 is the full transfer")
    parser.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=A,B",
        help="measure every combination, e.g. cfg_scale=1,1.5,2",
    )
    parser.add_argument("--limit", type=int, help="at most this many test pictures a style")
    add_device_flags(parser)
    return parser


def swept_settings(args: argparse.Namespace, trained: dict) -> list[TransferSettings]:
    """The settings to measure: one, or with --sweep every combination of its values."""
    knobs = []
    for text in args.sweep:
        name, _, values = text.partition("=")
        if not (name and values):
            raise UserError(f"--sweep {text}: write it as KEY=VALUE,VALUE, e.g. cfg_scale=1,1.5,2")
        knobs.append([(name, value) for value in re.split(r",(?![^\[]*\])", values)])  # not those inside [0, 1]
    settings = []
    for combination in product(*knobs):
        chosen = {"strength": args.strength} | dict(combination)
        try:
            strength = float(chosen.pop("strength"))
        except ValueError:
            strength = math.nan
        if not 0 <= strength <= 1:
            raise UserError("strength: must be a number from 0 to 1")
        overrides = [f"inference.{name}={value}" for name, value in chosen.items()]
        config = config_from_dict(apply_overrides(trained, [*args.overrides, *overrides]), where="settings")
        settings.append(transfer_settings(config.inference, strength))
    return settings


def main(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be 1 or more")
    pipeline, trained = load_pipeline(args.checkpoint, pick_device(args.device))
    settings = swept_settings(args, config_to_dict(trained))
    if trained.training.compile:
        pipeline.compile()
    config = config_from_dict(apply_overrides(config_to_dict(trained), args.overrides), where="--set")
    ruler = make_ruler(pipeline, args.train_data or Path(config.data.raw_data_root), args.data, args.limit)
    results = [
        evaluate(pipeline, ruler, how, args.pairs)
        for how in tqdm(settings, desc="settings", disable=len(settings) == 1 or None)
    ]
    write_report(ruler, results, args.output)
    print(figures_table(ruler, results))
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    run(main, build_parser())
