"""What a latent store says of itself: the meaning of its latents, and `meta.json`, in which that is written.

    data_root/meta.json                     what the latents are, which pictures are held out, their statistics
    data_root/<style>/<name.jpg>.pt         the latents, a file a picture: pt_store.py
    data_root/latents-00000.safetensors     or in shards of many pictures: shard_store.py

In meta.json a picture's entry is called `<style>/<name.jpg>.pt` either way. Files hold the autoencoder's raw latents;
the network sees them standardised per channel with the mean and deviation of the training split, which travel with
the checkpoint as part of its `LatentSpec`. dataset.py opens a store of either layout.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isonext.errors import UserError, brief, first_line
from isonext.utils.io import written_whole
from isonext.utils.schema import (
    Mismatch,
    flag,
    is_inside,
    listed,
    made_of,
    mapped,
    number,
    record,
    style_name,
    text,
    whole,
)

FORMAT = 1
LARGEST_SIDE = 8192  # pixels, of data.image_size
SPEC = {  # the entries of a LatentSpec in a file
    "autoencoder": text(),
    "channels": whole(1, 2**16),
    "factor": whole(1, LARGEST_SIDE),
    "image_size": whole(1, LARGEST_SIDE),
    "styles": listed(style_name, 1),
    "mean": listed(number()),
    "std": listed(number(1e-12)),
    "autoencoder_digest": text(longest=64),
}


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
    autoencoder_digest: str = ""  # of its weights; "" where they were not known: other programs', and before 0.2.0

    @property
    def is_finite(self) -> bool:
        """Whether latents can be standardised: all of the statistics are numbers."""
        return all(map(math.isfinite, (*self.mean, *self.std)))

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
        mean, std = (torch.tensor(values, device=like.device).view(-1, *ones) for values in (self.mean, self.std))
        return mean, std

    def has_autoencoder_of(self, other: "LatentSpec") -> bool:
        """Whether both are of one autoencoder, wherever its files lay: by digest, or where one is unknown by path."""
        if self.autoencoder_digest and other.autoencoder_digest:
            return self.autoencoder_digest == other.autoencoder_digest
        return Path(self.autoencoder).resolve() == Path(other.autoencoder).resolve()

    def autoencoder_beside(self, other: "LatentSpec") -> str:
        """For messages: its path, and what tells it from `other`'s where they have one path."""
        if self.autoencoder != other.autoencoder:
            return self.autoencoder
        return f"{self.autoencoder} (sha256 {self.autoencoder_digest[:12]})"

    def style_id(self, style: str) -> int:
        """The id of a style given by name, or by id as text."""
        if style in self.styles:
            return self.styles.index(style)
        if style.isdecimal() and len(style) < 20 and int(style) < len(self.styles):
            return int(style)
        known = ", ".join(f"{number} = {name}" for number, name in enumerate(self.styles))
        raise UserError(f"style {style[:80]!r} does not exist; there are: {known}")


def spec_of(tree: Any, where: str = "latents", finished: bool = True) -> LatentSpec:
    """The LatentSpec of a file's tree; Mismatch where it cannot be one. One that is not finished lacks statistics."""
    spec = made_of(LatentSpec, SPEC, tree, where)
    if len(set(spec.styles)) < len(spec.styles):
        raise Mismatch(f"{where}.styles", spec.styles, "names of which no two are equal")
    if spec.factor > spec.image_size:
        raise Mismatch(f"{where}.factor", spec.factor, f"at most image_size, which is {spec.image_size}")
    for name in ("mean", "std"):
        counts = (spec.channels,) if finished else (0, spec.channels)
        if len(getattr(spec, name)) not in counts:
            raise Mismatch(f"{where}.{name}", getattr(spec, name), f"a list of {spec.channels}, one a channel")
    return spec


@dataclass
class StoreMeta:
    """The contents of meta.json. `complete` is false while preprocessing is under way."""

    latents: LatentSpec
    flip: bool
    split: dict[str, list[str]] = field(default_factory=lambda: {"train": [], "val": []})  # "<style>/<name>.pt"
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # pictures by style and split
    complete: bool = False
    format: int = FORMAT
    layout: str = "pt"  # of the files: pt, safetensors, or foreign, for those of another program (external.py)
    written: list[str] = field(
        default_factory=list
    )  # entries of the split apart, what runs may have written: see `own`
    crops: int = 0  # random crops of each picture, beside its centre square

    @property
    def own(self) -> set[str]:
        """Entries and shards that this program wrote, or may have written before it was stopped: no other file here is
        ever deleted."""
        return {*self.written, *self.split["train"], *self.split["val"]}

    @property
    def copies(self) -> int:
        """Latents a picture: of its centre square and its crops, twice as many where mirrored ones are stored."""
        return self.squares * (1 + self.crops)

    @property
    def squares(self) -> int:
        """Latents of its centre square alone: 2 where the mirrored one is stored."""
        return 1 + self.flip

    def crops_in(self, split: str) -> int:
        """Crops a picture of that split: there are none of held-out pictures, which are measured with."""
        return self.crops if split == "train" else 0

    def split_bytes(self, split: str) -> int:
        """Of a split's latents in memory."""
        return len(self.split[split]) * self.picture_bytes // (1 + self.crops) * (1 + self.crops_in(split))

    @property
    def picture_bytes(self) -> int:
        """Of one picture's latents in memory, in float32, mirrored ones and crops included."""
        return 4 * self.copies * self.latents.channels * math.prod(self.latents.space)

    def write(self, root: Path) -> None:
        with written_whole(root / "meta.json") as beside:
            beside.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")


