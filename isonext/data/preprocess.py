"""Folders of pictures to a latent store: what is there already, what is new, statistics and split."""

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from isonext.config import Config, DataConfig
from isonext.data import images
from isonext.data.autoencoder import Autoencoder, load_autoencoder
from isonext.data.dataset import own_store
from isonext.data.pt_store import PtStore
from isonext.data.shard_store import ShardStore, refuse_external
from isonext.data.shards import OURS
from isonext.data.splits import group_pictures, split_off
from isonext.data.store import LatentSpec, Row, StoreMeta, WritePlan, channel_statistics, fingerprint, read_meta
from isonext.data.style_folders import find_styles, held_out_hint
from isonext.errors import UserError
from isonext.utils import distributed
from isonext.utils.distributed import rank
from isonext.utils.io import in_background, refuse_inside

BATCH = 16  # pictures at once, at most; of large ones the autoencoder takes fewer
LONGEST_NAME = 255  # bytes, on the file systems that are in use


@dataclass
class Report:
    """What a run did, and the store's meta as it is now."""

    meta: StoreMeta
    encoded: int = 0
    kept: int = 0
    removed: int = 0
    skipped: list[str] = field(default_factory=list)  # one line a bad picture
    left_out: Counter[str] = field(default_factory=Counter)  # other files by suffix
    seconds: float = 0.0  # of the encoding


@dataclass
class Work:
    """What there is to do, as the first process found it."""

    store: PtStore | ShardStore
    todo: list[tuple[str, Path]]  # entries to encode, and their pictures
    plan: WritePlan
    removed: int  # entries whose picture has gone
    batch: int = BATCH


def preprocess(config: Config, device: torch.device, quiet: bool | None = None, batch: int = BATCH) -> Report:
    """Bring the store at `data_root` in line with the pictures below `raw_data_root`.

    Of several processes the first one looks what there is to do, before, and completes the store, after; whole batches
    of it are shared out between them, so that the bits are those of one process.
    """
    raw_root = Path(config.data.raw_data_root)
    refuse_inside(config.data.data_root, "data.data_root", config.data.raw_data_root, "data.raw_data_root")
    left_out: Counter[str] = Counter()
    styles = find_styles(raw_root, config.data.num_classes, left_out)
    pictures = {f"{style}/{name.as_posix()}.pt": raw_root / style / name for style in styles for name in styles[style]}
    unnamable = _take_out_long_names(pictures) if config.data.format == "pt" else []
    groups = group_pictures(pictures, raw_root, config.data.split_by)
    codec = load_autoencoder(config.autoencoder.name, device)
    if distributed.is_main() and (hint := held_out_hint(raw_root, styles)):
        print(f"warning: {hint}", file=sys.stderr)
    with distributed.folder_lock(config.data.data_root):
        work = distributed.from_main(
            _find_work(config.data, codec, list(styles), pictures, batch) if distributed.is_main() else None
        )
        started = time.perf_counter()
        shares = distributed.gather(encode(work, codec, config, device, quiet))
        report = None
        if distributed.is_main():
            seconds = time.perf_counter() - started
            report = _tally(work, {entry: reason for share in shares for entry, reason in share.items()}, pictures)
            report.seconds, report.left_out = seconds, left_out
            report.skipped += unnamable
            _check_styles(raw_root, report.meta.latents.styles, pictures, report.skipped)
            _complete(work.store, {entry: groups[entry] for entry in pictures}, config.data.val_fraction)
        return distributed.from_main(report)


def _take_out_long_names(pictures: dict[str, Path]) -> list[str]:
    """Take out of entry -> picture those of which the entry's file cannot be named; returns a line for each."""
    long = [entry for entry in pictures if len(os.fsencode(entry.rpartition("/")[2])) > LONGEST_NAME]
    why = f"its name is longer than {LONGEST_NAME - 3} bytes; shorten it, or use --format safetensors"
    return [f"{pictures.pop(entry)}: {why}" for entry in long]


#################################################################################
#                              What is there already                            #
#################################################################################


def _find_work(data: DataConfig, codec: Autoencoder, styles: list[str], pictures: dict[str, Path], batch: int) -> Work:
    """Take stock of the store, which is not complete from here on. `pictures` is entry -> picture."""
    root = Path(data.data_root)
    meta = _prepare_meta(root, data, codec, styles)
    store = own_store(root, meta)
    if data.format == "pt":
        _refuse_others(root, meta, pictures)
    meta.written = sorted(meta.own | set(store.may_write(pictures, batch)))
    meta.write(root)
    removed, current = store.take_stock(pictures)
    todo = [(entry, picture) for entry, picture in pictures.items() if entry not in current]
    return Work(store, todo, store.plan(len(todo), batch), removed, batch)


