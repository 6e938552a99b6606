"""Sentences with a class each, from weighted sources that a JSON file names: read, cleaned, split, drawn.

    {"val_fraction": 0.05,
     "sources": [{"type": "grammar", "sentences": 20000, "weight": 1},
                 {"type": "text", "path": "lines.txt", "label": "news"},
                 {"type": "jsonl", "path": "captions.jsonl", "dataset": "coco", "weight": 3, "longer": "skip"},
                 {"type": "datasets", "path": "wikitext-103", "dataset": "wikitext", "longer": "skip"}]}

Paths are relative to that file. A sentence is held out by a hash of its text, so it is never trained on under one
source and validated under another. A source without labels is one class, called by its name.
"""

import dataclasses
import difflib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from isonext.data.splits import held_out
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.utils.seeding import seeded
from textflow import grammar
from textflow.records import DATASETS, read_datasets_folder, read_json_lines, read_lines, texts_of

TYPES = ("grammar", "text", "jsonl", "datasets")


@dataclass
class Source:
    """One entry of `sources`."""

    type: str  # grammar, text (a sentence a line), jsonl (an object a line), datasets (a folder of save_to_disk)
    path: str | None = None
    val_path: str | None = None  # else val_fraction of the sentences is held out
    name: str | None = None  # else the file's name
    weight: float | None = None  # of what is drawn, relative to the others; null is the number of its sentences
    dataset: str = "plain"  # how records are read: plain, wikitext, coco, audiocaps, llava
    field: str | None = None  # which field of a record holds the text; null is that of the dataset
    label: str | None = None  # the class of all its sentences; null is its name
    label_field: str | None = None  # which field of a record holds its class
    longer: str = "error"  # what a sentence beyond the autoencoder's limit is: an error, or to "skip"
    sentences: int | None = None  # how many at most; of the grammar 20000 where null
    seed: int = 0  # of the grammar's draw


@dataclass
class DataPlan:
    """A data config, checked; its sources are read by `load_corpora`."""

    folder: Path  # that paths are relative to
    sources: list[Source]
    val_fraction: float = 0.05


def read_data_config(path: str | Path) -> DataPlan:
    """Read and check; an unknown key, type or dataset is an error that names what is known."""
    path = Path(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such data config; examples/text/data_config.json is one to start from") from None
    except (UnicodeDecodeError, IsADirectoryError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("sources"), list) or not tree["sources"]:
        raise UserError(f"{path}: a data config is an object with a list of 'sources', at least one")
    _known(tree, ["val_fraction", "sources"], str(path))
    fraction = tree.get("val_fraction", 0.05)
    if not isinstance(fraction, int | float) or not 0 <= fraction <= 0.9:
        raise UserError(f"{path}: val_fraction = {fraction!r}: must be a number from 0 to 0.9")
    return DataPlan(
        path.parent, [_source(entry, f"{path}: source {n}") for n, entry in enumerate(tree["sources"])], fraction
    )


def _known(entry: dict, names: list[str], where: str) -> None:
    for name in entry:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.4)
            raise UserError(
                f"{where}: unknown key {name}; "
                + (f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}")
            )


def _source(entry: Any, where: str) -> Source:
    if not isinstance(entry, dict) or entry.get("type") not in TYPES:
        raise UserError(f"{where}: needs a 'type', one of {', '.join(TYPES)}")
    _known(entry, [field.name for field in dataclasses.fields(Source)], where)
    source = Source(**entry)
    if source.type != "grammar" and not isinstance(source.path, str):
        raise UserError(f"{where}: a source of type {source.type} needs a 'path'")
    if source.dataset not in DATASETS:
        raise UserError(f"{where}: dataset {source.dataset!r} is not one of {', '.join(DATASETS)}")
    if source.longer not in ("error", "skip"):
        raise UserError(f"{where}: longer = {source.longer!r}: must be error or skip")
    numbers = {"weight": source.weight, "sentences": source.sentences, "seed": source.seed}
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise UserError(f"{where}: {name} = {value!r}: must be a number, 0 or more")
    source.name = source.name or (Path(source.path).stem if source.path else source.type)
    return source


#################################################################################
#                                    A split                                    #
#################################################################################


@dataclass
class Corpus:
    """The sentences of one split, those of each source in a row."""

    texts: list[str]
    styles: Tensor  # (n,) int64: the class of each
    classes: list[str]  # their names, in id order; the same for both splits
    counts: list[int]  # sentences of each source
    weights: list[float]  # of each source
    names: list[str]  # of the sources
    longer: list[str]  # of each source

    def __len__(self) -> int:
        return len(self.texts)

    def draw(self, size: int, seed: int, step: int) -> tuple[list[str], Tensor, torch.Generator]:
        """Texts and classes (size,) of step `step`, and the generator for what else the step needs.

        A source by its weight, then a sentence of it: a function of (seed, step), and nothing to store.
        """
        generator = seeded(seed, "text", step)
        weights = torch.tensor([weight * (count > 0) for weight, count in zip(self.weights, self.counts, strict=True)])
        source = torch.multinomial(weights, size, replacement=True, generator=generator)
        counts = torch.tensor(self.counts)
        first = counts.cumsum(0) - counts
        index = first[source] + (torch.rand(size, generator=generator, dtype=torch.float64) * counts[source]).long()
        return [self.texts[i] for i in index], self.styles[index], generator

    def part(self, count: int) -> "Corpus":
        """The first `count` sentences of a fixed mixture: what is generated from and scored."""
        chosen = torch.randperm(len(self), generator=seeded(0, "part", 0))[:count]
        return self.only(sorted(chosen.tolist()))

    def only(self, kept: list[int]) -> "Corpus":
        ends = torch.tensor(self.counts).cumsum(0)
        of_source = Counter(torch.searchsorted(ends, torch.tensor(kept, dtype=torch.int64), right=True).tolist())
        counts = [of_source[number] for number in range(len(self.counts))]
        return dataclasses.replace(self, texts=[self.texts[i] for i in kept], styles=self.styles[kept], counts=counts)