def _entry(value: Any, where: str) -> str:
    if not isinstance(value, str) or not is_inside(value):
        raise Mismatch(where, value, "a picture of the store, <style>/<name>.pt")
    return value


def _own_file(value: Any, where: str) -> str:
    if not isinstance(value, str) or not is_inside(f"store/{value}"):  # what stands here may be deleted
        raise Mismatch(where, value, "a file of the store")
    return value


PARTS = ("train", "val")
META = {
    "flip": flag,
    "split": record(**dict.fromkeys(PARTS, listed(_entry))),
    "counts": mapped(mapped(whole())),
    "complete": flag,
    "layout": text("pt", "safetensors"),
    "written": listed(_own_file),
    "crops": whole(0, 64),
}


def read_meta(root: Path) -> StoreMeta | None:
    """meta.json, or None where there is none; a damaged or foreign one is an error."""
    path = root / "meta.json"
    if not path.exists():
        return None
    if not path.is_file():
        raise UserError(f"{path}: not a file; use another data.data_root")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            shown = brief(tree["format"])
            raise UserError(f"{path}: store format {shown}, this program reads {FORMAT}; preprocess anew")
        return _meta_of(tree)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(
            f"{path}: damaged ({reason}); use another data.data_root, or delete the folder and run "
            "preprocess_latents.py again"
        ) from None


def _meta_of(tree: dict) -> StoreMeta:
    """The contents of meta.json; Mismatch where they cannot be that of a store."""
    meta = made_of(StoreMeta, META, tree, "meta")
    meta.latents = spec_of(tree["latents"], finished=meta.complete)
    styles, entries = set(meta.latents.styles), [entry for names in meta.split.values() for entry in names]
    for entry in entries:
        if entry.partition("/")[0] not in styles:
            raise Mismatch("split", entry, "pictures of the styles")
    if len(set(entries)) < len(entries):
        raise Mismatch("split", entries, "pictures of which no two are the same")
    if meta.complete:
        tally = {name: Counter(entry.partition("/")[0] for entry in meta.split[name]) for name in PARTS}
        for style in meta.latents.styles:
            if meta.counts.get(style) != {name: tally[name][style] for name in PARTS}:
                raise Mismatch(f"counts[{style}]", meta.counts.get(style), "what the split has of the style")
    return meta


#################################################################################
#                        New pictures, on their way in                          #
#################################################################################


@dataclass
class Row:
    """What is stored of one picture."""

    entry: str  # "<style>/<name>.pt", as in meta.json
    source: list[int]  # the picture's fingerprint
    latent: Tensor  # (C, h, w)
    flipped: Tensor | None  # of the mirrored picture
    crops: Tensor | None = None  # (N, C, h, w) of its random crops
    crops_flipped: Tensor | None = None  # of those, mirrored

    @property
    def parts(self) -> dict[str, Tensor]:
        """What there is of it, by name."""
        named = {name: getattr(self, name) for name in ("latent", "flipped", "crops", "crops_flipped")}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def is_finite(self) -> bool:
        """Whether the autoencoder made numbers of the picture."""
        return all(bool(part.isfinite().all()) for part in self.parts.values())


def in_order(squares: Sequence[Tensor], crops: Sequence[Tensor], count: int) -> list[Tensor]:
    """Copies (..., C, h, w) in the order in which a split has them: the centre square and its mirror image, then each
    of the first `count` crops and its mirror image; `crops` are (..., N, C, h, w)."""
    return [*squares, *(part.select(-4, number) for number in range(count) for part in crops)]


@dataclass
class WritePlan:
    """How new pictures are cut into pieces, each the work of one process, and where the pieces go."""

    length: int  # pictures a piece: whole batches
    backlog: int  # files that may wait to be written while the encoder goes on
    shards: list[str] = field(default_factory=list)  # a file name a piece; none where a picture has its own file


def fingerprint(picture: Path) -> list[int]:
    """What tells that a picture file has changed: its size in bytes and its time of change."""
    status = picture.stat()
    return [status.st_size, status.st_mtime_ns]


def is_unchanged(picture: Path, source: list[int] | None) -> bool:
    """Whether the picture file is there and has the fingerprint `source`."""
    try:
        return fingerprint(picture) == source
    except OSError:  # it has gone just now; the reason is told when it is read
        return False


def channel_statistics(parts: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """Per-channel mean and deviation of raw latents, given in parts (n, C, *space); summed in float64."""
    total = squares = torch.zeros((), dtype=torch.float64)
    count = 0
    for part in parts:
        values = part.double().transpose(0, 1).flatten(1)
        total, squares, count = total + values.sum(1), squares + values.square().sum(1), count + values.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    return mean.tolist(), torch.where(std > 1e-6, std, 1.0).tolist()  # a constant channel stays as it is


def shown(sides: Iterable[int]) -> str:
    """Sides for people: 64 x 48."""
    return " x ".join(map(str, sides))
