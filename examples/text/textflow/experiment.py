"""The experiment of run_experiment.py: train, write, score, tabulate."""

import dataclasses
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from isonext.utils.device import device_name
from isonext.utils.io import written_whole
from textflow import grammar
from textflow.data import Corpus, load_corpora, read_data_config
from textflow.head_stage import WHAT, HeadRun, load_head, train_head
from textflow.heads import HeadConfig, Heads
from textflow.metrics import score
from textflow.model import TextModel, load_part, load_text_model
from textflow.run import make_model
from textflow.stages import Shape, quick_shape
from textflow.writing import Writing, sample_styles, save_predictions, write_texts

HEADS = [
    HeadConfig(use_text_decoder_head=True),
    HeadConfig(use_text_decoder_head=True, use_latent_refiner=True),
    HeadConfig(use_text_decoder_head=True, use_vq_codebook=True),
    HeadConfig(use_text_decoder_head=True, use_vq_codebook=True, use_latent_refiner=True),
]
COLUMNS = ("BLEU-4", "ROUGE-L", "METEOR", "grammatical", "codes used", "parameters", "seconds")


@dataclass
class Plan:
    """How much of everything."""

    shape: Shape = field(default_factory=Shape)
    head: HeadRun = field(default_factory=HeadRun)
    sentences: int = 1000  # that are written again and scored
    num_steps: int = 20  # of the solver


def quick_plan() -> Plan:
    head = HeadRun(batch_size=64, max_steps=150, lr=1e-3, log_interval=10, eval_interval=75, save_interval=0)
    return Plan(quick_shape(), head, sentences=200, num_steps=10)


def whole_plan() -> Plan:
    return Plan(head=HeadRun(batch_size=64, num_epochs=1))


def experiment(
    plan: Plan,
    data_config: str,
    folder: Path,
    seeds: int,  # a head
    t_start: float,  # where a sentence goes on from
    device: torch.device,
    quiet: bool | None = None,
) -> dict:
    """All of it; prints the tables and ten sentences a mode, writes results.json; returns what that holds."""
    started = time.perf_counter()
    corpora = load_corpora(read_data_config(data_config))
    make_model(folder / "model", plan.shape, corpora, device, quiet=quiet)
    model = load_text_model(folder / "model").to(device)
    chosen = model.accept(corpora[1]).part(plan.sentences)
    checks, samples = sanity(model, chosen, plan)
    settings = Writing("denoise", t_start, plan.num_steps, batch_size=64)
    rows = {"no head": [measure(model, None, chosen, settings, seed, folder) for seed in range(seeds)]}
    for config in HEADS:
        rows[config.name] = []
        for seed in range(seeds):
            heads, figures = trained(model, config, plan, seed, corpora, folder, quiet)
            rows[config.name].append(measure(model, heads, chosen, settings, seed, folder) | figures)
    results = {
        "device": device_name(device),
        "seconds": time.perf_counter() - started,
        "t_start": t_start,
        "sentences": len(chosen),
        "seeds": seeds,
        "checks": checks,
        "heads": rows,
        "samples": samples,
    }
    with written_whole(folder / "results.json") as beside:
        beside.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(report(results))
    print(json.dumps({name: value for name, value in results.items() if name != "samples"}, ensure_ascii=False))
    return results


def trained(
    model: TextModel, config: HeadConfig, plan: Plan, seed: int, corpora: tuple[Corpus, Corpus], folder: Path, quiet
) -> tuple[Heads, dict]:
    """A head and its training's figures; one that is finished is read from its file."""
    place = folder / "heads" / f"{config.name.replace(' ', '_')}_{seed}"
    if not (place / "last.pt").exists() or (place / "state.pt").exists():
        train_head(model, config, dataclasses.replace(plan.head, seed=seed), corpora, place, quiet)
    best, last = (
        load_part(place / f"{name}.pt", WHAT, ("config", "model", "weights", "figures"))["figures"]
        for name in ("best", "last")
    )
    figures = {"codes used": best.get("codes_used"), "perplexity": best.get("perplexity")}
    figures |= {"val_loss": best["val_loss"], "parameters": best["parameters"], "seconds": last["seconds"]}
    return load_head(place / "best.pt", model).to(model.device), figures


