"""Get sentences from the Hugging Face hub: WikiText, COCO captions, AudioCaps, LLaVA's answers; their text alone.

python examples/text/download_data.py --wikitext --coco --audiocaps --llava-cc3m --streaming --max-samples 1000
python examples/text/download_data.py --coco --subset-fraction 0.01 --data-root data/text

Writes DATA_ROOT/<name>/train.jsonl and, where the hub has such a split, val.jsonl; and DATA_ROOT/data_config.json,
which names all that lie there and is what train_text.py takes. HF_ENDPOINT chooses a mirror, HF_TOKEN an account.
"""

import argparse
import itertools
import json
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isonext.errors import UserError, first_line
from isonext.utils.cli import new_parser, run
from textflow.records import texts_of


@dataclass(frozen=True)
class Remote:
    """A data set of the hub."""

    repo: str
    config: str | None
    splits: dict[str, str]  # ours -> theirs
    dataset: str  # how its records are read, see textflow/records.py
    file: str | None = None  # the one file of the repository that is wanted, where not all are


REMOTES = {
    "wikitext": Remote(
        "Salesforce/wikitext", "wikitext-103-raw-v1", {"train": "train", "val": "validation"}, "wikitext"
    ),
    "coco": Remote("jxie/coco_captions", None, {"train": "train", "val": "validation"}, "coco"),
    "audiocaps": Remote("d0rj/audiocaps", None, {"train": "train", "val": "validation"}, "audiocaps"),
    "llava-cc3m": Remote("liuhaotian/LLaVA-CC3M-Pretrain-595K", None, {"train": "train"}, "llava", "chat.json"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Get sentences from the Hugging Face hub.", config=False)
    for name, remote in REMOTES.items():
        parser.add_argument(f"--{name}", action="store_true", help=remote.repo)
    parser.add_argument(
        "--streaming", action="store_true", help="read record by record; nothing is stored but the text"
    )
    parser.add_argument("--max-samples", type=int, metavar="N", help="at most so many records of each split")
    parser.add_argument(
        "--subset-fraction", type=float, default=1.0, metavar="F", help="of the records, drawn by chance"
    )
    parser.add_argument("--data-root", default="data/text", help="where the files go")
    return parser


def main(args: argparse.Namespace) -> None:
    names = [name for name in REMOTES if getattr(args, name.replace("-", "_"))]
    if not names:
        raise UserError("nothing to get: name one or more of " + " ".join(f"--{name}" for name in REMOTES))
    if not 0 < args.subset_fraction <= 1:
        raise UserError(f"--subset-fraction {args.subset_fraction}: must be above 0 and at most 1")
    if args.max_samples is not None and args.max_samples < 1:
        raise UserError(f"--max-samples {args.max_samples}: must be 1 or more")
    try:
        import datasets  # noqa: F401  here, so that --help is instant and a missing one is said before any work
    except ImportError:
        raise UserError("datasets is not installed: pip install -r requirements/text.txt") from None
    root = Path(args.data_root)
    for name in names:
        for ours, theirs in REMOTES[name].splits.items():
            count = fetch(REMOTES[name], theirs, root / name / f"{ours}.jsonl", args)
            print(f"{root / name / ours}.jsonl: {count} sentences")
    print(f"{write_data_config(root)}: give it to train_text.py as --data_config")


def fetch(remote: Remote, split: str, path: Path, args: argparse.Namespace) -> int:
    """One split to a file of {"text"} lines, whole or not at all; returns their number."""
    from isonext.utils.io import written_whole

    records = itertools.islice(_chosen(_records(remote, split, args.streaming), args.subset_fraction), args.max_samples)
    count = 0
    with written_whole(path) as beside, open(beside, "w", encoding="utf-8") as file:
        for number, record in enumerate(records):
            for text in texts_of(record, remote.dataset, None, f"{remote.repo}: record {number}"):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                count += 1
        if not count:
            raise UserError(f"{remote.repo}: split {split} has no sentence in what was taken; take more of it")
    return count


def _records(remote: Remote, split: str, streaming: bool) -> Iterator[dict]:
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the last one is told below
    try:
        yield from load_dataset(remote.repo, remote.config, split=split, streaming=streaming, data_files=remote.file)
    except Exception as error:  # of the network, the hub, the format: many types, one answer
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        reason = first_line(error)
        raise UserError(
            f"{remote.repo}: could not be had from {hub} ({reason[:160]}); set HF_ENDPOINT to a mirror, or train on "
            "the built-in grammar (examples/text/data_config.json)"
        ) from None


def _chosen(records: Iterator[dict], fraction: float) -> Iterator[dict]:
    """Each record with the probability `fraction`, the same ones at every call; the first one always."""
    rng = random.Random(0)
    return (record for number, record in enumerate(records) if rng.random() < fraction or number == 0)


def write_data_config(root: Path) -> Path:
    """A data config of every data set that lies under `root`."""
    from isonext.utils.io import written_whole

    sources = []
    for name in REMOTES:
        if (root / name / "train.jsonl").exists():
            source = {"name": name, "type": "jsonl", "path": f"{name}/train.jsonl", "longer": "skip"}
            if (root / name / "val.jsonl").exists():
                source["val_path"] = f"{name}/val.jsonl"
            sources.append(source)
    with written_whole(root / "data_config.json") as beside:
        beside.write_text(json.dumps({"sources": sources}, indent=1) + "\n", encoding="utf-8")
    return root / "data_config.json"


if __name__ == "__main__":
    run(main, build_parser())
