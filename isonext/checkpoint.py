"""Checkpoints: atomic save, checked load, the network in one, the newest one to resume from."""

import contextlib
import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isonext import __version__
from isonext.config import ONLY_OF, Config, config_from_dict, config_to_dict, load_config
from isonext.data.model_folder import BASE as BASE_TENSORS
from isonext.data.model_folder import CONFIG, NETWORK, TEACHER, WEIGHTS, read_header, read_model, write_model
from isonext.data.store import LatentSpec, shown, spec_of
from isonext.errors import UserError, brief, first_line
from isonext.flow.base import Base
from isonext.models.dit import DiT
from isonext.models.flow_map import FlowMap
from isonext.utils.io import file_sha256, load_data, written_whole
from isonext.utils.schema import (
    Check,
    Mismatch,
    dense,
    listed,
    made_of,
    mapped,
    not_negative,
    number,
    record,
    text,
    whole,
)
from model import IsoNext, VelocityNetwork

FORMAT = 2  # 1 was without base (white noise), store and guard
BEST = "best.pt"  # of all validations, by the score of training/validation.py
INTERRUPTED = "stage1_interrupted.pt"  # what Ctrl-C and SIGTERM leave, in the middle of an epoch; see `interrupted`
MOST_TOKENS = 2**16  # of a transformer: more than it could attend to


def _or_nothing(check: Check) -> Check:
    """An empty dict too, where the run had nothing to say yet, or its version did not."""
    return lambda value, where: {} if isinstance(value, dict) and not value else check(value, where)


def _moments(value: Any, where: str) -> dict:
    """AdamW's of one parameter; which there must be, training/state.py knows."""
    found = mapped(dense())(value, where)
    for name in found.keys() & {"step", "exp_avg_sq"}:  # roots are taken of both
        not_negative()(found[name], f"{where}.{name}")
    return found


ENTRIES = {  # of a checkpoint, beside config, latents and base, which depend on each other
    "store": text(),
    "guard": _or_nothing(record(norms=listed(number(0, 1e38)), skipped=whole(), in_a_row=whole())),
    "step": whole(),
    "epoch": whole(),
    "model": mapped(dense()),
    "ema": mapped(dense()),
    "optimizer": record(
        state=mapped(_moments, key=whole()),
        param_groups=listed(record(params=listed(whole()), lr=number(0, 1e4))),
    ),
    "ema_head_start": whole(),
    "run": text(),
    "log": _or_nothing(record(sums=not_negative((2, 4)), clipped=whole())),
    "front": _or_nothing(
        record(
            scale=number(0, 100),
            ceiling=number(0, 1),
            pictures=whole(),
            points=listed(record(cfg_scale=number(0, 100), style_success=number(0, 1), ssim=number())),
        )
    ),
    "version": text(),
    "teacher": mapped(dense()),
}
# What format 2 began without.
LATER = {"version": "", "ema_head_start": 0, "run": "", "log": {}, "front": {}, "teacher": {}}
BASE = {"strength": number(0, 1), "cells": whole(1, 64)} | dict.fromkeys(("mean", "deviation", "layouts"), dense())
# From which a base once drew its layouts: now `Base.can_sample` says no.
GONE = ("power", "layout_mean", "layout_factors", "layout_rest")


