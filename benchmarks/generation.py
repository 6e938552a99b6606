"""How far are generated latents from real ones, and how much of that is the base's?

python benchmarks/generation.py --checkpoint checkpoints/emoji/stage1_epoch16.pt --store latents/emoji

FLD (the Frechet distance of channel means and deviations) to the training latents of a style, mean over styles, of

    drawn     samples as sample.py makes them
    training  samples each of which has the layout of another training picture; the same where the base is white noise
    real      training latents themselves: half of as many against the other half, which no sample can be asked to beat

Unguided, with the checkpoint's own solver settings. The last line is JSON.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from isonext.data.dataset import load_split, open_store
from isonext.errors import UserError
from isonext.evaluation.metrics import frechet_distance, latent_features
from isonext.flow.transfer import TransferSettings, sample
from isonext.inference.sampling import draw_noise
from isonext.pipeline import Pipeline, load_pipeline, transfer_settings
from isonext.utils.cli import add_device_flags, new_parser, run
from isonext.utils.device import device_name, pick_device


def generate(pipeline: Pipeline, x0: Tensor, style: Tensor, settings: TransferSettings, batch: int) -> Tensor:
    parts = zip(x0.split(batch), style.split(batch), strict=True)
    return torch.cat([sample(pipeline, *(t.to(pipeline.device) for t in part), settings).cpu() for part in parts])


def main(args: argparse.Namespace) -> int:
    for name, least in (("pictures", 4), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be {least} or more")
    pipeline, config = load_pipeline(args.checkpoint, pick_device(args.device))
    settings = replace(transfer_settings(config.inference), cfg_scale=1.0)
    meta = open_store(args.store)
    if meta.latents.styles != pipeline.spec.styles:
        raise UserError(f"--store {args.store}: is not of the styles of {args.checkpoint}")
    split, rows = load_split(args.store, meta, "train"), []
    for number in tqdm(range(len(pipeline.spec.styles)), desc="styles", disable=None):
        index = (split.styles == number).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))][: args.pictures]
        x1, style = split.batch(index)
        noise, place = draw_noise(pipeline, args.seed, list(range(len(index))))
        starts = pipeline.base.sample(noise, place, style), pipeline.base.x0(noise, x1, style)
        drawn, training = (generate(pipeline, x0, style, settings, args.batch_size) for x0 in starts)
        real = latent_features(x1)
        others = latent_features(split.batch((split.styles == number).nonzero().flatten())[0])
        fld = [frechet_distance(latent_features(made), others) for made in (drawn, training)]
        rows.append([*fld, frechet_distance(real[::2], real[1::2])])
    drawn, training, real = torch.tensor(rows).mean(0).tolist()
    name = device_name(pipeline.device)
    print(f"{name}; FLD of up to {args.pictures} samples a style to its training latents")
    print(f"layouts drawn {drawn:.3f}, of training pictures {training:.3f}; halves of real ones {real:.3f}")
    result = {"drawn": round(drawn, 4), "training": round(training, 4), "real": round(real, 4)}
    print(json.dumps(result | {"pictures": args.pictures, "device": name}))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Measure how far generated latents are from real ones.", config=False)
    parser.add_argument("--checkpoint", required=True, help="a stage1_epoch*.pt of train.py")
    parser.add_argument("--store", required=True, type=Path, help="the latents that it was trained on")
    parser.add_argument("--pictures", type=int, default=256, help="samples a style, at most as many as pictures")
    parser.add_argument("--batch_size", type=int, default=32, help="at once")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    add_device_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, build_parser())
