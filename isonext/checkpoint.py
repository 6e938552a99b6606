"""Checkpoints: atomic save, checked load, the network in one, the newest one to resume from."""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from isonext import __version__
from isonext.config import ONLY_OF, Config, config_from_dict, config_to_dict
from isonext.data.store import LatentSpec, shown
from isonext.errors import UserError
from isonext.flow.base import Base
from isonext.models.dit import DiT
from isonext.utils.io import load_data, written_whole
from model import IsoNext, VelocityNetwork

FORMAT = 2  # 1 was without base (white noise), store and guard
BEST = "best.pt"  # of all validations, by the score of training/validation.py
INTERRUPTED = "stage1_interrupted.pt"  # what Ctrl-C and SIGTERM leave, in the middle of an epoch


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
    front: dict = dataclasses.field(default_factory=dict)  # measured at the end, see `Validation.measure_front`
    version: str = __version__  # of the program that wrote it; "" where that did not say yet

    def save(self, path: Path) -> None:
        tree = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        tree |= {"format": FORMAT, "config": config_to_dict(self.config)}
        tree |= {name: dataclasses.asdict(getattr(self, name)) for name in ("latents", "base")}
        with written_whole(path) as beside:
            torch.save(tree, beside)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check; anything that is not a checkpoint of this program is refused in one line."""
    tree = load_data(path, "checkpoint")
    names = {entry.name for entry in dataclasses.fields(Checkpoint)} | {"format"}
    if not isinstance(tree, dict) or "format" not in tree:
        raise UserError(f"{path}: not a checkpoint of train.py")
    if tree["format"] == 1:
        tree |= {"format": FORMAT, "base": {}, "store": "", "guard": {}}
        tree["config"].setdefault("training", {})["anchor_strength"] = 0.0
    if tree["format"] != FORMAT:
        raise UserError(f"{path}: checkpoint format {tree['format']}, this program reads {FORMAT}")
    for name, absent in (("version", ""), ("ema_head_start", 0), ("front", {})):  # format 2 came before them
        tree.setdefault(name, absent)
    if tree.keys() != names:
        raise UserError(f"{path}: checkpoint entries missing or unknown: {', '.join(sorted(tree.keys() ^ names))}")
    tree.pop("format")
    tree["config"] = config_from_dict(tree["config"], where=str(path))
    try:
        tree["base"].pop("power", None)  # from which a base once drew its layouts: now `Base.can_sample` says no
        tree["latents"], tree["base"] = LatentSpec(**tree["latents"]), Base(**tree["base"])
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    return Checkpoint(**tree)


def network_of(config: Config, spec: LatentSpec) -> Callable[..., VelocityNetwork]:
    """What makes a config's network, of `recompute`; counts come from the store, and one that disagrees is an error."""
    others = [name for kind, names in ONLY_OF.items() if kind != config.model.type for name in names]
    options = {name: value for name, value in dataclasses.asdict(config.model).items() if name not in others}
    counted = {"latent_channels": spec.channels, "num_styles": len(spec.styles)}
    for name, count in counted.items():
        if options[name] not in (None, count):
            raise UserError(f"model.{name} = {options[name]}, but the latents have {count}; leave the key out")
    if config.data.num_classes not in (None, len(spec.styles)):
        raise UserError(f"data.num_classes = {config.data.num_classes}, but the latents have {len(spec.styles)} styles")
    if options.pop("type") == "isonext":
        return functools.partial(IsoNext, **options | counted)
    patch = config.model.patch_size
    if any(side % patch for side in spec.space):
        raise UserError(f"model.patch_size = {patch} must divide the latents' {shown(spec.space)} cells")
    return functools.partial(DiT, size=spec.space, **options | counted)


def build_model(config: Config, spec: LatentSpec) -> VelocityNetwork:
    """The network of a config and a store; what its blocks compute again backwards is the trainer's affair."""
    return network_of(config, spec)()


def load_model(checkpoint: Checkpoint, path: str | Path, device: torch.device) -> VelocityNetwork:
    """The averaged network of a checkpoint, ready for transfers."""
    model = build_model(checkpoint.config, checkpoint.latents)
    load_weights(model, checkpoint.ema, path)
    return model.to(device).eval().requires_grad_(False)


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Copy weights in; a missing, extra or misshapen one is an error that names it."""
    own = model.state_dict()
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += [name for name in sorted(own.keys() & weights.keys()) if own[name].shape != weights[name].shape]
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(f"{path}: {len(wrong)} weights missing, extra or of another shape: {shown}")
    model.load_state_dict(weights)


def epoch_checkpoints(folder: Path) -> list[Path]:
    """stage1_epoch{N}.pt by rising N."""
    numbered = {path: re.fullmatch(r"stage1_epoch(\d+)\.pt", path.name) for path in folder.glob("stage1_epoch*.pt")}
    epochs = {path: int(match[1]) for path, match in numbered.items() if match}
    return sorted(epochs, key=lambda path: epochs[path])


def newest_checkpoint(folder: Path) -> tuple[Path, Checkpoint] | None:
    """The checkpoint with the most steps; None where there is none. Damaged ones are passed over, unless all are."""
    best = None
    paths = [path for path in (folder / INTERRUPTED, *reversed(epoch_checkpoints(folder))) if path.exists()]
    for path in paths:
        try:
            found = load_checkpoint(path)
        except UserError as error:
            print(f"warning: passed over {error}", file=sys.stderr)
            continue
        if best is None or found.step > best[1].step:
            best = (path, found)
        if path.name != INTERRUPTED:  # older ones have fewer steps
            break
    if paths and best is None:
        raise UserError(f"{folder}: none of its {len(paths)} checkpoints can be read; use another checkpoint.save_dir")
    return best
