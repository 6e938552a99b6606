"""Picture tensor <-> latent: the VAEs of diffusers, and the built-in block-DCT that needs no weights.

The VAEs are folders of diffusers (`vae_folder.py`) or files (`ldm_checkpoint.py`, `taesd_pair.py`).

Both are modules with the same face: `name`, `channels`, `factor` (pixels a latent cell), `digest` (what tells it from
any other, wherever it lies), and

    encode: pixels (B, 3, H, W) in [-1, 1], sides divisible by factor -> latents (B, channels, H / factor, W / factor)
    decode: the way back, not clipped

Latents here are the autoencoder's own, with its shift and scale applied; `store.py` standardises them.
"""

import hashlib
import itertools
import math
import re
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isonext.data import ldm_checkpoint, taesd_pair
from isonext.data.vae_folder import WAYS_OUT, load_folder
from isonext.data.vae_rules import RULES, Rule, check_channels
from isonext.errors import UserError, first_line, is_out_of_memory
from isonext.utils.device import autocast, fitting, has_bf16

PIXELS_AT_ONCE = 2**20  # that a VAE takes: 16 pictures of 256 px, 4 of 512 px, one of 1024 px
PROBED = (32, 64, 128, 256)  # sides of the pictures that tell a VAE's factor: up to 128 there are two cells


class Autoencoder(Protocol):
    """What all of them have: see the top of this file."""

    name: str
    channels: int
    factor: int
    digest: str
    side: int | None  # of pictures, in pixels, where it takes one size alone

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


def load_autoencoder(name: str, device: torch.device, download: bool = True) -> Autoencoder:
    """A hub id or local folder of a class in `vae_rules.RULES` or of a pipeline, a checkpoint file, `dct`, `dct:f4c12`.

    Without `download` a hub id must be in the cache.
    """
    if name == "dct" or name.startswith("dct:"):
        return DctCodec(name).to(device)
    return DiffusersAutoencoder(name, device, download)


def weights_digest(weights: Mapping[str, Tensor], *settings: Any) -> str:
    """SHA-256 of the weights' names, types, shapes and bytes, and of what else makes their latents."""
    seal = hashlib.sha256(repr(settings).encode())
    for name, weight in sorted(weights.items()):
        seal.update(repr((name, str(weight.dtype), tuple(weight.shape))).encode())
        plain: Any = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # mypy: a Buffer
        seal.update(plain)
    return seal.hexdigest()


