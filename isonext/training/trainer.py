"""A training run: the data, the state, its validation, one step, the loop, and what is saved."""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from isonext.checkpoint import BEST, Checkpoint, build_model, epoch_checkpoints, interrupted, load_weights, network_of
from isonext.config import Config
from isonext.data.dataset import load_split
from isonext.data.external import find_store
from isonext.errors import UserError, first_line
from isonext.models.flow_map import FlowMap
from isonext.pipeline import Pipeline, load_codec
from isonext.training.batches import Batch, Samples, base_of, check_batch_size, flow_samples
from isonext.training.folder import begin_run, folder_of, identify, is_finite, last_good, new_run
from isonext.training.gradients import GradientAccumulator
from isonext.training.log import Logbook, Tally
from isonext.training.memory_plan import (
    USABLE,
    MicroBatch,
    choose_micro_batch,
    count_needs,
    describe_reduction,
    refuse_too_large,
)
from isonext.training.pairs import FILE, map_inference, taught_samples
from isonext.training.processes import join_processes, peak_memory_gb
from isonext.training.resume import (
    begin_map,
    check_length,
    check_resume,
    find_init,
    find_start,
    in_units_of,
    take_over,
)
from isonext.training.state import StepResult, TrainState
from isonext.training.validation import Validation, can_be_transferred
from isonext.utils import distributed
from isonext.utils.cli import stop_signals
from isonext.utils.device import allow_tf32, free_bytes, has_bf16, prepare_process
from isonext.utils.io import refuse_inside, remove_unfinished
from model import VelocityNetwork, count_parameters

LOWER_RATE = "resume with a lower --set training.learning_rate or --set training.use_amp=false"  # where a run diverges

#################################################################################
#                                    The run                                    #
#################################################################################


