"""What a run may start from: its own checkpoint, exactly, or the weights of another run."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from isonext.checkpoint import Checkpoint, load_checkpoint, load_weights, newest_checkpoint
from isonext.config import Config, config_to_dict
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.training.folder import holds_checkpoints
from isonext.training.optim import learning_rate

COUNTED = ("latent_channels", "num_styles")  # null and the number that was counted mean the same
FIXED = {  # the rest of the training section may change on the way; the whole model section may not
    "batch_size": "epochs would not line up",
    "anchor_strength": "the network knows one base",
    "anchor_cells": "the network knows one base",
}
FIXED_IN_STAGE_2 = FIXED | {
    "stage2_pairs": "epochs would not line up",
    "stage2_scales": "its pairs are of those scales",
}

NEW_IN_STAGE_2 = "source.weight", "guidance.weight"


def find_init(init: str | None, resume: str | None, stage: int) -> Checkpoint | None:
    """The checkpoint whose weights a new run takes; UserError where it cannot be one, or where stage 2 has none."""
    if init is None:
        if stage == 2 and resume is None:
            raise UserError(
                "--stage 2 begins with a trained stage 1: give --init checkpoints/stage1_epoch200.pt, "
                "or go on with --resume"
            )
        return None
    other = load_checkpoint(init)
    if other.stage != 1:
        raise UserError(f"{init}: is of stage 2, and --init takes the weights of stage 1")
    return other


def find_start(folder: Path, resume: str | None, stage: int = 1) -> tuple[Path, Checkpoint] | None:
    """The checkpoint that `resume` names, or the folder's "newest"; None where the run starts from the beginning.

    UserError where a new run would write over the checkpoints of another.
    """
    if resume == "newest":
        newest = newest_checkpoint(folder, stage)
        if stage == 2 and newest is None:
            raise UserError(f"{folder}: no checkpoint of stage 2 yet; start with --stage 2 --init CHECKPOINT")
        return newest
    if resume is not None:
        found = load_checkpoint(resume)
        if not found.can_resume:
            raise UserError(f"{resume}: an exported model has no training state; start anew with --init {resume}")
        if found.stage != stage:
            raise UserError(f"{resume}: is of stage {found.stage}, this run of stage {stage}; see --stage and --init")
        return Path(resume), found
    if holds_checkpoints(folder):
        raise UserError(
            f"{folder}: holds the checkpoints of a run; go on with --resume, "
            "or start another with --set checkpoint.save_dir=FOLDER"
        )
    return None


def check_resume(checkpoint: Checkpoint, path: Path, config: Config, spec: LatentSpec, store: str) -> list[str]:
    """A line for each config key that changes with this resume; a UserError that names what may not change.

    `store` is the digest of the training pictures, see `LatentSplit.digest`.
    """
    known = checkpoint.latents
    if not spec.has_autoencoder_of(known):
        there, here = known.autoencoder_beside(spec), spec.autoencoder_beside(known)
        raise UserError(f"{path}: was trained on latents of autoencoder {there}, the store has {here}")
    for name in ("image_size", "styles"):
        was, now = getattr(known, name), getattr(spec, name)
        if was != now:
            raise UserError(f"{path}: was trained on latents of {name} {was}, the store has {now}")
    if checkpoint.store not in ("", store):
        raise UserError(
            f"{path}: was trained on other pictures than {config.data.data_root} holds now; put those back, or go on "
            f"from its weights with --init {path} --set checkpoint.save_dir=FOLDER"
        )
    was, now, changes = config_to_dict(checkpoint.config), config_to_dict(config), []
    fixed = FIXED if checkpoint.stage == 1 else FIXED_IN_STAGE_2
    for section, values in now.items():
        for key, value in values.items():
            old = was[section][key]
            if value == old or key in COUNTED or section in ("data", "inference"):
                continue
            if key == "anchor_strength" and (value == "auto" or value == checkpoint.base.strength):
                continue  # auto takes what the run has
            name = f"{section}.{key}"
            if section == "model" or (section == "training" and key in fixed):
                why = fixed.get(key, "its weights are of that shape")
                raise UserError(f"{path}: was trained with {name} {old}, not {value}: {why}")
            changes.append(f"{name} is now {value}, was {old}")
    return changes


def check_length(checkpoint: Checkpoint, path: Path, config: Config, steps_per_epoch: int) -> list[str]:
    """A line where another number of epochs makes the learning rate jump; UserError where fewer than done are asked.

    The schedule is a function of the whole run's length, so that a longer one stretches its cosine.
    """
    training, key = config.training, f"stage{checkpoint.stage}_epochs"
    epochs, asked = getattr(checkpoint.config.training, key), getattr(training, key)
    if checkpoint.step > asked * steps_per_epoch:
        raise UserError(
            f"{path}: has done {checkpoint.step / steps_per_epoch:.4g} epochs, more than training.{key} = "
            f"{asked}; raise that, or resume an earlier checkpoint"
        )
    was, now = (
        learning_rate(training, max(0, checkpoint.step - 1), count * steps_per_epoch) for count in (epochs, asked)
    )
    if math.isclose(was, now, rel_tol=0.1):
        return []
    return [
        f"warning: the learning rate goes on at {now:.2g} and not at {was:.2g}: {asked} epochs "
        f"instead of {epochs} stretch its cosine; to hold it, --set training.lr_schedule=constant and a learning rate"
    ]


def in_units_of(spec: LatentSpec, other: Checkpoint | None, path: str | Path | None) -> LatentSpec:
    """The store's spec with the statistics of another run, in whose units its network counts."""
    if other is None:
        return spec
    if not spec.has_autoencoder_of(other.latents):
        theirs, own = other.latents.autoencoder_beside(spec), spec.autoencoder_beside(other.latents)
        raise UserError(f"{path}: is of latents of autoencoder {theirs}, the store has {own}")
    if other.latents.channels != spec.channels:
        raise UserError(f"{path}: is of latents of channels {other.latents.channels}, the store has {spec.channels}")
    return replace(spec, mean=other.latents.mean, std=other.latents.std)


