"""The layout `pt` of a store: one file a picture.

data_root/<style>/<name.jpg>.pt         {"latent": (C, h, w), "flipped": (C, h, w), "source": [bytes, mtime_ns]}, and
                                        with N random crops "crops": (N, C, h, w), "crops_flipped": (N, C, h, w)
data_root/packed-train-0123abcd.npy     a split that memory does not hold, packed to be memory-mapped
"""

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isonext.data.store import Row, StoreMeta, WritePlan, fingerprint, in_order, is_unchanged
from isonext.errors import UserError
from isonext.utils import distributed
from isonext.utils.io import folder_lock, load_data, remove_unfinished, written_whole
from isonext.utils.schema import Mismatch, dense, record

PACKING_S = 3600.0  # what a run waits for another one that packs the same split
LATENT, CROPS = dense(ndim=3), dense(ndim=4)
PARTS = ("latent", "crops"), ("flipped", "crops_flipped")  # plain, mirrored


def write_latent(
    path: Path,
    latent: Tensor,
    flipped: Tensor | None,
    source: list[int],
    crops: Tensor | None = None,
    crops_flipped: Tensor | None = None,
) -> None:
    """The parts of a `Row`."""
    parts = {"latent": latent, "flipped": flipped, "crops": crops, "crops_flipped": crops_flipped}
    entry: dict = {name: part.cpu().clone() for name, part in parts.items() if part is not None}
    entry["source"] = source
    with written_whole(path) as beside, open(beside, "wb") as file:
        torch.save(entry, file)  # given a path, torch would write the unfinished file's name into it


def read_latent(path: Path) -> dict:
    """A store entry, checked for its form."""
    entry = load_data(path, "latent of the store")
    try:
        entry = record(latent=LATENT)(entry, "file")
        others = {"flipped": LATENT, "crops": CROPS, "crops_flipped": CROPS}
        entry |= {name: check(entry[name], name) for name, check in others.items() if name in entry}
    except Mismatch as error:
        raise UserError(f"{path}: not a latent of the store ({error}); run preprocess_latents.py again") from None
    return entry


def _reserve(path: Path) -> None:
    """Have the disk's room for all of the file, where the system can: a full disk would end the process later on."""
    with open(path, "rb+") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


