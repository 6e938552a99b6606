"""Latents to sentences: the four modes of generate_text.py. Nothing here sees a reference but through its latents."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from isonext.errors import UserError
from isonext.flow.guidance import GuidedField
from isonext.flow.loss import path
from isonext.flow.solvers import integrate, time_grid
from isonext.flow.transfer import TransferSettings, transfer
from isonext.utils.device import pick_device
from isonext.utils.io import written_whole
from isonext.utils.seeding import seeded
from textflow.data import load_corpora, read_data_config
from textflow.head_stage import load_head
from textflow.heads import Heads
from textflow.model import TextModel, load_text_model

METHOD = "midpoint"  # second order; the way back is not needed but for `roundtrip`, which takes alf


@dataclass
class Writing:
    """How latents come about, see generate_text.py."""

    mode: str = "denoise"
    t_start: float = 0.3
    num_steps: int = 20
    cfg_scale: float = 1.0
    batch_size: int = 32
    seed: int = 0


def decode_latents(model: TextModel, heads: Heads | None, latents: Tensor) -> list[str]:
    """Sentences of a flow's latents (B, 64, L); what reads the latents is what was trained, see `Heads.forward`."""
    with torch.inference_mode():
        return model.decode(heads(latents).latents if heads else latents)


def write_texts(
    model: TextModel,
    heads: Heads | None,
    texts: list[str] | None,
    styles: Tensor,
    settings: Writing,
    quiet: bool | None = None,
) -> list[str]:
    """One sentence for each of the classes `styles` (n,); `texts` are the references, which `sample` goes without."""
    space = (model.spec.channels, model.spec.image_size)
    noise = torch.randn(
        len(styles), *space, generator=seeded(settings.seed, "text noise", 0)
    )  # whatever the batch size
    written = []
    for start in tqdm(range(0, len(styles), settings.batch_size), disable=quiet, unit="batch", desc=settings.mode):
        part = slice(start, start + settings.batch_size)
        x0, style = noise[part].to(model.device), styles[part].to(model.device)
        x1 = None if texts is None else model.encode(texts[part])
        written += decode_latents(model, heads, _latents(model, x0, x1, style, settings))
    return written


@torch.inference_mode()
def _latents(model: TextModel, x0: Tensor, x1: Tensor | None, style: Tensor, settings: Writing) -> Tensor:
    """What the mode makes of noise x0 and a reference's latents x1, both (B, 64, L)."""
    if settings.mode == "reconstruct":
        return x1
    if settings.mode == "roundtrip":
        return transfer(model.field, x1, style, style, TransferSettings(num_steps=settings.num_steps)).latents
    t = settings.t_start if settings.mode == "denoise" else 0.0
    x = x0 if settings.mode == "sample" else path(x0, x1, torch.full((len(x0),), t, device=x0.device))[0]
    if t == 1:
        return x
    null = torch.full_like(style, model.field.null_style)
    field = GuidedField(model.field, style, settings.cfg_scale, null)
    return integrate(field, x, time_grid(settings.num_steps, start=t), METHOD)


def sample_styles(model: TextModel, count: int, class_name: str | None) -> Tensor:
    """(count,) classes to sample: the one that is named, or all in turn."""
    if class_name is not None:
        return torch.full((count,), model.spec.style_id(class_name))
    return torch.arange(count) % len(model.spec.styles)


def write_predictions(args: argparse.Namespace) -> None:
    """generate_text.py, once its flags are read."""
    model = load_text_model(args.model_path).to(pick_device(args.device))
    heads = load_head(args.checkpoint, model).to(model.device).without(args.without) if args.checkpoint else None
    settings = Writing(args.mode, args.t_start, args.num_steps, args.cfg_scale, args.batch_size, args.seed)
    texts, styles = None, None
    if args.mode == "sample":
        styles = sample_styles(model, args.num_samples, args.class_name)
    else:
        corpora = dict(zip(("train", "val"), load_corpora(read_data_config(args.data_config)), strict=True))
        chosen = model.accept(corpora[args.split]).part(args.num_samples)
        if not len(chosen):
            raise UserError("the split has no sentence: raise val_fraction in the data config, or use --split train")
        texts, styles = chosen.texts, chosen.styles
    written = write_texts(model, heads, texts, styles, settings)
    if texts:
        kept = [{"reference": text} for text in texts]
    else:
        kept = [{"reference": None, "class": model.spec.styles[style]} for style in styles]
    save_predictions(args.output, kept, written)
    print(f"{args.output}: {len(written)} sentences, {args.mode}, {heads.config.name if heads else 'no head'}")


def save_predictions(path: str | Path, known: list[dict], written: list[str]) -> None:
    """What eval_text.py reads: {"id", "reference", "prediction"} each, the known entries in between."""
    entries = [
        {"id": number, **entry, "prediction": text}
        for number, (entry, text) in enumerate(zip(known, written, strict=True))
    ]
    with written_whole(path) as beside:
        beside.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
