"""A trained flow made ready for pictures: autoencoder, statistics and network behind three calls.

encode: pixels -> standardised latents;   transfer: latents -> latents;   decode: latents -> pixels
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import solvers
from autoencoder import load_autoencoder
from checkpoint import load_checkpoint, load_model
from cli import UserError, autocast
from config import Config, InferenceConfig
from images import pad_to_multiple
from latents import LatentSpec
from solvers import Transfer, TransferSettings


@dataclass
class Pipeline:
    model: nn.Module
    codec: nn.Module
    spec: LatentSpec
    device: torch.device
    bf16: bool  # the network under BF16 autocast; as trained, unless changed

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], any size -> standardised latents, padded to whole latent cells."""
        padded = pad_to_multiple(pixels.to(self.device), self.codec.factor)
        return self.spec.standardise(self.codec.encode(padded))

    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Standardised latents -> (B, 3, height, width), the padding cut off, not clipped."""
        return self.codec.decode(self.spec.restore(latents))[..., :height, :width]

    def transfer(self, latents: Tensor, source: int | Tensor, target: int | Tensor, how: TransferSettings) -> Transfer:
        """Standardised latents -> standardised latents; the styles are one for all or one a picture."""
        styles = self._ids(len(latents), source, target)
        with autocast(self.device, self.bf16):
            return solvers.transfer(self.model, latents.to(self.device), *styles, how)

    def undo(self, made: Transfer, source: int | Tensor, target: int | Tensor, how: TransferSettings) -> Tensor:
        """The latents that a transfer started from, by running it backwards."""
        styles = self._ids(len(made.latents), source, target)
        with autocast(self.device, self.bf16):
            return solvers.undo(self.model, made, *styles, how)

    def _ids(self, count: int, *styles: int | Tensor) -> list[Tensor]:
        return [torch.as_tensor(style, device=self.device).expand(count) for style in styles]


def load_pipeline(path: str | Path, device: torch.device) -> tuple[Pipeline, Config]:
    """The averaged network of a checkpoint with its own autoencoder and statistics, and the config it was made by."""
    checkpoint = load_checkpoint(path)
    spec = checkpoint.latents
    codec = load_autoencoder(spec.autoencoder, device)
    if codec.channels != spec.channels:
        raise UserError(
            f"{path}: trained on {spec.channels}-channel latents, autoencoder {codec.name} gives {codec.channels}"
        )
    model = load_model(checkpoint, path, device)
    if checkpoint.config.training.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Pipeline(model, codec, spec, device, checkpoint.config.training.use_amp), checkpoint.config


def transfer_settings(config: InferenceConfig, strength: float = 1.0) -> TransferSettings:
    return TransferSettings(
        method=config.method,
        num_steps=config.num_steps,
        strength=strength,
        cfg_scale=config.cfg_scale,
        guidance=config.guidance,
        cfg_interval=config.cfg_interval,
        latent_clamp=config.latent_clamp,
    )
