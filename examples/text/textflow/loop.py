"""The loop of every stage, made of the core's parts: optimiser, its rate, the guard, the average, the logbook.

Why not trainer.Trainer: it opens a store of pictures itself, whose latents are square, draws mirrored ones, fits a
base of low bands, and ends an epoch by decoding a preview picture. What is left of it without those is this file.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from isonext.checkpoint import EMA, load_weights
from isonext.config import TrainingConfig
from isonext.errors import UserError
from isonext.training.log import Logbook
from isonext.training.optim import Guard, learning_rate, make_optimizer
from isonext.utils.cli import stop_signals
from isonext.utils.io import load_data, written_whole
from isonext.utils.seeding import seeded

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]  # step -> the loss, and figures for the log


class Stopped(UserError):
    """Ctrl-C or SIGTERM: the state is saved, and the same command goes on."""


@dataclasses.dataclass
class Schedule:
    """How long, and what happens at which step; 0 is never."""

    steps: int
    log_every: int = 20
    eval_every: int = 0
    save_every: int = 500


def fit(
    model: nn.Module,  # what is trained: its parameters, and no others
    loss_of: Loss,  # a function of the step, so that stopping and going on changes nothing
    training: TrainingConfig,
    schedule: Schedule,
    state: Path,  # the file to go on from; deleted when all is done
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,  # of the averaged model, after a step
    quiet: bool | None = None,
) -> nn.Module:
    """Train `model`; returns the average of its weights. A step that the guard refuses changes nothing."""
    run = _Run(model, training, schedule, state)
    logbook, bar = Logbook(state.parent / state.stem, run.step), None
    with stop_signals() as stop:
        bar = tqdm(total=schedule.steps, initial=run.step, unit="step", disable=quiet, desc=state.stem)
        while run.step < schedule.steps:
            if stop():
                run.save()
                raise Stopped(f"stopped at step {run.step}: saved {state}; the same command goes on from there")
            numbers = run.take_step(loss_of)
            bar.update()
            if _due(run.step, schedule.log_every):
                logbook.write(run.step, numbers)
                bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
            if evaluate and (run.step == schedule.steps or _due(run.step, schedule.eval_every)):
                logbook.write(run.step, evaluate(run.ema.model, run.step))
            if _due(run.step, schedule.save_every) and run.step < schedule.steps:
                run.save()
        bar.close()
    logbook.close()
    state.unlink(missing_ok=True)
    return run.ema.model


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


class _Run:
    """A stage under way: what is saved to go on from."""

    def __init__(self, model: nn.Module, training: TrainingConfig, schedule: Schedule, path: Path) -> None:
        self.model, self.training, self.schedule, self.path = model, training, schedule, path
        self.ema = EMA(model, training.ema_decay)
        self.optimizer = make_optimizer(model, training)
        self.step, self.guard = 0, Guard()
        # What must be equal for the run to be the same one; how often it logs and saves may change.
        self.kind = {"training": repr(training), "steps": schedule.steps}
        if path.exists():
            self._go_on(load_data(path, "state of a text stage"))

    def take_step(self, loss_of: Loss) -> dict[str, float]:
        training = self.training
        torch.manual_seed(seeded(training.seed, "text step", self.step).initial_seed())  # dropout, and the noise
        loss, numbers = loss_of(self.step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), training.grad_clip or math.inf).item()
        rate = learning_rate(training, self.step, self.schedule.steps)
        if self.guard.passes(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.ema.update(self.model, self.step)
        elif self.guard.has_given_up:
            raise UserError(
                f"the gradient was not finite, or leapt, in {self.guard.in_a_row} steps in a row; lower --lr"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": loss.item(), "lr": rate, "grad_norm": norm, "skipped_steps": self.guard.skipped} | numbers

    def save(self) -> None:
        tree = {"kind": self.kind, "step": self.step, "guard": self.guard.record}
        tree |= {"model": self.model.state_dict(), "ema": self.ema.model.state_dict()}
        tree |= {"optimizer": self.optimizer.state_dict()}
        with written_whole(self.path) as beside:
            torch.save(tree, beside)

    def _go_on(self, tree: dict) -> None:
        if tree.get("kind") != self.kind:
            raise UserError(f"{self.path}: is of a run with other settings; delete it to start anew, or use them again")
        load_weights(self.model, tree["model"], self.path)
        load_weights(self.ema.model, tree["ema"], self.path)
        self.optimizer.load_state_dict(tree["optimizer"])
        self.step, self.guard = tree["step"], Guard(tree["guard"])
        print(f"resumed from {self.path} at step {self.step}")
