"""The file of a shard, ours or another program's: written, checked, and read by rows without being loaded.

    latents (n, C, *space)         raw; float32, in other programs' shards also float16 or bfloat16
    latents_flip (n, C, *space)    of the mirrored pictures, where there are any
    latents_crops (n, N, C, h, w)  of N random crops of each picture, ours alone; latents_crops_flip, of those mirrored
    labels (n,)                    style ids from 0; or user_ids (n,), from 1

Ours also say, in the file's metadata, which picture each row is of: `pictures`, JSON of {entry: fingerprint}. Stores of
shards are in shard_store.py.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from isonext.data.store import Row, in_order
from isonext.errors import UserError, first_line
from isonext.utils.io import natural_order, written_whole
from isonext.utils.schema import is_inside

OURS = "latents-[0-9]*.safetensors"  # the shards of a store of ours; others beside them are left alone
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # of labels
PARTS = {  # the tensor of each part of a `Row`
    "latent": "latents",
    "flipped": "latents_flip",
    "crops": "latents_crops",
    "crops_flipped": "latents_crops_flip",
}
LABELS = {"labels": 0, "user_ids": 1}  # the tensor's name, and where its counting starts


@dataclass
class Shard:
    path: Path
    copies: list[Tensor]  # (n, C, *space) each, memory-mapped: the plain ones, then the mirrored ones, if any
    labels: Tensor  # (n,) int64, from 0
    first: int  # where the file's own labels start
    pictures: dict[str, list[int]]  # entry -> fingerprint, in the order of rows; empty in other programs' shards
    crops: list[Tensor]  # (n, N, C, h, w) each: the plain ones, then the mirrored ones, if any

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, number: int) -> dict[str, Tensor]:
        """The parts of a `Row`."""
        names = ("latent", "flipped")[: len(self.copies)] + ("crops", "crops_flipped")[: len(self.crops)]
        return {name: part[number] for name, part in zip(names, [*self.copies, *self.crops], strict=True)}


#################################################################################
#                                   One shard                                   #
#################################################################################


def shard_paths(root: Path, pattern: str = "*.safetensors") -> list[Path]:
    """The folder's shards in natural order, which is that of their rows."""
    found = (path for path in root.glob(pattern) if not path.name.startswith("."))
    return sorted(found, key=lambda path: natural_order(path.name))


def write_shard(path: Path, rows: list[Row], styles: list[str]) -> None:
    """All rows have the same parts."""
    numbers = {style: number for number, style in enumerate(styles)}
    tensors = {PARTS[name]: torch.stack([row.parts[name] for row in rows]) for name in rows[0].parts}
    tensors["labels"] = torch.tensor([numbers[row.entry.partition("/")[0]] for row in rows])
    pictures = json.dumps({row.entry: row.source for row in rows})
    with written_whole(path) as beside:  # one entry of metadata: the order of several would change from run to run
        beside.write_bytes(save(tensors, metadata={"pictures": pictures}))


def read_shard(path: Path) -> Shard:
    """A shard, checked for its form; a UserError that names what is wrong. Its latents stay on the disk."""
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in (*PARTS.values(), *LABELS) if name in names}
            pictures = json.loads((file.metadata() or {}).get("pictures", "{}"))
    except OSError:
        raise
    except Exception as error:  # safetensors and json stumble over many things in a damaged file
        reason = first_line(error)
        raise UserError(
            f"{path}: damaged, or no safetensors file ({reason}); copy it anew, or run preprocess_latents.py again"
        ) from None
    kind = next((name for name in LABELS if name in tensors), None)
    if "latents" not in tensors or kind is None:
        shown = ", ".join(sorted(names)) or "nothing"
        raise UserError(f"{path}: holds {shown}; a shard has `latents`, and `labels` or `user_ids`")
    copies, labels = [tensors[name] for name in ("latents", "latents_flip") if name in tensors], tensors[kind]
    _check_form(path, copies, labels, kind)
    fits = isinstance(pictures, dict) and all(map(is_inside, pictures)) and len(pictures) in (0, len(labels))
    if not fits or not all(map(_is_fingerprint, pictures.values())):
        raise UserError(f"{path}: damaged: it names other pictures than it has rows; run preprocess_latents.py again")
    crops = [tensors[name] for name in ("latents_crops", "latents_crops_flip") if name in tensors and pictures]
    form = copies[0].dtype, copies[0].shape
    if len(crops) > len(copies) or any((part.dtype, part.shape[:1] + part.shape[2:]) != form for part in crops):
        raise UserError(f"{path}: damaged: its crops are not those of its latents; run preprocess_latents.py again")
    return Shard(path, copies, labels.long() - LABELS[kind], LABELS[kind], pictures, crops)


