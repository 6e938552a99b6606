"""AdamW, on what it decays, and its learning rate."""

import math

import torch
from torch import nn

from config import TrainingConfig


def learning_rate(training: TrainingConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine that would reach zero one step after the last, or constant."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.lr_schedule == "constant":
        return training.learning_rate
    done = (step - training.warmup_steps) / max(1, total_steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, fused; weight decay on matrices and kernels only, not on biases, gates and embeddings."""
    decayed = {name for name, p in model.named_parameters() if p.ndim >= 2 and not name.startswith("style.")}
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if name in decayed],
            "weight_decay": training.weight_decay,
        },
        {"params": [p for name, p in model.named_parameters() if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)
