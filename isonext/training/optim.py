"""AdamW, on what it decays, and its learning rate; and the guard, which says what steps are not taken."""

import math
import statistics

import torch
from torch import nn

from isonext.config import TrainingConfig

MAX_NORMS = 100  # gradient norms that are remembered, those of the last steps taken
MIN_NORMS = 50  # of them, before one is called a leap
MAX_LEAP = 10.0  # times their median
MAX_SKIPPED = 20  # steps in a row, then the run stops


def learning_rate(training: TrainingConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine that would reach zero one step after the last, or constant."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.lr_schedule == "constant":
        return training.learning_rate
    done = (step - training.warmup_steps) / max(1, total_steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, fused; weight decay on matrices and kernels only, not on biases, gates, norms and the style embedding."""
    decayed = {name for name, p in model.named_parameters() if p.ndim >= 2 and not name.startswith("style.")}
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if name in decayed],
            "weight_decay": training.weight_decay,
        },
        {"params": [p for name, p in model.named_parameters() if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)


class Guard:
    """Judges each step by its gradient's norm before clipping, and counts. Its `record` goes into the checkpoint.

    A gradient that is not finite, or leaps out of the ordinary, would spoil the weights and both moments of AdamW.
    """

    def __init__(self, record: dict | None = None) -> None:
        record = record or {"norms": [], "skipped": 0, "in_a_row": 0}
        self.norms: list[float] = list(record["norms"])  # of the last steps that were taken
        self.skipped: int = record["skipped"]
        self.in_a_row: int = record["in_a_row"]

    @property
    def record(self) -> dict:
        return {"norms": list(self.norms), "skipped": self.skipped, "in_a_row": self.in_a_row}

    @property
    def has_given_up(self) -> bool:
        return self.in_a_row >= MAX_SKIPPED

    def passes(self, norm: float) -> bool:
        """Whether to take a step whose gradient has this norm."""
        limit = MAX_LEAP * statistics.median(self.norms) if len(self.norms) >= MIN_NORMS else math.inf
        if math.isfinite(norm) and norm <= limit:
            self.norms = [*self.norms[1 - MAX_NORMS :], norm]
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False