def _is_fingerprint(source: Any) -> bool:
    return isinstance(source, list) and len(source) == 2 and all(type(number) is int for number in source)


def _check_form(path: Path, copies: list[Tensor], labels: Tensor, kind: str) -> None:
    shape = tuple(copies[0].shape)
    if any(copy.dtype not in (torch.float32, torch.float16, torch.bfloat16) for copy in copies):
        raise UserError(f"{path}: latents of {copies[-1].dtype}; they must be float32, float16 or bfloat16")
    if len(shape) not in (3, 4):
        raise UserError(f"{path}: latents of shape {shape}; it must be (n, C, h, w) or (n, C, length)")
    if len(copies) == 2 and copies[1].shape != copies[0].shape:
        raise UserError(f"{path}: latents_flip of shape {tuple(copies[1].shape)}, but latents of {shape}")
    if 0 in shape[1:]:
        raise UserError(f"{path}: latents of shape {shape}, which hold nothing")
    if labels.dtype not in INTEGERS or labels.ndim != 1:
        raise UserError(f"{path}: {kind} of {labels.dtype}, shape {tuple(labels.shape)}; they must be integers (n,)")
    if len(labels) != shape[0]:
        raise UserError(f"{path}: {len(labels)} {kind}, but {shape[0]} latents")
    if len(labels) and labels.min() < LABELS[kind]:
        raise UserError(f"{path}: {kind} has a {labels.min()}; they count from {LABELS[kind]}")


#################################################################################
#                                  Many shards                                  #
#################################################################################


def read_alike(paths: list[Path], squares: int = 2, crops: int = 0) -> list[Shard]:
    """Shards whose rows can be mixed: of one shape, dtype and kind of labels, all with as many copies.

    Their copies are those of `squares` (1: without mirrored ones) and of the first `crops` crops, as far as they are
    there.
    """
    shards = [read_shard(path) for path in paths]
    for shard in shards:
        cut = shard.crops[:squares]
        there = min([crops, *(part.shape[1] for part in cut)])
        shard.copies = in_order(shard.copies[:squares], cut, there if cut else 0)

    def form(shard: Shard) -> dict:
        labels = {start: name for name, start in LABELS.items()}[shard.first]
        shape, dtype = tuple(shard.copies[0].shape[1:]), shard.copies[0].dtype
        return {"shape": shape, "dtype": dtype, "labels called": labels, "copies": len(shard.copies)}

    for shard in shards[1:]:
        for name, value in form(shard).items():
            first = form(shards[0])[name]
            if value != first:
                raise UserError(f"{shard.path}: {name} {value}, but {first} in {paths[0].name}; they must be alike")
    return shards


class Rows:
    """Chosen rows of many shards as one float32 array (copies, n, C, *space) that is read only where it is indexed."""

    def __init__(self, shards: list[Shard], rows: np.ndarray, copies: int) -> None:
        """`rows` (n,): numbers over all shards, one after the other."""
        starts = np.cumsum([0] + [len(shard) for shard in shards])
        self.tensors = [shard.copies for shard in shards]
        self.shard = np.searchsorted(starts, rows, "right") - 1
        self.row = rows - starts[self.shard]
        self.shape = (copies, len(rows), *shards[0].copies[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: tuple) -> np.ndarray:
        """By (copy, index), numbers or arrays (B,): (B, C, *space)."""
        copy, index = np.broadcast_arrays(*where)
        shard, row = self.shard[index].ravel().tolist(), self.row[index].ravel().tolist()
        picked = torch.empty((len(row), *self.shape[2:]))
        for place, (c, s, r) in enumerate(zip(copy.ravel().tolist(), shard, row, strict=True)):
            picked[place] = self.tensors[s][c][r]
        return picked.numpy().reshape(*index.shape, *self.shape[2:])

    def parts(self, size: int = 1024) -> Iterator[tuple[int, slice, np.ndarray]]:
        """All of it, piece by piece: copy, rows, latents (n, C, *space)."""
        for copy, start in itertools.product(range(len(self)), range(0, self.shape[1], size)):
            rows = np.arange(start, min(start + size, self.shape[1]))
            yield copy, slice(start, start + len(rows)), self[copy, rows]

    def loaded(self) -> np.ndarray:
        """All of it, in memory."""
        latents = np.empty(self.shape, np.float32)
        for copy, rows, part in self.parts():
            latents[copy, rows] = part
        return latents
