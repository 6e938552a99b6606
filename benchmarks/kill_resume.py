"""Kill a training run at random moments, resume it each time, and compare it with one that was left in peace.

python benchmarks/kill_resume.py

Real processes of `train.py` get SIGKILL, some in the middle of a save, whose writes are slowed down for it. In the end
the two last checkpoints (weights, average, optimizer, counters) and the two logs must be equal to the last bit. The
last line is JSON; the exit status is 1 where anything differs.
"""

import argparse
import io
import json
import random
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from isonext.checkpoint import epoch_checkpoints, load_checkpoint
from isonext.training.log import read_metrics
from isonext.utils.cli import new_parser, run

ROOT = Path(__file__).resolve().parents[1]
SETTING = {
    "model": {"hidden_dim": 16, "num_layers": 2, "num_groups": 4, "style_dim": 16, "time_dim": 16},
    "training": {"batch_size": 8, "warmup_steps": 10, "compile": False, "num_workers": 0, "log_every_steps": 1,
                 "save_every_epochs": 1, "keep_checkpoints": 2, "val_every_epochs": 10**6},
    "data": {"image_size": 32, "val_fraction": 0.0, "flip": False},
    "autoencoder": {"name": "dct:f4c12"},
}  # fmt: skip
STARTED = " parameters, "  # in the line that train.py prints when it begins to train


def slow_training(arguments: list[str], pause: float) -> None:
    """`python train.py ARGUMENTS`, but a checkpoint takes `pause` seconds to write, so that a kill may well hit it."""
    save = torch.save

    def save_slowly(tree: object, path: Path) -> None:
        buffer = io.BytesIO()
        save(tree, buffer)
        content, pieces = buffer.getvalue(), 20
        with open(path, "wb") as file:
            for number in range(pieces):
                file.write(content[len(content) * number // pieces : len(content) * (number + 1) // pieces])
                file.flush()
                time.sleep(pause / pieces)

    torch.save = save_slowly
    torch.set_num_threads(1)
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def start(folder: Path, run_name: str, pause: float) -> subprocess.Popen:
    flags = ["--config", "config.json", "--resume", "--set", f"checkpoint.save_dir={run_name}"]
    command = [sys.executable, str(Path(__file__)), "--child", str(pause), *flags]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_once(folder: Path, pause: float, after: float) -> bool:
    """Resume, kill `after` seconds into the training; whether the kill hit a save. RuntimeError if the run was over."""
    process = start(folder, "killed", pause)
    said = []
    for line in process.stdout:
        said.append(line)
        if STARTED in line:
            break
    else:
        raise RuntimeError("train.py ended by itself:\n" + "".join(said))
    time.sleep(after)
    if process.poll() is not None:
        raise RuntimeError("the run was over before the last kill; give it more --epochs")
    process.kill()
    process.communicate()
    return any((folder / "killed").glob(".*.isonext-tmp-*"))


def finish(folder: Path, run_name: str) -> None:
    process = start(folder, run_name, 0.0)
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"train.py ended with status {process.returncode}:\n{said}")


def differing(one: object, other: object) -> int:
    """How many numbers of two checkpoints' trees are not equal."""
    if isinstance(one, torch.Tensor):
        return int((one != other).sum()) if one.shape == other.shape else one.numel()
    if isinstance(one, dict):
        return sum(differing(one.get(key), other.get(key)) for key in one.keys() | other.keys())
    if isinstance(one, list | tuple):
        return sum(map(differing, one, other)) + abs(len(one) - len(other))
    return int(one != other)


def prepare(folder: Path, epochs: int) -> None:
    """Pictures, config and latent store of a run of a hundredth of a second a step."""
    generator = np.random.default_rng(0)
    for style in ("a", "b"):
        (folder / "raw_data" / style).mkdir(parents=True)
        for number in range(32):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "raw_data" / style / f"{number}.png")
    setting = SETTING | {"training": SETTING["training"] | {"stage1_epochs": epochs}}
    (folder / "config.json").write_text(json.dumps(setting))
    subprocess.run([sys.executable, str(ROOT / "preprocess_latents.py")], cwd=folder, check=True, capture_output=True)


def main(args: argparse.Namespace) -> int:
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, args.epochs)
        finish(folder, "in_peace")
        hit = sum(
            kill_once(folder, args.pause, moments.uniform(0, args.longest))
            for _ in tqdm(range(args.kills), desc="kills", disable=None)
        )
        finish(folder, "killed")
        ends = [load_checkpoint(epoch_checkpoints(folder / name)[-1]) for name in ("in_peace", "killed")]
        parts = ("step", "model", "ema", "optimizer", "guard")
        off = {part: differing(*(getattr(end, part) for end in ends)) for part in parts}
        logs = [
            [
                (line["step"], line.get("loss"), line.get("grad_norm"))
                for line in read_metrics(folder / name / "metrics.jsonl")
            ]
            for name in ("in_peace", "killed")
        ]
        off["log"] = differing(*logs)
    print(f"{args.kills} kills, {hit} of them in the middle of a save; {ends[0].step} steps")
    for part, count in off.items():
        print(f"  {part:10s}{count} differ")
    print(json.dumps({"kills": args.kills, "hit_a_save": hit, "steps": ends[0].step, "differing": off}))
    return 1 if any(off.values()) else 0


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "Kill training at random moments, resume it, and compare with a run left in peace.", config=False
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=150, help="of 8 steps; enough that no kill comes too late")
    parser.add_argument("--longest", type=float, default=2.0, help="seconds of training before a kill, at most")
    parser.add_argument("--pause", type=float, default=0.4, help="seconds that the killed run's saves take")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        slow_training(sys.argv[3:], float(sys.argv[2]))
    else:
        run(main, build_parser())