class DiffusersAutoencoder(nn.Module):
    """A pretrained VAE of any class in `vae_rules.py`; encodes to the posterior's mode. BF16 on CUDA and on a CPU that
    has it, else float32.

    A batch goes through it in parts of at most `pixels_at_once`, or a picture; half as many where memory runs out. The
    result is that of the whole batch, up to the rounding of kernels that PyTorch chooses by the size of a batch.
    """

    vae: Any  # one of the classes of diffusers, which is not imported where it is not used

    def __init__(self, name: str, device: torch.device, download: bool = True) -> None:
        super().__init__()
        self.name, self.device = name, device
        self.bf16_encode = self.bf16_decode = device.type == "cuda" or (device.type == "cpu" and has_bf16(device))
        self.pixels_at_once = PIXELS_AT_ONCE
        vae = _load_vae(name, download)
        self.rule: Rule = vae.rule if isinstance(vae, taesd_pair.TaesdPair) else RULES[type(vae).__name__]
        check_channels(name, self.rule, vae.config, WAYS_OUT)
        self.affine = self.rule.affine(name, vae)
        self.digest = weights_digest(vae.state_dict(), type(vae).__name__, *self.affine.settings())
        shift, scale = (v.to(device) if isinstance(v, Tensor) else v for v in (self.affine.shift, self.affine.scale))
        self.shift, self.scale = shift, scale
        self.side = getattr(vae, self.rule.side) if self.rule.side else None
        self.vae = vae.to(device).eval().requires_grad_(False)
        if all(weight.dim() < 5 for weight in self.vae.parameters()):  # there is no such layout of 3-D convolutions
            self.vae.to(memory_format=torch.channels_last)  # a fifth faster: benchmarks/autoencoder.py
        _see_in_float32(self.vae.encoder, device.type)
        self._probe()

    def _probe(self) -> None:
        """Learn channels and factor from a small grey picture. UserError where that does not go through, or comes back
        in another size: what does so later has cost hours by then."""
        try:
            latents, side = self._encode_grey()
            self.channels, self.factor = latents.shape[1], max(1, side // latents.shape[-1])
            pixels = self.decode(latents)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"autoencoder {self.name}: a picture does not go through ({first_line(error)})") from None
        (cells, *other), drawn = latents.shape[2:], tuple(pixels.shape[1:])
        if other != [cells] or side % cells or drawn != (3, side, side):
            raise UserError(
                f"autoencoder {self.name}: makes latents of shape {tuple(latents.shape[1:])} of {side} x {side} "
                f"pixels, and a picture of shape {drawn} of those: encoder and decoder do not fit; {WAYS_OUT}"
            )
        if not (latents.isfinite().all() and pixels.isfinite().all()):
            raise UserError(f"autoencoder {self.name}: makes no finite numbers of a grey picture; {WAYS_OUT}")

    def _encode_grey(self) -> tuple[Tensor, int]:
        """The latents of the first of these pictures that is more than one cell, and its side."""
        for side in PROBED if self.side is None else (self.side,):
            try:
                latents = self.encode(torch.zeros(1, 3, side, side, device=self.device))
            except (RuntimeError, ValueError) as error:
                if side == PROBED[-1] or self.side or is_out_of_memory(error):
                    raise
                continue  # smaller than a cell
            if latents.shape[-1] > 1:
                break
        return latents, side

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[2:]
        if self.side and (height, width) != (self.side, self.side):
            alone = f"{self.side} x {self.side} pixels alone, not {width} x {height}"
            raise UserError(f"autoencoder {self.name}: takes pictures of {alone}")
        return self._in_parts(self._encode, pixels, height * width)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        return self._in_parts(self._decode, latents, math.prod(latents.shape[2:]) * self.factor**2)

    def _encode(self, pixels: Tensor) -> Tensor:
        rule = self.rule
        x = (pixels + 1) / 2 if rule.unit else pixels
        x = F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0) if rule.alpha else x
        with autocast(self.device, self.bf16_encode):
            encoded = getattr(self.vae.encode(x.unsqueeze(2) if rule.time else x), rule.output)
        z = (encoded.mode() if rule.output == "latent_dist" else encoded).float()
        z = z.squeeze(2) if rule.time else z
        z = F.pixel_unshuffle(z, rule.pack) if rule.pack > 1 else z
        return ((z - self.shift) * self.scale).contiguous()

    def _decode(self, latents: Tensor) -> Tensor:
        rule = self.rule
        z = latents / self.scale + self.shift
        z = F.pixel_shuffle(z, rule.pack) if rule.pack > 1 else z
        with autocast(self.device, self.bf16_decode):
            pixels = self.vae.decode(z.unsqueeze(2) if rule.time else z, **rule.decode).sample.float()
        pixels = pixels.squeeze(2) if rule.time else pixels
        pixels = pixels[:, :3] if rule.alpha else pixels
        return pixels * 2 - 1 if rule.unit else pixels

    def _in_parts(self, work: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
        """`work` on the rows of x, each of so many pixels, as many at once as fit."""

        def at_once() -> int:
            return min(len(x), max(1, self.pixels_at_once // pixels))

        def smaller() -> Callable[[], None] | None:
            return None if at_once() == 1 else halve

        def halve() -> None:
            half = math.ceil(at_once() / 2)
            print(f"out of memory in the autoencoder with {at_once()} pictures: going on with {half}", file=sys.stderr)
            self.pixels_at_once = half * pixels

        def in_parts() -> Tensor:
            parts = [work(part) for part in x.split(at_once())]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return fitting(in_parts, smaller)


def _see_in_float32(encoder: nn.Module, device: str) -> None:
    """Under BF16 autocast the first layer computes in float32, and hands on BF16 as before.

    Pixels rounded to the eight bits of BF16 are most of what it costs smooth pictures, and the layer is a twentieth of
    the time.
    """
    first: Any = next(layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d))
    forward = first.forward

    def in_float32(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(device, enabled=False):
            x = forward(*args, **kwargs)
        return x.bfloat16() if torch.is_autocast_enabled(device) else x

    first.forward = in_float32


def _load_vae(name: str, download: bool) -> Any:
    if ldm_checkpoint.is_checkpoint(name):
        weights = ldm_checkpoint.read_weights(name)
        return taesd_pair.load(name, weights) if taesd_pair.is_half(weights) else ldm_checkpoint.build(weights, name)
    return load_folder(name, download)


#################################################################################
#                                 Large pictures                                #
#################################################################################


def tiled(work: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, ratio: Fraction) -> Tensor:
    """`work` on overlapping square tiles of x (B, C, H, W), blended by linear ramps within the overlaps, in float32.

    `work` multiplies the sides by `ratio`, which must make whole numbers of H, W, tile and overlap. Sides in cells of
    x. (What diffusers has for this takes four latent channels for granted in one of its two autoencoders.)
    """
    size = x.shape[-2:]
    spans = [_spans(length, tile, overlap) for length in size]
    total: Tensor | None = None
    weight: Tensor | None = None
    for (top, bottom), (left, right) in itertools.product(*spans):
        part = work(x[..., top:bottom, left:right]).float()
        if total is None or weight is None:
            total = part.new_zeros(*part.shape[:2], *(int(side * ratio) for side in size))
            weight = total[:1, :1].clone()
        place = [slice(int(a * ratio), int(b * ratio)) for a, b in ((top, bottom), (left, right))]
        ramps = [
            _ramp(a > 0, b < length, int(overlap * ratio), part.shape[axis])
            for (a, b), length, axis in zip(((top, bottom), (left, right)), size, (2, 3), strict=True)
        ]
        mask = (ramps[0][:, None] * ramps[1]).to(part)
        total[..., place[0], place[1]] += mask * part
        weight[..., place[0], place[1]] += mask
    assert total is not None and weight is not None  # there is a tile
    return total / weight


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Tiles of one axis: equally long, the last one moved back to end with the axis."""
    if length <= tile:
        return [(0, length)]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    return [(start, start + tile) for start in starts]


def _ramp(before: bool, after: bool, overlap: int, length: int) -> Tensor:
    """Weights (length,) of a tile: 1, falling to 0 over the middle quarter of the overlap where it has a neighbour.

    What lies further out does not count at all: there a convolution has seen the tile's edge instead of the picture.
    """
    rise = (((torch.arange(length) + 0.5) - overlap * 3 / 8) / (overlap / 4)).clamp_min(0)
    weight = torch.ones(length)
    if before:
        weight = weight.minimum(rise)
    return weight.minimum(rise.flip(0)) if after else weight


#################################################################################
#                               The built-in codec                              #
#################################################################################


class DctCodec(nn.Module):
    """`dct:f{f}c{c}`: an orthonormal f x f block DCT of YCbCr that keeps the c strongest of its 3 f^2 coefficients.

    "Strongest" is fixed beforehand, by the variances that the coefficients of natural pictures have under the usual
    model (a first-order Markov field of correlation 0.95, colour far weaker than brightness), so that a latent channel
    always means the same thing. At c = 3 f^2 nothing is lost; below, what is dropped is fine detail.
    """

    analysis: Tensor
    synthesis: Tensor
    COLOUR_ENERGY = (1.0, 0.02, 0.02)  # Y, Cb, Cr: colour carries a few hundredths of the energy of pictures

    def __init__(self, name: str) -> None:
        super().__init__()
        spec = re.fullmatch(r"dct(?::f(\d+)c(\d+))?", name)
        if not spec:
            raise UserError(f"autoencoder {name}: the built-in codec is written dct or dct:f4c12")
        self.factor, self.channels = int(spec[1] or 4), int(spec[2] or 12)
        if not (1 <= self.factor <= 64 and 1 <= self.channels <= 3 * self.factor**2):
            raise UserError(f"autoencoder {name}: f must be 1 to 64 and c 1 to 3 f^2 = {3 * self.factor**2}")
        self.side: int | None = None
        self.name = f"dct:f{self.factor}c{self.channels}"
        self.digest = weights_digest({}, self.name)
        analysis, synthesis = _dct_kernels(self.factor, self.channels, self.COLOUR_ENERGY)
        self.register_buffer("analysis", analysis)
        self.register_buffer("synthesis", synthesis)

    def encode(self, pixels: Tensor) -> Tensor:
        return F.conv2d(pixels, self.analysis, stride=self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        return F.conv_transpose2d(latents, self.synthesis, stride=self.factor)


def _dct_kernels(factor: int, channels: int, colour_energy: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(channels, 3, f, f) kernels that take RGB to the kept coefficients, and those back to RGB."""
    n = torch.arange(factor, dtype=torch.float64)
    basis = torch.cos(math.pi / factor * (n[None] + 0.5) * n[:, None]) * math.sqrt(2 / factor)  # row u: frequency u
    basis[0] /= math.sqrt(2)
    correlation = 0.95 ** (n[:, None] - n[None]).abs()
    variance = (basis @ correlation @ basis.T).diagonal()
    energy = torch.einsum("k,u,v->kuv", torch.tensor(colour_energy, dtype=torch.float64), variance, variance)
    # Equal energies, such as those of (u, v) and (v, u), must not be ordered by the last bit of somebody's BLAS.
    kept = (energy / energy.max()).round(decimals=9).flatten().argsort(descending=True, stable=True)[:channels]
    to_ycbcr = torch.tensor(  # ITU-R BT.601, full range, on pixels around zero
        [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=torch.float64
    )
    blocks = torch.einsum("ui,vj->uvij", basis, basis)
    analysis = torch.einsum("kr,uvij->kuvrij", to_ycbcr, blocks).flatten(0, 2)[kept]
    synthesis = torch.einsum("rk,uvij->kuvrij", to_ycbcr.inverse(), blocks).flatten(0, 2)[kept]
    return analysis.float().contiguous(), synthesis.float().contiguous()


if __name__ == "__main__":
    from isonext.data.autoencoder_report import main

    main()