@dataclass
class PtStore:
    """The files of a store in this layout; `meta` says which there are."""

    root: Path
    meta: StoreMeta

    def check(self) -> None:
        """UserError where a style has vanished."""
        for style in self.meta.latents.styles:
            if not (self.root / style).is_dir():
                raise UserError(
                    f"{self.root / style}: this style's folder has vanished; run preprocess_latents.py again"
                )

    #############################################################################
    #                             Brought up to date                            #
    #############################################################################

    def stored_styles(self) -> set[str]:
        """The styles that have latents here."""
        return {style for style in self.meta.latents.styles if any((self.root / style).rglob("*.pt"))}

    def take_stock(self, pictures: dict[str, Path]) -> tuple[int, set[str]]:
        """Delete entries whose picture has gone, and what a killed run left unfinished.

        `pictures` is entry -> picture. Returns how many entries went, and those that are up to date.
        """
        stored = [path for style in self.meta.latents.styles for path in (self.root / style).rglob("*.pt")]
        for folder in {self.root, *(path.parent for path in stored)}:
            remove_unfinished(folder)
        gone = self.meta.own - pictures.keys()
        entries = [path for path in stored if path.relative_to(self.root).as_posix() in gone]
        for path in entries:
            path.unlink()
        return len(entries), {entry for entry, picture in pictures.items() if self._is_current(entry, picture)}

    def _is_current(self, entry: str, picture: Path) -> bool:
        path = self.root / entry
        if not path.exists():
            return False
        try:
            stored = read_latent(path)
        except UserError:  # damaged: encode it again
            return False
        copies = self._copies(stored, self.meta.crops)
        if copies is None or not all(part.isfinite().all() for part in copies):  # an earlier version let those in
            return False
        return is_unchanged(picture, stored.get("source"))

    def _copies(self, entry: dict, crops: int) -> list[Tensor] | None:
        """An entry's latents (C, h, w), mirrored ones included; None where it lacks some of them."""
        parts = PARTS[: self.meta.squares]
        if any(name not in entry for name, _ in parts):
            return None
        if crops and any(name not in entry or len(entry[name]) < crops for _, name in parts):
            return None
        return in_order([entry[name] for name, _ in parts], [entry[name] for _, name in parts if crops], crops)

    def plan(self, count: int, batch: int) -> WritePlan:
        """For `count` new pictures that are encoded `batch` at once."""
        return WritePlan(length=batch, backlog=4 * batch)

    def writes(self, rows: list[Row], plan: WritePlan, piece: int) -> Iterator[tuple]:
        """The calls, function first, that write a piece of the work."""
        for row in rows:
            parts = row.latent, row.flipped, row.source, row.crops, row.crops_flipped
            yield write_latent, self.root / row.entry, *parts

    def may_write(self, entries: Collection[str], batch: int) -> list[str]:
        """The files that a run on these entries may write, relative to the root."""
        return list(entries)

    def left(self) -> list[str]:
        """The files of a complete store that its split does not name."""
        return []

    def discard(self, entry: str) -> None:
        """Remove what is left of an entry whose picture cannot be read any more."""
        (self.root / entry).unlink(missing_ok=True)

    #############################################################################
    #                                    Read                                   #
    #############################################################################

    def latents(self, names: list[str]) -> Iterator[Tensor]:
        """The named entries', mirrored ones and crops included, in parts (n, C, h, w)."""
        for name in names:
            for part in self._read(name, self.meta.crops):
                yield part[None]

    def _read(self, name: str, crops: int) -> list[Tensor]:
        """An entry's latents; UserError where they are not those that meta promises."""
        spec = self.meta.latents
        copies = self._copies(read_latent(self.root / name), crops)
        if copies is None or any(copy.shape != (spec.channels, *spec.space) for copy in copies):
            raise UserError(f"{self.root / name}: does not match meta.json; run preprocess_latents.py again")
        return copies

    def load(self, split: str, memory_limit: int) -> np.ndarray:
        """A split's latents (copies, n, C, h, w), float32: in memory, or above `memory_limit` bytes memory-mapped from
        one packed file, which is written once. Of several processes all must call this."""
        names, spec = self.meta.split[split], self.meta.latents
        crops = self.meta.crops_in(split)
        shape = (self.meta.squares * (1 + crops), len(names), spec.channels, *spec.space)
        for name in names[:1]:  # before memory is had for all of them
            self._read(name, crops)
        if self.meta.split_bytes(split) > memory_limit:
            return self._packed(split, names, shape)
        latents = np.empty(shape, np.float32)
        self._fill(latents, names, crops)
        return latents

    def _packed(self, split: str, names: list[str], shape: tuple[int, ...]) -> np.ndarray:
        """One `.npy` of the whole split, written anew when any of its files has changed."""
        crops = self.meta.crops_in(split)
        state = repr([(name, fingerprint(self.root / name)) for name in names] + [shape] + [crops] * bool(crops))
        path = self.root / f"packed-{split}-{hashlib.sha256(state.encode()).hexdigest()[:16]}.npy"
        with distributed.in_turn():
            if not path.exists():
                with folder_lock(self.root, PACKING_S):
                    if not path.exists():  # another run may have packed it meanwhile
                        self._pack(path, split, names, shape)
        return np.load(path, mmap_mode="r")

    def _pack(self, path: Path, split: str, names: list[str], shape: tuple[int, ...]) -> None:
        """Write the packed split to `path`, in the place of an older one."""
        for old in self.root.glob(f"packed-{split}-*.npy"):
            if re.fullmatch(rf"packed-{split}-[0-9a-f]{{16}}\.npy", old.name):
                old.unlink()
        remove_unfinished(self.root)
        with written_whole(path) as beside:
            latents = np.lib.format.open_memmap(beside, "w+", np.float32, shape)
            _reserve(beside)
            self._fill(latents, names, self.meta.crops_in(split))
            latents.flush()

    def _fill(self, latents: np.ndarray, names: list[str], crops: int) -> None:
        """Read the named entries into `latents` (copies, n, C, h, w)."""
        for number, name in enumerate(names):
            for copy, tensor in enumerate(self._read(name, crops)):
                latents[copy, number] = tensor.float().numpy()
