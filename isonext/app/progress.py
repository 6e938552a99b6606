"""How a training is getting on, from what it writes: its log, its previews, its process."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from isonext.app.runs import Run
from isonext.app.survey import spoken
from isonext.app.trainings import Job, job_of
from isonext.app.words import say
from isonext.training.folder import METRICS
from isonext.training.log import read_metrics
from isonext.utils.io import natural_order

QUARTERS = {f"loss_t{q}": f"{q / 4:g}–{(q + 1) / 4:g}" for q in range(4)}
MOST_POINTS = 300  # of a curve
MOST_LINES, MOST_PREVIEWS = 8, 6  # the last ones
COLUMNS = {"val_loss": "loss", "val_style_success": "style", "val_ssim": "SSIM", "val_score": "score"}


@dataclass(frozen=True)
class Progress:
    """What the page shows of a run."""

    sentence: str
    losses: dict[str, list]  # columns step, loss, t
    validation: str  # a table in Markdown
    previews: list[Path]  # the newest first


def look_at(run: Run, headers: Mapping[str, str] | None) -> Progress:
    lines = read_metrics(run.folder / METRICS)
    previews = sorted(run.folder.glob("preview_epoch*.png"), key=lambda path: natural_order(path.name))
    parts = [status_of(run.title, job_of(run.folder), headers), *place_of(run.folder, lines, headers)]
    sentence = say("comma", headers).join(parts)
    return Progress(sentence, losses_of(lines), validation_table(lines), previews[: -MOST_PREVIEWS - 1 : -1])


def status_of(name: str, job: Job, headers: Mapping[str, str] | None) -> str:
    if job.process:
        return say("training" if job.command == "train" else "preparing", headers, name)
    return say("elsewhere" if job.locked else "at_rest", headers, name)


def place_of(folder: Path, lines: list[dict], headers: Mapping[str, str] | None) -> list[str]:
    """Step and epoch, speed, and while it is under way about how long it takes yet."""
    line = next((line for line in reversed(lines) if "epoch" in line), None)
    if line is None:
        return []
    job = job_of(folder)
    parts = [say("place", headers, line["step"], line["epoch"])]
    if job.epochs:
        parts[0] += say("of_epochs", headers, job.epochs)
    if speed := line.get("samples_per_s"):
        parts.append(say("speed", headers, f"{speed:.0f}" if speed >= 100 else f"{speed:.3g}"))
        if job.process and job.epochs and job.batch and line["epoch"] > 0:
            pictures = line["step"] / line["epoch"] * job.batch  # of an epoch
            parts.append(say("left", headers, spoken((job.epochs - line["epoch"]) * pictures / speed)))
    return parts


def losses_of(lines: list[dict]) -> dict[str, list]:
    """The curves of the quarters of t, thinned out evenly."""
    table: dict[str, list] = {"step": [], "loss": [], "t": []}
    for name, quarter in QUARTERS.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        every = -(-len(points) // MOST_POINTS) or 1
        for step, loss in points[(len(points) - 1) % every :: every]:  # the last one stays
            for column, value in zip(table, (step, loss, quarter), strict=True):
                table[column].append(value)
    return table


def validation_table(lines: list[dict]) -> str:
    """The last validations, the newest first; "" where there was none."""
    measured = [line for line in lines if "val_loss" in line][: -MOST_LINES - 1 : -1]
    if not measured:
        return ""
    rows = [["step", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
    for line in measured:
        rows.append([str(line["step"]), *(f"{line[name]:.3f}" if name in line else "" for name in COLUMNS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
