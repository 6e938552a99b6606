"""What is drawn at a step: a function of (seed, step), so that a resume draws the same."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isonext.config import TrainingConfig
from isonext.data.dataset import LatentSplit
from isonext.errors import UserError
from isonext.flow.base import Base, choose_strength, fit_base
from isonext.flow.loss import drop_labels, pair_noise, sample_time
from isonext.utils.seeding import seeded


@dataclass
class Batch:
    x0: Tensor  # (B, C, h, w) noise
    x1: Tensor  # (B, C, h, w) standardised latents
    t: Tensor  # (B,)
    style: Tensor  # (B,) int64, some of them the null style

    def part(self, chosen: slice) -> "Batch":
        return Batch(self.x0[chosen], self.x1[chosen], self.t[chosen], self.style[chosen])

    def to(self, device: torch.device, channels_last: bool) -> "Batch":
        """On the device; to CUDA by way of pinned memory, so that nothing waits for the copy."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        tensors = [self.x0, self.x1, self.t, self.style]
        if device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        x0, x1, t, style = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Batch(x0.contiguous(memory_format=layout), x1.contiguous(memory_format=layout), t, style)


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=seeded(seed, "order", epoch))


@functools.lru_cache(maxsize=2)
def balanced_order(seed: int, epoch: int, drawn: int, counts: tuple[int, ...]) -> Tensor:
    """(drawn,) what an epoch draws where styles take turns, as places in the pictures sorted by style.

    Turns are counted through from the first epoch on. So each style goes through all of its pictures, in an order that
    is new every time, before it takes one again, and it is drawn as often as any other to within one.
    """
    order, first = torch.empty(drawn, dtype=torch.int64), 0
    turns = torch.arange(epoch * drawn, (epoch + 1) * drawn)
    for style, count in enumerate(counts):
        mine = turns % len(counts) == style
        draws = turns[mine] // len(counts)  # of this style, counted through
        if len(draws):
            rounds = range(int(draws[0]) // count, int(draws[-1]) // count + 1)
            shuffled = [torch.randperm(count, generator=seeded(seed, f"order {style}", number)) for number in rounds]
            order[mine] = first + torch.cat(shuffled)[draws - rounds[0] * count]
        first += count
    return order


def drawn_pictures(split: LatentSplit, training: TrainingConfig, step: int) -> Tensor:
    """(B,) the pictures of optimiser step `step`. An epoch has as many steps whatever the balance of styles."""
    size = training.batch_size
    steps_per_epoch = len(split) // size
    epoch, place = divmod(step, steps_per_epoch)
    part = slice(place * size, (place + 1) * size)
    if training.balance == "natural":
        return epoch_order(training.seed, epoch, len(split))[part]
    return split.by_style[balanced_order(training.seed, epoch, steps_per_epoch * size, split.counts)[part]]


def base_of(split: LatentSplit, training: TrainingConfig, of_auto: float | None = None) -> tuple[Base, str]:
    """The base that the config asks for, fitted to at most 1024 pictures a style; and what "auto" chose, or "".

    "auto" is `of_auto`, if that is given.
    """
    cells = split.spec.image_size // split.spec.factor
    if training.anchor_strength and training.anchor_cells > cells:
        raise UserError(f"training.anchor_cells = {training.anchor_cells}: the latents have {cells} cells a side")

    def spread(style: int) -> Tensor:
        index = (split.styles == style).nonzero().flatten()
        return split.batch(index[:: math.ceil(len(index) / 1024)])[0]

    strength, choice, styles = training.anchor_strength, "", len(split.spec.styles)
    if strength == "auto" and of_auto is not None:
        strength = of_auto
    elif strength == "auto":
        strength, choice = choose_strength(spread, styles, training.anchor_cells)
    return fit_base(spread, styles, strength, training.anchor_cells), choice


ALL = slice(None)


def draw_batch(
    split: LatentSplit,
    base: Base,
    training: TrainingConfig,
    step: int,
    null_style: int,
    rows: slice = ALL,  # of the batch: a process's share
) -> Batch:
    """The batch of optimiser step `step`, or those `rows` of it.

    Random numbers are drawn for the whole batch, so that a row is the same whoever draws it; latents are read and
    standardised for the rows alone, except where noise is paired over the whole batch.
    """
    index = drawn_pictures(split, training, step)
    generator = seeded(training.seed, "batch", step)
    mirrored = torch.rand(len(index), generator=generator) < 0.5
    crop = torch.zeros_like(index)
    if split.crops:
        crop = torch.randint(1 + split.crops, index.shape, generator=generator)
    read = ALL if training.coupling == "ot" else rows
    x1, style = split.batch(index[read], mirrored[read], crop[read])
    noise = torch.randn(len(index), *x1.shape[1:], generator=generator)[read]
    t = sample_time(len(index), training.time_sampling, generator)
    if training.coupling == "ot":
        noise = pair_noise(noise, base.above(x1), style)
    label = drop_labels(split.styles[index], training.label_drop_prob, null_style, generator)
    if training.coupling == "ot":
        noise, x1, style = noise[rows], x1[rows], style[rows]
    return Batch(base.x0(noise, x1, style), x1, t[rows], label[rows])
