"""What was understood of an autoencoder, in lines for people: `python -m isonext.data.autoencoder NAME`."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isonext.data.autoencoder import Autoencoder, DiffusersAutoencoder, load_autoencoder
from isonext.data.demo_pictures import draw_scene
from isonext.data.images import to_bytes, to_pixels
from isonext.utils import cli
from isonext.utils.device import pick_device

SIDE = 256  # of the test picture, where the autoencoder does not take another size alone


def describe(codec: Autoencoder, device: torch.device) -> str:
    """Class, channels, factor, rule, and how well and how fast a drawn picture goes through."""
    side = codec.side or math.ceil(SIDE / codec.factor) * codec.factor
    picture = to_pixels(to_bytes(draw_scene(0, "shaded", side)))[None].to(device)
    kind, rule, pixels = type(codec).__name__, "z", "[-1, 1]"
    if isinstance(codec, DiffusersAutoencoder):
        kind, rule, pixels = type(codec.vae).__name__, codec.affine.text, "[0, 1]" if codec.rule.unit else "[-1, 1]"
    latents, encoding = _timed(lambda: codec.encode(picture), device)
    rebuilt, decoding = _timed(lambda: codec.decode(latents), device)
    error = (rebuilt.clamp(-1, 1) - picture).square().mean().item()
    shape = " x ".join(map(str, latents.shape[1:]))
    return "\n".join(
        f"{name:14s}{value}"
        for name, value in (
            ("autoencoder", codec.name),
            ("class", kind),
            ("channels", codec.channels),
            ("pixels a cell", codec.factor),
            ("pictures", f"{side} x {side} pixels alone" if codec.side else "of any size"),
            ("its pixels", pixels),
            ("latents", rule),
            ("test picture", f"{side} x {side} pixels -> {shape} -> {10 * math.log10(4 / max(error, 1e-12)):.1f} dB"),
            ("time", f"encode {encoding:.1f} ms, decode {decoding:.1f} ms, one picture on {device}"),
            ("sha256", codec.digest),
        )
    )


def _timed(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """What `work` gives, and the milliseconds of its second run."""
    for _ in range(2):
        started = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return result, 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = cli.new_parser("What is understood of an autoencoder.", config=False)
    parser.add_argument("name", help="as autoencoder.name: a folder, a file, a hub id, dct")
    cli.add_device_flags(parser)

    def report(args: Any) -> None:
        device = pick_device(args.device)
        print(describe(load_autoencoder(args.name, device), device))

    cli.run(report, parser)
