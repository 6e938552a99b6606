"""Folders of pictures to a latent store: what is there already, what is new, statistics and split."""

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from isonext.config import Config
from isonext.data import images
from isonext.data.autoencoder import load_autoencoder
from isonext.data.dataset import sharded
from isonext.data.shards import OURS, Row, ShardPlan, plan_shards, read_shard, shard_paths, tidy, write_shard
from isonext.data.splits import group_pictures, split_off
from isonext.data.store import (
    LatentSpec,
    StoreMeta,
    channel_statistics,
    fingerprint,
    read_latent,
    read_meta,
    write_latent,
)
from isonext.errors import UserError
from isonext.utils import distributed
from isonext.utils.distributed import rank
from isonext.utils.io import in_background, natural_order, remove_unfinished

BATCH = 16  # pictures at once


@dataclass
class Report:
    encoded: int = 0
    kept: int = 0
    removed: int = 0
    skipped: list[str] = field(default_factory=list)  # one line a bad picture
    seconds: float = 0.0
    meta: StoreMeta | None = None


def preprocess(config: Config, device: torch.device, quiet: bool | None = None) -> Report:
    """Bring the store at `data_root` in line with the pictures below `raw_data_root`.

    Of several processes the first one looks what there is to do, before, and completes the store, after; whole batches
    of it are shared out between them, so that the bits are those of one process.
    """
    raw_root, root = Path(config.data.raw_data_root), Path(config.data.data_root)
    pictures = find_styles(raw_root, config.data.num_classes)
    entries = {
        f"{style}/{name.as_posix()}.pt": raw_root / style / name for style in pictures for name in pictures[style]
    }
    groups = group_pictures(entries, raw_root, config.data.split_by)
    codec = load_autoencoder(config.autoencoder.name, device)
    report = todo = plan = None
    if distributed.is_main():
        meta = _prepare_meta(root, config, codec, list(pictures))
        meta.write(root)  # not complete from here on
        report = Report(meta=meta)
        report.removed, current = _take_stock(root, meta, entries)
        todo = [(entry, path) for entry, path in entries.items() if entry not in current]
        plan = _plan(root, meta, len(todo))
    todo, plan = distributed.from_main((todo, plan))
    started = time.perf_counter()
    shares = distributed.gather(encode(todo, root, codec, config, device, quiet, plan))
    if report:
        report.seconds = time.perf_counter() - started
        _complete(report, root, todo, {entry: reason for share in shares for entry, reason in share.items()}, entries)
        _check_styles(raw_root, report.meta.latents.styles, entries, report.skipped)
        _finish(root, report.meta, {entry: groups[entry] for entry in entries}, config.data.val_fraction)
    return distributed.from_main(report)


