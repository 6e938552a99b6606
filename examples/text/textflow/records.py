"""Files to records, and records to sentences: where each data set keeps its text, and what has to be cleaned off.

Imports nothing that takes long: download_data.py reads records, too.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from isonext.errors import UserError, first_line

# The field that holds the text: the first of these that a record has.
DATASETS = {
    "plain": ("text",),
    "wikitext": ("text",),
    "coco": ("caption", "captions", "sentences_raw", "sentences"),
    "audiocaps": ("caption",),
    "llava": ("conversations", "messages"),
}
Rows = Iterator[tuple[str, dict]]  # (where, record)


def read_utf8(path: Path) -> str:
    """The text of a file; bytes that are not UTF-8 are an error that names their line."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; check the data config, or get the data by examples/text/download_data.py"
        )
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not UTF-8 text; convert the file (iconv -t utf-8)") from None


def read_lines(path: Path) -> Rows:
    """A sentence a line; empty lines are skipped."""
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if line.strip():
            yield f"{path}: line {number}", {"text": line}


def read_json_lines(path: Path) -> Rows:
    """An object a line."""
    for where, line in read_lines(path):
        try:
            record = json.loads(line["text"])
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error.msg})") from None
        if not isinstance(record, dict):
            raise UserError(f'{where}: an object such as {{"text": "..."}} is needed, not {line["text"][:40]}')
        yield where, record


def read_datasets_folder(path: Path) -> tuple[Rows, Rows | None]:
    """Train and validation records of a folder of `datasets`' save_to_disk; the latter where it has some."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; make it with Dataset.save_to_disk, or use download_data.py")
    try:
        from datasets import Dataset, load_from_disk
    except ImportError:
        raise UserError(f"{path}: to read it: pip install -r requirements/text.txt") from None
    try:
        found = load_from_disk(str(path))
    except Exception as error:  # of many types: not a folder of datasets, a damaged one, one of another version
        reason = first_line(error)
        raise UserError(f"{path}: not a folder that datasets' save_to_disk wrote ({reason})") from None
    splits = {"train": found} if isinstance(found, Dataset) else found
    if "train" not in splits:
        raise UserError(f"{path}: has no split 'train', only {', '.join(splits)}")
    val = next((splits[name] for name in ("validation", "val", "dev") if name in splits), None)
    return _rows(path, splits["train"]), None if val is None else _rows(path, val)


def _rows(path: Path, split: Iterable[dict]) -> Rows:
    for number, record in enumerate(split):
        yield f"{path}: record {number}", record


#################################################################################
#                              A record's sentences                             #
#################################################################################


def texts_of(record: dict, dataset: str, field: str | None, where: str) -> list[str]:
    """The sentences of one record; none for an empty line, a heading, or a question without answer."""
    fields = (field,) if field else DATASETS[dataset]
    value = next((record[name] for name in fields if name in record), None)
    if value is None:
        raise UserError(
            f"{where}: no field {' or '.join(map(repr, fields))}; the record has: {', '.join(record) or 'none'}"
        )
    texts = [" ".join(text.replace("<image>", " ").split()) for text in _flat(value, where)]
    if dataset == "wikitext":
        texts = [sentence for text in texts for sentence in _wikitext(text)]
    return [text for text in texts if text]


def _flat(value: Any, where: str) -> list[str]:
    """The texts inside a field: a text, a list, COCO's {"raw": text}, the answers of a conversation."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for each in value for text in _flat(each, where)]
    if isinstance(value, dict) and "raw" in value:
        return _flat(value["raw"], where)
    speaker = next((name for name in ("from", "role") if isinstance(value, dict) and name in value), None)
    said = next((name for name in ("value", "content") if isinstance(value, dict) and name in value), None)
    if speaker and said:
        if isinstance(value[speaker], list):  # datasets keeps a list of objects as an object of lists
            turns = zip(value[speaker], value[said], strict=True)
        else:
            turns = [(value[speaker], value[said])]
        return [text for who, text in turns if who in ("gpt", "assistant")]
    raise UserError(f"{where}: a text was expected, not {json.dumps(value, default=str)[:60]}")


def _wikitext(text: str) -> list[str]:
    """Sentences of a paragraph of WikiText, whose tokens are set apart by blanks; none of a heading `= Title =`."""
    if text.startswith("= ") and text.endswith(" ="):
        return []
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    text = re.sub(r" ([,.;:!?)])", r"\1", text)
    return re.split(r"(?<=[.!?]) (?=[A-Z\"])", text)
