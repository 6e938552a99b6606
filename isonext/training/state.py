"""What training changes: the weights, their average, the optimizer, the guard, and the step. And one step of it."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from isonext.checkpoint import load_weights
from isonext.config import TrainingConfig
from isonext.errors import UserError, first_line
from isonext.training.optim import Guard, learning_rate, make_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class EMA:
    """The exponential moving average of a model's weights, which is what transfers use.

    The decay warms up as (1 + n) / (10 + n), so that the random start is soon forgotten. n counts the steps of this run
    and `head_start`, those that the average had seen before it: one that --init brought along is not forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.head_start = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 0."""
        seen = self.head_start + step
        decay = min(self.decay, (1 + seen) / (10 + seen))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


class StepResult(NamedTuple):
    norm: float  # of the gradient, before clipping
    rate: float  # the learning rate
    taken: bool  # False where the guard refused it


@dataclass
class TrainState:
    """All that a step changes. Together with (seed, step), from which batches are drawn, it is the whole of a run."""

    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    guard: Guard
    step: int = 0  # optimiser steps done

    @classmethod
    def start(cls, model: nn.Module, training: TrainingConfig) -> "TrainState":
        """That of a new run; what is trained is the model's parameters, and no others."""
        return cls(model, EMA(model, training.ema_decay), make_optimizer(model, training), Guard())

    def take_step(self, training: TrainingConfig, total_steps: int) -> StepResult:
        """One optimiser step by the gradients that are there; one that the guard refuses changes no weight."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), training.grad_clip or math.inf).item()
        rate = learning_rate(training, self.step, total_steps)
        taken = self.guard.passes(norm)
        if taken:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.ema.update(self.model, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepResult(norm, rate, taken)

    def to_tree(self) -> dict[str, Any]:
        """Its entries in a file."""
        return {
            "step": self.step,
            "guard": self.guard.record,
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_head_start": self.ema.head_start,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_tree(self, tree: Mapping[str, Any], path: Path) -> None:
        """Go on from these entries of the file `path`; UserError where its weights do not fit.

        Weight decay and betas stay those of this run's config, not those that the file was written with.
        """
        load_weights(self.model, tree["model"], path)
        load_weights(self.ema.model, tree["ema"], path)
        self.ema.head_start = tree.get("ema_head_start", 0)  # which came later than the rest
        self._load_optimizer(tree["optimizer"], path)
        self.step, self.guard = tree["step"], Guard(tree["guard"])

    def _load_optimizer(self, tree: dict[str, Any], path: Path) -> None:
        """Its moments and rate; the other options are those of this run. UserError where they do not fit."""
        kept = ("params", "lr")
        options = [{key: group[key] for key in group if key not in kept} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(tree)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: the optimizer's state does not fit ({first_line(error)})") from None
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
            for parameter in group["params"]:
                _refuse_other_moments(self.optimizer.state.get(parameter, {}), parameter, path)


def _refuse_other_moments(moments: dict[str, torch.Tensor], parameter: torch.Tensor, path: Path) -> None:
    """UserError unless they are AdamW's of this parameter; before its first step there are none."""
    shapes = {name: tuple(moment.shape) for name, moment in moments.items() if name != "step"}
    counted = "step" in moments and moments["step"].numel() == 1
    if moments and not (counted and shapes == dict.fromkeys(MOMENTS, tuple(parameter.shape))):
        raise UserError(f"{path}: the optimizer's state does not fit (it has moments of {shapes})")