@dataclass
class Checkpoint:
    """All that a run is: enough to transfer pictures with nothing else at hand, and to go on training exactly."""

    config: Config
    latents: LatentSpec
    base: Base  # of the flow: where it starts
    store: str  # digest of the training pictures' names
    guard: dict  # what training/optim.py remembers of the gradients
    step: int  # optimiser steps done
    epoch: int  # whole epochs done
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict
    ema_head_start: int = 0  # optimiser steps that the average had seen before this run
    run: str = ""  # an id, see training/folder.py; "" where there was none yet
    log: dict = dataclasses.field(default_factory=dict)  # what the next line of the log has of the steps before
    front: dict = dataclasses.field(default_factory=dict)  # measured at the end, see `Validation.measure_front`
    version: str = __version__  # of the program that wrote it; "" where that did not say yet
    teacher: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # stage 1's averaged weights; {} in stage 1

    @property
    def stage(self) -> int:
        """1: of the flow; 2: of the map of few steps, which a flow taught."""
        return 2 if self.teacher else 1

    @property
    def flow(self) -> dict[str, Tensor]:
        """The averaged weights of the flow."""
        return self.teacher or self.ema

    @property
    def can_resume(self) -> bool:
        """Whether a training can go on from it; an exported one has nothing but the averaged weights."""
        return bool(self.optimizer["param_groups"])

    def save(self, path: Path) -> None:
        tree = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        tree |= {"format": FORMAT, "config": config_to_dict(self.config)}
        tree |= {name: dataclasses.asdict(getattr(self, name)) for name in ("latents", "base")}
        with written_whole(path) as beside:
            torch.save(tree, beside)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a checkpoint, or a folder of export.py; anything else is refused in one line."""
    tree = _tree_of_folder(Path(path)) if Path(path).is_dir() else load_data(path, "checkpoint")
    names = {entry.name for entry in dataclasses.fields(Checkpoint)} | {"format"}
    if not isinstance(tree, dict) or type(tree.get("format")) is not int:
        raise UserError(f"{path}: not a checkpoint of train.py")
    if tree["format"] == 1:
        tree |= {"format": FORMAT, "base": {}, "store": "", "guard": {}}
        with contextlib.suppress(KeyError, AttributeError, TypeError):  # else it is none, as is said below
            tree["config"].setdefault("training", {})["anchor_strength"] = 0.0
    if tree["format"] != FORMAT:
        raise UserError(f"{path}: checkpoint format {brief(tree['format'])}, this program reads {FORMAT}")
    for name, absent in LATER.items():
        tree.setdefault(name, absent)
    if tree.keys() != names:
        odd = ", ".join(sorted(str(name)[:40] for name in tree.keys() ^ names)[:8])
        raise UserError(f"{path}: checkpoint entries missing or unknown: {odd}")
    tree.pop("format")
    tree["config"] = config_from_dict(tree["config"], where=str(path))
    try:
        tree["latents"] = spec_of(tree["latents"])
        tree["base"] = _base_of(tree["base"], tree["latents"])
        checkpoint = made_of(Checkpoint, ENTRIES, tree, "checkpoint")
    except Mismatch as error:
        raise UserError(f"{path}: damaged ({error})") from None
    _check_sizes(checkpoint, path)
    return checkpoint


def _tree_of_folder(folder: Path) -> dict:
    """That of the checkpoint it came from, as far as it went along: weights that are the average, and no training."""
    header, tensors = read_model(folder)
    tree, config = header["entries"], config_to_dict(load_config(folder / CONFIG))
    network, base, teacher = (
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in (NETWORK, BASE_TENSORS, TEACHER)
    )
    if len(network) + len(base) + len(teacher) != len(tensors) or not isinstance(tree.get("base"), dict):
        raise UserError(f"{folder / WEIGHTS}: damaged (it has no base, or tensors of neither network nor base)")
    tree |= {"base": tree["base"] | base, "config": config, "model": network, "ema": network, "teacher": teacher}
    return tree | {"format": FORMAT, "store": "", "guard": {}, "optimizer": {"state": {}, "param_groups": []}}


def export_checkpoint(checkpoint: Checkpoint, path: str | Path, folder: Path, config: dict[str, Any]) -> None:
    """To a folder that `load_checkpoint` reads: what transfers need of the checkpoint at `path`, and this config."""
    latents, base = dataclasses.asdict(checkpoint.latents), dataclasses.asdict(checkpoint.base)
    latents["autoencoder"] = config["autoencoder"]["name"]
    tensors = {f"{NETWORK}{name}": tensor for name, tensor in checkpoint.ema.items()}
    tensors |= {f"{TEACHER}{name}": tensor for name, tensor in checkpoint.teacher.items()}
    tensors |= {f"{BASE_TENSORS}{name}": base.pop(name) for name in ("mean", "deviation", "layouts")}
    entries = {name: getattr(checkpoint, name) for name in ("step", "epoch", "ema_head_start", "front", "version")}
    header = {"checkpoint": checkpoint_digest(path), "entries": entries | {"latents": latents, "base": base}}
    write_model(folder, tensors, header, config)


def checkpoint_digest(path: str | Path) -> str:
    """SHA-256 of a checkpoint's file; of an exported folder, that of the checkpoint it came from, whose bits it has."""
    return read_header(Path(path))["checkpoint"] if Path(path).is_dir() else file_sha256(path)


