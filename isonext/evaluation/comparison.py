"""Transfers that another program made of the same test pictures, beside ours: figures, differences, table, plot."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from isonext.evaluation.evaluator import Direction, Evaluator, Figure, point
from isonext.evaluation.intervals import Estimate, bootstrap
from isonext.evaluation.metrics import ssim
from isonext.evaluation.report import plain
from isonext.utils.io import written_whole

FIGURES = ("style_success", "ssim_to_source")


@dataclass
class Row:
    """A method in one setting, or after one share of its time."""

    name: str
    seconds: float | None  # of training, for all directions; None: not measured
    steps: int | None  # of training; None: not counted
    ours: bool
    directions: dict[tuple[str, str], Direction] = field(default_factory=dict)  # by source and target

    def score(self, way: tuple[str, str], figure: str) -> float:
        return point(self.directions[way].figures[figure])

    def tree(self) -> dict:
        """As JSON takes it."""
        figures = {
            f"{source}->{target}": plain({name: direction.figures[name] for name in FIGURES})
            for (source, target), direction in self.directions.items()
        }
        return {"name": self.name, "seconds": self.seconds, "steps": self.steps} | figures


@dataclass(frozen=True)
class Margin:
    """Of a peer's row in one direction: our row that is no worse in style, and what it has in SSIM more."""

    peer: str
    way: tuple[str, str]
    ours: str | None  # the one of most SSIM among those of no less style success; None: there is none
    difference: Estimate | None

    def __str__(self) -> str:
        said = f"{self.difference} ({self.ours})" if self.ours else "ours reaches no such style success"
        return f"{self.peer}, {self.way[0]} -> {self.way[1]}: {said}"

    def tree(self) -> dict:
        source, target = self.way
        return {"peer": self.peer, "source": source, "target": target, "ours": self.ours} | plain(
            {"ssim_difference": self.difference}
        )


def judge(evaluator: Evaluator, source: str, target: str, results: Tensor) -> Direction:
    """The figures, as evaluate.py has them, of transfers (N, 3, S, S) of all N test pictures of a style."""
    names, before = list(evaluator.test[source]), torch.stack(list(evaluator.test[source].values()))
    values: dict[str, Figure] = {
        "style_success": evaluator.classifier.predict(results) == evaluator.styles.index(target),
        "ssim_to_source": ssim(results, before),
    }
    return Direction(source, target, names, values, [list(pair) for pair in zip(before, results, strict=True)])


def margins(rows: list[Row]) -> list[Margin]:
    """Of each of the peer's rows and directions, with the difference picture by picture."""
    found: list[Margin] = []
    for peer in (row for row in rows if not row.ours):
        for way, theirs in peer.directions.items():
            able = [row for row in rows if row.ours and row.score(way, FIGURES[0]) >= peer.score(way, FIGURES[0])]
            best = max(able, key=lambda row: row.score(way, FIGURES[1]), default=None)
            difference = None
            if best:
                difference = bootstrap(best.directions[way].by_picture(FIGURES[1]) - theirs.by_picture(FIGURES[1]))
            found.append(Margin(peer.name, way, best.name if best else None, difference))
    return found


def table(rows: list[Row]) -> str:
    """Markdown: a line a row, and a line for each of the `margins`."""
    ways = list(rows[0].directions)
    heads = [f"{source} -> {target}: {title}" for source, target in ways for title in ("style success", "SSIM")]
    lines = [f"| method | minutes | steps | {' | '.join(heads)} |", f"|{' --- |' * (3 + len(heads))}"]
    for row in rows:
        cells = [str(row.directions[way].figures[name]) for way in ways for name in FIGURES]
        minutes = "-" if row.seconds is None else f"{row.seconds / 60:.1f}"
        lines.append(f"| {row.name} | {minutes} | {row.steps or '-'} | {' | '.join(cells)} |")
    lines += ["", "SSIM of ours less the peer's, picture by picture, where our style success is no less:", ""]
    return "\n".join([*lines, *(f"- {margin}" for margin in margins(rows))])


def plot_fronts(rows: list[Row], path: Path) -> None:
    """Style success against SSIM to the source, a panel a direction; ours is red."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ways = list(rows[0].directions)
    figure, panels = pyplot.subplots(1, len(ways), figsize=(12, 5), sharey=True, layout="constrained")
    for axes, way in zip(panels, ways, strict=True):
        for number, row in enumerate(rows, 1):
            place = row.score(way, FIGURES[0]), row.score(way, FIGURES[1])
            label = f"{number}   {row.name}" if way == ways[0] else None
            axes.scatter(*place, color="tab:red" if row.ours else "tab:blue", label=label)
            axes.annotate(str(number), place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="style success", title=f"{way[0]} -> {way[1]}")
        axes.margins(x=0.15)
    panels[0].set(ylabel="SSIM to source")
    figure.legend(loc="outside right upper", fontsize=7)
    with written_whole(path) as beside:
        figure.savefig(beside, dpi=120)
    pyplot.close(figure)
