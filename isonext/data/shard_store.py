"""The layout `safetensors` of a store: shards of many pictures. And another program's shards, which are read alone.

    data_root/latents-00000.safetensors     rows of pictures in the order in which they came, see shards.py

A shard appears whole or not at all, and is written again only without the rows whose picture has gone or changed.
"""

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isonext.data.shards import OURS, Rows, Shard, read_alike, read_shard, shard_paths, write_shard
from isonext.data.store import Row, StoreMeta, WritePlan, is_unchanged
from isonext.errors import UserError
from isonext.utils.io import remove_unfinished

SHARD_BYTES = 2**26  # of latents; what a kill can cost at most, and many times what a read costs to begin


@dataclass
class ShardStore:
    """The shards of a store of ours; `meta` says which pictures they hold."""

    root: Path
    meta: StoreMeta

    def check(self) -> None:
        """Nothing here: `rows` says which picture is missing, once the shards are opened."""

    #############################################################################
    #                             Brought up to date                            #
    #############################################################################

    def stored_styles(self) -> set[str]:
        """The styles that have latents here."""
        return {entry.partition("/")[0] for entry in self._entries()}

    def _entries(self) -> set[str]:
        """Those of all shards but the damaged ones."""
        entries: set[str] = set()
        for path in shard_paths(self.root, OURS):
            with contextlib.suppress(UserError):
                entries |= read_shard(path).pictures.keys()
        return entries

    def take_stock(self, pictures: dict[str, Path]) -> tuple[int, set[str]]:
        """Drop the rows whose picture has gone or changed, and what a killed run left unfinished.

        `pictures` is entry -> picture. Returns how many entries went, and those that are up to date. A shard that loses
        rows is written anew without them; one that is left empty, or is damaged, is deleted. A damaged one that meta
        does not name is a UserError.
        """
        remove_unfinished(self.root)
        removed = len(self._entries() - pictures.keys())
        current: set[str] = set()
        for path in shard_paths(self.root, OURS):
            try:
                shard = read_shard(path)
            except UserError:  # damaged: its pictures are encoded again
                if path.name not in self.meta.own:
                    raise UserError(
                        f"{path}: damaged, and meta.json does not say that it is this program's; delete it, and run "
                        "preprocess_latents.py again"
                    ) from None
                path.unlink()
                continue
            rows = [row for row in _rows_of(shard, self.meta) if row.entry not in current]
            rows = [row for row in rows if row.entry in pictures and is_unchanged(pictures[row.entry], row.source)]
            rows = [row for row in rows if row.is_finite]  # else it is damaged, and encoded again
            current |= {row.entry for row in rows}
            if not rows:
                path.unlink()
            elif len(rows) < len(shard):
                write_shard(path, rows, self.meta.latents.styles)
        return removed, current

    def plan(self, count: int, batch: int) -> WritePlan:
        """For `count` new pictures that are encoded `batch` at once: shards under the lowest numbers that are free.

        A shard is written before the next is begun, so that a kill costs no more than one.
        """
        length = max(1, SHARD_BYTES // (self.meta.picture_bytes * batch)) * batch
        taken = {path.name for path in shard_paths(self.root, OURS)}
        free = (name for number in itertools.count() if (name := f"latents-{number:05}.safetensors") not in taken)
        return WritePlan(length, backlog=0, shards=list(itertools.islice(free, math.ceil(count / length))))

    def writes(self, rows: list[Row], plan: WritePlan, piece: int) -> Iterator[tuple]:
        """The call, function first, that writes a piece of the work; none where all its pictures are bad."""
        if rows:
            yield write_shard, self.root / plan.shards[piece], rows, self.meta.latents.styles

    def may_write(self, entries: Collection[str], batch: int) -> list[str]:
        """The files that a run on these entries may write, relative to the root."""
        return self.plan(len(entries), batch).shards

    def left(self) -> list[str]:
        """The files of a complete store that its split does not name."""
        return [path.name for path in shard_paths(self.root, OURS)]

    def discard(self, entry: str) -> None:
        """Nothing is left of an entry whose picture cannot be read any more: `take_stock` dropped its row."""

    #############################################################################
    #                                    Read                                   #
    #############################################################################

    def latents(self, names: list[str]) -> Iterator[Tensor]:
        """The named entries', mirrored ones and crops included, in parts (n, C, h, w)."""
        return _parts(self.rows(names, self.meta.crops))

    def load(self, split: str, memory_limit: int) -> np.ndarray | Rows:
        """A split's latents (copies, n, C, h, w), float32: in memory, or above `memory_limit` bytes memory-mapped."""
        names = self.meta.split[split]
        rows = self.rows(names, self.meta.crops_in(split))
        for _, places, part in rows.parts():
            broken = ~np.isfinite(part).all((1, 2, 3))
            if broken.any():
                name = names[places.start + int(broken.argmax())]
                raise UserError(f"{self.root}: the latent of {name} has numbers that are none; preprocess again")
        return rows.loaded() if self.meta.split_bytes(split) <= memory_limit else rows

    def rows(self, names: list[str], crops: int) -> Rows:
        """The named entries' rows, memory-mapped."""
        shards = read_alike(shard_paths(self.root, OURS), self.meta.squares, crops)
        entries = (entry for shard in shards for entry in shard.pictures)
        places = {entry: number for number, entry in enumerate(entries)}
        missing = [name for name in names if name not in places]
        if missing:
            raise UserError(f"{self.root}: the shards lack {missing[0]!r}; run preprocess_latents.py again")
        return _chosen_rows(self, shards, [places[name] for name in names], self.meta.squares * (1 + crops))


@dataclass
class ExternalStore:
    """Another program's shards. An entry is `<style>/<number of the row>`, counted through all files."""

    root: Path
    meta: StoreMeta

    def latents(self, names: list[str]) -> Iterator[Tensor]:
        """The named entries', mirrored ones included, in parts (n, C, h, w)."""
        return _parts(self.rows(names))

    def load(self, split: str, memory_limit: int) -> np.ndarray | Rows:
        """As `ShardStore.load`."""
        rows = self.rows(self.meta.split[split])
        return rows.loaded() if self.meta.split_bytes(split) <= memory_limit else rows

    def rows(self, names: list[str]) -> Rows:
        """The named entries' rows, memory-mapped."""
        shards = read_alike(shard_paths(self.root), self.meta.squares)
        return _chosen_rows(self, shards, [int(name.rpartition("/")[2]) for name in names], self.meta.squares)


def refuse_external(root: Path, pattern: str = "*.safetensors") -> None:
    """UserError where the folder has another program's shards, which a store of ours would mix with."""
    for path in shard_paths(root, pattern):
        try:
            external = not read_shard(path).pictures
        except UserError:  # no shard: neither read nor written over
            continue
        if external:
            raise UserError(f"{path}: is another program's; use another data.data_root for the store")


def _rows_of(shard: Shard, meta: StoreMeta) -> Iterator[Row]:
    """A shard's rows; none where it lacks mirrored ones or crops of them."""
    cut = [part for part in shard.crops[: meta.squares] if part.shape[1] >= meta.crops]
    if len(shard.copies) < meta.squares or (meta.crops and len(cut) < meta.squares):
        return
    for number, (entry, source) in enumerate(shard.pictures.items()):
        parts = shard.row(number)
        yield Row(entry, source, parts["latent"], *map(parts.get, ("flipped", "crops", "crops_flipped")))


def _chosen_rows(store: ShardStore | ExternalStore, shards: list[Shard], numbers: list[int], copies: int) -> Rows:
    """Rows by their numbers over all shards, checked against the store's meta."""
    if not shards:
        raise UserError(f"{store.root}: the shards lack every picture; run preprocess_latents.py again")
    spec = store.meta.latents
    rows = Rows(shards, np.array(numbers, np.int64), copies)
    if (len(shards[0].copies), *rows.shape[2:]) != (copies, spec.channels, *spec.space):
        raise UserError(f"{store.root}: the shards do not match meta.json; run preprocess_latents.py again")
    return rows


def _parts(rows: Rows) -> Iterator[Tensor]:
    return (torch.from_numpy(part) for _, _, part in rows.parts())