def find_styles(raw_root: Path, expected: int | None) -> dict[str, list[Path]]:
    """Style name -> its pictures; the folders are the styles, in natural order."""
    if not raw_root.is_dir():
        raise UserError(f"{raw_root}: no such folder; put one folder of pictures a style there (data.raw_data_root)")
    folders = [path for path in raw_root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    styles = {path.name: images.find_pictures(path) for path in sorted(folders, key=lambda p: natural_order(p.name))}
    if not styles:
        raise UserError(f"{raw_root}: holds no folders; make one folder of pictures a style there")
    for name, pictures in styles.items():
        if not pictures:
            raise UserError(f"{raw_root / name}: holds no pictures ({' '.join(images.SUFFIXES)}); fill or remove it")
    if expected not in (None, len(styles)):
        raise UserError(f"{raw_root}: {len(styles)} folders ({', '.join(styles)}), but data.num_classes = {expected}")
    return styles


#################################################################################
#                              What is there already                            #
#################################################################################


def _prepare_meta(root: Path, config: Config, codec: nn.Module, styles: list[str]) -> StoreMeta:
    """The store's meta, not complete until the end; an existing store of another kind is an error, not a mixture."""
    size = config.data.image_size
    if size % codec.factor:
        raise UserError(f"--target_size {size}: must be a multiple of {codec.factor} for the autoencoder {codec.name}")
    spec = LatentSpec(codec.name, codec.channels, codec.factor, size, styles)
    old = read_meta(root)
    if old is None:
        for path in shard_paths(root):
            if not read_shard(path).pictures:
                raise UserError(f"{path}: is another program's; use another data.data_root for the store")
    else:
        for key, was, now in (
            ("autoencoder", old.latents.autoencoder, codec.name),
            ("size", old.latents.image_size, size),
            ("channels", old.latents.channels, codec.channels),
            ("format", old.layout, config.data.format),
        ):
            if was != now:
                raise UserError(
                    f"{root}: the store has {key} {was}, not {now}; use another data.data_root or delete it"
                )
        # A style that has no latents yet (all its pictures were bad) may go as it came.
        stored = _stored_styles(root, old)
        kept = [style for style in old.latents.styles if style in styles or style in stored]
        gone = [style for style in kept if style not in styles]
        if gone:
            raise UserError(
                f"{config.data.raw_data_root}: the style folder {gone[0]} has vanished; put it back, or delete {root}"
            )
        # Ids of known styles stay; new styles come behind them.
        spec.styles = kept + [style for style in styles if style not in kept]
    return StoreMeta(spec, config.data.flip, layout=config.data.format)


def _stored_styles(root: Path, meta: StoreMeta) -> set[str]:
    """The styles that have latents in the store."""
    if meta.layout == "pt":
        return {style for style in meta.latents.styles if any((root / style).rglob("*.pt"))}
    return {entry.partition("/")[0] for entry in _stored_in_shards(root)}


def _stored_in_shards(root: Path) -> set[str]:
    """The entries of all shards but the damaged ones."""
    entries = set()
    for path in shard_paths(root, OURS):
        with contextlib.suppress(UserError):
            entries |= read_shard(path).pictures.keys()
    return entries


def _take_stock(root: Path, meta: StoreMeta, entries: dict[str, Path]) -> tuple[int, set[str]]:
    """Clear away what is stale: how many entries' pictures have gone, and which entries are there and stay."""
    if meta.layout == "pt":
        removed = _remove_stale(root, meta, entries)
        return removed, {entry for entry, path in entries.items() if _is_current(root / entry, path, meta.flip)}
    remove_unfinished(root)
    removed = len(_stored_in_shards(root) - entries.keys())

    def wanted(entry: str, source: list[int]) -> bool:
        try:
            return entry in entries and fingerprint(entries[entry]) == source
        except OSError:  # it has gone just now; the reason is told when it is read
            return False

    return removed, tidy(root, wanted, 1 + meta.flip, meta.latents.styles)


def _plan(root: Path, meta: StoreMeta, count: int) -> ShardPlan | None:
    """Which shards `count` new pictures go to; None where each has a file of its own."""
    if meta.layout == "pt":
        return None
    spec = meta.latents
    row_bytes = 4 * (1 + meta.flip) * spec.channels * math.prod(spec.space)
    return plan_shards(root, count, row_bytes, BATCH, spec.styles)


def _remove_stale(root: Path, meta: StoreMeta, entries: dict[str, Path]) -> int:
    """Delete entries whose picture has gone, and what a killed run left unfinished."""
    removed = 0
    stored = [path for style in meta.latents.styles for path in (root / style).rglob("*.pt")]
    for folder in {root, *(path.parent for path in stored)}:
        remove_unfinished(folder)
    for path in stored:
        if path.exists() and path.relative_to(root).as_posix() not in entries:
            path.unlink()
            removed += 1
    return removed


def _is_current(entry: Path, picture: Path, flip: bool) -> bool:
    if not entry.exists():
        return False
    try:
        stored = read_latent(entry)
    except UserError:  # damaged: encode it again
        return False
    return stored.get("source") == fingerprint(picture) and ("flipped" in stored or not flip)


#################################################################################
#                                    Encoding                                   #
#################################################################################


class SquarePictures(Dataset):
    """Decodes and resizes in worker processes: item -> (uint8 (3, size, size), fingerprint), or the reason why not."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> tuple[int, Tensor | None, list[int] | str]:
        path = self.paths[item]
        try:
            source = fingerprint(path)
            return item, images.to_bytes(images.square(images.open_picture(path), self.size)), source
        except (UserError, OSError) as error:
            return item, None, str(error)


def encode(
    todo: list[tuple[str, Path]],
    root: Path,
    codec: nn.Module,
    config: Config,
    device: torch.device,
    quiet: bool | None,
    plan: ShardPlan | None = None,  # None: a file for each picture
) -> dict[str, str | None]:
    """Encode and write this process's share of `todo`: entry -> None, or why its picture was skipped.

    Batches are cut before they are shared out: the bits of a latent may depend on the size of its batch. A shard is
    the work of one process.
    """
    length = plan.length if plan else BATCH
    pieces = [range(len(todo))[start : start + length] for start in range(0, len(todo), length)]
    own = [p[start : start + BATCH] for p in pieces[rank() :: distributed.world()] for start in range(0, len(p), BATCH)]
    workers = min(
        config.training.num_workers, len(own) * BATCH, math.ceil((os.cpu_count() or 1) / distributed.local_world())
    )
    loader = DataLoader(
        SquarePictures([path for _, path in todo], config.data.image_size),
        batch_sampler=own,
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context="spawn" if workers and device.type != "cpu" else None,
    )
    results, rows = {}, []
    total, quiet = sum(map(len, own)), quiet if distributed.is_main() else True
    at_once = 0 if plan else 4 * BATCH  # a shard is written before the next is begun: a kill costs no more than one
    with tqdm(total=total, desc="encoding", unit="picture", disable=quiet) as bar, in_background(at_once) as submit:
        for items in loader:
            rows += _encoded(items, todo, codec, config.data.flip, device)
            results |= {todo[item][0]: source if picture is None else None for item, picture, source in items}
            last = items[-1][0]
            if last == pieces[last // length][-1]:
                for function, *arguments in _writes(root, rows, plan, last // length):
                    submit(function, *arguments)
                rows = []
            bar.update(len(items))
    return results


def _encoded(
    items: list, todo: list[tuple[str, Path]], codec: nn.Module, flip: bool, device: torch.device
) -> list[Row]:
    """A batch of `SquarePictures` less the bad ones."""
    good = [item for item in items if item[1] is not None]
    if not good:
        return []
    pixels = images.to_pixels(torch.stack([picture for _, picture, _ in good]).to(device))
    plain = codec.encode(pixels).cpu()
    flipped = codec.encode(pixels.flip(-1)).cpu() if flip else [None] * len(good)
    return [
        Row(todo[item][0], source, latent, mirror)
        for (item, _, source), latent, mirror in zip(good, plain, flipped, strict=True)
    ]


def _writes(root: Path, rows: list[Row], plan: ShardPlan | None, piece: int) -> Iterator[tuple]:
    """The calls, function first, that write `rows`: a file each, or all to the shard of their piece of the work."""
    if plan is None:
        for row in rows:
            yield write_latent, root / row.entry, row.latent, row.flipped, row.source
    elif rows:
        yield write_shard, root / plan.names[piece], rows, plan.styles


def _complete(
    report: Report, root: Path, todo: list[tuple[str, Path]], results: dict[str, str | None], entries: dict[str, Path]
) -> None:
    """Count what was encoded, and take out of `entries` and the store what was skipped."""
    report.kept = len(entries) - len(todo)
    for entry, _ in todo:
        if results[entry]:
            report.skipped.append(results[entry])
            (root / entry).unlink(missing_ok=True)
            del entries[entry]
        else:
            report.encoded += 1


def _check_styles(raw_root: Path, styles: list[str], entries: Iterable[str], skipped: list[str]) -> None:
    """A style all of whose pictures are bad is an error that shows the first reason."""
    readable = {entry.partition("/")[0] for entry in entries}
    for style in styles:
        if style not in readable:
            reason = next(line for line in skipped if line.startswith(str(raw_root / style)))
            raise UserError(f"{raw_root / style}: no picture of this style can be read; the first: {reason}")


def _finish(root: Path, meta: StoreMeta, groups: dict[str, str], val_fraction: float) -> None:
    """Split, statistics and counts: the store is complete. `groups`: every entry and its group."""
    val = split_off(groups, val_fraction)
    meta.split = {"train": sorted(groups.keys() - val), "val": sorted(val)}
    tally = {name: Counter(entry.partition("/")[0] for entry in names) for name, names in meta.split.items()}
    meta.counts = {style: {name: tally[name][style] for name in tally} for style in meta.latents.styles}
    meta.latents.mean, meta.latents.std = channel_statistics(_training_latents(root, meta))
    meta.complete = True
    meta.write(root)


def _training_latents(root: Path, meta: StoreMeta) -> Iterator[Tensor]:
    """Those of the training split, mirrored copies included, in parts (n, C, h, w)."""
    if meta.layout != "pt":
        yield from (torch.from_numpy(part) for _, _, part in sharded(root, meta, meta.split["train"]).parts())
        return
    for name in meta.split["train"]:
        entry = read_latent(root / name)
        for part in ("latent", "flipped") if meta.flip else ("latent",):
            yield entry[part][None]


def print_report(report: Report, root: Path, echo: Callable[[str], None] = print) -> None:
    for number, (style, counts) in enumerate(report.meta.counts.items()):
        echo(f"style {number} {style}: {counts['train']} to train on, {counts['val']} held out")
    rate = f", {report.encoded / report.seconds:.1f} pictures/s" if report.encoded else ""
    echo(f"{root}: {report.encoded} encoded, {report.kept} kept, {report.removed} removed{rate}")
    for reason in report.skipped:
        echo(f"skipped: {reason}")
    if report.skipped:
        echo(f"{len(report.skipped)} pictures were skipped")