def take_over(
    networks: tuple[nn.Module, nn.Module],  # the model and its average, freshly made for `spec`
    checkpoint: Checkpoint,
    path: str | Path,
    spec: LatentSpec,
) -> str:
    """Weights of another run; embeddings go by the styles' names, and those of new styles stay as they were made.

    Returns a line that says what was kept.
    """
    old = checkpoint.latents
    shared = [style for style in spec.styles if style in old.styles]
    rows = torch.tensor([spec.styles.index(style) for style in shared] + [len(spec.styles)])  # the null style is last
    from_rows = torch.tensor([old.styles.index(style) for style in shared] + [len(old.styles)])
    for network, weights in zip(networks, (checkpoint.model, checkpoint.ema), strict=True):
        own, theirs = (
            network.state_dict().get("style.weight"),
            weights.get("style.weight"),
        )  # a DiT of one style has none
        weights = {name: weight for name, weight in weights.items() if name != "style.weight"}
        if own is not None:
            weights["style.weight"] = own.detach().clone()
        if own is not None and theirs is not None:
            if theirs.shape[1] != own.shape[1]:
                raise UserError(f"{path}: has embeddings of {theirs.shape[1]} numbers, the config of {own.shape[1]}")
            weights["style.weight"][rows] = theirs[from_rows].to(own)
        load_weights(network, weights, path)
    new = [style for style in spec.styles if style not in shared]
    return (
        f"weights from {path} at step {checkpoint.step}; styles kept: {', '.join(shared) or 'none'}; "
        f"new: {', '.join(new) or 'none'}"
    )


def begin_map(
    networks: tuple[nn.Module, nn.Module],  # stage 2's network and its average
    checkpoint: Checkpoint,  # of stage 1
    path: str | Path,
    spec: LatentSpec,
) -> str:
    """Stage 1's averaged weights in both; what stage 2 has beside them stays zero. Returns a line that says so."""
    if checkpoint.latents.styles != spec.styles:
        theirs, own = (", ".join(styles) for styles in (checkpoint.latents.styles, spec.styles))
        raise UserError(f"{path}: its styles are {theirs}, those of the store {own}; stage 2 takes those of stage 1")
    for network in networks:
        new = {name: tensor for name, tensor in network.state_dict().items() if name in NEW_IN_STAGE_2}
        load_weights(network, checkpoint.ema | new, path)
    return f"stage 2 of {path} at step {checkpoint.step}"
