"""A checkpoint, and others beside it, over held-out pictures and settings: loaded, measured, reported."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from isonext.config import Config, config_to_dict, named_autoencoder
from isonext.data.dataset import open_store
from isonext.errors import UserError
from isonext.evaluation.evaluator import Evaluator, Pictures, encode_styles, load_styles
from isonext.evaluation.options import EvaluateOptions, swept_combinations
from isonext.evaluation.perceptual import Perceptual
from isonext.evaluation.report import FILES, report_text, write_report
from isonext.flow.transfer import TransferSettings
from isonext.pipeline import Pipeline, front_line, load_pipeline, settled, transfer_settings
from isonext.utils.device import pick_device
from isonext.utils.distributed import refuse_several
from isonext.utils.io import check_output


@dataclass
class Run:
    """A checkpoint under one setting."""

    name: str  # the checkpoint's path, as given
    pipeline: Pipeline
    settings: TransferSettings
    config: Config  # that of the training, with this setting


def evaluate(options: EvaluateOptions) -> int:
    """evaluate.py, once its flags are read."""
    refuse_several("evaluate.py")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: must be 1 or more")
    check_output(options.output, *FILES)
    runs = load_runs(options)
    skipped: list[str] = []
    evaluator = load_evaluator(options, runs[0], skipped)
    results = [
        evaluator.measure(run.pipeline, run.settings, run.name, quick=options.quick)
        for run in tqdm(runs, desc="evaluations", disable=len(runs) == 1 or None)
    ]
    pictures = write_report(evaluator, results, options.output)
    print(report_text(evaluator, results))
    print(f"written to {options.output}; look at {', '.join(path.name for path in pictures)}")
    return 1 if skipped else 0  # done, but not for every picture


def load_runs(options: EvaluateOptions) -> list[Run]:
    """The checkpoint, then the baselines, each under every setting; all must speak of the same latents, or nothing can
    be compared."""
    device, combinations = pick_device(options.device), swept_combinations(options)
    runs: list[Run] = []
    for path in (options.checkpoint, *options.baselines):
        pipeline, trained = load_pipeline(path, device, named_autoencoder(options.overrides))
        if runs and replace(pipeline.spec, autoencoder=runs[0].pipeline.spec.autoencoder) != runs[0].pipeline.spec:
            raise UserError(f"--baseline {path}: is of other latents or styles than {options.checkpoint}")
        if trained.training.compile:
            pipeline.compile()
        for combination in combinations:
            config = settled(config_to_dict(trained), combination.overrides, where="settings")
            settings = transfer_settings(config.inference, combination.strength, front=pipeline.front)
            pipeline.check_settings(settings)
            if config.inference.cfg_scale == "auto":
                print(f"{path}: {front_line(pipeline.front)}")
            runs.append(Run(path, pipeline, settings, config))
    return runs


def load_evaluator(options: EvaluateOptions, run: Run, skipped: list[str]) -> Evaluator:
    """What measures all runs, from the pictures of the first one; `skipped` is told of bad ones."""
    perceptual = None if options.quick else Perceptual(run.pipeline.spec.image_size)
    train, test = load_pictures(options, run, skipped)
    return Evaluator(run.pipeline, train, test, options.pairs, perceptual)


def load_pictures(options: EvaluateOptions, run: Run, skipped: list[str]) -> tuple[dict[str, Tensor], Pictures]:
    """Training latents and test pictures: from folders, or by the split of the store that the checkpoint is of."""
    spec, data = run.pipeline.spec, run.config.data
    root = options.train_data or Path(data.raw_data_root)
    if options.data:
        test = load_styles(options.data, spec.styles, spec.image_size, options.limit, skipped=skipped)
        return encode_styles(run.pipeline, root, skipped=skipped), test
    split = open_store(Path(data.data_root)).split
    if not split["val"]:
        raise UserError(f"{data.data_root}: has no validation split; give held-out pictures with --data")
    train, val = (_by_style(split[part], spec.styles) for part in ("train", "val"))
    test = load_styles(root, spec.styles, spec.image_size, options.limit, val, skipped)
    return encode_styles(run.pipeline, root, train, skipped), test


def _by_style(entries: list[str], styles: list[str]) -> dict[str, list[Path]]:
    """Entries of the store, `<style>/<name>.pt`, as the pictures' names by style."""
    pictures = [Path(entry).with_suffix("") for entry in entries]
    return {style: [Path(*path.parts[1:]) for path in pictures if path.parts[0] == style] for style in styles}
