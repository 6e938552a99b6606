"""How many pictures a second an autoencoder encodes and decodes, and what each way of computing costs in quality.

python benchmarks/autoencoder.py --autoencoder models/taesd3
python benchmarks/autoencoder.py --autoencoder random

Times encoding and decoding in turn: NCHW and NHWC memory in float32, NHWC under BF16 autocast where the device has it.
The ways that a loaded autoencoder takes are compared with those of the builds that knew BF16 on CUDA alone. `random` is
an AutoencoderKL of Stable Diffusion's size with random weights, of which only the speed means something. On a CPU the
time is that of the calling thread: run it with OMP_NUM_THREADS=1. The last line is JSON.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from isonext.data.autoencoder import DiffusersAutoencoder, load_autoencoder
from isonext.data.demo_pictures import draw_scene
from isonext.data.images import to_bytes, to_pixels
from isonext.errors import UserError
from isonext.utils.cli import add_device_flags, new_parser, run
from isonext.utils.device import device_name, has_bf16, pick_device

WAYS = {  # name -> memory layout, BF16
    "nchw float32": (torch.contiguous_format, False),
    "nhwc float32": (torch.channels_last, False),
    "nhwc bf16": (torch.channels_last, True),
}


def save_random(folder: Path) -> str:
    """Stable Diffusion's AutoencoderKL: 83.7 M random weights."""
    import diffusers

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    torch.manual_seed(0)
    diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks).save_pretrained(
        folder
    )
    return str(folder)


def timed(work: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one call: of this thread on a CPU, which others may share; of the clock on a card."""
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def as_way(codec: DiffusersAutoencoder, way: str) -> None:
    layout, bf16 = WAYS[way]
    codec.bf16_encode = codec.bf16_decode = bf16
    if all(weight.dim() < 5 for weight in codec.parameters()):
        codec.vae.to(memory_format=layout)


def measure(codec: DiffusersAutoencoder, pixels: Tensor, ways: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Way -> pictures a second of encoding and of decoding, medians of the rounds, and dB of the pictures rebuilt,
    where only the decoder computes so, and where both do."""
    seconds: dict[tuple[str, str], list[float]] = {}
    quality = {}
    as_way(codec, "nhwc float32")
    exact = codec.encode(pixels)
    for turn in tqdm(range(rounds + 1), desc=f"{pixels.shape[-1]} px", disable=None):  # the first one warms up
        for way in ways:
            as_way(codec, way)
            latents = codec.encode(pixels)
            if not turn:
                quality[way] = {
                    "decode_db": decibels(codec, exact, pixels),
                    "both_db": decibels(codec, latents, pixels),
                }
            for part, work, x in (("encode", codec.encode, pixels), ("decode", codec.decode, latents)):
                taken = timed(lambda work=work, x=x: work(x), pixels.device)  # type: ignore[misc]
                seconds.setdefault((way, part), []).extend([taken] * bool(turn))
    return {
        way: {part: len(pixels) / statistics.median(seconds[way, part]) for part in ("encode", "decode")} | quality[way]
        for way in ways
    }


def decibels(codec: DiffusersAutoencoder, latents: Tensor, pixels: Tensor) -> float:
    """PSNR of what is decoded, in [-1, 1], over all pictures."""
    return 10 * math.log10(4 / (codec.decode(latents).clamp(-1, 1) - pixels).square().mean().item())


def main(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        name = save_random(Path(scratch)) if args.autoencoder == "random" else args.autoencoder
        codec = load_autoencoder(name, device)
    if not isinstance(codec, DiffusersAutoencoder):
        raise UserError(f"--autoencoder {args.autoencoder}: has no weights whose layout and precision could matter")
    ways = [way for way, (_, bf16) in WAYS.items() if not bf16 or has_bf16(device)]
    names = {True: "nhwc bf16", False: "nhwc float32"}
    default = {"encode": names[codec.bf16_encode], "decode": names[codec.bf16_decode]}
    before = names[device.type == "cuda"]
    figures: dict[str, object] = {"device": device_name(device), "default": default, "before": before}
    print(f"{device_name(device)}; {args.autoencoder}, {args.pictures} pictures at once")
    for size in args.sizes:
        drawn = [to_pixels(to_bytes(draw_scene(seed, "shaded", size))) for seed in range(args.pictures)]
        rows = measure(codec, torch.stack(drawn).to(device), ways, args.rounds)
        for way, row in rows.items():
            rates = f"encode {row['encode']:8.2f}/s   decode {row['decode']:8.2f}/s"
            decoded = f"decoded so {row['decode_db']:6.2f} dB, both {row['both_db']:6.2f} dB"
            print(f"{size:5d} px  {way:13s} {rates}   {decoded}")
        gains = {part: rows[way][part] / rows[before][part] for part, way in default.items()}
        print(f"{size:5d} px  default over before: encode {gains['encode']:.2f}, decode {gains['decode']:.2f}")
        figures[str(size)] = {way: {key: round(value, 3) for key, value in row.items()} for way, row in rows.items()}
    print(json.dumps(figures))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Time an autoencoder's ways of computing side by side.", config=False)
    parser.add_argument("--autoencoder", default="random", help="as autoencoder.name, or random")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides of the pictures in pixels")
    parser.add_argument("--pictures", type=int, default=4, help="at once")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each")
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, build_parser())
