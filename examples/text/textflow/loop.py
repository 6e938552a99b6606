"""The loop of every stage: a loss is called back at every step, and the averaged model is shown now and then.

What a step does is training/state.py. training/trainer.py is not used, since it trains on a store of pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from isonext.config import TrainingConfig
from isonext.errors import UserError
from isonext.training.log import Logbook
from isonext.training.state import TrainState
from isonext.utils.cli import stop_signals
from isonext.utils.io import load_data, written_whole
from isonext.utils.seeding import seeded

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]  # step -> the loss, and figures for the log


class Stopped(UserError):
    """Ctrl-C or SIGTERM: the state is saved, and the same command goes on."""


@dataclass
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
    path: Path,  # of the state to go on from; deleted when all is done
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,  # of the averaged model, after a step
    quiet: bool | None = None,
) -> nn.Module:
    """Train `model`; returns the average of its weights. A step that the guard refuses changes nothing."""
    state = TrainState.start(model, training)
    # What must be equal for the run to be the same one; how often it logs and saves may change.
    kind = {"training": repr(training), "steps": schedule.steps}
    if path.exists():
        load_state(state, kind, path)
    logbook = Logbook(path.parent / path.stem, state.step)
    with stop_signals() as stop:
        bar = tqdm(total=schedule.steps, initial=state.step, unit="step", disable=quiet, desc=path.stem)
        while state.step < schedule.steps:
            if stop():
                save_state(state, kind, path)
                raise Stopped(f"stopped at step {state.step}: saved {path}; the same command goes on from there")
            numbers = take_step(state, loss_of, training, schedule.steps)
            bar.update()
            if is_due(state.step, schedule.log_every):
                logbook.write(state.step, numbers)
                bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
            if evaluate and (state.step == schedule.steps or is_due(state.step, schedule.eval_every)):
                logbook.write(state.step, evaluate(state.ema.model, state.step))
            if is_due(state.step, schedule.save_every) and state.step < schedule.steps:
                save_state(state, kind, path)
        bar.close()
    logbook.close()
    path.unlink(missing_ok=True)
    return state.ema.model


def is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def take_step(state: TrainState, loss_of: Loss, training: TrainingConfig, total_steps: int) -> dict[str, float]:
    """One optimiser step: its figures for the log; a UserError where the guard has refused too many in a row."""
    torch.manual_seed(seeded(training.seed, "text step", state.step).initial_seed())  # dropout, and the noise
    loss, numbers = loss_of(state.step)
    loss.backward()
    result = state.take_step(training, total_steps)
    guard = state.guard
    if guard.has_given_up:
        raise UserError(f"the gradient was not finite, or leapt, in {guard.in_a_row} steps in a row; lower --lr")
    figures = {"loss": loss.item(), "lr": result.rate, "grad_norm": result.norm, "skipped_steps": guard.skipped}
    return figures | numbers


def save_state(state: TrainState, kind: dict, path: Path) -> None:
    with written_whole(path) as beside:
        torch.save({"kind": kind} | state.to_tree(), beside)


def load_state(state: TrainState, kind: dict, path: Path) -> None:
    """Go on from a saved state; that of a run of another kind is an error."""
    tree = load_data(path, "state of a text stage")
    if tree.get("kind") != kind:
        raise UserError(f"{path}: is of a run with other settings; delete it to start anew, or use them again")
    state.load_tree(tree, path)
    print(f"resumed from {path} at step {state.step}")
