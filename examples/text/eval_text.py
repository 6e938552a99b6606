"""Score the sentences that generate_text.py wrote: BLEU-4, ROUGE-1/2/L, METEOR, with bootstrap intervals.

python examples/text/eval_text.py --predictions predictions.json --metrics bleu rouge meteor --output_json results.json
python examples/text/eval_text.py --predictions mlp.json vq.json           # several files make one table

A file is a JSON list of {"id", "reference", "prediction"}. All figures are per cent, the larger the better.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from isonext.errors import UserError
from isonext.utils.cli import new_parser, run
from textflow.metrics import METRICS


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Score predicted sentences against their references.", config=False)
    parser.add_argument("--predictions", nargs="+", required=True, metavar="FILE", help="as generate_text.py writes")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), metavar="NAME", help=" ".join(METRICS))
    parser.add_argument("--output_json", metavar="FILE", help="the same figures as JSON")
    return parser


def read_predictions(path: str) -> tuple[list[str], list[str]]:
    """References and predictions of a file; anything that cannot be scored is an error that says where."""
    from textflow.records import read_utf8

    try:
        entries = json.loads(read_utf8(Path(path)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno}: {error.msg}") from None
    if not isinstance(entries, list):
        raise UserError(f'{path}: predictions are a list of {{"id", "reference", "prediction"}}')
    if not entries:
        raise UserError(f"{path}: holds no predictions; was generate_text.py run on an empty split?")
    for number, entry in enumerate(entries):
        for name in ("reference", "prediction"):
            if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
                hint = "; sentences from noise (--mode sample) have none" if name == "reference" else ""
                raise UserError(f"{path}: entry {number} has no {name}{hint}")
    if not any(entry["prediction"].strip() for entry in entries):
        raise UserError(f"{path}: all its predictions are empty: nothing to score")
    return [entry["reference"] for entry in entries], [entry["prediction"] for entry in entries]


def main(args: argparse.Namespace) -> None:
    unknown = [name for name in args.metrics if name not in METRICS]
    if unknown:
        raise UserError(f"--metrics {unknown[0]}: not one of {', '.join(METRICS)}")
    files = {path: read_predictions(path) for path in args.predictions}
    try:
        from textflow.metrics import score

        results = {path: score(*pairs, args.metrics) for path, pairs in files.items()}
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements/text.txt") from None
    print(table(results))
    if args.output_json:
        from isonext.utils.io import written_whole

        tree = {
            path: {"sentences": len(files[path][0])} | {name: dataclasses.asdict(s) for name, s in scores.items()}
            for path, scores in results.items()
        }
        with written_whole(args.output_json) as beside:
            beside.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def table(results: dict) -> str:
    """A line a file, a column a metric: the figure and its 95% interval."""
    names = list(next(iter(results.values())))
    rows = [["", *names]]
    rows += [
        [path, *(f"{s.value:.2f} [{s.low:.1f}, {s.high:.1f}]" for s in scores.values())]
        for path, scores in results.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


if __name__ == "__main__":
    run(main, build_parser())
