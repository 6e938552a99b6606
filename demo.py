"""Everything end to end, on pictures drawn by code: draw, preprocess, train, transfer, measure. No download.

python demo.py        # a few minutes on 2 CPU cores; run again after a stop, it goes on where it was

It leaves in outputs/demo: shaded_to_ink.png and ink_to_shaded.png (source, transfer, true pair), losses.png, and the
report of evaluate.py. The functions are those of the everyday commands; only the pictures are the demo's own.
"""

import argparse
import time
from pathlib import Path

from isonext.config import Config, load_config
from isonext.errors import UserError
from isonext.utils.cli import new_parser, run


def main(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from isonext.data.demo_pictures import draw_folders
    from isonext.data.preprocess import preprocess, print_report
    from isonext.training.trainer import train
    from isonext.utils.device import pick_device
    from isonext.utils.distributed import refuse_several

    refuse_several("demo.py")
    started = time.perf_counter()
    config = load_config(args.config, args.overrides)
    pictures = Path(config.data.raw_data_root).parent
    output = Path(config.checkpoint.save_dir).parent
    device = pick_device("auto")

    print(f"1/4  drawing two worlds of {args.num_train} pictures and {args.num_test} known pairs in {pictures}")
    with tqdm(total=2 * (args.num_train + args.num_test), unit="picture", disable=None) as bar:
        draw_folders(
            pictures,
            num_train=args.num_train,
            num_test=args.num_test,
            size=config.data.image_size,
            progress=lambda n: bar.update(n),
        )
    print("2/4  preprocess_latents.py: pictures to latents")
    print_report(preprocess(config, device), Path(config.data.data_root))
    print("3/4  train.py: the velocity field of both styles")
    trainer = train(config, resume="newest")
    if not trainer.finished:
        return trainer.stopped
    print("4/4  evaluate.py: transfer the test pictures both ways and measure")
    text, shown = measure(config, pictures, output)
    print(f"\n{text}\n")
    print(f"look at {', '.join(map(str, shown))}   ({time.perf_counter() - started:.0f} s)")
    return 0


def measure(config: Config, pictures: Path, output: Path) -> tuple[str, list[Path]]:
    """The report on the last checkpoint as text, and the sheets and curves that it leaves in `output`."""
    from isonext.checkpoint import epoch_checkpoints
    from isonext.evaluation.evaluator import Evaluator, encode_styles, load_styles
    from isonext.evaluation.report import report_text, write_report
    from isonext.pipeline import load_pipeline, transfer_settings
    from isonext.training.log import plot_losses
    from isonext.utils.device import pick_device

    checkpoints = epoch_checkpoints(Path(config.checkpoint.save_dir))
    if not checkpoints:
        raise UserError(f"{config.checkpoint.save_dir}: no checkpoint was written; delete {output} and run again")
    pipeline, _ = load_pipeline(checkpoints[-1], pick_device("auto"))
    settings = transfer_settings(config.inference, front=pipeline.front)
    if config.training.compile:
        pipeline.compile()
    held = load_styles(pictures / "test", pipeline.spec.styles, pipeline.spec.image_size)
    evaluator = Evaluator(pipeline, encode_styles(pipeline, Path(config.data.raw_data_root)), held, pairs=True)
    results = [evaluator.measure(pipeline, settings, checkpoints[-1].name)]
    sheets = write_report(evaluator, results, output)
    plot_losses(Path(config.checkpoint.save_dir) / "metrics.jsonl", output / "losses.png")
    return report_text(evaluator, results), [*sheets, output / "losses.png"]


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Draw two styles, train a flow, transfer and measure: everything end to end, in minutes.")
    parser.add_argument("--config", default=Path(__file__).parent / "configs" / "demo.json", help="the JSON config")
    parser.add_argument("--num_train", type=int, default=900, help="training pictures a style")
    parser.add_argument("--num_test", type=int, default=64, help="test pairs")
    return parser


if __name__ == "__main__":
    run(main, build_parser())
