"""The report of evaluate.py: tables, contact sheets, and the plot of style against structure."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from isonext.data import images
from isonext.evaluation.evaluator import Direction, Evaluation, Evaluator, point
from isonext.evaluation.intervals import Estimate
from isonext.flow.transfer import TransferSettings
from isonext.utils.io import written_whole

# Of each table: heading, and columns of (title, figure, figure in brackets: what doing nothing or real pictures give).
TABLES = {
    "Style": (
        ("style success (before)", "style_success", "style_success_before"),
        ("patch distance SWD (before)", "swd", "swd_before"),
        ("Lab distance (before)", "lab", "lab_before"),
    ),
    "Structure, against the source": (
        ("SSIM", "ssim_to_source", None),
        ("edge F1", "edge_f1_to_source", None),
        ("self-similarity distance", "self_similarity_to_source", None),
    ),
    "Structure, against the true pair": (
        ("SSIM (before)", "ssim_to_pair", "ssim_to_pair_before"),
        ("edge F1 (before)", "edge_f1_to_pair", "edge_f1_to_pair_before"),
        ("self-similarity distance (before)", "self_similarity_to_pair", "self_similarity_to_pair_before"),
        ("PSNR, dB (before)", "psnr_to_pair", "psnr_to_pair_before"),
        ("retrieval (before)", "retrieval", "retrieval_before"),
    ),
    "Distribution and memorisation": (
        ("FLD (real pictures)", "fld", "fld_floor"),
        ("KLD (real pictures)", "kld", "kld_floor"),
        ("nearest training latent (real pictures)", "nearest", "nearest_held_out"),
        ("FID", "fid", None),
        ("KID", "kid", None),
        ("LPIPS to the source", "lpips_to_source", None),
    ),
    "Conservation": (
        ("latent elements that the way back changes", "round_trip_differing", None),
        ("of", "round_trip_elements", None),
        ("cycle a-b-a without the kept defect, rms", "cycle", None),
    ),
}
SWEEP = (
    ("style success", "style_success"),
    ("SSIM to source", "ssim_to_source"),
    ("edge F1", "edge_f1_to_source"),
    ("retrieval", "retrieval"),
    ("SWD", "swd"),
    ("FLD", "fld"),
    ("FLD of real pictures", "fld_floor"),  # at as few pictures: most of a small set's FLD is its size
)
COMPARED = (("style success less the first", "style_success"), ("SSIM less the first", "ssim_to_source"))

FILES = ("metrics.json", "report.md", "front.png")  # that a report may consist of, beside its sheets


def report_text(evaluator: Evaluator, results: list[Evaluation]) -> str:
    """Markdown: for one evaluation every figure by direction, for several the means over directions, a line each."""
    lines = [
        f"classifier accuracy on held-out pictures (ceiling of style success): {evaluator.classifier_accuracy}",
        f"autoencoder alone (ceiling of every picture-level figure): {evaluator.reconstruction_psnr} dB",
        *(evaluator.perceptual.missing if evaluator.perceptual else ()),
        *_copies(results[0].directions),
        "",
    ]
    if len(results) > 1:
        return "\n".join(lines + _sweep_table(results))
    (result,) = results
    for heading, known in TABLES.items():
        columns = [column for column in known if column[1] in result.directions[0].figures]
        if columns:
            lines += [f"### {heading}", "", *_table(result.directions, columns), ""]
    if result.base:
        x0 = result.base
        lines += [
            f"Structure x0 of all styles: a linear probe tells the source style with {x0['leakage']} "
            f"(chance {x0['leakage_chance']:.3f}), mean {x0['mean']:.3f}, deviation {x0['deviation']:.3f}, "
            f"low-band power {x0['low_band']:.2f} (white noise 1)"
        ]
    return "\n".join(lines)


def _copies(directions: list[Direction]) -> list[str]:
    """A warning for each style of which test pictures are training pictures: their distance to those is zero."""
    distances = {direction.target: direction.by_picture("nearest_held_out") for direction in directions}
    copies = {style: int((nearest == 0).sum()) for style, nearest in distances.items()}
    return [
        f"warning: {count} of {len(distances[style])} test pictures of {style} are among its training pictures: no "
        "figure here is of held-out pictures alone; give others with --data"
        for style, count in copies.items()
        if count
    ]


def _table(directions: list[Direction], columns: list[tuple[str, str, str | None]]) -> list[str]:
    lines = [f"| direction | {' | '.join(title for title, _, _ in columns)} |", f"|{' --- |' * (1 + len(columns))}"]
    for direction in directions:
        figures = direction.figures
        cells = [
            _show(figures.get(figure)) + (f" ({_brief(figures.get(other))})" if other else "")
            for _, figure, other in columns
        ]
        name = f"{direction.source} -> {direction.target} ({len(direction.names)})"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _sweep_table(results: list[Evaluation]) -> list[str]:
    columns = [column for column in SWEEP if results[0].mean(column[1]) is not None]
    chosen = front([_point(result) for result in results])
    lines = [
        "Means over all directions, intervals over pictures; * is on the front: no other is better in both style "
        "success and SSIM to source. Less the first: differences picture by picture, which two intervals do not tell.",
        "",
        f"| | setting | {' | '.join(title for title, _ in (*columns, *COMPARED))} | leakage | round trip |",
        f"|{' --- |' * (6 + len(columns))}",
    ]
    for number, result in enumerate(results):
        values = [result.mean(figure) for _, figure in columns]
        values += [result.difference(results[0], figure) if number else None for _, figure in COMPARED]
        cells = " | ".join(map(_show, values))
        differing = [direction.figures.get("round_trip_differing") for direction in result.directions]
        trip = "-" if None in differing else f"{sum(map(point, differing)):.0f} differ"
        star = "*" if number in chosen else ""
        leakage = _show(result.base.get("leakage"))
        lines.append(f"| {star} | {label(result, results)} | {cells} | {leakage} | {trip} |")
    return lines


def _point(result: Evaluation) -> tuple[float, float]:
    return point(result.mean("style_success")), point(result.mean("ssim_to_source"))


def label(result: Evaluation, among: list[Evaluation]) -> str:
    """What tells one evaluation from the others: its checkpoint, where there are several, and what was swept."""
    settings = asdict(result.settings)
    varied = [name for name in settings if len({getattr(other.settings, name) for other in among}) > 1]
    parts = [result.name] if len({other.name for other in among}) > 1 else []
    return ", ".join(parts + [f"{name} {getattr(result.settings, name)}" for name in varied]) or result.name


def front(points: list[tuple[float, float]]) -> set[int]:
    """The Pareto front, larger being better in both: the numbers of the points that none other dominates."""

    def dominated(x: float, y: float) -> bool:
        return any(a >= x and b >= y and (a > x or b > y) for a, b in points)

    return {number for number, point in enumerate(points) if not dominated(*point)}


def write_report(evaluator: Evaluator, results: list[Evaluation], folder: Path) -> list[Path]:
    """metrics.json and report.md; contact sheets for one evaluation, front.png for several. Returns the pictures."""
    tree = {
        **plain(
            {
                "classifier_accuracy": evaluator.classifier_accuracy,
                "reconstruction_psnr": evaluator.reconstruction_psnr,
            }
        ),
        "not_measured": evaluator.perceptual.missing if evaluator.perceptual else [],
        "results": [
            {
                "name": result.name,
                "settings": asdict(result.settings),
                "means": plain({figure: result.mean(figure) for _, figure in SWEEP}),
                "base": plain(result.base),
                "directions": [
                    {"source": d.source, "target": d.target, "pictures": len(d.names)} | plain(d.figures)
                    for d in result.directions
                ],
            }
            for result in results
        ],
    }
    with written_whole(folder / "metrics.json") as beside:
        beside.write_text(json.dumps(tree, indent=1, allow_nan=False), encoding="utf-8")
    with written_whole(folder / "report.md") as beside:
        settings = "\n".join(f"{result.name}: {_settings(result.settings)}" for result in results)
        beside.write_text(
            f"{settings}\n\n{report_text(evaluator, results)}\n", encoding="utf-8", errors="backslashreplace"
        )
    if len(results) > 1:
        plot_front(results, folder / "front.png")
        return [folder / "front.png"]
    return [save_sheet(direction, folder) for direction in results[0].directions]


def save_sheet(direction: Direction, folder: Path, count: int = 8, across: int = 3) -> Path:
    """The best, the median and the worst pictures by structure score, a block of `count` each, best first."""
    order = direction.by_picture("ssim_to_source").argsort(descending=True).tolist()
    middle = max(0, len(order) // 2 - count // 2)
    chosen = order
    if len(order) > across * count:
        chosen = [*order[:count], *order[middle : middle + count], *order[-count:]]
    across = min(across, len(chosen))
    height = math.ceil(len(chosen) / across)
    columns = [chosen[start : start + height] for start in range(0, len(chosen), height)]
    lines = [list(chain(*(direction.rows[column[y]] for column in columns if y < len(column)))) for y in range(height)]
    titles = [direction.source, f"as {direction.target}"] + (["true pair"] if len(direction.rows[0]) == 3 else [])
    zoom = max(1, 96 // direction.rows[0][0].shape[-1])
    pictures = [[images.to_picture(pixels) for pixels in line] for line in lines]
    path = folder / f"{direction.source}_to_{direction.target}.png"
    images.save_picture(images.contact_sheet(pictures, titles * len(columns), zoom), path)
    return path


def plot_front(results: list[Evaluation], path: Path) -> None:
    """Style success against SSIM to the source, the front drawn as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [_point(result) for result in results]
    chosen = sorted(front(points), key=lambda number: points[number])
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    axes.plot(*zip(*(points[number] for number in chosen), strict=True), color="tab:red", linewidth=1, zorder=1)
    for number, place in enumerate(points):  # names stand beside the plot: neighbours' would lie on each other
        colour, name = "tab:red" if number in chosen else "tab:grey", label(results[number], results)
        axes.scatter(*place, color=colour, zorder=2, label=f"{number + 1}   {name}")
        axes.annotate(str(number + 1), place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="style success", ylabel="SSIM to source", title="Style against structure; red: the front")
    axes.margins(x=0.15)
    figure.legend(loc="outside right upper", fontsize=7)
    with written_whole(path) as beside:
        figure.savefig(beside, dpi=120)
    pyplot.close(figure)


def _show(value: Estimate | float | int | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _brief(value: Estimate | float | None) -> str:
    return "-" if value is None else f"{value.mean if isinstance(value, Estimate) else value:.3f}"


def plain(figures: Mapping[str, Estimate | float | int | None]) -> dict:
    """As JSON takes it: what is no number, such as the ends of an interval that there is not, is null."""

    def finite(value: Estimate | float | int | None) -> dict | float | int | None:
        if isinstance(value, Estimate):
            return plain(asdict(value))
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: finite(value) for name, value in figures.items()}


def _settings(settings: TransferSettings) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(settings).items())
