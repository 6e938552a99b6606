"""Which pictures belong together, so that no recording lies on both sides of the split."""

import csv
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from cli import UserError


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
