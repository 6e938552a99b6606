"""The gradients of a step: a process's share of the batch, in micro-batches as large as memory allows."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from isonext.config import TrainingConfig
from isonext.errors import first_line, is_out_of_memory
from isonext.training.batches import Batch, Samples, Style
from isonext.training.memory_plan import MicroBatch
from isonext.utils.device import autocast, fitting
from model import VelocityNetwork

BLOCKS_KEEP = {"selective": "products", "full": "input"}  # for their backward pass, where they recompute the rest


class GradientAccumulator:
    """Draws this process's share of a batch and accumulates its gradients in the model."""

    def __init__(
        self,
        model: VelocityNetwork,
        samples: Samples,
        training: TrainingConfig,
        accelerator: Accelerator,
        bf16: bool,
        micro_batch: MicroBatch,  # to begin with
    ) -> None:
        self.model, self.samples, self.training = model, samples, training
        self.accelerator, self.device, self.bf16 = accelerator, accelerator.device, bf16
        self.micro_batch = micro_batch
        self.drawn: tuple[int, MicroBatch, list[Batch]] | None = None  # a step whose share is ready

    def prepare(self, step: int, compiled: bool) -> None:
        """Before the first step: compile where asked for, and have the processes' gradients averaged."""
        if compiled:
            self._compile(step)
        self.network = self.accelerator.prepare_model(self.model)

    def _compile(self, step: int) -> None:
        """Compile in place (weights keep their names); where that fails, warn and go on without."""
        self.model.compile(dynamic=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._fitting(lambda: self.losses(self.model, self._share(step)[0]).mean().backward())
        except Exception as error:  # no compiler, an unsupported platform: many types, one answer
            if is_out_of_memory(error):
                raise
            self.model.uncompile()
            reason = first_line(error)
            self.accelerator.print(f"warning: torch.compile does not work here ({reason}); going on without it")
        self.model.zero_grad()

    def compute(self, step: int) -> Tensor:
        """The gradients of `step`, whatever memory is left: (2, 4) losses and counts by quarter of t."""
        return self._fitting(lambda: self.accumulate(step))

    def draw_ahead(self, step: int) -> None:
        """Make the share of a later step ready, while a GPU still works on this one."""
        self.drawn = step, self.micro_batch, self._share(step)

    def accumulate(self, step: int) -> Tensor:
        """The gradients of this process's share, one micro-batch after another: (2, 4) losses and counts by quarter."""
        parts, sums = self._share(step), torch.zeros(2, 4, device=self.device)
        size = sum(len(part.t) for part in parts)
        for number, part in enumerate(parts):
            with nullcontext() if number == len(parts) - 1 else self.accelerator.no_sync(self.network):
                losses = self.losses(self.network, part)
                self.accelerator.backward(losses.sum() / size)
            quarter = (part.t * 4).long().clamp(max=3)
            sums[0].index_add_(0, quarter, losses.detach())
            sums[1].index_add_(0, quarter, torch.ones_like(losses))
        return sums

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """(B,) the loss of each sample; only the network runs in BF16."""

        def in_bf16(x: Tensor, t: Tensor, style: Style) -> Tensor:
            with autocast(self.device, self.bf16):
                return network(x, t, style)

        return self.samples.loss(in_bf16, batch.x0, batch.x1, batch.t, batch.style)

    def _share(self, step: int) -> list[Batch]:
        """This process's share of the batch of `step`, cut into micro-batches."""
        if self.drawn and self.drawn[:2] == (step, self.micro_batch):
            return self.drawn[2]
        rows = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        own = self.samples.draw(step, rows)
        size = self.micro_batch.pictures
        parts = [own.part(slice(start, start + size)) for start in range(0, len(own.t), size)]
        return [part.to(self.device, self.training.channels_last) for part in parts]

    def _fitting(self, work: Callable[[], Any]) -> Any:
        """What `work()` returns; where memory runs out its gradients are dropped and it begins again in smaller parts.

        Not with several processes: those that went on would wait for ever for the one that begins again.
        """
        return fitting(work, self._smaller)

    def _smaller(self) -> Callable[[], None] | None:
        """What makes a step need less memory; None where nothing does."""
        smaller = self.micro_batch.smaller(self.training)
        if smaller is None or self.accelerator.num_processes > 1:
            return None

        def cut() -> None:
            halved = smaller.pictures < self.micro_batch.pictures
            way = smaller.pictures if halved else f"blocks that keep their {BLOCKS_KEEP[smaller.recompute]} alone"
            print(f"out of memory in a micro-batch of {self.micro_batch.pictures}: going on with {way}")
            self.micro_batch, self.model.recompute = smaller, smaller.recompute
            self.model.zero_grad(set_to_none=True)

        return cut
