"""Does preprocessing keep the encoder busy?

python benchmarks/preprocess.py --autoencoder models/my-vae

Draws pictures, then times, in turn, the bare encoder on batches in memory (each picture and its mirror image) and the
inner part of `preprocess_latents.py` on the same pictures (reading, resizing, encoding, writing). What memory layout
and BF16 do to the encoder, `autoencoder.py` measures. The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from isonext.config import Config
from isonext.data import images
from isonext.data.autoencoder import load_autoencoder
from isonext.data.preprocess import BATCH, Work, encode
from isonext.data.pt_store import PtStore
from isonext.data.store import LatentSpec, StoreMeta
from isonext.utils.cli import add_device_flags, new_parser, run
from isonext.utils.device import device_name, pick_device


def draw(folder: Path, count: int, size: int) -> list[Path]:
    """Photographs' stand-ins: smooth waves with grain, a quarter larger than the squares they become."""
    rng, side = np.random.default_rng(0), size * 5 // 4
    y, x = np.mgrid[:side, : side * 4 // 3][..., None] / side
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    for path in paths:
        waves = np.sin(rng.uniform(2, 20, 3) * x + rng.uniform(0, 6, 3)) + np.cos(rng.uniform(2, 20, 3) * y)
        pixels = 127.5 + 50 * waves + rng.normal(0, 6, (*waves.shape[:2], 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return paths


def bare(codec: nn.Module, batches: list[Tensor]) -> None:
    """What preprocessing asks of the encoder: every picture and its mirror image."""
    for pixels in batches:
        codec.encode(pixels)
        codec.encode(pixels.flip(-1))


def store_work(folder: Path, paths: list[Path], codec: nn.Module, size: int) -> Work:
    """All pictures and their mirror images, to a store of single files."""
    spec = LatentSpec(codec.name, codec.channels, codec.factor, size, ["drawn"])
    store = PtStore(folder, StoreMeta(spec, flip=True))
    return Work(store, [(f"{path.name}.pt", path) for path in paths], store.plan(len(paths), BATCH), removed=0)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    codec, config = load_autoencoder(args.autoencoder, device), Config()
    config.data.image_size, config.training.num_workers = args.size, args.num_workers
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        paths = draw(Path(scratch), args.pictures, args.size)
        squares = [images.to_bytes(images.open_square(path, args.size)) for path in paths]
        batches = [images.to_pixels(part.to(device)) for part in torch.stack(squares).split(BATCH)]
        whole = store_work(Path(scratch) / "latents", paths, codec, args.size)
        ways: dict[str, Callable[[], object]] = {
            "bare": lambda: bare(codec, batches),
            "whole": lambda: encode(whole, codec, config, device, True),
        }
        for _ in tqdm(range(args.rounds + 1), desc="rounds", disable=None):  # the first one warms up
            for name, work in ways.items():
                rates.setdefault(name, []).append(len(paths) / timed(work, device))
    report({name: measured[1:] for name, measured in rates.items()}, args, device_name(device))
    return 0


def report(rates: dict[str, list[float]], args: argparse.Namespace, device: str) -> None:
    """Medians of the rounds; shares are medians of each round's own, since a machine's speed drifts."""
    titles, result = {"bare": "bare encoder", "whole": "preprocessing"}, {}
    print(f"{device}; {args.autoencoder}, {args.pictures} pictures of {args.size} pixels")
    for way, measured in rates.items():
        share = statistics.median(one / other for one, other in zip(measured, rates["bare"], strict=True))
        result |= {f"{way}_per_s": round(statistics.median(measured), 3), f"{way}_share": round(share, 4)}
        print(f"{titles[way]:24s}{statistics.median(measured):9.2f} pictures/s   {share:7.1%} of {titles['bare']}")
    print(json.dumps(result | {"device": device, "pictures": args.pictures, "size": args.size}))


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Compare preprocessing's throughput with that of the bare encoder.", config=False)
    parser.add_argument("--autoencoder", default="dct", help="as autoencoder.name in the config")
    parser.add_argument("--size", type=int, default=256, help="side of the squares in pixels")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=4, help="decoding processes")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, build_parser())
