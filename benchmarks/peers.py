"""How do transfers compare with those of CUT and of CycleGAN, trained for the same time on the same pictures?

python benchmarks/peers.py --peer cut --code ../contrastive-unpaired-translation \\
    --config configs/photo.json --train_data raw_data/photo --data raw_data/photo_test --minutes 10
python benchmarks/peers.py --peer cyclegan --code ../pytorch-CycleGAN-and-pix2pix \\
    --checkpoint report/peers/ours/run/stage1_epoch80.pt --train_data raw_data/photo --data raw_data/photo_test

`--code` is a checkout that you have (taesungp/contrastive-unpaired-translation has both networks); its train.py and
test.py run as they are. The time is the processes' CPU time, or on a GPU the clock's. Ours includes preprocessing; that
of a --checkpoint is not known. CUT goes one way: it is trained twice, and measured after half of the time each, which
is the time for both, and after all of it each. docs/quality.md says what else is equal. The last line is JSON.
"""

import argparse
import json
import re
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isonext.checkpoint import load_checkpoint, newest_checkpoint
from isonext.config import load_config
from isonext.data import images
from isonext.data.style_folders import find_styles
from isonext.errors import UserError
from isonext.evaluation.comparison import Row, judge, margins, plot_fronts, table
from isonext.evaluation.evaluator import Evaluator, Pictures
from isonext.evaluation.intervals import estimate
from isonext.evaluation.options import EvaluateOptions
from isonext.evaluation.report import plain, save_sheet
from isonext.evaluation.sweep import Run, load_pictures, load_runs
from isonext.utils.cli import add_device_flags, new_parser, run
from isonext.utils.device import device_name, pick_device
from isonext.utils.io import check_output, written_whole
from isonext.utils.meter import run_metered

ROOT = Path(__file__).resolve().parents[1]
MOST = 0.97  # of the time that our epochs are planned for: no two runs take the same
KEPT_SAVES = 3  # newest ones of a peer; the last one may be half-written when its time is used up


@dataclass(frozen=True)
class Peer:
    """A network as its own code calls it."""

    model: str  # for --model
    generators: tuple[str, ...]  # of one training, as its files are called
    ways: tuple[str, ...]  # a training for each --direction
    shares: tuple[float, ...]  # of the time of each training, after which it is measured


