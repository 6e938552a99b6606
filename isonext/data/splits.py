"""The split: which pictures belong together, and which of them are held out, by hashes of their names."""

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from isonext.errors import UserError


def group_pictures(entries: Iterable[str], raw_root: Path, split_by: str) -> dict[str, str]:
    """Entry `<style>/<picture>.pt` -> its group, of which all are held out or none.

    picture           each by itself
    folder-prefix     <style>/<folder>/x.png: the folders; <style>/<group>_0001.png: the name up to its last `_`
    FILE.csv          columns `path` (relative to `raw_root`) and `group`; a group may have pictures of many styles
    """
    if split_by == "picture":
        return {entry: entry for entry in entries}
    pictures = {entry: entry.removesuffix(".pt") for entry in entries}
    if split_by == "folder-prefix":
        return {entry: _recording(PurePosixPath(picture)) for entry, picture in pictures.items()}
    if not split_by.endswith(".csv"):
        raise UserError(f"data.split_by = {split_by}: must be picture, folder-prefix, or a .csv file")
    table = _read_table(Path(split_by))
    missing = [picture for picture in pictures.values() if picture not in table]
    if missing:
        raise UserError(f"{split_by}: lacks {len(missing)} pictures of {raw_root}, the first is {missing[0]}; add them")
    return {entry: table[picture] for entry, picture in pictures.items()}


def _recording(picture: PurePosixPath) -> str:
    """The style comes first: folders and prefixes of the same name in two styles are two groups."""
    style, *folders, _ = picture.parts
    return "/".join((style, *(folders or [picture.stem.rpartition("_")[0] or picture.stem])))


def _read_table(path: Path) -> dict[str, str]:
    """Path -> group."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"path", "group"} <= set(rows.fieldnames or ()):
                raise UserError(f"{path}: its first line must name the columns path,group")
            table: dict[str, str] = {}
            for row in rows:
                if not (row["path"] and row["group"]):
                    raise UserError(f"{path}: line {rows.line_num}: needs a path and a group")
                if table.setdefault(row["path"], row["group"]) != row["group"]:
                    raise UserError(f"{path}: line {rows.line_num}: {row['path']} has another group above")
            return table
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of groups (data.split_by)") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV table ({error})") from None


def held_out(names: Iterable[str], fraction: float) -> set[str]:
    """The names of one style's validation split: those whose hash falls below `fraction`.

    A hash, not a shuffle, so that adding pictures never moves one from validation to training. Few pictures may
    leave the split empty; that of the highest hash is always trained on, so that no style is held out whole.
    """
    rank = {
        name: int(hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8], 16) / 2**32 for name in names
    }
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
