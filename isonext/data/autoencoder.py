"""Picture tensor <-> latent: the VAEs of diffusers, and the built-in block-DCT that needs no weights.

The VAEs are folders of diffusers or single files (`ldm_checkpoint.py`).

Both are modules with the same face: `name`, `channels`, `factor` (pixels a latent cell), `digest` (what tells it from
any other, wherever it lies), and

    encode: pixels (B, 3, H, W) in [-1, 1], sides divisible by factor -> latents (B, channels, H / factor, W / factor)
    decode: the way back, not clipped

Latents here are the autoencoder's own, with its shift and scale applied; `store.py` standardises them.
"""

import hashlib
import itertools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isonext.data import ldm_checkpoint
from isonext.errors import UserError, first_line
from isonext.utils.device import autocast, fitting

PIXELS_AT_ONCE = 2**20  # that a VAE takes: 16 pictures of 256 px, 4 of 512 px, one of 1024 px
WAYS_OUT = "give a local diffusers folder or checkpoint file as autoencoder.name, or the built-in codec: dct"


class Autoencoder(Protocol):
    """What all of them have: see the top of this file."""

    name: str
    channels: int
    factor: int
    digest: str

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


def load_autoencoder(name: str, device: torch.device, download: bool = True) -> Autoencoder:
    """A hub id or local folder of an AutoencoderKL or AutoencoderTiny, a checkpoint file, `dct`, or `dct:f4c12`.

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
    """A pretrained VAE; encodes to the posterior mean. BF16 on CUDA, float32 elsewhere.

    A batch goes through it in parts of at most `pixels_at_once`, or a picture; half as many where memory runs out. The
    result is that of the whole batch, up to the rounding of kernels that PyTorch chooses by the size of a batch.
    """

    vae: Any  # one of the classes of diffusers, which is not imported where it is not used

    def __init__(self, name: str, device: torch.device, download: bool = True) -> None:
        super().__init__()
        self.name, self.device, self.bf16 = name, device, device.type == "cuda"
        self.pixels_at_once = PIXELS_AT_ONCE
        vae = _load_vae(name, download)
        _check_config(name, vae.config)
        self.scale = vae.config.scaling_factor
        self.shift = vae.config.get("shift_factor") or 0.0
        self.digest = weights_digest(vae.state_dict(), type(vae).__name__, self.scale, self.shift)
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.vae.to(memory_format=torch.channels_last)  # encodes 1.3 to 1.7 times as fast: benchmarks/preprocess.py
        self.channels = self.vae.config.latent_channels
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._probe()

    def _probe(self) -> None:
        """UserError where a small grey picture does not go through: what does so later has cost hours by then."""
        side = 4 * self.factor
        try:
            latents = self.encode(torch.zeros(1, 3, side, side, device=self.device))
            pixels = self.decode(latents)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise UserError(f"autoencoder {self.name}: a picture does not go through ({first_line(error)})") from None
        shapes = tuple(latents.shape[1:]), tuple(pixels.shape[1:])
        if shapes != ((self.channels, 4, 4), (3, side, side)):
            raise UserError(
                f"autoencoder {self.name}: makes latents of shape {shapes[0]} of {side} x {side} pixels, and a picture "
                f"of shape {shapes[1]} of those: encoder and decoder do not fit; {WAYS_OUT}"
            )
        if not (latents.isfinite().all() and pixels.isfinite().all()):
            raise UserError(f"autoencoder {self.name}: makes no finite numbers of a grey picture; {WAYS_OUT}")

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        return self._in_parts(self._encode, pixels, math.prod(pixels.shape[2:]))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        return self._in_parts(self._decode, latents, math.prod(latents.shape[2:]) * self.factor**2)

    def _encode(self, pixels: Tensor) -> Tensor:
        with autocast(self.device, self.bf16):
            encoded = self.vae.encode(pixels)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return ((latents.float() - self.shift) * self.scale).contiguous()

    def _decode(self, latents: Tensor) -> Tensor:
        with autocast(self.device, self.bf16):
            return self.vae.decode(latents / self.scale + self.shift).sample.float()

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


def _load_vae(name: str, download: bool) -> Any:
    if ldm_checkpoint.is_checkpoint(name):
        return ldm_checkpoint.load_checkpoint(name)
    import diffusers  # seconds to import, so only where it is used
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # without a network it would tell of every retry; the one line below tells the rest
    classes = {"AutoencoderKL": diffusers.AutoencoderKL, "AutoencoderTiny": diffusers.AutoencoderTiny}
    warnings.filterwarnings("ignore", module="huggingface_hub")  # of its own use by diffusers
    try:
        class_name = diffusers.AutoencoderKL.load_config(name, local_files_only=not download).get("_class_name")
        if class_name not in classes:
            raise ValueError(f"its class is {class_name}, not one of {', '.join(classes)}")
        options = {"output_loading_info": True, "local_files_only": not download}
        vae, loading = classes[class_name].from_pretrained(name, **options)
        if loading["missing_keys"]:  # diffusers would leave these random
            raise ValueError(f"{len(loading['missing_keys'])} weights are missing, e.g. {loading['missing_keys'][0]}")
        return vae
    except Exception as error:  # diffusers lets many types out of a broken folder; the answer is the same
        reason = (
            f"this folder does not load ({first_line(error)})" if Path(name).exists() else _hub_reason(error, download)
        )
        raise UserError(f"autoencoder {name}: {reason}; {WAYS_OUT}") from None


def _hub_reason(error: BaseException, download: bool) -> str:
    """Why a name that is no local folder did not load: diffusers wraps the cause in a guess of its own."""
    from huggingface_hub import errors

    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    hub = "not in the cache, and the hub was not reached" if download else "and not in the cache"
    for kind, reason in (
        (errors.GatedRepoError, "is gated on the hub: accept its terms there, and log in by `hf auth login`"),
        (errors.RepositoryNotFoundError, "no such local folder, and the hub has none, or it is private"),
        (errors.HFValidationError, "no such local folder, and no name that the hub could have"),
        (errors.LocalEntryNotFoundError, f"no such local folder, {hub}"),
    ):
        if any(isinstance(part, kind) for part in chain):
            return reason
    return f"does not load from the hub or its cache ({first_line(chain[-1])})"


def _check_config(name: str, config: Any) -> None:
    """UserError where it is no autoencoder of RGB pictures, or says no scale."""
    for key in ("in_channels", "out_channels"):
        if config[key] != 3:
            raise UserError(f"autoencoder {name}: {key} is {config[key]}, but pictures have 3 channels; {WAYS_OUT}")
    scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
    for key, value in (("scaling_factor", scale), ("shift_factor", shift)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(
                f"autoencoder {name}: {key} in its config.json is {json.dumps(value)}; write a number there"
            )
    if scale == 0:
        raise UserError(f"autoencoder {name}: scaling_factor in its config.json is 0; write another number there")


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