def _base_of(tree: Any, spec: LatentSpec) -> Base:
    """The base of a checkpoint's tree, of the shapes that the latents give it; Mismatch where it cannot be one."""
    if isinstance(tree, dict):
        tree = {name: value for name, value in tree.items() if name not in GONE}
    base = made_of(Base, BASE, tree, "base")
    if not base.strength:
        return Base()
    squares: tuple[int, ...] = tuple(side // base.cells for side in spec.space)
    per_style: tuple[int, ...] = (len(spec.styles), spec.channels)
    expected = {"mean": per_style, "deviation": per_style}
    if base.layouts.numel():
        count = base.layouts.shape[1] if base.layouts.ndim > 1 else 1
        expected["layouts"] = (per_style[0], count, per_style[1], *squares)
    for name, shape in expected.items():
        if getattr(base, name).shape != shape:
            raise Mismatch(f"base.{name}", tuple(getattr(base, name).shape), f"of shape {shape}")
    if not all(squares) or (base.deviation <= 0).any():
        raise Mismatch("base", base.cells, "of squares inside the latents, and of deviations above 0")
    return base


def _check_sizes(checkpoint: Checkpoint, path: str | Path) -> None:
    """UserError where the weights are not those of the config's network, before memory is had for one of its size."""
    config = checkpoint.config
    blocks = {name.split(".")[1] for name in checkpoint.ema if name.startswith("blocks.")}
    if len(blocks) != config.model.num_layers:
        counts = f"model.num_layers = {config.model.num_layers}, but the weights are of {len(blocks)}"
        raise UserError(f"{path}: damaged ({counts})")
    try:
        with torch.device("meta"):
            own, teachers = (
                network_of(config, checkpoint.latents, stage)().state_dict() for stage in (checkpoint.stage, 1)
            )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except RuntimeError as error:  # sizes whose product nobody can count
        raise UserError(f"{path}: damaged (its config is of no network: {first_line(error)})") from None
    for weights in (checkpoint.ema, checkpoint.model):
        refuse_other_weights(own, weights, path)
    refuse_other_weights(teachers, checkpoint.flow, path)


def network_of(config: Config, spec: LatentSpec, stage: int = 1) -> Callable[..., VelocityNetwork]:
    """What makes a config's network of a stage, of `recompute`; counts come from the store, and one that disagrees is
    an error."""
    others = [name for kind, names in ONLY_OF.items() if kind != config.model.type for name in names]
    options = {name: value for name, value in dataclasses.asdict(config.model).items() if name not in others}
    counted = {"latent_channels": spec.channels, "num_styles": len(spec.styles)}
    for name, count in counted.items():
        if options[name] not in (None, count):
            raise UserError(f"model.{name} = {options[name]}, but the latents have {count}; leave the key out")
    if config.data.num_classes not in (None, len(spec.styles)):
        raise UserError(f"data.num_classes = {config.data.num_classes}, but the latents have {len(spec.styles)} styles")
    if options.pop("type") == "isonext":
        return functools.partial(IsoNext if stage == 1 else FlowMap, **options | counted)
    if stage == 2:
        raise UserError("stage 2 is for model.type isonext; a dit has no map of few steps")
    patch = config.model.patch_size
    if any(side % patch for side in spec.space):
        raise UserError(f"model.patch_size = {patch} must divide the latents' {shown(spec.space)} cells")
    tokens = math.prod(side // patch for side in spec.space)
    if tokens > MOST_TOKENS:
        raise UserError(
            f"model.patch_size = {patch} makes {tokens} tokens of a latent; at most {MOST_TOKENS} are allowed"
        )
    return functools.partial(DiT, size=spec.space, **options | counted)


def build_model(config: Config, spec: LatentSpec) -> VelocityNetwork:
    """The network of a config and a store; what its blocks compute again backwards is the trainer's affair."""
    return network_of(config, spec)()


def load_model(checkpoint: Checkpoint, path: str | Path, device: torch.device) -> VelocityNetwork:
    """The averaged network of the flow, ready for transfers; of stage 2, that of its teacher."""
    model = build_model(checkpoint.config, checkpoint.latents)
    load_weights(model, checkpoint.flow, path)
    return model.to(device).eval().requires_grad_(False)


def load_map(checkpoint: Checkpoint, path: str | Path, device: torch.device) -> FlowMap | None:
    """The averaged network of stage 2, ready for transfers; None where the checkpoint is of stage 1."""
    if checkpoint.stage == 1:
        return None
    model = network_of(checkpoint.config, checkpoint.latents, 2)()
    load_weights(model, checkpoint.ema, path)
    assert isinstance(model, FlowMap)
    return model.to(device).eval().requires_grad_(False)


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Copy weights in; a missing, extra or misshapen one is an error that names it."""
    refuse_other_weights(model.state_dict(), weights, path)
    model.load_state_dict(weights)


def refuse_other_weights(own: dict[str, Tensor], weights: dict[str, Tensor], path: str | Path) -> None:
    """UserError where the weights are not those of a network that has `own`."""
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += [name for name in sorted(own.keys() & weights.keys()) if own[name].shape != weights[name].shape]
    if wrong:
        shown = ", ".join(name[:80] for name in wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(f"{path}: {len(wrong)} weights missing, extra or of another shape: {shown}")


def interrupted(stage: int) -> str:
    """The name of `INTERRUPTED` in a stage."""
    return INTERRUPTED.replace("1", str(stage))


def epoch_checkpoints(folder: Path, stage: int = 1) -> list[Path]:
    """stage1_epoch{N}.pt by rising N, or those of stage 2."""
    names = re.compile(rf"stage{stage}_epoch\d+\.pt")
    return sorted((path for path in folder.glob("*.pt") if names.fullmatch(path.name)), key=epoch_of)


def epoch_of(path: Path) -> int:
    """N of a stage1_epoch{N}.pt, or of a stage2_epoch{N}.pt."""
    return int(path.stem.partition("_epoch")[2])


def newest_checkpoint(folder: Path, stage: int = 1) -> tuple[Path, Checkpoint] | None:
    """The checkpoint with the most steps; None where there is none. Damaged ones are passed over, unless all are."""
    best, left = None, folder / interrupted(stage)
    paths = [path for path in (left, *reversed(epoch_checkpoints(folder, stage))) if path.exists()]
    for path in paths:
        try:
            found = load_checkpoint(path)
        except UserError as error:
            print(f"warning: passed over {error}", file=sys.stderr)
            continue
        if best is None or found.step > best[1].step:
            best = (path, found)
        if path != left:  # older ones have fewer steps
            break
    if paths and best is None:
        raise UserError(f"{folder}: none of its {len(paths)} checkpoints can be read; use another checkpoint.save_dir")
    return best
