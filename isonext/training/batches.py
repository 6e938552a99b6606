"""What is drawn at a step: a function of (seed, step), so that a resume draws the same."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isonext.config import Config, TrainingConfig
from isonext.data.dataset import LatentSplit
from isonext.errors import UserError
from isonext.flow.base import Base, choose_strength, fit_base
from isonext.flow.loss import Loss, drop_labels, flow_loss, pair_noise, sample_time
from isonext.models.flow_map import Pair
from isonext.utils.seeding import seeded

Style = Tensor | Pair  # (B,) int64, some of them the null style; of stage 2 what a transfer is


@dataclass
class Batch:
    x0: Tensor  # (B, C, h, w) noise; of stage 2 the picture's latents
    x1: Tensor  # (B, C, h, w) standardised latents; of stage 2 the transfer's
    t: Tensor  # (B,)
    style: Style

    def part(self, chosen: slice) -> "Batch":
        return self._changed(lambda tensor: tensor[chosen])

    def to(self, device: torch.device, channels_last: bool) -> "Batch":
        """On the device; to CUDA by way of pinned memory, so that nothing waits for the copy."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        pinned = self._changed(Tensor.pin_memory) if device.type == "cuda" else self
        there = pinned._changed(lambda tensor: tensor.to(device, non_blocking=True))
        there.x0, there.x1 = (x.contiguous(memory_format=layout) for x in (there.x0, there.x1))
        return there

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with every tensor changed."""
        style = Pair(*map(change, self.style)) if isinstance(self.style, Pair) else change(self.style)
        return Batch(change(self.x0), change(self.x1), change(self.t), style)


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


def check_batch_size(drawn: int, config: Config, stage: int, processes: int) -> None:
    """UserError where `drawn`, what an epoch draws from, is less than a batch, or the processes cannot share one."""
    batch = config.training.batch_size
    if drawn < batch:
        what, more = ("training pictures", "add pictures") if stage == 1 else ("pairs", "raise training.stage2_pairs")
        raise UserError(
            f"{config.data.data_root}: {drawn} {what}, fewer than one batch of {batch}; "
            f"{more} or use --set training.batch_size={max(1, drawn)}"
        )
    if batch % processes:
        raise UserError(f"training.batch_size = {batch} cannot be shared by {processes} processes evenly")


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


@dataclass
class Samples:
    """What a stage is trained and validated on."""

    draw: Callable[[int, slice], Batch]  # those rows of the batch of an optimiser step
    held_out: Callable[[int], Batch]  # so many samples for the held-out loss, always the same
    held: int  # that there are for it
    loss: Loss


def flow_samples(
    train: LatentSplit, val: LatentSplit, base: Base, training: TrainingConfig, null_style: int
) -> Samples:
    """Those of stage 1: pictures and noise."""
    return Samples(
        lambda step, rows: draw_batch(train, base, training, step, null_style, rows),
        lambda count: held_out_batch(val, base, training, count),
        len(val),
        flow_loss,
    )


def held_out_batch(split: LatentSplit, base: Base, training: TrainingConfig, count: int) -> Batch:
    """`count` held-out pictures, with noise and times that never change."""
    generator = seeded(training.seed, "validation", 0)
    chosen = torch.randperm(len(split), generator=generator)[:count]
    noise = torch.randn(count, *split.latents.shape[2:], generator=generator)
    x1, style = split.batch(chosen)
    return Batch(base.x0(noise, x1, style), x1, spread_times(count), style)


def spread_times(count: int) -> Tensor:
    """(count,) times spread evenly, so that few pictures suffice."""
    return (torch.arange(count) + 0.5) / count
