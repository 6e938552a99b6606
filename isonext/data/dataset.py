"""The training data: all latents of one split of a store, in memory or memory-mapped."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from isonext.data.shards import OURS, Rows, read_alike, shard_paths
from isonext.data.store import LatentSpec, StoreMeta, fingerprint, read_latent
from isonext.errors import UserError
from isonext.utils import distributed
from isonext.utils.io import remove_unfinished, written_whole


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
        memory_limit = min(distributed.gather(psutil.virtual_memory().available // (2 * distributed.local_world())))
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
    with distributed.in_turn():
        if not path.exists():
            for old in root.glob(f"packed-{split}-*.npy"):
                old.unlink()
            remove_unfinished(root)
            with written_whole(path) as beside:
                latents = np.lib.format.open_memmap(beside, "w+", np.float32, shape)
                _fill(latents, root, names)
                latents.flush()
    return np.load(path, mmap_mode="r")
