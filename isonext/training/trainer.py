"""A training run: the network and its average, the optimiser, the data, one step, the loop, and what is saved."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from tqdm import tqdm

from isonext.checkpoint import (
    BEST,
    EMA,
    INTERRUPTED,
    Checkpoint,
    build_model,
    epoch_checkpoints,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
)
from isonext.config import Config
from isonext.data.dataset import load_split
from isonext.data.external import find_store
from isonext.errors import UserError, first_line
from isonext.flow.loss import flow_loss
from isonext.pipeline import Pipeline, load_codec, transfer_settings
from isonext.training.batches import Batch, base_of, draw_batch
from isonext.training.log import Logbook
from isonext.training.memory_plan import USED, Cut, choose_cut, needs_of, reduced
from isonext.training.optim import Guard, learning_rate, make_optimizer
from isonext.training.resume import check_resume, in_units_of, take_over
from isonext.training.validation import Judge, save_preview
from isonext.utils import distributed
from isonext.utils.cli import stop_signals
from isonext.utils.device import allow_tf32, autocast, free_bytes, has_bf16, prepare_process
from isonext.utils.io import remove_unfinished
from isonext.utils.seeding import seeded
from model import count_parameters

#################################################################################
#                                    The run                                    #
#################################################################################


class Trainer:
    """One training run: network, averaged network, optimizer, data, and where it stands."""

    def __init__(self, config: Config, resume: str | None = None, init: str | None = None) -> None:
        """`resume`: None for a new run, "newest", or a checkpoint's path; `init`: that of one whose weights to take."""
        self.config, training = config, config.training
        self.folder = Path(config.checkpoint.save_dir)
        # Autocast wraps the network alone, see `losses`; without GPUs accelerate must be told of several processes.
        many_on_cpu = distributed.world() > 1 and not torch.cuda.is_available()
        patience = InitProcessGroupKwargs(timeout=distributed.PATIENCE)
        self.accelerator = Accelerator(cpu=many_on_cpu, mixed_precision="no", kwargs_handlers=[patience])
        self.device = self.accelerator.device
        self.bf16 = training.use_amp and has_bf16(self.device)
        allow_tf32(training.tf32)
        prepare_process()
        root = Path(config.data.data_root)
        meta = find_store(root, config)
        self.train, self.val = (load_split(root, meta, split) for split in ("train", "val"))
        other = load_checkpoint(init) if init else None
        self.spec = self.train.spec = self.val.spec = in_units_of(meta.latents, other, init)
        self._check_sizes()
        self.base = base_of(self.train, training)

        self.share = training.batch_size // self.accelerator.num_processes
        self.cut = choose_cut(training, self.share, self._memory(), needs_of(config, self.spec, self.bf16))
        torch.manual_seed(training.seed)
        layout = torch.channels_last if training.channels_last else torch.contiguous_format
        self.model = build_model(config, self.spec).to(self.device, memory_format=layout)
        self.model.keep = self.cut.keep
        self.ema = EMA(self.model, training.ema_decay)
        self.optimizer = make_optimizer(self.model, training)
        self.step, self.guard = 0, Guard()
        self.drawn: tuple[int, Cut, list[Batch]] | None = None  # a step whose share is ready
        self.clipped = 0  # steps since the last line of the log
        self.judge: Judge | None = None  # made at the first validation
        self._start(resume)
        if other:
            self.accelerator.print(take_over((self.model, self.ema.model), other, init, self.spec))
        if self.accelerator.is_main_process:
            remove_unfinished(self.folder)  # not before: a run that is refused must not touch one that is under way
        self.steps_per_epoch = len(self.train) // training.batch_size
        self.total_steps = training.stage1_epochs * self.steps_per_epoch
        if training.compile and self.step < self.total_steps:
            self._compile()
        self.network = self.accelerator.prepare_model(self.model)
        self.quarter_sums = torch.zeros(2, 4, device=self.device)  # summed losses and counts by quarter of t

    def _check_sizes(self) -> None:
        batch, world = self.config.training.batch_size, self.accelerator.num_processes
        if len(self.train) < batch:
            raise UserError(
                f"{self.config.data.data_root}: {len(self.train)} training pictures, fewer than one batch of {batch}; "
                f"add pictures or use --set training.batch_size={max(1, len(self.train))}"
            )
        if batch % world:
            raise UserError(f"training.batch_size = {batch} cannot be shared by {world} processes evenly")

    def _memory(self) -> float:
        """Bytes that this process may take; a CPU's memory is shared by all of them."""
        return USED * free_bytes(self.device) / (1 if self.device.type == "cuda" else self.accelerator.num_processes)

    def _start(self, resume: str | None) -> None:
        """From the beginning, or where a checkpoint of this run stands."""
        if resume is None:
            if epoch_checkpoints(self.folder) or any((self.folder / name).exists() for name in (INTERRUPTED, BEST)):
                raise UserError(
                    f"{self.folder}: holds the checkpoints of a run; go on with --resume, "
                    "or start another with --set checkpoint.save_dir=FOLDER"
                )
            return
        found = newest_checkpoint(self.folder) if resume == "newest" else (Path(resume), load_checkpoint(resume))
        if found is None:
            self.accelerator.print(f"{self.folder}: no checkpoint yet, starting from the beginning")
            return
        path, checkpoint = found
        for line in check_resume(checkpoint, path, self.config, self.spec, self.train.digest):
            self.accelerator.print(line)
        # The statistics stay those of the start: the network's units must not move under it.
        self.spec = self.train.spec = self.val.spec = checkpoint.latents
        self.base = checkpoint.base
        load_weights(self.model, checkpoint.model, path)
        load_weights(self.ema.model, checkpoint.ema, path)
        options = [{key: group[key] for key in ("weight_decay", "betas")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(checkpoint.optimizer)
        for group, now in zip(self.optimizer.param_groups, options, strict=True):
            group.update(now)  # what the config says now, not what it said then
        self.step, self.guard = checkpoint.step, Guard(checkpoint.guard)
        self.accelerator.print(f"resumed from {path} at step {self.step}")

    def _compile(self) -> None:
        """Compile in place (weights keep their names); where that fails, warn and go on without."""
        self.model.compile(dynamic=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._fitting(lambda: self.losses(self.model, self._share(self.step)[0]).mean().backward())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, an unsupported platform: many types, one answer
            self.model.uncompile()
            reason = first_line(error)
            self.accelerator.print(f"warning: torch.compile does not work here ({reason}); going on without it")
        self.model.zero_grad()

    #############################################################################
    #                                 One step                                  #
    #############################################################################

    def _share(self, step: int) -> list[Batch]:
        """This process's share of the batch of `step`, cut into micro-batches."""
        if self.drawn and self.drawn[:2] == (step, self.cut):
            return self.drawn[2]
        training, accelerator = self.config.training, self.accelerator
        batch = draw_batch(self.train, self.base, training, step, self.model.null_style)
        own = batch.part(slice(accelerator.process_index, None, accelerator.num_processes))
        size = self.cut.pictures
        parts = [own.part(slice(start, start + size)) for start in range(0, len(own.t), size)]
        return [part.to(self.device, training.channels_last) for part in parts]

    def losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """(B,) the loss of each sample; only the network runs in BF16."""

        def in_bf16(x: Tensor, t: Tensor, style: Tensor) -> Tensor:
            with autocast(self.device, self.bf16):
                return network(x, t, style)

        return flow_loss(in_bf16, batch.x0, batch.x1, batch.t, batch.style)

    def _fitting(self, work: Callable[[], Any]) -> Any:
        """What `work()` returns; where memory runs out its gradients are dropped and it begins again in smaller parts.

        Not with several processes: those that went on would wait for ever for the one that begins again.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                cut = self.cut.smaller(self.config.training)
                if cut is None or self.accelerator.num_processes > 1:
                    raise
            # Only here, where the error is gone, does nothing hold on to the tensors of the attempt.
            way = cut.pictures if cut.pictures < self.cut.pictures else f"blocks that keep their {cut.keep} alone"
            print(f"out of memory in a micro-batch of {self.cut.pictures}: going on with {way}")
            self.cut, self.model.keep = cut, cut.keep
            self.model.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def accumulate(self) -> Tensor:
        """The gradients of this process's share, one micro-batch after another: (2, 4) losses and counts by quarter."""
        parts, sums = self._share(self.step), torch.zeros(2, 4, device=self.device)
        size = sum(len(part.t) for part in parts)
        for number, part in enumerate(parts):
            with nullcontext() if number == len(parts) - 1 else self.accelerator.no_sync(self.network):
                losses = self.losses(self.network, part)
                self.accelerator.backward(losses.sum() / size)
            quarter = (part.t * 4).long().clamp(max=3)
            sums[0].index_add_(0, quarter, losses.detach())
            sums[1].index_add_(0, quarter, torch.ones_like(losses))
        return sums

    def train_step(self) -> float:
        """One optimiser step; returns the gradient's norm before clipping. What the guard refuses changes nothing."""
        training = self.config.training
        sums = self._fitting(self.accumulate)
        if self.step + 1 < self.total_steps:  # drawn while a GPU still works on this step: the norm waits for it
            self.drawn = self.step + 1, self.cut, self._share(self.step + 1)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), training.grad_clip or math.inf).item()
        if self.guard.passes(norm):
            self.clipped += 0 < training.grad_clip < norm
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(training, self.step, self.total_steps)
            self.optimizer.step()
            self.ema.update(self.model, self.step)
            self.quarter_sums += sums
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norm

    #############################################################################
    #                                 The loop                                  #
    #############################################################################

    def fit(self, stop: Callable[[], bool] = lambda: False, quiet: bool | None = None) -> None:
        """Train to the last epoch, or until `stop()`; saves on the way and when stopped."""
        main = self.accelerator.is_main_process
        logbook = Logbook(self.folder, self.step) if main else None
        self.best_score = logbook.largest("val_score") if logbook else 0.0
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=quiet if main else True)
        started, seen = time.perf_counter(), 0
        while self.step < self.total_steps and not self._any(stop()):
            norm = self.train_step()
            seen += self.config.training.batch_size
            bar.update()
            if self.guard.has_given_up:
                raise UserError(self._diverged())
            if self.step % self.config.training.log_every_steps == 0:
                numbers = self._numbers(norm, seen / (time.perf_counter() - started))
                bar.set_postfix(loss=f"{numbers.get('loss', math.nan):.4f}", refresh=False)
                if logbook:
                    logbook.write(self.step, numbers)
                started, seen = time.perf_counter(), 0
            if self.step % self.steps_per_epoch == 0:
                paused = time.perf_counter()
                self._end_epoch(self.step // self.steps_per_epoch, logbook)
                started += time.perf_counter() - paused
        bar.close()
        if self.step < self.total_steps and main:
            self.save(self.folder / INTERRUPTED)
            print(f"stopped at step {self.step}: saved {self.folder / INTERRUPTED}; go on with --resume")
        if logbook:
            logbook.close()

    def _last_good(self) -> str:
        good = epoch_checkpoints(self.folder)
        return f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"

    def _diverged(self) -> str:
        return (
            f"the gradient was not finite, or leapt, in {self.guard.in_a_row} steps in a row up to step {self.step}; "
            f"{self._last_good()}: resume with a lower --set training.learning_rate or --set training.use_amp=false"
        )

    def _any(self, flag: bool) -> bool:
        """Whether any process says so: a signal may reach one of them a step before the others."""
        if self.accelerator.num_processes == 1:
            return flag
        return self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum").item() > 0

    def _numbers(self, norm: float, rate: float) -> dict[str, float]:
        """What is logged; the losses are means since the last call."""
        sums, counts = self.accelerator.reduce(self.quarter_sums, "sum").tolist()
        self.quarter_sums.zero_()
        numbers = {"loss": sum(sums) / sum(counts)} if sum(counts) else {}
        numbers |= {f"loss_t{q}": sums[q] / counts[q] for q in range(4) if counts[q]}
        rate_now = learning_rate(self.config.training, self.step - 1, self.total_steps)
        numbers |= {"epoch": self.step / self.steps_per_epoch, "lr": rate_now, "samples_per_s": rate}
        numbers |= {"memory_gb": peak_memory_gb(self.device), "skipped_steps": self.guard.skipped}
        numbers["clipped"] = self.clipped / self.config.training.log_every_steps
        self.clipped = 0
        return numbers | ({"grad_norm": norm} if math.isfinite(norm) else {})

    def _end_epoch(self, epoch: int, logbook: Logbook | None) -> None:
        training = self.config.training
        last = self.step == self.total_steps
        if logbook and len(self.val) and (epoch % training.val_every_epochs == 0 or last):
            numbers = self.validate() | self._judged()
            logbook.write(self.step, numbers)
            if numbers.get("val_score", 0) > self.best_score:
                self.best_score = numbers["val_score"]
                self.save(self.folder / BEST)
        if logbook and (epoch % training.save_every_epochs == 0 or last):
            self.save(self.folder / f"stage1_epoch{epoch}.pt")
            (self.folder / INTERRUPTED).unlink(missing_ok=True)
            for old in epoch_checkpoints(self.folder)[: -training.keep_checkpoints]:  # [:-0] is none
                old.unlink()
            with self._dispensable("preview"):
                split, settings = self.val if len(self.val) else self.train, transfer_settings(self.config.inference)
                save_preview(self._pipeline(), split, settings, self.folder / f"preview_epoch{epoch}.png")
        self.accelerator.wait_for_everyone()

    def _judged(self) -> dict[str, float]:
        """The figures of a handful of transfers; none where there are not the pictures for it."""
        numbers = {}
        if Judge.can_judge(self.val):
            with self._dispensable("figures of transfers"):
                settings = transfer_settings(self.config.inference)
                self.judge = self.judge or Judge(self._pipeline(), self.train, self.val, settings)
                numbers = self.judge()
        return numbers

    @contextmanager
    def _dispensable(self, what: str) -> Iterator[None]:
        """A picture or a figure less is no reason to stop a training run."""
        try:
            yield
        except (UserError, FloatingPointError, torch.OutOfMemoryError) as error:
            print(f"warning: no {what}: {first_line(error)}")

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The averaged network's loss on held-out latents, with noise and times that never change."""
        total, count = 0.0, min(len(self.val), 512)
        generator = seeded(self.config.training.seed, "validation", 0)
        chosen = torch.randperm(len(self.val), generator=generator)[:count]
        noise = torch.randn(count, *self.val.latents.shape[2:], generator=generator)
        times = (torch.arange(count) + 0.5) / count  # spread evenly, so that few pictures suffice
        for start in range(0, count, self.cut.pictures):  # of which training has shown that they fit
            part = slice(start, start + self.cut.pictures)
            x1, style = self.val.batch(chosen[part])
            batch = Batch(self.base.x0(noise[part], x1, style), x1, times[part], style)
            total += self.losses(self.ema.model, batch.to(self.device, self.config.training.channels_last)).sum().item()
        return {"val_loss": total / count}

    def save(self, path: Path) -> None:
        """The whole state, in one file; where there is no room for it, nothing is lost but the steps since the last."""
        checkpoint = Checkpoint(
            config=self.config,
            latents=self.spec,
            base=self.base,
            store=self.train.digest,
            guard=self.guard.record,
            step=self.step,
            epoch=self.step // self.steps_per_epoch,
            model=self.model.state_dict(),
            ema=self.ema.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )
        try:
            checkpoint.save(path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(
                f"{path}: could not be written ({reason}); {self._last_good()}: make room and go on with --resume"
            ) from None

    def _pipeline(self) -> Pipeline:
        codec = load_codec(self.spec, self.device, self.config.data.data_root)
        return Pipeline(self.ema.model, codec, self.spec, self.device, self.bf16, base=self.base)


def peak_memory_gb(device: torch.device) -> float:
    """CUDA's peak of reserved memory; elsewhere what the process occupies now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def train(config: Config, resume: str | None = None, init: str | None = None, quiet: bool | None = None) -> Trainer:
    """Run (or go on with) the training that `config` describes; Ctrl-C and SIGTERM save first."""
    # DDP warns of the memory layout of depthwise weights (stride of a dimension of 1), which costs it nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with stop_signals() as stop, distributed.peers_needed():
        trainer = Trainer(config, resume, init)
        trainer.accelerator.print(
            f"{count_parameters(trainer.model) / 1e6:.2f} M parameters, {len(trainer.train)} pictures in "
            f"{len(trainer.spec.styles)} styles ({', '.join(trainer.spec.styles)}), {len(trainer.val)} held out, "
            f"{trainer.total_steps} steps on {trainer.device} in {'BF16' if trainer.bf16 else 'float32'}"
            f"{reduced(config.training, trainer.cut, trainer.share)}"
        )
        trainer.fit(stop, quiet)
    return trainer
