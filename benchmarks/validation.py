"""What does watching cost: which share of a run's time do its validations and previews take?

python benchmarks/validation.py --config config.json            # the store that the config names must be there
python benchmarks/validation.py --config configs/emoji.json --steps 20

Measured in one process, by wall clock: training steps in eager mode unless the config compiles, the first validation
(with what is made once a run), a later one with figures, one of the loss alone, and a preview. The share is theirs over
a whole run of that config, by its own numbers of epochs. Nothing is saved. The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from isonext.config import load_config
from isonext.training.trainer import Trainer
from isonext.utils.cli import new_parser, run
from isonext.utils.device import device_name


def seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(trainer: Trainer, steps: int, sheet: Path) -> dict[str, float]:
    """Seconds of each thing."""
    device, at_once = trainer.device, trainer.gradients.micro_batch.pictures
    training = [seconds(trainer.train_step, device) for _ in range(steps + 2)][2:]

    def validate(last: bool) -> Callable[[], object]:
        return lambda: trainer.validation.validate(at_once, 1, last)

    return {
        "step": statistics.median(training),
        "first": seconds(validate(last=True), device),
        "figures": min(seconds(validate(last=True), device) for _ in range(2)),
        "loss": seconds(lambda: trainer.validation.held_out_loss(at_once), device) if len(trainer.val) else 0.0,
        "preview": seconds(lambda: trainer.validation.save_preview(sheet, 1, True), device),
    }


def whole_run(trainer: Trainer, spent: dict[str, float]) -> dict[str, float]:
    """Seconds of a whole run, and how often what is looked at comes in it."""
    training, plan = trainer.config.training, trainer.validation.plan
    epochs = range(1, training.stage1_epochs + 1)
    last = epochs[-1]
    validated = [epoch for epoch in epochs if epoch % training.val_every_epochs == 0 or epoch == last]
    figures = sum(plan.has_figures(training, epoch, epoch == last) for epoch in validated)
    saved = [epoch for epoch in epochs if epoch % training.save_every_epochs == 0 or epoch == last]
    previews = sum(plan.has_preview(training, epoch, epoch == last) for epoch in saved)
    watching = spent["first"] - spent["figures"] + figures * spent["figures"]
    watching += (len(validated) - figures) * spent["loss"] + previews * spent["preview"]
    steps = trainer.total_steps * spent["step"]
    counts = {"validations": len(validated), "with_figures": figures, "previews": previews}
    return counts | {"training_s": steps, "watching_s": watching, "share": watching / (steps + watching)}


def main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    with tempfile.TemporaryDirectory() as folder:
        config.checkpoint.save_dir = folder
        trainer = Trainer(config)
        spent = measure(trainer, args.steps, Path(folder) / "preview.png")
    plan, total = trainer.validation.plan, whole_run(trainer, spent)
    held = f"{plan.transferred} transfers, at every {plan.every}. validation" if plan.every > 1 else plan.transferred
    print(f"{device_name(trainer.device)}; {trainer.describe()}")
    print(f"figures: {held}; preview: {plan.rows} pictures of {plan.previewed} styles; loss: "
          f"{trainer.validation.loss_count} pictures\n")  # fmt: skip
    for name, what in (
        ("step", "a training step"),
        ("first", "the first validation, with what is made once"),
        ("figures", "a later one with figures"),
        ("loss", "one of the loss alone"),
        ("preview", "a preview"),
    ):
        print(f"{what:48s}{spent[name]:10.3f} s")
    print(f"\na whole run: {total['training_s']:.0f} s of steps, {total['watching_s']:.0f} s of watching: "
          f"{total['share']:.1%}")  # fmt: skip
    result = {"device": device_name(trainer.device)} | {f"{name}_s": round(value, 4) for name, value in spent.items()}
    print(json.dumps(result | {name: round(value, 4) for name, value in total.items()}))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Time validations and previews against the training steps of a config.")
    parser.add_argument("--config", default="config.json", help="the JSON config, whose store must be there")
    parser.add_argument("--steps", type=int, default=10, help="training steps that are timed")
    return parser


if __name__ == "__main__":
    run(main, build_parser())
