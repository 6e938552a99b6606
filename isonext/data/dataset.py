"""A latent store opened, whatever its layout, and the training data: all latents of one split."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from isonext.data.pt_store import PtStore
from isonext.data.shard_store import ExternalStore, ShardStore
from isonext.data.shards import Rows, shard_paths
from isonext.data.store import LatentSpec, StoreMeta, read_meta
from isonext.errors import UserError
from isonext.utils import distributed


def store_of(root: Path, meta: StoreMeta) -> PtStore | ShardStore | ExternalStore:
    """The store at `root`, by the layout that its meta names."""
    if meta.layout == "foreign":
        return ExternalStore(root, meta)
    return own_store(root, meta)


def own_store(root: Path, meta: StoreMeta) -> PtStore | ShardStore:
    """The same of a store that preprocess_latents.py wrote."""
    return PtStore(root, meta) if meta.layout == "pt" else ShardStore(root, meta)


def open_store(root: Path) -> StoreMeta:
    """The meta of a finished store of ours, or an error that says which command makes one."""
    meta = read_meta(root)
    if meta is None and shard_paths(root):
        raise UserError(f"{root}: holds latents of another program, which name no pictures; give pictures with --data")
    if meta is None:
        raise UserError(f"{root}: no latent store here; run: python preprocess_latents.py")
    if not meta.complete:
        raise UserError(f"{root}: preprocessing was not finished; run python preprocess_latents.py again")
    own_store(root, meta).check()
    for style in meta.latents.styles:
        if not meta.counts[style]["train"]:
            raise UserError(f"{root / style}: the style has no training picture; add pictures and preprocess again")
    return meta


@dataclass
class LatentSplit:
    """All latents of one split, in memory or memory-mapped."""

    spec: LatentSpec
    latents: np.ndarray | Rows  # (copies, n, C, *space) float32, raw; its copies in the order of `store.in_order`
    styles: Tensor  # (n,) int64
    names: list[str]
    crops: int = 0  # of each picture, beside its centre square

    def __len__(self) -> int:
        return len(self.styles)

    @functools.cached_property
    def digest(self) -> str:
        return split_digest(len(self.latents), self.names, self.crops)

    @functools.cached_property
    def by_style(self) -> Tensor:
        """(n,) the pictures' numbers, those of the first style first."""
        return self.styles.argsort(stable=True)

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """How many pictures each style has."""
        return tuple(self.styles.bincount(minlength=len(self.spec.styles)).tolist())

    def batch(self, index: Tensor, mirrored: Tensor | None = None, crop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standardised latents (B, C, *space) and styles (B,) of the pictures `index` (B,); mirrored (B,) bool; crop
        (B,) is 0 for the centre square, or 1 and up."""
        squares = len(self.latents) // (1 + self.crops)
        copy = torch.zeros_like(index) if mirrored is None or squares == 1 else mirrored.long()
        copy = copy if crop is None else copy + squares * crop
        raw = torch.from_numpy(np.ascontiguousarray(self.latents[copy.numpy(), index.numpy()]))
        return self.spec.standardise(raw), self.styles[index]


def split_digest(copies: int, names: list[str], crops: int) -> str:
    """Of what is drawn from: the pictures' names, whether there are mirrored copies, and how many crops."""
    drawn = (copies, names, *[crops] * bool(crops))
    return hashlib.sha256(repr(drawn).encode()).hexdigest()


def load_split(root: Path, meta: StoreMeta, split: str, memory_limit: int | None = None) -> LatentSplit:
    """The split's latents: in memory where they fit `memory_limit` bytes (half of what is free), else memory-mapped.
    Of several processes all must call this."""
    if memory_limit is None:  # shared by the processes of a machine, and the least of all, so that all do the same
        memory_limit = min(distributed.gather(psutil.virtual_memory().available // (2 * distributed.local_world())))
    names, spec = meta.split[split], meta.latents
    ids = {style: number for number, style in enumerate(spec.styles)}
    styles = torch.tensor([ids[name.partition("/")[0]] for name in names], dtype=torch.int64)
    return LatentSplit(spec, store_of(root, meta).load(split, memory_limit), styles, names, meta.crops_in(split))