PEERS = {
    "cut": Peer("cut", ("G",), ("AtoB", "BtoA"), (0.5, 1.0)),
    "cyclegan": Peer("cycle_gan", ("G_A", "G_B"), ("AtoB",), (1.0,)),
}
# In CUT's repository cycle_gan_model.py asks for an option that no parser has, and takes no data where train.py hands
# it some. The files stay as they are: this runs train.py, or test.py, with both mended in memory.
MENDED = """
import argparse, runpy, sys
from models.cycle_gan_model import CycleGANModel
argparse.Namespace.amp = False
CycleGANModel.data_dependent_initialize = lambda model, data=None: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


#################################################################################
#                                     Ours                                      #
#################################################################################


def train_ours(args: argparse.Namespace, device: torch.device, budget_s: float) -> tuple[Path, float]:
    """Preprocess and train with as many epochs as the time has room for: the checkpoint, and the seconds of both.

    The rate falls to zero at the last epoch, so their number must be known before: two short runs, which do not count,
    tell what a start and an epoch take.
    """
    folder, log = args.output.resolve() / "ours", args.output / "ours.log"
    sets = [f"data.raw_data_root={args.train_data.resolve()}", f"data.data_root={folder / 'latents'}"]
    flags = ["--config", str(args.config), *(f"--set={text}" for text in (*args.overrides, *sets))]

    def work(script: str, *more: str, limit_s: float) -> tuple[float, int | None]:
        command = [sys.executable, str(ROOT / script), *flags, *more]
        used, status = run_metered(command, log, limit_s, device.type == "cuda", graceful=True)
        if status and (status, script) != (1, "preprocess_latents.py"):  # 1: done, but for a bad picture
            raise UserError(f"{script} failed: {last_line(log)}; all that it said is in {log}")
        return used, status

    def training(epochs: int, name: str, limit_s: float) -> tuple[float, int | None]:
        place = f"--set=checkpoint.save_dir={folder / name}"
        return work("train.py", f"--set=training.stage1_epochs={epochs}", place, limit_s=limit_s)

    prepared, status = work("preprocess_latents.py", f"--device={device}", limit_s=budget_s)
    if status is None:
        raise UserError(f"--minutes {args.minutes:g}: preprocessing alone takes longer; give more")
    (one, _), (three, _) = (training(epochs, f"probe{epochs}", budget_s) for epochs in (1, 3))
    epoch_s = max((three - one) / 2, 1e-6)
    epochs = int((MOST * budget_s - prepared - (one - epoch_s)) / epoch_s)
    if epochs < 1:
        raise UserError(f"--minutes {args.minutes:g}: an epoch of ours takes {prepared + one:.0f} s; give more")
    print(f"ours: {prepared:.0f} s of preprocessing, {epoch_s:.1f} s an epoch, so {epochs} epochs")
    used, status = training(epochs, "run", budget_s - prepared)
    if status is None:
        print("ours: stopped before its last epoch, as its time was used up")
    found = newest_checkpoint(folder / "run")
    if found is None:
        raise UserError(f"--minutes {args.minutes:g}: train.py saved nothing in it; see {log}")
    return found[0], prepared + used


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


#################################################################################
#                                   The peer                                    #
#################################################################################


def check_code(code: Path, peer: Peer) -> None:
    """UserError where a folder is no checkout with this network."""
    for name in ("train.py", "test.py", "options", f"models/{peer.model}_model.py"):
        if not (code / name).exists():
            raise UserError(f"--code {code}: has no {name}; give a checkout of the peer's repository, see --help")


@dataclass(frozen=True)
class Checkout:
    """The peer's code, and what its commands have in common."""

    code: Path
    peer: Peer
    gpu: int | None  # its number; None: the CPU
    side: int  # of the pictures in pixels
    work: Path  # a folder for its data, weights and results
    logs: Path

    def command(self, script: str, name: str, way: str, **options: object) -> list[str]:
        """python train.py, or test.py, with these options; those that another version lacks are left out."""
        known = "".join(path.read_text(encoding="utf-8") for path in sorted((self.code / "options").glob("*.py")))
        model = (self.code / "models" / f"{self.peer.model}_model.py").read_text(encoding="utf-8")
        options = {
            "dataroot": self.work / "data", "name": name, "model": self.peer.model, "direction": way,
            "crop_size": self.side, "gpu_ids": -1 if self.gpu is None else self.gpu,
            "netG": "resnet_6blocks" if self.side < 256 else "resnet_9blocks",  # CycleGAN's paper, section 7.1
        } | options  # fmt: skip
        given = {option: value for option, value in options.items() if re.search(rf"--{option}['\"]", known)}
        flags = [text for option, value in given.items() for text in (f"--{option}", str(value)) if text]
        mended = ["-c", MENDED] if "opt.amp" in model and "--amp" not in known else []
        return [sys.executable, *mended, script, *flags]

    def check(self) -> None:
        """UserError where its commands do not start, before any time is spent."""
        log = self.logs / f"{self.peer.model}.log"
        for script in ("train.py", "test.py"):
            command = [*self.command(script, "check", "AtoB"), "--help"]
            _, status = run_metered(command, log, float("inf"), self.gpu is not None, self.code)
            if status:
                raise self.failure(script, log, status)

    def train(self, way: str, budget_s: float) -> list[tuple[float, int, Path]]:
        """One training: for each share of the time the seconds used, the step that was saved last, and the weights."""
        folder, log = self.work / "weights" / way, self.logs / f"{self.peer.model}_{way}.log"
        marks: list[tuple[float, int, Path]] = []

        def mark(used: float) -> None:
            kept = self.work / f"kept{len(marks)}"
            marks.append((used, keep_newest(folder, self.peer.generators, kept / way), kept))

        def watch(used: float) -> None:
            saves(folder)
            if len(marks) + 1 < len(self.peer.shares) and used >= self.peer.shares[len(marks)] * budget_s:
                mark(used)

        command = self.command(
            "train.py", way, way, checkpoints_dir=self.work / "weights", load_size=round(self.side * 286 / 256),
            num_threads=0, save_by_iter="", save_latest_freq=5 if self.gpu is None else 200,
            save_epoch_freq=10**6, display_id=0, no_html="",
        )  # fmt: skip
        used, status = run_metered(command, log, budget_s, self.gpu is not None, self.code, watch=watch)
        if status:
            raise self.failure("train.py", log, status)
        while len(marks) < len(self.peer.shares):  # more than one where its own last epoch came early
            mark(used)
        return marks

    def transfer(self, way: str, weights: Path, results: Path, count: int) -> None:
        """test.py on the test pictures, with the weights of a training."""
        log = self.logs / f"{self.peer.model}_{way}.log"
        command = self.command(
            "test.py", way, way, checkpoints_dir=weights, results_dir=results, load_size=self.side, num_test=count
        )
        _, status = run_metered(command, log, float("inf"), self.gpu is not None, self.code)
        if status:
            raise self.failure("test.py", log, status)

    def failure(self, script: str, log: Path, status: int) -> UserError:
        missing = re.search(r"No module named '([\w.]+)'\s*$", log.read_text(encoding="utf-8", errors="replace"))
        if missing:
            return UserError(f"--code {self.code}: needs the package {missing[1]}; pip install {missing[1]}")
        why = last_line(log)
        return UserError(f"--code {self.code}: {script} ended with status {status} ({why}); all it said is in {log}")