class Trainer:
    """One training run: its data, its state, what computes its gradients and validates it, and where it is written."""

    def __init__(
        self,
        config: Config,
        resume: str | None = None,
        init: str | None = None,
        autoencoder: str | None = None,
        stage: int = 1,
    ) -> None:
        """`resume`: None for a new run, "newest", or a checkpoint's path; `init`: that of one whose weights to take;
        `autoencoder`: where the store's lies now, if not where the store says; `stage`: 2 learns the map of `init`."""
        self.config, self.stage, training = config, stage, config.training
        self.inference = config.inference if stage == 1 else map_inference(config)
        self.folder = folder_of(config, stage)
        self.interrupted = self.folder / interrupted(stage)
        other = find_init(init, resume, stage)
        self.accelerator = join_processes()
        self.device = self.accelerator.device
        self.bf16 = training.use_amp and has_bf16(self.device)
        allow_tf32(training.tf32)
        prepare_process()
        self._load_data(other, init)
        micro_batch, model = self._make_model()
        self.state = TrainState.start(model, training)
        self.steps_per_epoch = self.drawn // training.batch_size
        self.total_steps = self.steps_per_epoch * (training.stage1_epochs if stage == 1 else training.stage2_epochs)
        self.tally = Tally(self.accelerator)
        self.run = new_run()
        self.branches_from: Path | None = None  # the checkpoint that was asked for by name
        self.teacher: dict[str, Tensor] = {}  # stage 1's averaged weights, in stage 2
        self._resume(resume)
        if autoencoder:  # checked now, not at the first validation; checkpoints will name this place
            self.spec.autoencoder = load_codec(self.spec, self.device, config.data.data_root, autoencoder).name
        if other and init:
            self._begin_from(other, init)
        if self.accelerator.is_main_process:
            remove_unfinished(self.folder)  # not before: a run that is refused must not touch one that is under way
        self.samples = self._make_samples()
        self.gradients = GradientAccumulator(model, self.samples, training, self.accelerator, self.bf16, micro_batch)
        self.gradients.prepare(self.state.step, compiled=training.compile and not self.finished)
        self.stopped = 0  # the exit status: of a signal, or 1 where the last epoch could not be saved
        self.validation = self._make_validation()

    def _load_data(self, other: Checkpoint | None, init: str | None) -> None:
        """The latents of both splits, in the units of the weights that are taken over, and the base."""
        config, root = self.config, Path(self.config.data.data_root)
        meta = find_store(root, config)
        self.train, self.val = (load_split(root, meta, split) for split in ("train", "val"))
        self.spec = self.train.spec = self.val.spec = in_units_of(meta.latents, other, init)
        check_batch_size(self.drawn, config, self.stage, self.accelerator.num_processes)
        of_auto = other.base.strength if other else None  # its weights know one base
        self.base, self.choice = base_of(self.train, config.training, of_auto)

    def _make_model(self) -> tuple[MicroBatch, VelocityNetwork]:
        """How a process goes through its share of a batch, and the network as it is at the start of a run."""
        training, network = self.config.training, network_of(self.config, self.spec, self.stage)
        self.share = training.batch_size // self.accelerator.num_processes
        micro_batch = self._choose_micro_batch(network)
        torch.manual_seed(training.seed)
        layout = torch.channels_last if training.channels_last else torch.contiguous_format
        model = network(recompute=micro_batch.recompute)
        return micro_batch, model.to(self.device, memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks memory_format

    @property
    def finished(self) -> bool:
        return self.state.step >= self.total_steps

    @property
    def drawn(self) -> int:
        """What an epoch draws from: pictures, or the teacher's pairs."""
        return len(self.train) if self.stage == 1 else self.config.training.stage2_pairs

    def _choose_micro_batch(self, network: Callable[..., VelocityNetwork]) -> MicroBatch:
        """As the config says, or as the free memory allows; a CPU's is shared by all processes."""
        training = self.config.training
        needs = count_needs(network, self.spec, self.bf16, training.channels_last, self.device.type == "cpu")
        sharing = 1 if self.device.type == "cuda" else self.accelerator.num_processes
        free = free_bytes(self.device) / sharing
        refuse_too_large(network, free)
        return choose_micro_batch(training, self.share, USABLE * free, needs)

    def _resume(self, resume: str | None) -> None:
        """Go on where a checkpoint of this run stands, if there is one."""
        found = find_start(self.folder, resume, self.stage)
        if found is None:
            if resume:
                self.accelerator.print(f"{self.folder}: no checkpoint yet, starting from the beginning")
            return
        path, checkpoint = found
        self.run = identify(self.folder, path, checkpoint)
        lines = check_resume(checkpoint, path, self.config, self.spec, self.train.digest)
        for line in lines + check_length(checkpoint, path, self.config, self.steps_per_epoch):
            self.accelerator.print(line)
        # The statistics stay those of the start: the network's units must not move under it.
        known = checkpoint.latents
        self.spec = self.train.spec = self.val.spec = replace(self.spec, mean=known.mean, std=known.std)
        self.base, self.choice, self.teacher = checkpoint.base, "", checkpoint.teacher
        self.state.load_tree(vars(checkpoint), path)
        self.tally.restore(checkpoint.log)
        self.branches_from = None if resume == "newest" else path
        self.accelerator.print(f"resumed from {path} at step {self.state.step}")

    def _begin_from(self, other: Checkpoint, init: str) -> None:
        """Take the weights of another run: of stage 1, on new pictures or as the teacher of stage 2."""
        networks = self.state.model, self.state.ema.model
        if self.stage == 1:
            self.accelerator.print(take_over(networks, other, init, self.spec))
            self.state.ema.head_start = other.ema_head_start + other.step
        else:
            self.accelerator.print(begin_map(networks, other, init, self.spec))
            self.base, self.teacher = other.base, other.ema

    def _make_samples(self) -> Samples:
        training, splits = self.config.training, (self.train, self.val)
        if self.stage == 1:
            return flow_samples(*splits, self.base, training, null_style=len(self.spec.styles))
        path = self.folder / FILE
        return taught_samples(self.config, *splits, path, self.teacher, self._make_teacher, self.accelerator)

    def _make_teacher(self) -> Pipeline:
        network = build_model(self.config, self.spec)
        load_weights(network, self.teacher, "the teacher")
        network = network.eval().requires_grad_(False)
        return self._make_pipeline(network.to(self.device, memory_format=torch.channels_last))  # type: ignore[call-overload]  # torch's stub lacks memory_format

    def _make_pipeline(self, network: VelocityNetwork) -> Pipeline:
        codec = load_codec(self.spec, self.device, self.config.data.data_root)
        return Pipeline(network, codec, self.spec, self.device, self.bf16, base=self.base)

    def _make_validation(self) -> Validation:
        training, averaged = self.config.training, self.state.ema.model
        assert isinstance(averaged, VelocityNetwork)

        def losses(batch: Batch) -> Tensor:
            return self.gradients.losses(averaged, batch.to(self.device, training.channels_last))

        def make_pipeline() -> Pipeline:
            pipeline = self._make_pipeline(averaged)
            if isinstance(averaged, FlowMap):  # no transfer by map asks for the flow
                pipeline.map, pipeline.scales = averaged, training.stage2_scales
            return pipeline

        splits, samples, steps = (self.train, self.val), self.samples, self.steps_per_epoch
        return Validation(*splits, training, self.inference, averaged, losses, samples, steps, make_pipeline)

    #############################################################################
    #                                 The loop                                  #
    #############################################################################

    def train_step(self) -> StepResult:
        """One optimiser step. What the guard refuses is not counted in the losses either."""
        training, following = self.config.training, self.state.step + 1
        sums = self.gradients.compute(self.state.step)
        if following < self.total_steps:
            self.gradients.draw_ahead(following)  # before the norm, which waits for the GPU
        result = self.state.take_step(training, self.total_steps)
        if result.taken:
            self.tally.add(sums, clipped=0 < training.grad_clip < result.norm)
        return result

    def fit(self, stop: Callable[[], int] = lambda: 0, quiet: bool | None = None) -> None:
        """Train to the last epoch, or until `stop()` is an exit status; saves on the way and when stopped."""
        main = self.accelerator.is_main_process
        if main:
            self._begin()
        logbook = Logbook(self.folder, self.state.step) if main else None
        known = logbook and (self.folder / BEST).exists()  # a branch that was left took its best along
        self.best_score = logbook.largest("val_score") if logbook and known else 0.0
        bar = tqdm(total=self.total_steps, initial=self.state.step, unit="step", disable=quiet if main else True)
        started, seen = time.perf_counter(), 0
        while not self.finished:
            self.stopped = self._agree(stop())
            if self.stopped:
                break
            result = self.train_step()
            seen += self.config.training.batch_size
            bar.update()
            if self.state.guard.has_given_up:
                raise UserError(self._diverged())
            if self.state.step % self.config.training.log_every_steps == 0:
                numbers = self._numbers(result, seen / (time.perf_counter() - started))
                bar.set_postfix(loss=f"{numbers.get('loss', math.nan):.4f}", refresh=False)
                if logbook:
                    logbook.write(self.state.step, numbers)
                started, seen = time.perf_counter(), 0
            if self.state.step % self.steps_per_epoch == 0:
                paused = time.perf_counter()
                self._end_epoch(self.state.step // self.steps_per_epoch, logbook)
                started += time.perf_counter() - paused
        bar.close()
        self.tally.gather()
        if main and not self.finished:
            self._save_interrupted()
        if logbook:
            logbook.close()

    def _begin(self) -> None:
        """Make the folder this run's. What it saved after a checkpoint that was asked for by name is another branch."""
        begin_run(self.folder, self.run, self.branches_from, self.state.step, self.steps_per_epoch)
        if self.branches_from is None:
            return
        if not self.finished and self.branches_from.resolve() != self.interrupted.resolve():
            self.save(self.interrupted)  # from here --resume goes on, until there is a newer one
        self.branches_from = None

    def _save_interrupted(self) -> None:
        """Also where the last steps were refused: it takes no other checkpoint's place, and remembers them."""
        if not self._is_finite():
            print(
                f"stopped at step {self.state.step}: the weights are not finite and were not saved; {self._last_good()}"
            )
            return
        self.save(self.interrupted)
        print(f"stopped at step {self.state.step}: saved {self.interrupted}; go on with --resume")

    def _is_finite(self) -> bool:
        return is_finite(self.state.model.state_dict(), self.state.ema.model.state_dict())

    def _is_sound(self) -> bool:
        """Whether an epoch may be saved: the last step was taken, and the weights are finite."""
        return not self.state.guard.in_a_row and self._is_finite()

    def _last_good(self) -> str:
        good = last_good(self.folder)
        return f"the last good checkpoint is {good}" if good else "there is no good checkpoint yet"

    def _diverged(self) -> str:
        return (
            f"the gradient was not finite, or leapt, in {self.state.guard.in_a_row} steps in a row up to "
            f"step {self.state.step}; {self._last_good()}: {LOWER_RATE}"
        )

    def _agree(self, status: int) -> int:
        """The largest of all processes' exit statuses: a signal may reach one of them a step before the others."""
        if self.accelerator.num_processes == 1:
            return status
        return int(self.accelerator.gather(torch.tensor([status], device=self.device)).max().item())

    def _numbers(self, result: StepResult, samples_per_s: float) -> dict[str, float]:
        """What is logged of the last step, and of those since the last call."""
        losses, clipped = self.tally.take()
        epoch, skipped = self.state.step / self.steps_per_epoch, self.state.guard.skipped
        numbers = losses | {"epoch": epoch, "lr": result.rate, "samples_per_s": samples_per_s}
        numbers |= {"memory_gb": peak_memory_gb(self.device), "skipped_steps": skipped}
        numbers["clipped"] = clipped / self.config.training.log_every_steps
        return numbers | ({"grad_norm": result.norm} if math.isfinite(result.norm) else {})

    def _end_epoch(self, epoch: int, logbook: Logbook | None) -> None:
        training = self.config.training
        self.tally.gather()
        if logbook and len(self.val) and (epoch % training.val_every_epochs == 0 or self.finished):
            numbers = self.validation.validate(self.gradients.micro_batch.pictures, epoch, self.finished)
            logbook.write(self.state.step, numbers)
            if self.finished:
                self._choose_scale()
            if self._is_sound() and numbers.get("val_score", 0) > self.best_score:
                self.best_score = numbers["val_score"]
                self.save(self.folder / BEST)
        if logbook and (epoch % training.save_every_epochs == 0 or self.finished):
            self._save_epoch(epoch)
            self.validation.save_preview(self.folder / f"preview_epoch{epoch}.png", epoch, self.finished)
        if self.finished and not self._is_sound():
            self.stopped = 1
        self.accelerator.wait_for_everyone()

    def _choose_scale(self) -> None:
        """At the end, where "auto" asks for it, and of every map, whose style at a scale is not its teacher's."""
        if self.inference.cfg_scale == "auto" or (self.stage == 2 and can_be_transferred(self.val)):
            self.validation.measure_front()
            if self.validation.front:
                self.inference = replace(self.inference, cfg_scale="auto")

    def _save_epoch(self, epoch: int) -> None:
        """Save, and delete the oldest. What may be broken is not saved, and nothing makes room for it."""
        if not self._is_sound():
            refused = self.state.guard.in_a_row
            why = f"the last {refused} steps were refused" if refused else "the weights are not finite"
            advice = f": {LOWER_RATE}" if self.finished else ""
            print(f"warning: epoch {epoch} is not saved: {why}; {self._last_good()}{advice}")
            return
        self.save(self.folder / f"stage{self.stage}_epoch{epoch}.pt")
        self.interrupted.unlink(missing_ok=True)
        kept = self.config.training.keep_checkpoints
        for old in epoch_checkpoints(self.folder, self.stage)[:-kept]:  # [:-0] is none
            old.unlink()

    def save(self, path: Path) -> None:
        """The whole state, in one file; where there is no room for it, nothing is lost but the steps since the last."""
        checkpoint = Checkpoint(
            config=replace(self.config, inference=self.inference),
            teacher=self.teacher,
            latents=self.spec,
            base=self.base,
            store=self.train.digest,
            epoch=self.state.step // self.steps_per_epoch,
            run=self.run,
            log=self.tally.kept,
            front=self.validation.front,
            **self.state.to_tree(),
        )
        try:
            checkpoint.save(path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(
                f"{path}: could not be written ({reason}); {self._last_good()}: make room and go on with --resume"
            ) from None

    def describe(self) -> str:
        """The line at the start of a run, and what it chose for itself."""
        return (
            f"{count_parameters(self.state.model) / 1e6:.2f} M parameters, {len(self.train)} pictures in "
            f"{len(self.spec.styles)} styles ({', '.join(self.spec.styles)}), {len(self.val)} held out, "
            f"{self.total_steps} steps on {self.device} in {'BF16' if self.bf16 else 'float32'}"
            f"{describe_reduction(self.config.training, self.gradients.micro_batch, self.share)}"
            + (f"\n{self.choice}" if self.choice else "")
        )


def train(
    config: Config,
    resume: str | None = None,
    init: str | None = None,
    autoencoder: str | None = None,
    quiet: bool | None = None,
    stage: int = 1,
) -> Trainer:
    """Run (or go on with) the training that `config` describes, see `Trainer`; Ctrl-C and SIGTERM save first."""
    # DDP warns of the memory layout of depthwise weights (stride of a dimension of 1), which costs it nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    folder, data = folder_of(config, stage), config.data
    for root, key in ((data.raw_data_root, "data.raw_data_root"), (data.data_root, "data.data_root")):
        refuse_inside(str(folder), "checkpoint.save_dir", root, key)
    with distributed.folder_lock(folder), distributed.peers_needed():
        trainer = Trainer(config, resume, init, autoencoder, stage)
        trainer.accelerator.print(trainer.describe())
        with stop_signals() as stop:  # before, there is nothing to save, and the teacher's pairs take a while
            trainer.fit(stop, quiet)
    return trainer