def load_corpora(plan: DataPlan) -> tuple[Corpus, Corpus]:
    """The training and the validation split of all sources; no sentence is in both."""
    pairs = [_read_source(source, plan) for source in plan.sources]  # ((train), (val)) of (text, label) each
    held = {text for _, val in pairs for text, _ in val}
    pairs = [([entry for entry in train if entry[0] not in held], val) for train, val in pairs]
    for source, (train, _) in zip(plan.sources, pairs, strict=True):
        if not train:
            raise UserError(f"{source.path or source.name}: no sentence is left to train on")
    classes = sorted({label for train, val in pairs for _, label in train + val})
    weights = [len(p[0]) if s.weight is None else s.weight for s, p in zip(plan.sources, pairs, strict=True)]
    if not any(weights):
        raise UserError(f"{plan.folder}: all weights of the sources are 0")

    def corpus(split: int) -> Corpus:
        entries = [entry for pair in pairs for entry in pair[split]]
        styles = torch.tensor([classes.index(label) for _, label in entries], dtype=torch.int64)
        counts = [len(pair[split]) for pair in pairs]
        names, longer = [s.name for s in plan.sources], [s.longer for s in plan.sources]
        return Corpus(
            [text for text, _ in entries], styles, classes, counts, [float(w) for w in weights], names, longer
        )

    return corpus(0), corpus(1)


Entries = list[tuple[str, str]]  # (text, label)


def _read_source(source: Source, plan: DataPlan) -> tuple[Entries, Entries]:
    """What one source has to train on and to hold out."""
    if source.type == "grammar":
        texts = grammar.sample(20000 if source.sentences is None else int(source.sentences), source.seed)
        train, val = [(text, grammar.topic_of(text)) for text in texts], None
    elif source.type == "datasets":
        train, val = (_entries(rows, source) for rows in read_datasets_folder(plan.folder / source.path))
    else:
        read = read_lines if source.type == "text" else read_json_lines
        train = _entries(read(plan.folder / source.path), source)
        val = _entries(read(plan.folder / source.val_path), source) if source.val_path else None
    if val is None:
        held = held_out([text for text, _ in train], plan.val_fraction) if train else set()
        train, val = [e for e in train if e[0] not in held], [e for e in train if e[0] in held]
    return train, val


def _entries(rows, source: Source) -> Entries | None:
    """(where, record) pairs to texts and labels; None where the split is not there."""
    if rows is None:
        return None
    entries: Entries = []
    for where, record in rows:
        label = source.label or source.name
        if source.label_field:
            if source.label_field not in record:
                raise UserError(f"{where}: no field {source.label_field!r}; the record has: {', '.join(record)}")
            label = str(record[source.label_field])
        entries += [(text, label) for text in texts_of(record, source.dataset, source.field, where)]
        if source.sentences is not None and len(entries) >= source.sentences:
            return entries[: int(source.sentences)]
    return entries


#################################################################################
#                             What a model can take                             #
#################################################################################


def within_limit(corpus: Corpus, tokenizer: Tokenizer, limit: int) -> Corpus:
    """Without the sentences over the limit where their source says skip; elsewhere they are an error that shows one."""
    source = torch.repeat_interleave(torch.arange(len(corpus.counts)), torch.tensor(corpus.counts)).tolist()
    lengths = [len(row.ids) + 1 for row in tokenizer.encode_batch(corpus.texts)]  # and the end mark
    long = [number for number, length in enumerate(lengths) if length > limit]
    for number in long:
        if corpus.longer[source[number]] == "error":
            raise UserError(
                f"source {corpus.names[source[number]]}: a sentence of {lengths[number]} tokens, the limit is {limit}: "
                f'{corpus.texts[number][:50]!r}...; give the source "longer": "skip", or raise --max_tokens'
            )
    if not long:
        return corpus
    print(f"{len(long)} of {len(corpus)} sentences are longer than {limit} tokens: skipped")
    skipped = set(long)
    return corpus.only([number for number in range(len(corpus)) if number not in skipped])


def check_classes(spec: LatentSpec, corpus: Corpus) -> None:
    """The classes' ids mean the same in the data and in the model."""
    if corpus.classes != spec.styles:
        raise UserError(
            f"the text model's classes are {', '.join(spec.styles)}; the data config has {', '.join(corpus.classes)}: "
            "use the data config that the model was trained with, or another --model_path"
        )
