"""A checkpoint, and others beside it, over held-out pictures and settings: loaded, measured, reported."""

import argparse
import math
import re
from itertools import product
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from isonext.config import Config, apply_overrides, config_from_dict, config_to_dict
from isonext.data.dataset import open_store
from isonext.errors import UserError
from isonext.evaluation.evaluator import Evaluator, Pictures, encode_styles, load_styles
from isonext.evaluation.perceptual import Perceptual
from isonext.evaluation.report import report_text, write_report
from isonext.flow.transfer import TransferSettings
from isonext.pipeline import Pipeline, load_pipeline, transfer_settings
from isonext.utils.device import pick_device
from isonext.utils.distributed import refuse_several


def load_pictures(args: argparse.Namespace, config: Config, pipeline: Pipeline) -> tuple[dict[str, Tensor], Pictures]:
    """Training latents and test pictures: from folders, or by the split of the store that the checkpoint is of."""
    styles, size = pipeline.spec.styles, pipeline.spec.image_size
    root = args.train_data or Path(config.data.raw_data_root)
    if args.data:
        held = load_styles(args.data, styles, size, args.limit)
        return encode_styles(pipeline, root), held
    split = open_store(Path(config.data.data_root)).split
    if not split["val"]:
        raise UserError(f"{config.data.data_root}: has no validation split; give held-out pictures with --data")
    known, held = (_by_style(split[part], styles) for part in ("train", "val"))
    return encode_styles(pipeline, root, known), load_styles(root, styles, size, args.limit, held)


def _by_style(entries: list[str], styles: list[str]) -> dict[str, list[Path]]:
    """Entries of the store, `<style>/<name>.pt`, as the pictures' names by style."""
    pictures = [Path(entry).with_suffix("") for entry in entries]
    return {style: [Path(*path.parts[1:]) for path in pictures if path.parts[0] == style] for style in styles}


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


def load_all(args: argparse.Namespace) -> list[tuple[str, Pipeline, Config]]:
    """The checkpoint and the baselines beside it; all must speak of the same latents, or nothing can be compared."""
    device, loaded = pick_device(args.device), []
    for path in [args.checkpoint, *args.baseline]:
        pipeline, config = load_pipeline(path, device)
        if loaded and pipeline.spec != loaded[0][1].spec:
            raise UserError(f"--baseline {path}: is of other latents or styles than {args.checkpoint}")
        if config.training.compile:
            pipeline.compile()
        loaded.append((str(path), pipeline, config))
    return loaded


def evaluate(args: argparse.Namespace) -> int:
    """evaluate.py, once its flags are read."""
    refuse_several("evaluate.py")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be 1 or more")
    loaded = load_all(args)
    runs = [
        (name, pipeline, settings)
        for name, pipeline, config in loaded
        for settings in swept_settings(args, config_to_dict(config))
    ]
    _, pipeline, trained = loaded[0]
    config = config_from_dict(apply_overrides(config_to_dict(trained), args.overrides), where="--set")
    perceptual = None if args.quick else Perceptual(pipeline.spec.image_size)
    evaluator = Evaluator(pipeline, *load_pictures(args, config, pipeline), args.pairs, perceptual)
    results = [
        evaluator.measure(pipeline, settings, name, quick=args.quick)
        for name, pipeline, settings in tqdm(runs, desc="evaluations", disable=len(runs) == 1 or None)
    ]
    pictures = write_report(evaluator, results, args.output)
    print(report_text(evaluator, results))
    print(f"written to {args.output}; look at {', '.join(path.name for path in pictures)}")
    return 0