def _prepare_meta(root: Path, data: DataConfig, codec: Autoencoder, styles: list[str]) -> StoreMeta:
    """The store's meta, not complete until the end; an existing store of another kind is an error, not a mixture."""
    size = data.image_size
    if size % codec.factor:
        raise UserError(f"--target_size {size}: must be a multiple of {codec.factor} for the autoencoder {codec.name}")
    if codec.side not in (None, size):
        raise UserError(f"--target_size {size}: the autoencoder {codec.name} takes pictures of {codec.side} px alone")
    spec = LatentSpec(codec.name, codec.channels, codec.factor, size, styles, autoencoder_digest=codec.digest)
    meta = StoreMeta(spec, data.flip, layout=data.format, crops=data.crops)
    old = read_meta(root)
    if old is None:
        refuse_external(root)
        _refuse_foreign(root)
        return meta
    if not spec.has_autoencoder_of(old.latents):
        raise UserError(
            f"{root}: the store has autoencoder {old.latents.autoencoder_beside(spec)}, not "
            f"{spec.autoencoder_beside(old.latents)}; use another data.data_root or delete it"
        )
    for key, was, now in (
        ("size", old.latents.image_size, size),
        ("channels", old.latents.channels, codec.channels),
        ("format", old.layout, data.format),
    ):
        if was != now:
            raise UserError(f"{root}: the store has {key} {was}, not {now}; use another data.data_root or delete it")
    refuse_external(root, OURS)
    spec.styles = _continued_styles(root, old, data.raw_data_root, styles)
    meta.written = sorted(old.own)
    spec.autoencoder_digest = old.latents.autoencoder_digest  # of what lies there; before 0.2.0 nobody asked
    return meta


def _refuse_others(root: Path, meta: StoreMeta, entries: Iterable[str]) -> None:
    """UserError where an entry's file is there that no run of this program has written."""
    if not meta.own and read_meta(root):  # stopped before 0.2.0 wrote down what a run may write
        return
    for entry in entries:
        if entry not in meta.own and (root / entry).exists():
            raise UserError(
                f"{root / entry}: is there, and meta.json does not say that this program wrote it; move it away"
            )


def _refuse_foreign(root: Path) -> None:
    """UserError where a folder without a store holds files: they are somebody else's. Hidden ones may stay."""
    found = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    if found:
        raise UserError(
            f"{root}: is no latent store and not empty ({found[0]}); give data.data_root a new or an empty folder"
        )


def _continued_styles(root: Path, old: StoreMeta, raw_root: str, styles: list[str]) -> list[str]:
    """Styles in id order: those of the store keep their ids, new ones come behind them."""
    stored = own_store(root, old).stored_styles()
    # A style that has no latents yet (all its pictures were bad) may go as it came.
    known = [style for style in old.latents.styles if style in styles or style in stored]
    gone = [style for style in known if style not in styles]
    if gone:
        raise UserError(f"{raw_root}: the style folder {gone[0]} has vanished; put it back, or delete {root}")
    return known + [style for style in styles if style not in known]


#################################################################################
#                                    Encoding                                   #
#################################################################################


class SquarePictures(Dataset):
    """Decodes and resizes in worker processes: item -> (uint8 (1 + crops, 3, size, size), fingerprint), the centre
    square first, or the reason why not."""

    def __init__(self, todo: list[tuple[str, Path]], size: int, crops: int) -> None:
        """`todo`: entries and their pictures."""
        self.todo, self.size, self.crops = todo, size, crops

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, item: int) -> tuple[int, Tensor | None, list[int] | str]:
        entry, path = self.todo[item]
        try:
            with images.one_picture(path):
                source, picture = fingerprint(path), images.open_picture(path)
                squares = [images.square(picture, self.size)]
                squares += [images.random_square(picture, self.size, entry, number) for number in range(self.crops)]
                return item, torch.stack([images.to_bytes(square) for square in squares]), source
        except UserError as error:
            return item, None, str(error)


