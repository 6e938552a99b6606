"""The third stage: a head is trained between the frozen flow and the frozen decoder.

At a random t, x_t = (1 - t) x0 + t x1 of a sentence's latents x1, and the flow's guess of them is

    x1_hat = x_t + (1 - t) v(x_t, t, class)

The loss is the decoder's cross-entropy given heads(x1_hat), + 0.1 MSE to x1, + the codebook's own.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from isonext.checkpoint import load_weights
from isonext.config import TrainingConfig
from isonext.errors import UserError
from isonext.flow.loss import path, sample_time
from model import count_parameters
from textflow.data import Corpus
from textflow.heads import HeadConfig, Heads, usage
from textflow.loop import Schedule, fit
from textflow.model import TextModel, load_part, save_part

CLEAN_WEIGHT = 0.1  # of the squared error to the clean latents
WHAT = "text head"


@dataclass
class HeadRun:
    """What a head's training is told."""

    batch_size: int = 8
    num_epochs: int = 1
    max_steps: int | None = None  # in place of the epochs' count
    lr: float = 1e-4
    log_interval: int = 100
    eval_interval: int = 500
    save_interval: int = 2000
    seed: int = 0

    def training(self, steps: int) -> TrainingConfig:
        """No average (decay 0): a mean of codebooks, whose codes have changed places, is none."""
        return TrainingConfig(
            batch_size=self.batch_size,
            learning_rate=self.lr,
            ema_decay=0.0,
            seed=self.seed,
            warmup_steps=min(100, steps // 10),
        )


def guess(model: TextModel, x1: Tensor, style: Tensor, generator: torch.Generator) -> Tensor:
    """The flow's x1_hat (B, 64, L) of clean latents x1 of classes `style`, each at a time of its own."""
    t = sample_time(len(x1), "uniform", generator).to(x1.device)
    x0 = torch.randn(x1.shape, generator=generator).to(x1.device)
    xt, _ = path(x0, x1, t)
    with torch.no_grad():
        return xt + (1 - t)[:, None, None] * model.field(xt, t, style.to(x1.device))


def losses(model: TextModel, heads: Heads, texts: list[str], x1: Tensor, x1_hat: Tensor) -> tuple[Tensor, dict, tuple]:
    """The loss, its parts for the log, and (outputs, codes), by which the codebook is tended."""
    result = heads(x1_hat)
    words = model.cross_entropy(result.latents, texts)
    clean = F.mse_loss(result.latents, x1)
    numbers = {"cross_entropy": words.item(), "mse": clean.item(), "vq": result.vq_loss.item()}
    return words + CLEAN_WEIGHT * clean + result.vq_loss, numbers, (result.outputs.detach(), result.codes)


def train_head(
    model: TextModel, config: HeadConfig, settings: HeadRun, corpora: tuple[Corpus, Corpus], folder: Path, quiet=None
) -> dict[str, float]:
    """Train; writes folder/best.pt (of all validations, by the loss) and folder/last.pt; returns the last figures."""
    train, val = (model.accept(corpus) for corpus in corpora)
    steps = settings.max_steps or settings.num_epochs * max(1, len(train) // settings.batch_size)
    torch.manual_seed(settings.seed)
    heads = Heads(config, model.spec.channels).to(model.device)
    if heads.codebook:
        heads.codebook.start_from(_first_outputs(model, heads, train, settings))

    def loss_of(step: int) -> tuple[Tensor, dict]:
        texts, style, generator = train.draw(settings.batch_size, settings.seed, step)
        x1 = model.encode(texts).clone()  # out of inference mode, so that autograd may keep it
        loss, numbers, (outputs, codes) = losses(model, heads, texts, x1, guess(model, x1, style, generator))
        if codes is not None:
            numbers |= usage(codes, config.vq_codes) | {"restarted": heads.codebook.restart_dead(outputs, codes)}
        return loss, numbers

    lowest, figures, started = math.inf, {}, time.perf_counter()

    def evaluate(_: Heads, step: int) -> dict[str, float]:
        nonlocal lowest
        figures.update(validate(model, heads.eval(), val, settings))
        figures.update(steps=step, seconds=time.perf_counter() - started, parameters=count_parameters(heads))
        heads.train()
        save_head(folder / "last.pt", model, heads, figures)
        if figures["val_loss"] < lowest:
            lowest = figures["val_loss"]
            save_head(folder / "best.pt", model, heads, figures)
        return dict(figures)

    schedule = Schedule(steps, settings.log_interval, settings.eval_interval, settings.save_interval)
    fit(heads, loss_of, settings.training(steps), schedule, folder / "state.pt", evaluate, quiet)
    return figures


@torch.no_grad()
def _first_outputs(model: TextModel, heads: Heads, train: Corpus, settings: HeadRun) -> Tensor:
    """(N, 64) outputs of the head, as many as there are codes: those of an enlarged first batch."""
    count = math.ceil(heads.config.vq_codes / model.spec.image_size)
    outputs = []
    for number in range(math.ceil(count / 64)):
        texts, style, generator = train.draw(64, settings.seed, number)
        guessed = guess(model, model.encode(texts).clone(), style, generator)
        outputs.append(heads.head(guessed.mT.flatten(0, 1)))
    return torch.cat(outputs)


@torch.no_grad()
def validate(model: TextModel, heads: Heads, val: Corpus, settings: HeadRun) -> dict[str, float]:
    """The loss on up to 512 held-out sentences with noise and times that never change, and the codes they take."""
    if not len(val):
        raise UserError("no sentence is held out to validate on: raise val_fraction in the data config")
    part, total, taken = val.part(512), 0.0, []
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(part), 64):
        texts = part.texts[start : start + 64]
        x1 = model.encode(texts).clone()
        x1_hat = guess(model, x1, part.styles[start : start + 64], generator)
        loss, _, (_, codes) = losses(model, heads, texts, x1, x1_hat)
        total += loss.item() * len(texts)
        taken += [codes] if codes is not None else []
    return {"val_loss": total / len(part)} | (usage(torch.cat(taken), heads.config.vq_codes) if taken else {})


def save_head(path: Path, model: TextModel, heads: Heads, figures: dict[str, float]) -> None:
    save_part(path, WHAT, config=heads.config, model=model.digest, weights=heads.state_dict(), figures=dict(figures))


def load_head(path: str | Path, model: TextModel) -> Heads:
    """The heads of a checkpoint, frozen; one that was trained on other latents is an error."""
    tree = load_part(Path(path), WHAT, ("config", "model", "weights", "figures"))
    if tree["model"] != model.digest:
        raise UserError(
            f"{path}: was trained on the latents of another text model than --model_path: give that one, or train the "
            "head anew"
        )
    heads = Heads(HeadConfig(**tree["config"]), model.spec.channels)
    load_weights(heads, tree["weights"], path)
    return heads.eval().requires_grad_(False)
