"""The record of a training run: metrics.jsonl, TensorBoard, and the loss curve as a picture."""

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from isonext.errors import WriteError, first_line
from isonext.utils.io import written_whole


class Logbook:
    """One line of numbers a logging step, to `metrics.jsonl` and to TensorBoard; WriteError where there is no room."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Lines later than `resume_step` come from a run that went on past its checkpoint: they are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        earlier = [line for line in read_metrics(self.path) if line["step"] <= resume_step]
        with written_whole(self.path) as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in earlier), encoding="utf-8")
        self.earlier = earlier
        self.events = folder / "tensorboard"
        self.failure: OSError | None = None  # of TensorBoard's thread
        self.earlier_hook = threading.excepthook
        threading.excepthook = self._hear_thread
        with _as_write_error(self.events):
            self.board = SummaryWriter(str(self.events), purge_step=resume_step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        with _as_write_error(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | numbers) + "\n")
        with _as_write_error(self.events):
            for name, number in numbers.items():
                self.board.add_scalar(name, number, step)

    def largest(self, name: str) -> float:
        """Of what was logged before this run went on; 0 where there is nothing."""
        return max((line[name] for line in self.earlier if name in line), default=0.0)

    def close(self) -> None:
        with _as_write_error(self.events):
            self.board.close()
            if self.failure:
                raise self.failure
        threading.excepthook = self.earlier_hook

    def _hear_thread(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard raises its thread's error once more in `write`, and we do in `close`: no traceback of it here."""
        if type(failure.thread).__module__.startswith("tensorboard.") and isinstance(failure.exc_value, OSError):
            self.failure = failure.exc_value
        else:
            self.earlier_hook(failure)


class Tally:
    """What the steps since the last line of the log came to; the losses are of this process until they are gathered."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums = torch.zeros(2, 4, device=accelerator.device)  # losses, and how many, by quarter of t
        self.clipped = 0  # steps

    def add(self, sums: Tensor, clipped: bool) -> None:
        self.sums += sums
        self.clipped += clipped

    def gather(self) -> None:
        """Bring the losses to process 0, which saves them."""
        if self.accelerator.num_processes > 1:
            self.sums = self.accelerator.reduce(self.sums, "sum") * self.accelerator.is_main_process

    @property
    def kept(self) -> dict:
        """For a checkpoint."""
        return {"sums": self.sums.cpu(), "clipped": self.clipped}

    def restore(self, kept: dict) -> None:
        """From a checkpoint; an empty one has nothing to say."""
        if kept and self.accelerator.is_main_process:  # the losses are those of all processes
            self.sums += kept["sums"].to(self.sums.device)
        self.clipped = kept.get("clipped", 0)

    def take(self) -> tuple[dict[str, float], int]:
        """The mean losses by their names in the log, over all processes, and the clipped steps; then it begins anew."""
        sums, counts = self.accelerator.reduce(self.sums, "sum").tolist()
        losses = {"loss": sum(sums) / sum(counts)} if sum(counts) else {}
        losses |= {f"loss_t{q}": sums[q] / counts[q] for q in range(4) if counts[q]}
        clipped, self.clipped = self.clipped, 0
        self.sums.zero_()
        return losses, clipped


@contextlib.contextmanager
def _as_write_error(path: Path) -> Iterator[None]:
    """Within, what the system refuses to write to `path` is a WriteError."""
    try:
        yield
    except OSError as error:
        raise WriteError(path, error.strerror or first_line(error)) from error


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, of each what is a number. A damaged line is left out, and a warning counts them;
    a last line that a kill cut off is no damage."""
    *texts, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines = [_numbers_of(text) for text in texts if text.strip()]
    if None in lines:
        print(f"warning: {path}: {lines.count(None)} damaged lines are left out", file=sys.stderr)
    return [line for line in [*lines, _numbers_of(last)] if line is not None]


def _numbers_of(text: bytes) -> dict | None:
    """A line's numbers by name; None where it is no JSON object with a step."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested without end
        return None
    numbers = {name: value for name, value in line.items() if type(value) in (int, float)} if type(line) is dict else {}
    return numbers if type(numbers.get("step")) is int else None


def plot_losses(metrics: Path, output: Path) -> None:
    """Training loss, its quarters of t and the validation loss over steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(metrics)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    curves = {f"loss_t{q}": f"t in [{q / 4:g}, {(q + 1) / 4:g})" for q in range(4)}
    for name, label in curves.items():
        axes.plot(*_curve(lines, name), linewidth=1, alpha=0.55, label=label)
    axes.plot(*_curve(lines, "loss"), color="black", linewidth=1.5, label="training loss")
    axes.plot(*_curve(lines, "val_loss"), "o-", color="crimson", markersize=3, label="validation loss (EMA)")
    axes.set(xlabel="step", ylabel="error of v", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    with written_whole(output) as beside:
        figure.savefig(beside)
    pyplot.close(figure)


def _curve(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in points], [value for _, value in points]
