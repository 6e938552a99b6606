"""How much a run may look at on its way: numbers of pictures that keep validations and previews cheap beside training.

They are counted once, from operations and not by a clock, so that a run has the same figures wherever it is resumed.
They do not depend on the number of epochs either: a run that is made longer goes on with the figures that it had.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isonext.config import TrainingConfig
from isonext.flow.transfer import TransferSettings, invert, transfer

# Shares of the operations of the training steps between two of each. Together they stay well below the 5 % of a run's
# time that watching may take: a figure's operations are slower than a step's, and the classifier and its pictures,
# which are made once a run, come on top.
LOSSES, FIGURES, PREVIEWS = 0.003, 0.015, 0.006
FREE = 1e10  # operations, a fraction of a second, that are not worth sparing
MOST_APART = 8  # validations from one with figures to the next, and checkpoints from one preview to the next
FEWEST_LOSSES, MOST_LOSSES, MOST_TRANSFERRED = 16, 512, 32
MOST_ROWS, MOST_PREVIEWED = 3, 8  # of the sheet: pictures a style, and styles, with whose square its cost grows


@dataclass(frozen=True)
class Operations:
    """Floating-point operations: of a training step, and of one picture elsewhere."""

    step: int
    evaluation: int  # of the network
    decoding: int
    inversion: int  # evaluations of that leg
    generation: int

    @property
    def transfer(self) -> int:
        return (self.inversion + self.generation) * self.evaluation + self.decoding


@dataclass(frozen=True)
class WatchPlan:
    transferred: int  # pictures with figures, over all styles
    every: int  # of so many validations one has figures
    rows: int  # pictures a style on the preview sheet
    previewed: int  # styles on it
    previews_every: int = 1  # of so many epochs' checkpoints one has a preview

    def has_figures(self, training: TrainingConfig, epoch: int, last: bool) -> bool:
        """Whether the validation after `epoch` measures transfers; the last one does."""
        return last or epoch // training.val_every_epochs % self.every == 0

    def has_preview(self, training: TrainingConfig, epoch: int, last: bool) -> bool:
        """Whether the checkpoint of `epoch` has one; the last one does."""
        return last or epoch // training.save_every_epochs % self.previews_every == 0


def budget(share: float, steps: int, step: int) -> float:
    """Operations: a share of those of so many training steps of `step` operations."""
    return max(FREE, share * steps * step)


def count_losses(training: TrainingConfig, steps_per_epoch: int, held: int, step: int, evaluation: int) -> int:
    """The pictures of the held-out loss; `held`: those that there are; operations of a step and of an evaluation."""
    room = budget(LOSSES, training.val_every_epochs * steps_per_epoch, step)
    return min(held, MOST_LOSSES, max(FEWEST_LOSSES, int(room / evaluation)))


def plan_watching(
    training: TrainingConfig,
    steps_per_epoch: int,
    styles: int,
    held: int,  # pictures that are held out
    cost: Operations,
) -> WatchPlan:
    """What fits the budgets; where not even the least of it does, that."""
    most = min(held, MOST_TRANSFERRED)
    room = budget(FIGURES, training.val_every_epochs * steps_per_epoch, cost.step) / cost.transfer
    every = min(MOST_APART, max(1, math.ceil(most / room)))
    transferred = max(min(most, 2 * styles), min(most, int(every * room)))
    sheets = [(rows, min(styles, MOST_PREVIEWED)) for rows in range(MOST_ROWS, 0, -1)]
    sheets += [(1, shown) for shown in range(sheets[0][1] - 1, 1, -1)]
    room = budget(PREVIEWS, training.save_every_epochs * steps_per_epoch, cost.step)
    rows, shown = next((sheet for sheet in sheets if sheet_operations(*sheet, cost) <= room), sheets[-1])
    apart = min(MOST_APART, math.ceil(sheet_operations(rows, shown, cost) / room))
    return WatchPlan(transferred, every, rows, shown, apart)


def sheet_operations(rows: int, styles: int, cost: Operations) -> int:
    """Of a preview: each of rows x styles pictures is inverted once, and generated in every style."""
    evaluations = cost.inversion + styles * cost.generation
    return rows * styles * (evaluations * cost.evaluation + (1 + styles) * cost.decoding)


class _Still:
    """A network that moves nothing, to count the evaluations of a transfer with."""

    null_style = 2

    def __call__(self, x: Tensor, t: Tensor, style: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def embed(self, style: Tensor) -> Tensor:
        return style[:, None].float()

    def map_velocity(self, x: Tensor, t: Tensor, source: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        return torch.zeros_like(x)

    map_embed = embed

    def x0(self, noise: Tensor, x1: Tensor, style: Tensor) -> Tensor:
        return noise


def transfer_evaluations(settings: TransferSettings) -> tuple[int, int]:
    """Evaluations a picture of the inversion leg and of the generation leg; of flowedit, 0 and all of them."""
    x1, source, target = torch.zeros(1, 1, 1, 1), torch.tensor([0]), torch.tensor([1])
    whole = transfer(_Still(), x1, source, target, settings).nfe
    if settings.method == "flowedit":
        return 0, whole
    inversion = invert(_Still(), x1, source, settings).nfe
    return inversion, whole - inversion