def saves(folder: Path) -> list[int]:
    """The steps of the files iter_<step>_net_<network>.pth, newest first; deletes old ones."""
    steps = sorted({int(path.name.split("_")[1]) for path in folder.glob("iter_*_net_*.pth")}, reverse=True)
    for path in (path for step in steps[KEPT_SAVES:] for path in folder.glob(f"iter_{step}_net_*.pth")):
        path.unlink()
    return steps[:KEPT_SAVES]


def keep_newest(folder: Path, generators: tuple[str, ...], kept: Path) -> int:
    """Copy the newest save that is whole as the `latest` one, and return its step; 0 where there is none.

    A file that its writer has not finished does not load. On a CPU some versions save what torch's DataParallel adds to
    the names of weights, and cannot load it again.
    """
    for step in saves(folder):
        try:
            files = {name: folder / f"iter_{step}_net_{name}.pth" for name in generators}
            weights = {name: torch.load(path, "cpu", weights_only=True) for name, path in files.items()}
        except Exception:
            continue
        kept.mkdir(parents=True)
        for name, tensors in weights.items():
            bare = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
            torch.save(bare, kept / f"latest_net_{name}.pth")
        return step
    return 0


def write_squares(train: Path, test: Pictures, styles: list[str], side: int, folder: Path) -> int:
    """The peer's trainA, trainB, testA and testB: the squares that ours sees, so that it can read every file and crops
    none of them otherwise; the number of test pictures.

    Test pictures have the same names in A and B, and as many: the peer calls what it makes of B after A.
    """
    count = max(len(test[style]) for style in styles)
    for letter, style in zip("AB", styles, strict=True):
        for number, name in enumerate(images.find_pictures(train / style)):
            with suppress(images.BadPicture):
                square = images.open_square(train / style / name, round(side * 286 / 256))
                images.save_picture(square, folder / f"train{letter}" / f"{number:06}.png")
        pixels = list(test[style].values())
        for number in range(count):
            picture = images.to_picture(pixels[number % len(pixels)])
            images.save_picture(picture, folder / f"test{letter}" / f"{number:06}.png")
    return count


def read_results(folder: Path, label: str, count: int) -> Tensor:
    """(count, 3, S, S) what test.py saved as images/<label>/<number>.png, or images/<number>_<label>.png."""
    found = sorted([*folder.rglob(f"{label}/[0-9]*.png"), *folder.rglob(f"[0-9]*_{label}.png")])[:count]
    if len(found) < count:
        raise UserError(f"--code: test.py wrote {len(found)} of {count} pictures {label}; is it another version?")
    return torch.stack([images.to_pixels(images.to_bytes(images.open_picture(path))) for path in found])


def run_peer(checkout: Checkout, evaluator: Evaluator, train: Path, name: str, budget_s: float) -> list[Row]:
    """Train, transfer and measure: a row for each share of the time."""
    (a, b), peer, rows = evaluator.styles, checkout.peer, []
    count = write_squares(train, evaluator.test, evaluator.styles, checkout.side, checkout.work / "data")
    marks = {way: checkout.train(way, budget_s) for way in peer.ways}
    for number, share in enumerate(peer.shares):
        of_share = [marks[way][number] for way in peer.ways]
        seconds, steps = sum(used for used, _, _ in of_share), min(step for _, step, _ in of_share)
        if not steps:
            raise UserError(f"--minutes {budget_s / 60:g}: {name} saved no weights within {share:g} of it; give more")
        minutes = f"{share * budget_s / 60:g} minutes each way" if len(peer.ways) > 1 else "both ways"
        row = Row(f"{name}, {minutes}", seconds, steps, ours=False)
        for way in peer.ways:
            weights, results = marks[way][number][2], checkout.work / f"results{number}_{way}"
            checkout.transfer(way, weights, results, count)
            made = [("fake_B", (a, b) if way == "AtoB" else (b, a))]
            made += [("fake_A", (b, a))] if len(peer.ways) == 1 else []
            for label, (source, target) in made:
                pixels = read_results(results, label, len(evaluator.test[source]))
                row.directions[source, target] = judge(evaluator, source, target, pixels)
        rows.append(row)
    return rows


#################################################################################
#                                 The comparison                                #
#################################################################################


def measure_ours(evaluator: Evaluator, runs: list[Run], seconds: float | None) -> list[Row]:
    rows = []
    for each in runs:
        name = f"ours, strength {each.settings.strength:g}, scale {each.settings.cfg_scale:g}"
        measured = evaluator.measure(each.pipeline, each.settings, name, quick=True)
        directions = {(one.source, one.target): one for one in measured.directions}
        rows.append(Row(name, seconds, None, True, directions))
    return rows


