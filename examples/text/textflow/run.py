"""What train_text.py does once its flags are read: the missing stages in their order."""

import argparse
import dataclasses
from pathlib import Path

import torch

from isonext.errors import UserError
from isonext.utils.device import allow_tf32, pick_device
from textflow.data import Corpus, load_corpora, read_data_config
from textflow.head_stage import HeadRun, train_head
from textflow.heads import HeadConfig
from textflow.model import AUTOENCODER, FLOW, is_omniflow, load_text_model
from textflow.stages import Shape, quick_shape, train_autoencoder, train_flow


def shape_of(args: argparse.Namespace) -> Shape:
    """The preset, with what the flags say in its place."""
    shape = quick_shape() if args.shape == "quick" else Shape()
    sizes = {"latents": args.latents, "max_tokens": args.max_tokens, "t5": args.t5}
    steps = {"autoencoder_steps": args.autoencoder_steps, "flow_steps": args.flow_steps}
    for name, value in (sizes | steps).items():
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")
    given = {name: value for name, value in sizes.items() if value is not None}
    autoencoder = dataclasses.replace(shape.autoencoder, **given)
    given = {name: value for name, value in steps.items() if value is not None}
    return dataclasses.replace(shape, autoencoder=autoencoder, **given)


def from_flags(kind: type, args: argparse.Namespace):
    """A dataclass whose fields are flags, as far as there are such flags."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in vars(args).items() if name in names})


def train(args: argparse.Namespace) -> None:
    folder, shape = Path(args.model_path), shape_of(args)
    head = from_flags(HeadConfig, args)
    wants_head = args.stage == "head" or head.name != "" or head.use_vq_codebook
    if wants_head:
        head.check(shape.autoencoder.latent_dim)  # before an hour's training, not after it
    device = pick_device(args.device)
    allow_tf32(True)
    corpora = load_corpora(read_data_config(args.data_config))
    if args.stage in ("autoencoder", "flow", "all") and not is_omniflow(folder):
        make_model(folder, shape, corpora, device, args.stage)
    if wants_head and args.stage in ("head", "all"):
        model = load_text_model(folder).to(device)
        train_head(model, head, from_flags(HeadRun, args), corpora, Path(args.output_dir))
        print(f"{Path(args.output_dir) / 'best.pt'}: {head.name}")


def make_model(
    folder: Path, shape: Shape, corpora: tuple[Corpus, Corpus], device: torch.device, stage: str = "all", quiet=None
) -> None:
    """The stages up to `stage` whose files are not there."""
    for name, file, make in (("autoencoder", AUTOENCODER, train_autoencoder), ("flow", FLOW, train_flow)):
        if stage not in (name, "all"):
            continue
        if (folder / file).exists():
            print(f"{folder / file}: is there already; delete it to train it anew")
        else:
            make(folder, shape, *corpora, device, quiet)
            print(f"{folder / file}: trained")
