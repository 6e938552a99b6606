"""Score the sentences that generate_text.py wrote: BLEU-4, chrF, ROUGE-1/2/L, METEOR, with bootstrap intervals.

python examples/text/eval_text.py --predictions predictions.json --metrics bleu chrf --output_json results.json
python examples/text/eval_text.py --predictions mlp.json vq.json           # several files make one table

A file is a JSON list of {"id", "reference", "prediction"}. All figures are per cent, the larger the better.
"""

import argparse
import dataclasses
import json
import math
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
        from isonext.evaluation.report import plain
        from isonext.utils.io import written_whole

        tree = {
            path: {"sentences": len(files[path][0])}
            | {name: plain(dataclasses.asdict(score)) for name, score in scores.items()}
            for path, scores in results.items()
        }
        with written_whole(args.output_json) as beside:
            beside.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def table(results: dict) -> str:
    """A line a file, a column a metric: the figure and its 95% interval; - where references are of another script."""
    names = list(dict.fromkeys(name for scores in results.values() for name in scores))
    rows = [["", *names]]
    rows += [[path, *(_cell(scores.get(name)) for name in names)] for path, scores in results.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cell(score) -> str:
    if score is None:
        return "-"
    ends = "no interval" if math.isnan(score.low) else f"{score.low:.1f}, {score.high:.1f}"
    return f"{score.value:.2f} [{ends}]"


if __name__ == "__main__":
    run(main, build_parser())
