"""The latent store on disk: one `.pt` a picture, or shards of many, and one `meta.json`; and batches from it.

    data_root/meta.json                 what the latents are, which pictures are held out, their statistics
    data_root/<style>/<name.jpg>.pt     {"latent": (C, h, w), "flipped": (C, h, w), "source": [bytes, mtime_ns]}
    data_root/latents-00000.safetensors, ...    instead of those, see shards.py

In meta.json a picture's entry is called `<style>/<name.jpg>.pt` either way. Files hold the autoencoder's raw latents;
the network sees them standardised per channel with the mean and deviation of the training split, which travel with
the checkpoint as part of its `LatentSpec`.
"""

import dataclasses
import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

import processes
from base import Base, fit_base
from cli import UserError
from config import TrainingConfig
from files import load_data, remove_unfinished, written_whole
from flow import drop_labels, pair_noise, sample_time
from shards import OURS, Rows, read_alike, shard_paths

FORMAT = 1


@dataclass
class LatentSpec:
    """What a model's latents are: the autoencoder they come from, their scale, and the meaning of each style id."""

    autoencoder: str
    channels: int
    factor: int  # pixels a latent cell
    image_size: int  # side of the training squares, pixels
    styles: list[str]  # in id order
    mean: list[float] = field(default_factory=list)  # per channel, of the training split
    std: list[float] = field(default_factory=list)

    @property
    def space(self) -> tuple[int, ...]:
        """The sides of a latent, in cells."""
        return (self.image_size // self.factor,) * 2

    def standardise(self, latents: Tensor) -> Tensor:
        """Raw (B, C, *space) -> mean 0, deviation 1 per channel."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def restore(self, latents: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        ones = [1] * (like.ndim - 2)
        return tuple(torch.tensor(values, device=like.device).view(-1, *ones) for values in (self.mean, self.std))

    def style_id(self, style: str) -> int:
        """The id of a style given by name, or by id as text."""
        if style in self.styles:
            return self.styles.index(style)
        if style.isdecimal() and int(style) < len(self.styles):
            return int(style)
        known = ", ".join(f"{number} = {name}" for number, name in enumerate(self.styles))
        raise UserError(f"style {style!r} does not exist; there are: {known}")


def shown(sides: Iterable[int]) -> str:
    """Sides for people: 64 x 48."""
    return " x ".join(map(str, sides))


@dataclass
class StoreMeta:
    """The contents of meta.json. `complete` is false while preprocessing is under way."""

    latents: LatentSpec
    flip: bool
    split: dict[str, list[str]] = field(default_factory=lambda: {"train": [], "val": []})  # "<style>/<name>.pt"
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # pictures by style and split
    complete: bool = False
    format: int = FORMAT
    layout: str = "pt"  # of the files: pt, safetensors, or foreign, for those of another program (foreign.py)

    def write(self, root: Path) -> None:
        with written_whole(root / "meta.json") as beside:
            beside.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")


def read_meta(root: Path) -> StoreMeta | None:
    """meta.json, or None where there is none; a damaged or foreign one is an error."""
    path = root / "meta.json"
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise UserError(f"{path}: store format {tree['format']}, this program reads {FORMAT}; preprocess anew")
        return StoreMeta(LatentSpec(**tree.pop("latents")), **tree)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it and run preprocess_latents.py again") from None


def open_store(root: Path) -> StoreMeta:
    """The meta of a finished store of ours, or an error that says which command makes one."""
    meta = read_meta(root)
    if meta is None and shard_paths(root):
        raise UserError(f"{root}: holds latents of another program, which name no pictures; give pictures with --data")
    if meta is None:
        raise UserError(f"{root}: no latent store here; run: python preprocess_latents.py")
    if not meta.complete:
        raise UserError(f"{root}: preprocessing was not finished; run python preprocess_latents.py again")
    for style in meta.latents.styles:
        if meta.layout == "pt" and not (root / style).is_dir():
            raise UserError(f"{root / style}: this style's folder has vanished; run preprocess_latents.py again")
        if not meta.counts[style]["train"]:
            raise UserError(f"{root / style}: the style has no training picture; add pictures and preprocess again")
    return meta


#################################################################################
#                                  One picture                                  #
#################################################################################


def fingerprint(picture: Path) -> list[int]:
    """What tells that a picture file has changed: its size in bytes and its time of change."""
    status = picture.stat()
    return [status.st_size, status.st_mtime_ns]


def write_latent(path: Path, latent: Tensor, flipped: Tensor | None, source: list[int]) -> None:
    entry = {"latent": latent.cpu().clone(), "source": source}
    if flipped is not None:
        entry["flipped"] = flipped.cpu().clone()
    with written_whole(path) as beside, open(beside, "wb") as file:
        torch.save(entry, file)  # given a path, torch would write the unfinished file's name into it


def read_latent(path: Path) -> dict:
    """A store entry, checked for its form."""
    entry = load_data(path, "latent of the store")
    if not isinstance(entry, dict) or not isinstance(entry.get("latent"), Tensor) or entry["latent"].ndim != 3:
        raise UserError(f"{path}: not a latent of the store (a dict with 'latent' of shape (C, h, w))")
    return entry


def held_out(names: Iterable[str], fraction: float) -> set[str]:
    """The names of one style's validation split: those whose hash falls below `fraction`.

    A hash, not a shuffle, so that adding pictures never moves one from validation to training. Few pictures may
    leave the split empty; that of the highest hash is always trained on, so that no style is held out whole.
    """
    rank = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names}
    limit = min(fraction, max(rank.values(), default=0))
    return {name for name, value in rank.items() if value < limit}


def split_off(groups: dict[str, str], fraction: float) -> set[str]:
    """The held-out entries, where `groups` is entry (`<style>/...`) -> group: whole groups, by the groups' hashes.

    A group that any one style needs for training is trained on in all of them.
    """
    by_style = defaultdict(set)
    for entry, group in groups.items():
        by_style[entry.partition("/")[0]].add(group)
    trained = {group for mine in by_style.values() for group in mine - held_out(mine, fraction)}
    return {entry for entry, group in groups.items() if group not in trained}


def channel_statistics(parts: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """Per-channel mean and deviation of raw latents, given in parts (n, C, *space); summed in float64."""
    total, squares, count = 0.0, 0.0, 0
    for part in parts:
        values = part.double().transpose(0, 1).flatten(1)
        total, squares, count = total + values.sum(1), squares + values.square().sum(1), count + values.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return mean.tolist(), torch.where(std > 1e-6, std, 1.0).tolist()  # a constant channel stays as it is


#################################################################################
#                                  The training data                            #
#################################################################################


@dataclass
class LatentSplit:
    """All latents of one split, in memory or memory-mapped."""

    spec: LatentSpec
    latents: np.ndarray | Rows  # (copies, n, C, *space) float32, raw; copies is 2 where mirrored ones were stored
    styles: Tensor  # (n,) int64
    names: list[str]

    def __len__(self) -> int:
        return len(self.styles)

    @functools.cached_property
    def digest(self) -> str:
        """Of what is drawn from: the pictures' names, and whether there are mirrored copies."""
        return hashlib.sha256(repr((len(self.latents), self.names)).encode()).hexdigest()

    def batch(self, index: Tensor, mirrored: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standardised latents (B, C, *space) and styles (B,) of the pictures `index` (B,); mirrored (B,) bool."""
        copy = torch.zeros_like(index) if mirrored is None or len(self.latents) == 1 else mirrored.long()
        raw = torch.from_numpy(np.ascontiguousarray(self.latents[copy.numpy(), index.numpy()]))
        return self.spec.standardise(raw), self.styles[index]


def load_split(root: Path, meta: StoreMeta, split: str, memory_limit: int | None = None) -> LatentSplit:
    """The split's latents: in memory where they fit `memory_limit` bytes (half of what is free), else memory-mapped,
    shards as they are, `.pt` files from one packed file, which is written once beside the store. Of several processes
    all must call this."""
    names, spec = meta.split[split], meta.latents
    ids = {style: number for number, style in enumerate(spec.styles)}
    styles = torch.tensor([ids[name.partition("/")[0]] for name in names], dtype=torch.int64)
    if memory_limit is None:  # shared by the processes of a machine, and the least of all, so that all do the same
        memory_limit = min(processes.gather(psutil.virtual_memory().available // (2 * processes.local_world())))
    if meta.layout == "pt":
        shape = (1 + meta.flip, len(names), spec.channels, *spec.space)
        whole = 4 * int(np.prod(shape)) <= memory_limit
        latents = _filled(root, names, shape) if whole else _packed(root, split, names, shape)
    else:
        latents = sharded(root, meta, names)
        latents = latents.loaded() if 4 * int(np.prod(latents.shape)) <= memory_limit else latents
    return LatentSplit(spec, latents, styles, names)


def sharded(root: Path, meta: StoreMeta, names: list[str]) -> Rows:
    """The named entries' rows in the store's shards, memory-mapped."""
    ours, spec = meta.layout != "foreign", meta.latents
    shards = read_alike(shard_paths(root, OURS) if ours else shard_paths(root), copies=1 + meta.flip)
    try:
        if ours:
            entries = [entry for shard in shards for entry in shard.pictures]
            places = {entry: number for number, entry in enumerate(entries)}
            numbers = [places[name] for name in names]
        else:  # an entry there is `<style>/<number of the row>`
            numbers = [int(name.rpartition("/")[2]) for name in names]
        rows = Rows(shards, np.array(numbers, np.int64), 1 + meta.flip)
    except (KeyError, IndexError) as error:  # IndexError: there is not one shard
        raise UserError(f"{root}: the shards lack {error}; run preprocess_latents.py again") from None
    if (len(shards[0].copies), *rows.shape[2:]) != (1 + meta.flip, spec.channels, *spec.space):
        raise UserError(f"{root}: the shards do not match meta.json; run preprocess_latents.py again")
    return rows


def _filled(root: Path, names: list[str], shape: tuple[int, ...]) -> np.ndarray:
    latents = np.empty(shape, np.float32)
    _fill(latents, root, names)
    return latents


def _fill(latents: np.ndarray, root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        entry = read_latent(root / name)
        copies = [entry[part] for part in ("latent", "flipped")[: len(latents)] if part in entry]
        if len(copies) < len(latents) or any(copy.shape != latents.shape[2:] for copy in copies):
            raise UserError(f"{root / name}: does not match meta.json; run preprocess_latents.py again")
        for copy, tensor in enumerate(copies):
            latents[copy, number] = tensor.numpy()


def _packed(root: Path, split: str, names: list[str], shape: tuple[int, ...]) -> np.ndarray:
    """One `.npy` of the whole split, made anew when any of its files has changed."""
    state = repr([(name, fingerprint(root / name)) for name in names] + [shape])
    path = root / f"packed-{split}-{hashlib.sha256(state.encode()).hexdigest()[:16]}.npy"
    with processes.in_turn():
        if not path.exists():
            for old in root.glob(f"packed-{split}-*.npy"):
                old.unlink()
            remove_unfinished(root)
            with written_whole(path) as beside:
                latents = np.lib.format.open_memmap(beside, "w+", np.float32, shape)
                _fill(latents, root, names)
                latents.flush()
    return np.load(path, mmap_mode="r")


#################################################################################
#                 What is drawn at a step: a function of (seed, step)           #
#################################################################################


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
        tensors = (self.x0, self.x1, self.t, self.style)
        if device.type == "cuda":
            tensors = (tensor.pin_memory() for tensor in tensors)
        x0, x1, t, style = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Batch(x0.contiguous(memory_format=layout), x1.contiguous(memory_format=layout), t, style)


def seeded(seed: int, stream: str, number: int) -> torch.Generator:
    """A CPU generator of its own for every (seed, stream, number): nothing to store, nothing to fast-forward."""
    words = np.random.SeedSequence([seed, *stream.encode(), number]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=seeded(seed, "order", epoch))


def base_of(split: LatentSplit, training: TrainingConfig) -> Base:
    """The base that the config asks for, fitted to at most 1024 pictures a style."""
    cells = split.spec.image_size // split.spec.factor
    if training.anchor_strength and training.anchor_cells > cells:
        raise UserError(f"training.anchor_cells = {training.anchor_cells}: the latents have {cells} cells a side")

    def some(style: int) -> Tensor:
        index = (split.styles == style).nonzero().flatten()
        return split.batch(index[:: -(-len(index) // 1024)])[0]

    return fit_base(some, len(split.spec.styles), training.anchor_strength, training.anchor_cells)


def draw_batch(split: LatentSplit, base: Base, training: TrainingConfig, step: int, null_style: int) -> Batch:
    """The whole batch of optimiser step `step`; each process then takes its share of it."""
    steps_per_epoch = len(split) // training.batch_size
    epoch, place = divmod(step, steps_per_epoch)
    order = epoch_order(training.seed, epoch, len(split))
    index = order[place * training.batch_size : (place + 1) * training.batch_size]
    generator = seeded(training.seed, "batch", step)
    mirrored = torch.rand(len(index), generator=generator) < 0.5
    x1, style = split.batch(index, mirrored)
    noise = torch.randn(x1.shape, generator=generator)
    t = sample_time(len(index), training.time_sampling, generator)
    if training.coupling == "ot":
        noise = pair_noise(noise, x1, style)
    return Batch(base.x0(noise, x1, style), x1, t, drop_labels(style, training.label_drop_prob, null_style, generator))