def measure(model: TextModel, heads: Heads | None, chosen: Corpus, settings: Writing, seed: int, folder: Path) -> dict:
    """The figures of one way to write the chosen sentences; the sentences go to a file that eval_text.py reads."""
    written = write_texts(
        model, heads, chosen.texts, chosen.styles, dataclasses.replace(settings, seed=seed), quiet=True
    )
    name = f"{heads.config.name if heads else 'no head'}_{settings.mode}_{settings.t_start:g}_{seed}.json".replace(
        " ", "_"
    )
    save_predictions(folder / "predictions" / name, [{"reference": text} for text in chosen.texts], written)
    return figures_of(chosen.texts, written) | {"parameters": 0, "seconds": 0.0, "codes used": None}


def figures_of(texts: list[str], written: list[str]) -> dict[str, float]:
    """Per cent, all of them; METEOR under its full name too, which says what it matched."""
    scores = {name: each.value for name, each in score(texts, written, ["bleu", "rouge", "meteor"]).items()}
    meteor = next(value for name, value in scores.items() if name.startswith("METEOR"))
    exact = 100 * statistics.fmean(a == b for a, b in zip(texts, written, strict=True))
    grammatical = 100 * statistics.fmean(map(grammar.is_grammatical, written))
    return scores | {"METEOR": meteor, "grammatical": grammatical, "exact": exact}


def sanity(model: TextModel, chosen: Corpus, plan: Plan) -> tuple[dict, dict]:
    """Without a head: the ceiling, two amounts of noise, the round trip, shuffled references, and samples by class."""
    base = Writing(num_steps=plan.num_steps, batch_size=64)
    ways = {
        "reconstruct": dataclasses.replace(base, mode="reconstruct"),
        "roundtrip": dataclasses.replace(base, mode="roundtrip"),
        "denoise 0.7": dataclasses.replace(base, t_start=0.7),
        "denoise 0.3": dataclasses.replace(base, t_start=0.3),
    }
    checks, samples, written = {}, {"reference": chosen.texts[:10]}, []
    for name, settings in ways.items():
        written = write_texts(model, None, chosen.texts, chosen.styles, settings, quiet=True)
        checks[name], samples[name] = figures_of(chosen.texts, written), written[:10]
        if name == "reconstruct":
            checks["shuffled references"] = figures_of(chosen.texts[1:] + chosen.texts[:1], written)
    styles = sample_styles(model, len(chosen), None)
    written = write_texts(model, None, None, styles, dataclasses.replace(base, mode="sample"), quiet=True)
    topics = [model.spec.styles[style] for style in styles]
    of_class = [grammar.topic_of(text) == topic for text, topic in zip(written, topics, strict=True)]
    checks["sample"] = {
        "grammatical": 100 * statistics.fmean(map(grammar.is_grammatical, written)),
        "of the class": 100 * statistics.fmean(of_class),
        "different": 100 * len(set(written)) / len(written),
    }
    samples["sample"] = [f"{topic}: {text}" for topic, text in zip(topics[:10], written[:10], strict=True)]
    return checks, samples


#################################################################################
#                                  For people                                   #
#################################################################################


def report(results: dict) -> str:
    """Both tables, and the sentences."""
    head = f"{results['sentences']} held-out sentences from t = {results['t_start']:g}, {results['seeds']} seeds"
    cells = {name: [_spread(rows, column) for column in COLUMNS] for name, rows in results["heads"].items()}
    lines = [f"{head}, per cent: mean and deviation", "", *table(cells, COLUMNS)]
    columns = ("BLEU-4", "ROUGE-L", "METEOR", "grammatical", "exact", "of the class", "different")
    cells = {
        name: ["-" if column not in row else f"{row[column]:.1f}" for column in columns]
        for name, row in results["checks"].items()
    }
    lines += ["", "without a head:", "", *table(cells, columns)]
    for name, texts in results["samples"].items():
        lines += ["", f"{name}:", *(f"  {text}" for text in texts)]
    return "\n".join(lines)


def _spread(rows: list[dict], column: str) -> str:
    """Mean and deviation over the seeds, which one has not; a count is one where all seeds agree."""
    values = [row[column] for row in rows]
    if values[0] is None:
        return "-"
    if column == "parameters":
        return f"{values[0] / 1e6:.2f} M" if values[0] else "0"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def table(cells: dict[str, list[str]], columns: tuple[str, ...]) -> list[str]:
    """Lines of a Markdown table."""
    rows = [["", *columns], *([name, *row] for name, row in cells.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
