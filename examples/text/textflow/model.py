"""The frozen text model: autoencoder and flow of one folder, `models/text`, and how they are kept in files.

    models/text/autoencoder.pt   its shape, tokenizer and weights, the latents' statistics and the classes' names
    models/text/flow.pt          the velocity network's shape and averaged weights, and which autoencoder it belongs to

Latents are (B, 64, L) here: channels first, as everywhere in the core. `TextModel` is what the heads and the commands
work with; the real OmniFlow has the same calls behind it, see omniflow.py.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isonext.checkpoint import load_weights
from isonext.data.store import LatentSpec
from isonext.errors import UserError
from isonext.models.dit import DiT
from isonext.utils.io import load_data, written_whole
from textflow.autoencoder import AutoencoderConfig, TextAutoencoder, load_tokenizer
from textflow.data import Corpus, check_classes, within_limit

FORMAT = 1
AUTOENCODER, FLOW = "autoencoder.pt", "flow.pt"


@dataclass
class FlowConfig:
    """The shape of the velocity network, `dit.DiT` over (64, L); its other options are the paper's."""

    hidden_dim: int = 384
    num_layers: int = 12
    num_heads: int = 6


@dataclass
class TextModel:
    """Sentences to standardised latents and back, and the velocity between noise and them; nothing in it is trained."""

    autoencoder: TextAutoencoder
    spec: LatentSpec
    field: nn.Module  # velocity (B, 64, L) = field(x, t, style); has null_style
    digest: str  # of the weights: a head knows by it whether it was trained on these latents

    @property
    def device(self) -> torch.device:
        return self.autoencoder.device

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> Tensor:
        """(B, 64, L), mean 0 and deviation 1 per channel."""
        return self.spec.standardise(self.autoencoder.encode(texts).mT)

    def cross_entropy(self, latents: Tensor, texts: list[str]) -> Tensor:
        """Of the frozen decoder, given latents (B, 64, L): a scalar that gradients flow through to the latents."""
        return self.autoencoder.cross_entropy(self.spec.restore(latents).mT, texts)

    def decode(self, latents: Tensor) -> list[str]:
        """(B, 64, L) -> sentences, from the latents alone."""
        return self.autoencoder.decode(self.spec.restore(latents).mT)

    def accept(self, corpus: Corpus) -> Corpus:
        """What it can take of a corpus, whose classes must be its own."""
        check_classes(self.spec, corpus)
        return within_limit(corpus, self.autoencoder.tokenizer, self.autoencoder.config.max_tokens)

    def to(self, device: torch.device) -> "TextModel":
        self.autoencoder.to(device)
        self.field.to(device)
        return self


#################################################################################
#                                     Files                                     #
#################################################################################


def digest_of(*parts: dict[str, Tensor] | str) -> str:
    """Of weights, in the order of their names."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
            continue
        for name in sorted(part):
            digest.update(name.encode() + part[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_part(path: Path, what: str, **entries: Any) -> None:
    """One file of plain data and tensors; dataclasses as dicts."""
    plain = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in entries.items()}
    with written_whole(path) as beside:
        torch.save({"format": FORMAT, "what": what} | plain, beside)


def load_part(path: Path, what: str, names: tuple[str, ...]) -> dict[str, Any]:
    """What `save_part` wrote under that `what`, with these entries; anything else is refused in one line."""
    tree = load_data(path, what)
    if not isinstance(tree, dict) or tree.get("what") != what:
        raise UserError(f"{path}: not a {what} of train_text.py")
    if tree["format"] != FORMAT or tree.keys() != {"format", "what", *names}:
        raise UserError(f"{path}: a {what} of another version of this program; train it anew")
    return tree


def save_autoencoder(folder: Path, autoencoder: TextAutoencoder, spec: LatentSpec) -> None:
    save_part(
        folder / AUTOENCODER,
        "text autoencoder",
        config=autoencoder.config,
        tokenizer=autoencoder.tokenizer.to_str(),
        spec=spec,
        weights=autoencoder.state_dict(),
    )


def load_autoencoder(folder: Path) -> tuple[TextAutoencoder, LatentSpec]:
    """The frozen autoencoder of a model folder, and what its latents are."""
    if not (folder / AUTOENCODER).exists():
        raise UserError(
            f"{folder}: no text model here; make it: python examples/text/train_text.py --model_path {folder}"
        )
    tree = load_part(folder / AUTOENCODER, "text autoencoder", ("config", "tokenizer", "spec", "weights"))
    autoencoder = TextAutoencoder(AutoencoderConfig(**tree["config"]), load_tokenizer(tree["tokenizer"]))
    load_weights(autoencoder, tree["weights"], folder / AUTOENCODER)
    return autoencoder.eval().requires_grad_(False), LatentSpec(**tree["spec"])


def make_field(config: FlowConfig, spec: LatentSpec) -> DiT:
    """The core's transformer over a sequence of latents, a token each."""
    shape = dataclasses.asdict(config)
    # Nothing is recomputed backwards: a step over 8 or 32 tokens is small in memory, and computing it twice is not.
    return DiT(
        spec.channels, len(spec.styles), (spec.image_size,), patch_size=1, qk_norm=True, recompute="none", **shape
    )


def save_flow(folder: Path, config: FlowConfig, field: nn.Module, autoencoder: TextAutoencoder) -> None:
    belongs = digest_of(autoencoder.state_dict())
    save_part(folder / FLOW, "text flow", config=config, autoencoder=belongs, weights=field.state_dict())


def is_omniflow(folder: Path) -> bool:
    """Whether a folder holds OmniFlow's weights, in the diffusers layout, rather than ours."""
    return (folder / "transformer").is_dir() and not (folder / AUTOENCODER).exists()


def load_text_model(folder: str | Path) -> TextModel:
    """Autoencoder and flow of a folder, frozen; a folder of OmniFlow's is opened by its adapter."""
    folder = Path(folder)
    if is_omniflow(folder):
        from textflow.omniflow import open_omniflow

        return open_omniflow(folder)
    autoencoder, spec = load_autoencoder(folder)
    if not (folder / FLOW).exists():
        raise UserError(
            f"{folder}: its flow is missing: python examples/text/train_text.py --stage flow --model_path {folder}"
        )
    tree = load_part(folder / FLOW, "text flow", ("config", "autoencoder", "weights"))
    belongs = digest_of(autoencoder.state_dict())
    if tree["autoencoder"] != belongs:
        raise UserError(
            f"{folder / FLOW}: was trained on the latents of another autoencoder; delete it and train it anew"
        )
    field = make_field(FlowConfig(**tree["config"]), spec)
    load_weights(field, tree["weights"], folder / FLOW)
    return TextModel(autoencoder, spec, field.eval().requires_grad_(False), digest_of(belongs, tree["weights"]))
