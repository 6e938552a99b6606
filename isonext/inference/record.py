"""What made the pictures of an output folder: written down beside them, so that one folder never holds two kinds."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isonext.errors import UserError
from isonext.flow.transfer import TransferSettings
from isonext.inference.structure_file import fixed_bits
from isonext.pipeline import Pipeline
from isonext.utils.io import written_whole


def record_of_run(pipeline: Pipeline, settings: TransferSettings, own: dict[str, Any]) -> dict[str, Any]:
    """All that decides what a result shows, as JSON has it; `own` is what a command adds."""
    bits = fixed_bits(pipeline)
    record = asdict(settings) | {name: bits[name] for name in ("checkpoint", "autoencoder", "precision")}
    return json.loads(json.dumps(record | own))


def keep_record(
    path: Path,  # of the record, in the folder
    record: dict[str, Any],
    present: list[Path],  # results that are there
    replaced: set[Path],  # results that this run makes
    overwrite: bool,
) -> None:
    """Write the record; a UserError where results are there that something else has made.

    Those that --overwrite is to replace go first: a run that is killed must not leave two kinds of them.
    """
    before = _read_record(path)
    other = before and next((name for name in record if before.get(name) != record[name]), None)
    if before is None or other:
        left = [result for result in present if not overwrite or result not in replaced]
        if left:
            why = "and no record of what made it"
            if before and other:
                why = f"made with {other} {_short(before.get(other))}, not {_short(record[other])}"
            way_out = "give another folder" if overwrite else "give another folder, or --overwrite"
            raise UserError(f"--output {path.parent}: holds {min(left).relative_to(path.parent)}, {why}; {way_out}")
        for result in present:
            result.unlink()
    with written_whole(path) as beside:
        beside.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _read_record(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or "checkpoint" not in record:
        raise UserError(f"{path}: damaged, or no record of what made the pictures here; give another --output")
    return record


def _short(value: object) -> str:
    """For a message: a digest by its first figures."""
    return value[:12] if isinstance(value, str) else json.dumps(value)
