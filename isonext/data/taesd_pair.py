"""The two files of a TAESD as its author publishes them (madebyollin/taesd): an encoder and a decoder, by themselves.

diffusers' AutoencoderTiny is the same network in its first shape; the one for FLUX.2 (`taef2`) pools in its middle
blocks, and the one for Sana (`taesana`) has 32 pixels a cell. Which it is, the weights tell. Pixels lie in [0, 1].
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from isonext.data import ldm_checkpoint
from isonext.data.vae_rules import Rule, as_it_is
from isonext.errors import UserError

WIDTH = 64


def is_half(weights: dict[str, Any]) -> bool:
    """Whether these are one of the two: layers that have numbers for names."""
    return bool(weights) and all(key.partition(".")[0].isdigit() for key in weights)


def load(path: str | Path, weights: dict[str, Any]) -> "TaesdPair":
    """The pair, of one of its files, whose `weights` these are, and the one that lies beside it, in float32.

    A weight that is missing, of another shape or not known is a UserError that names it.
    """
    path = Path(path)
    own, other = ("encoder", "decoder") if "0.weight" in weights else ("decoder", "encoder")
    beside = _beside(path, own, other)
    parts = {own: (path, weights), other: (beside, ldm_checkpoint.read_weights(beside))}
    if not is_half(parts[other][1]):
        raise UserError(f"autoencoder {beside}: is no {other} of a TAESD, as its {own} {path.name} wants one")
    for file, weights in parts.values():
        ldm_checkpoint.check_tensors(weights, file)
    latent = _width(*parts["encoder"])
    pooled, deep = "12.pool.0.weight" in parts["encoder"][1], "4.conv.0.weight" in parts["encoder"][1]
    deep = deep and "2.bias" in parts["encoder"][1]
    with torch.device("meta"):  # the weights below take the place of random ones
        pair = TaesdPair(latent, pooled, deep)
    for part, (file, weights) in parts.items():
        state = getattr(pair, part).state_dict()
        ldm_checkpoint.check_names({key: key for key in state}, weights, file)
        shaped = {key: ldm_checkpoint.shaped(weights[key], state[key], key, file) for key in state}
        getattr(pair, part).load_state_dict(shaped, assign=True)
    return pair


def _beside(path: Path, own: str, other: str) -> Path:
    name = path.name.replace(own, other)
    for suffix in (path.suffix, *ldm_checkpoint.SUFFIXES):
        if name != path.name and (found := path.with_name(name).with_suffix(suffix)).is_file():
            return found
    wanted = name if name != path.name else f"NAME_{other}{path.suffix}"
    raise UserError(
        f"autoencoder {path}: is the {own} of a TAESD, and its {other} is not beside it; put it there as {wanted}"
        + ("" if name != path.name else f", and call this one NAME_{own}{path.suffix}")
    )


def _width(path: Path, encoder: dict[str, Tensor]) -> int:
    """Channels of the latents: what comes out of the encoder's last layer."""
    biases = [key for key in encoder if key.endswith(".bias") and key.count(".") == 1]
    if not biases:
        raise UserError(f"autoencoder {path}: the bias of its last layer is missing; {ldm_checkpoint.ADVICE}")
    return len(encoder[max(biases, key=lambda key: int(key.partition(".")[0]))])


#################################################################################
#                                  The networks                                 #
#################################################################################


class TaesdPair(nn.Module):
    """With the face of diffusers' classes. `pooled` and `deep` are the shapes of taef2 and of taesana."""

    rule = Rule(as_it_is, "latents", unit=True)

    def __init__(self, latent: int, pooled: bool, deep: bool) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.encoder = _deep_encoder(latent) if deep else _encoder(latent, pooled)
        self.decoder = _deep_decoder(latent) if deep else _decoder(latent, pooled)

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=self.encoder(pixels))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.decoder(latents))


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    def __init__(self, width: int, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width), nn.ReLU(), _conv(width), nn.ReLU(), _conv(width))
        self.pool = None
        if pooled:
            wide = 4 * width
            thin = [nn.Conv2d(*sizes, 1, bias=False) for sizes in ((width, wide), (wide, width))]
            self.pool = nn.Sequential(thin[0], nn.GroupNorm(4, wide), nn.ReLU(), thin[1])

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _conv(before: int, after: int = 0, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after or before, 3, padding=1, **options)


def _blocks(width: int, count: int = 3, pooled: bool = False) -> list[nn.Module]:
    return [_Block(width, pooled) for _ in range(count)]


def _down(pooled: bool = False) -> list[nn.Module]:
    return [_conv(WIDTH, stride=2, bias=False), *_blocks(WIDTH, pooled=pooled)]


def _up(before: int, after: int = WIDTH, pooled: bool = False) -> list[nn.Module]:
    return [*_blocks(before, pooled=pooled), nn.Upsample(scale_factor=2), _conv(before, after, bias=False)]


def _encoder(latent: int, pooled: bool) -> nn.Sequential:
    first = [_conv(3, WIDTH), *_blocks(WIDTH, 1)]
    return nn.Sequential(*first, *_down(), *_down(), *_down(pooled), _conv(WIDTH, latent))


def _decoder(latent: int, pooled: bool) -> nn.Sequential:
    levels = [*_up(WIDTH, pooled=pooled), *_up(WIDTH), *_up(WIDTH)]
    return nn.Sequential(_Clamp(), _conv(latent, WIDTH), nn.ReLU(), *levels, *_blocks(WIDTH, 1), _conv(WIDTH, 3))


def _deep_encoder(latent: int) -> nn.Sequential:
    first = [_conv(3, WIDTH // 2, stride=2), nn.ReLU(), _conv(WIDTH // 2, WIDTH, stride=2), nn.ReLU()]
    return nn.Sequential(*first, *_blocks(WIDTH, 1), *_down(), *_down(), *_down(), _conv(WIDTH, latent))


def _deep_decoder(latent: int) -> nn.Sequential:
    first = [_Clamp(), _conv(latent, 4 * WIDTH), nn.ReLU()]
    wide = [*_up(4 * WIDTH, 2 * WIDTH), *_up(2 * WIDTH, WIDTH)]
    levels = [*wide, *_up(WIDTH), *_up(WIDTH), *_up(WIDTH)]
    return nn.Sequential(*first, *levels, *_blocks(WIDTH, 1), _conv(WIDTH, 3))