def write_results(rows: list[Row], evaluator: Evaluator, folder: Path) -> dict:
    """report.md, front.png and the sheets; returns what the last line says."""
    real = [evaluator.classifier.predict(torch.stack(list(pictures.values()))) == number
            for number, pictures in enumerate(evaluator.test.values())]  # fmt: skip
    accuracy, uncoded = evaluator.classifier_accuracy, estimate(torch.cat(real))
    text = (
        f"{table(rows)}\n\nThe classifier on real test pictures: {accuracy} through our autoencoder, {uncoded} as they "
        "are.\n"
    )
    print(text)
    with written_whole(folder / "report.md") as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
    plot_fronts(rows, folder / "front.png")
    for row in rows:
        for direction in row.directions.values():
            save_sheet(direction, folder / re.sub(r"[^\w.]+", "_", row.name))
    print(f"written to {folder}; look at front.png and at the sheets")
    found = {"rows": [row.tree() for row in rows], "margins": [margin.tree() for margin in margins(rows)]}
    return found | plain({"classifier_accuracy": accuracy, "classifier_accuracy_uncoded": uncoded})


def check_input(args: argparse.Namespace) -> int:
    """UserError for what can be told before any of the time is spent; the side of the pictures."""
    if args.peer not in PEERS:
        raise UserError(f"--peer {args.peer}: is not known; one of {', '.join(PEERS)}")
    if not 0 < args.minutes < float("inf"):
        raise UserError(f"--minutes {args.minutes:g}: must be more than 0")
    if pick_device(args.device).type not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device}: the peers know cuda and cpu alone")
    check_code(args.code, PEERS[args.peer])
    check_output(args.output, "report.md", "front.png")
    styles = find_styles(args.train_data, None)
    if len(styles) != 2:
        raise UserError(f"--train_data {args.train_data}: has {len(styles)} styles; the peers know two")
    for style in styles:
        if not images.find_pictures(args.data / style):
            raise UserError(f"--data {args.data / style}: holds no pictures; give held-out ones of each style")
    if args.checkpoint:
        return load_checkpoint(args.checkpoint).latents.image_size
    if (args.output / "ours").exists():
        raise UserError(
            f"--output {args.output}: has ours of another run; take that by --checkpoint, or another folder"
        )
    return load_config(args.config, args.overrides).data.image_size


def main(args: argparse.Namespace) -> int:
    side = check_input(args)
    device, budget_s, seconds = pick_device(args.device), 60 * args.minutes, None
    gpu = (device.index or 0) if device.type == "cuda" else None
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        checkout = Checkout(args.code.resolve(), PEERS[args.peer], gpu, side, Path(folder), args.output.resolve())
        checkout.check()
        checkpoint = args.checkpoint
        if args.config:
            checkpoint, seconds = train_ours(args, device, budget_s)
        options = EvaluateOptions(
            str(checkpoint), data=args.data, train_data=args.train_data, quick=True, device=args.device,
            sweep=tuple(args.sweep), overrides=tuple(args.overrides),
        )  # fmt: skip
        runs = load_runs(options)
        evaluator = Evaluator(runs[0].pipeline, *load_pictures(options, runs[0], []), pairs=False)
        rows = measure_ours(evaluator, runs, seconds)
        rows += run_peer(checkout, evaluator, args.train_data, args.peer, budget_s)
    result = {
        "device": device_name(device),
        "peer": args.peer,
        "minutes": args.minutes,
        "side": side,
        "checkpoint": str(checkpoint),
    }
    print(json.dumps(result | write_results(rows, evaluator, args.output)))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Compare transfers with a peer's after the same time of training.")
    parser.add_argument("--peer", required=True, help=f"which network: {', '.join(PEERS)}")
    parser.add_argument("--code", required=True, type=Path, help="your checkout of the peer's repository")
    ours = parser.add_mutually_exclusive_group(required=True)
    ours.add_argument("--config", type=Path, help="train ours by this config, for the same time")
    ours.add_argument("--checkpoint", type=Path, help="or take this stage1_epoch*.pt of train.py")
    parser.add_argument("--train_data", required=True, type=Path, help="one folder of pictures a style, to train on")
    parser.add_argument("--data", required=True, type=Path, help="held-out pictures, one folder a style")
    parser.add_argument("--minutes", type=float, default=10, help="of CPU time, or on a GPU of the clock's")
    parser.add_argument("--sweep", nargs="+", default=["strength=0.4,0.6,0.8,1", "cfg_scale=1,2,4"], metavar="KEY=A,B",
                        help="settings of ours, every combination")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("report/peers"), help="folder of the report")
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, build_parser())
