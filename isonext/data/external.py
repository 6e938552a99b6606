"""Latents that another program computed, taken as a store: LightningDiT's folders, and train/val files with user ids.

    data_root/*.safetensors       `latents`, perhaps `latents_flip`, and `labels` or `user_ids`: see shards.py
    data_root/latents_stats.pt    {"mean": (1, C, 1, 1), "std": (1, C, 1, 1)}, or none

Where file names say train and val, that is the split; else it is made by hashes, as for pictures. Such files do not say
which autoencoder they are of: that, and the size of the pictures, are the config's.
"""

import math
import re
from pathlib import Path

import numpy as np
import torch

from isonext.config import Config
from isonext.data.dataset import open_store
from isonext.data.shard_store import ExternalStore
from isonext.data.shards import Shard, read_alike, shard_paths
from isonext.data.splits import split_off
from isonext.data.store import LatentSpec, StoreMeta, channel_statistics, shown
from isonext.errors import UserError
from isonext.utils import distributed
from isonext.utils.io import load_data
from isonext.utils.schema import Mismatch, dense, record

STATISTICS = "latents_stats.pt"
ENOUGH = 2**16  # latents for statistics: at the worst, means are then off by 1/256 of a deviation


def find_store(root: Path, config: Config) -> StoreMeta:
    """The meta of the store at `root`, ours or another program's. Of several processes all must call this."""
    meta = survey(root, config)
    if meta is None:
        return open_store(root)
    found = None
    if distributed.is_main():
        path = root / STATISTICS
        found = _read_statistics(path, meta.latents.channels) if path.exists() else _statistics(root, meta)
    meta.latents.mean, meta.latents.std = distributed.from_main(found)
    return meta


def survey(root: Path, config: Config) -> StoreMeta | None:
    """The meta of another program's latents, but for their statistics; None where there are none, or a store of ours.

    Entries are `<style>/<number of the row>`, counted through all files in natural order.
    """
    paths = shard_paths(root)
    if (root / "meta.json").exists() or not paths:
        return None
    shards = read_alike(paths)
    labels = torch.cat([shard.labels for shard in shards]).numpy()
    styles = _styles(root, labels, shards[0].first)
    split = _split(root, shards, labels, styles, config.data.val_fraction)
    tally = {part: np.bincount([labels[row] for row in rows], minlength=len(styles)) for part, rows in split.items()}
    for number, style in enumerate(styles):
        if not tally["train"][number]:
            raise UserError(f"{root}: all latents of label {style} are held out; move some to the training file")
    names = {part: [f"{styles[labels[row]]}/{row}" for row in rows] for part, rows in split.items()}
    counts = {style: {part: int(tally[part][number]) for part in tally} for number, style in enumerate(styles)}
    spec = _spec(root, tuple(shards[0].copies[0].shape[1:]), styles, config)
    return StoreMeta(spec, len(shards[0].copies) == 2, names, counts, complete=True, layout="foreign")


def _styles(root: Path, labels: np.ndarray, first: int) -> list[str]:
    """A name for each label; a label that no latent has is an error, since nothing could be learnt of it."""
    if not len(labels):
        raise UserError(f"{root}: its files hold no latents")
    present = np.unique(labels)  # not np.bincount: labels may be any numbers, and memory is had for none of them
    count = int(labels.max()) + 1 - len(present)
    if count:
        absent = next((number for number, label in enumerate(present.tolist()) if label != number), len(present))
        raise UserError(
            f"{root}: {count} labels have no latent, the first is {absent + first}, though there are labels "
            f"up to {labels.max() + first}; number them from {first} without gaps"
        )
    return [f"user{number + 1}" if first else str(number) for number in range(labels.max() + 1)]


def _split(
    root: Path, shards: list[Shard], labels: np.ndarray, styles: list[str], fraction: float
) -> dict[str, list[int]]:
    """Part -> its rows: by the names of the files, or where none of them says val, by hashes of the rows' numbers."""
    parts = [_part(shard.path) for shard in shards]
    if any(parts) and not all(parts):
        path = shards[parts.index(None)].path
        raise UserError(f"{path}: says neither train nor val, which names of other files here do; rename it")
    if "val" in parts:
        of_row = np.repeat(np.array(parts, str), [len(shard) for shard in shards])
        return {part: np.flatnonzero(of_row == part).tolist() for part in ("train", "val")}
    entries = [f"{styles[label]}/{row}" for row, label in enumerate(labels.tolist())]
    held = split_off({entry: entry for entry in entries}, fraction)
    split: dict[str, list[int]] = {"train": [], "val": []}
    for row, entry in enumerate(entries):
        split["val" if entry in held else "train"].append(row)
    return split


def _part(path: Path) -> str | None:
    """Whether a file's name has the word train or val in it: latents_train, val-00 (but not interval)."""
    match = re.search(r"(?<![a-z])(train|val)(?:ing|id|idation)?(?![a-z])", path.stem.lower())
    return match and match[1]


def _spec(root: Path, shape: tuple[int, ...], styles: list[str], config: Config) -> LatentSpec:
    """Latents of `shape` (C, *space), under the config's autoencoder and size of pictures."""
    size, side = config.data.image_size, shape[-1]
    if len(shape) != 3 or shape[1] != shape[2]:  # the one place that would have to let others through
        raise UserError(f"{root}: latents of {shown(shape[1:])} cells; they must be square pictures' (n, C, h, h)")
    if size % side:
        raise UserError(
            f"data.image_size = {size}: the latents at {root} have {side} cells a side; set it to the side of the "
            "pictures they were computed from, in pixels"
        )
    return LatentSpec(config.autoencoder.name, shape[0], size // side, size, styles)


def _read_statistics(path: Path, channels: int) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel, as LightningDiT writes them."""
    values = load_data(path, "file of latent statistics")
    try:
        found = record(mean=dense(), std=dense())(values, "file")
    except Mismatch as error:
        reason = f"must be a dict of `mean` and `std` of shape (1, {channels}, 1, 1) of finite numbers"
        raise UserError(f"{path}: {reason} ({error}); delete it to have them computed") from None
    mean, std = (found[name].double().flatten() for name in ("mean", "std"))
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"{path}: must be a dict of `mean` and `std` of shape (1, {channels}, 1, 1)")
    if not (std > 0).all():
        raise UserError(f"{path}: mean and std must be finite, and std above 0; delete it to have them computed")
    return mean.tolist(), std.tolist()


def _statistics(root: Path, meta: StoreMeta) -> tuple[list[float], list[float]]:
    """Those of the training split, mirrored copies included; of a very large one, of rows evenly spaced in it."""
    names = meta.split["train"]
    names = names[:: math.ceil(len(names) / ENOUGH)]
    print(f"{root}: no {STATISTICS}; mean and deviation are computed from {len(names)} training latents")
    mean, std = channel_statistics(ExternalStore(root, meta).latents(names))
    if not np.isfinite([mean, std]).all():
        raise UserError(f"{root}: its latents are not all finite numbers; compute them again")
    return mean, std