def encode(
    work: Work, codec: Autoencoder, config: Config, device: torch.device, quiet: bool | None
) -> dict[str, str | None]:
    """Encode and write this process's share of the work: entry -> None, or why its picture was skipped.

    Batches are cut before they are shared out: the bits of a latent may depend on the size of its batch. A piece of
    the plan is the work of one process.
    """
    todo, length, batch = work.todo, work.plan.length, work.batch
    pieces = [range(len(todo))[start : start + length] for start in range(0, len(todo), length)]
    own = [
        list(p[start : start + batch])
        for p in pieces[rank() :: distributed.world()]
        for start in range(0, len(p), batch)
    ]
    workers = min(
        config.training.num_workers, len(own) * batch, math.ceil((os.cpu_count() or 1) / distributed.local_world())
    )
    loader = DataLoader(
        SquarePictures(todo, config.data.image_size, config.data.crops),
        batch_sampler=own,
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context="spawn" if workers and device.type != "cpu" else None,
    )
    results: dict[str, str | None] = {}
    rows: list[Row] = []
    total, quiet = sum(map(len, own)), quiet if distributed.is_main() else True
    progress = tqdm(total=total, desc="encoding", unit="picture", disable=quiet)
    with progress as bar, in_background(work.plan.backlog) as submit:
        for items in loader:
            encoded, bad = _encoded(items, todo, codec, config.data.flip, device)
            rows += encoded
            results |= dict.fromkeys((row.entry for row in encoded), None)
            results |= bad
            last = items[-1][0]
            if last == pieces[last // length][-1]:
                for function, *arguments in work.store.writes(rows, work.plan, last // length):
                    submit(function, *arguments)
                rows = []
            bar.update(len(items))
    return results


def _encoded(
    items: list, todo: list[tuple[str, Path]], codec: Autoencoder, flip: bool, device: torch.device
) -> tuple[list[Row], dict[str, str]]:
    """A batch of `SquarePictures`: the rows of the good ones, and entry -> what is wrong with a bad one."""
    bad = {todo[item][0]: reason for item, picture, reason in items if picture is None}
    good = [item for item in items if item[1] is not None]
    if not good:
        return [], bad
    plain, flipped = [], []
    for squares in torch.stack([pictures for _, pictures, _ in good], 1):  # of all pictures the same one
        pixels = images.to_pixels(squares.to(device))
        plain.append(codec.encode(pixels).cpu())
        flipped += [codec.encode(pixels.flip(-1)).cpu()] if flip else []
    rows = []
    for place, (item, _, source) in enumerate(good):
        entry, path = todo[item]
        row = Row(entry, source, plain[0][place], flipped[0][place] if flip else None)
        if len(plain) > 1:
            row.crops = torch.stack([part[place] for part in plain[1:]])
            row.crops_flipped = torch.stack([part[place] for part in flipped[1:]]) if flip else None
        if row.is_finite:
            rows.append(row)
        else:
            bad[entry] = f"{path}: the autoencoder {codec.name} makes no finite numbers of it"
    return rows, bad


#################################################################################
#                              The store completed                              #
#################################################################################


def _tally(work: Work, results: dict[str, str | None], pictures: dict[str, Path]) -> Report:
    """Count what was encoded, and take out of `pictures` and the store what was skipped."""
    report = Report(work.store.meta, kept=len(pictures) - len(work.todo), removed=work.removed)
    for entry, _ in work.todo:
        if reason := results[entry]:
            report.skipped.append(reason)
            work.store.discard(entry)
            del pictures[entry]
        else:
            report.encoded += 1
    return report


def _check_styles(raw_root: Path, styles: list[str], entries: Iterable[str], skipped: list[str]) -> None:
    """A style all of whose pictures are bad is an error that shows the first reason."""
    readable = {entry.partition("/")[0] for entry in entries}
    for style in styles:
        if style not in readable:
            reason = next(line for line in skipped if line.startswith(str(raw_root / style)))
            raise UserError(f"{raw_root / style}: no picture of this style can be read; the first: {reason}")


def _complete(store: PtStore | ShardStore, groups: dict[str, str], val_fraction: float) -> None:
    """Split, statistics and counts: the store is complete. `groups`: every entry and its group."""
    meta, val = store.meta, split_off(groups, val_fraction)
    meta.written = store.left()
    meta.split = {"train": sorted(groups.keys() - val), "val": sorted(val)}
    tally = {name: Counter(entry.partition("/")[0] for entry in names) for name, names in meta.split.items()}
    meta.counts = {style: {name: tally[name][style] for name in tally} for style in meta.latents.styles}
    spec = meta.latents
    spec.mean, spec.std = channel_statistics(store.latents(meta.split["train"]))
    if not spec.is_finite:  # pictures of this run were looked at; these are of an earlier version
        entry = next(name for name in groups if not all(part.isfinite().all() for part in store.latents([name])))
        raise UserError(f"{store.root}: the latent of {entry} is not finite; delete the store and preprocess anew")
    meta.complete = True
    meta.write(store.root)


def print_report(report: Report, root: Path, echo: Callable[[str], None] = print) -> None:
    for number, (style, counts) in enumerate(report.meta.counts.items()):
        echo(f"style {number} {style}: {counts['train']} to train on, {counts['val']} held out")
    rate = f", {report.encoded / report.seconds:.1f} pictures/s" if report.encoded else ""
    echo(f"{root}: {report.encoded} encoded, {report.kept} kept, {report.removed} removed{rate}")
    for reason in report.skipped:
        echo(f"skipped: {reason}")
    if report.skipped:
        echo(f"{len(report.skipped)} pictures were skipped")
    if report.left_out:
        echo(images.left_out_line(report.left_out))
