"""What each autoencoder class of diffusers takes and gives, as data: `DiffusersAutoencoder` follows it.

docs/autoencoders.md is this table with the shapes, and tests/data/test_vae_rules.py holds the two together.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from isonext.errors import UserError

DOCS = "docs/autoencoders.md"


@dataclass(frozen=True)
class Affine:
    """latents = (z - shift) * scale: numbers, or float32 tensors (1, channels, 1, 1), of the packed channels."""

    shift: float | Tensor = 0.0
    scale: float | Tensor = 1.0
    text: str = "z"  # for people

    def settings(self) -> tuple[Any, Any]:
        """For the digest: scale and shift as plain numbers."""
        scale, shift = (v.flatten().tolist() if isinstance(v, Tensor) else v for v in (self.scale, self.shift))
        return scale, shift


AffineOf = Callable[[str, Any], Affine]  # of an autoencoder's name, for the errors, and its model


@dataclass(frozen=True)
class Rule:
    """How pictures (B, 3, H, W) in [-1, 1] go through a class, and its latents come out as (B, C, h, w)."""

    affine: AffineOf
    output: str = "latent_dist"  # where encode's answer has the latents; of a distribution, the mode is taken
    time: bool = False  # pictures and latents have a time axis, of one frame, behind the channels
    unit: bool = False  # its pixels lie in [0, 1]
    alpha: bool = False  # its pictures have a fourth channel, opacity: 1 going in, dropped coming out
    pack: int = 1  # so many by so many cells become the channels of one
    patch: str = ""  # key of the config: pixels by pixels that the class itself packs into channels
    side: str = ""  # attribute of the model: the one side of pictures, in pixels, that it takes
    decode: Mapping[str, Any] = field(default_factory=dict)  # further arguments of decode


#################################################################################
#                                The affine rules                               #
#################################################################################


def by_scale(name: str, vae: Any) -> Affine:
    """scaling_factor and shift_factor; with latents_mean and latents_std, as SDXL's pipeline reads them, those."""
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    for key, value in (("scaling_factor", scale), ("shift_factor", shift)):
        if not _is_number(value):
            raise UserError(
                f"autoencoder {name}: {key} in its config.json is {json.dumps(value)}; write a number there"
            )
    if scale == 0:
        raise UserError(f"autoencoder {name}: scaling_factor in its config.json is 0; write another number there")
    if vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None:
        lists = by_lists(name, vae)
        return Affine(lists.shift, lists.scale * scale, f"{lists.text} x {scale:g}")
    return Affine(shift, scale, f"(z - {shift:g}) x {scale:g}" if shift else f"z x {scale:g}")


def by_lists(name: str, vae: Any) -> Affine:
    """latents_mean and latents_std: a number a channel."""
    channels = vae.config.get("z_dim") or vae.config.get("latent_channels")
    lists = []
    for key in ("latents_mean", "latents_std"):
        values = vae.config.get(key)
        good = isinstance(values, list | tuple) and len(values) == channels and all(map(_is_number, values))
        if not good or (key == "latents_std" and min(values) <= 0):
            above = " above 0" if key == "latents_std" else ""
            raise UserError(
                f"autoencoder {name}: {key} in its config.json is {json.dumps(values)[:60]}; write a list of "
                f"{channels} numbers{above} there, one a channel"
            )
        lists.append(torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))
    return Affine(lists[0], 1 / lists[1], "(z - latents_mean) / latents_std")


def by_batch_norm(name: str, vae: Any) -> Affine:
    """The running statistics of a batch norm over packed channels, which the class keeps and never applies itself."""
    mean, variance = vae.bn.running_mean.float(), vae.bn.running_var.float()
    if not (variance >= 0).all():
        raise UserError(f"autoencoder {name}: bn.running_var has numbers below 0: its weights are damaged")
    scale = (variance + vae.bn.eps).rsqrt()
    text = f"(z - bn.running_mean) / sqrt(bn.running_var + {vae.bn.eps:g})"
    return Affine(mean.view(1, -1, 1, 1), scale.view(1, -1, 1, 1), text)


def as_it_is(_name: str, _vae: Any) -> Affine:
    return Affine()


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


#################################################################################
#                                  The classes                                  #
#################################################################################

RULES = {
    "AsymmetricAutoencoderKL": Rule(by_scale),  # without mask and picture its decoder is a plain one
    "AutoencoderDC": Rule(by_scale, "latent"),
    "AutoencoderKL": Rule(by_scale),
    # Packed as FLUX.2 has it: its statistics are of the 128 channels, and a cell of 16 pixels is a quarter of the work.
    "AutoencoderKLFlux2": Rule(by_batch_norm, pack=2),
    "AutoencoderKLHunyuanImage": Rule(by_scale),
    "AutoencoderKLHunyuanImageRefiner": Rule(by_scale, time=True),
    "AutoencoderKLKVAE": Rule(as_it_is),
    "AutoencoderKLQwenImage": Rule(by_lists, time=True),
    "AutoencoderKLQwenImage21": Rule(by_lists, time=True, alpha=True),
    "AutoencoderKLTemporalDecoder": Rule(by_scale, decode={"num_frames": 1}),
    "AutoencoderKLWan": Rule(by_lists, time=True, patch="patch_size"),
    "AutoencoderRAE": Rule(as_it_is, "latent", unit=True, side="decoder_image_size"),  # normalises by itself
    "AutoencoderTiny": Rule(by_scale, "latents"),
    "VQModel": Rule(by_scale, "latents"),  # continuous latents; its decoder takes the nearest entries of the codebook
}

VIDEO = "an autoencoder of videos"
SOUND = "an autoencoder of sound"
REFUSED = {
    "AutoencoderKLAllegro": VIDEO,
    "AutoencoderKLCogVideoX": VIDEO,
    "AutoencoderKLCosmos": VIDEO,
    "AutoencoderKLHunyuanVideo": VIDEO,
    "AutoencoderKLHunyuanVideo15": VIDEO,
    "AutoencoderKLKVAEAudio": SOUND,
    "AutoencoderKLKVAEVideo": VIDEO,
    "AutoencoderKLLTX2Audio": SOUND,
    "AutoencoderKLLTX2Video": VIDEO,
    "AutoencoderKLLTXVideo": VIDEO,
    "AutoencoderKLMagvit": VIDEO,
    "AutoencoderKLMiniMaxH3": VIDEO,
    "AutoencoderKLMiniMaxH3Audio": SOUND,
    "AutoencoderKLMochi": VIDEO,
    "AutoencoderOobleck": SOUND,
    "AutoencoderSAME": SOUND,
    "AutoencoderVidTok": VIDEO,
    "ConsistencyDecoderVAE": "its decoder draws noise, so that a latent has no one picture; take Stable Diffusion's "
    "AutoencoderKL, which has the same latents",
    "Cosmos3AVAEAudioTokenizer": SOUND,
    "Kandinsky6SRVAE": VIDEO,
    "LongCatAudioDiTVae": SOUND,
    "MMAudioVAE": SOUND,
    "RFD4ProteinaAutoencoder": "an autoencoder of proteins",
}


def rule_of(class_name: Any) -> Rule:
    """ValueError, in one line, for a class whose models are none of pictures, or are no map of them."""
    if rule := RULES.get(class_name):
        return rule
    reason = REFUSED.get(class_name, f"no autoencoder of pictures that is known here: {DOCS} lists those")
    raise ValueError(f"its class is {class_name}, {reason}")


def check_channels(name: str, rule: Rule, config: Any, ways_out: str) -> None:
    """UserError where it is no autoencoder of RGB pictures."""
    expected = (3 + rule.alpha) * (config.get(rule.patch) or 1) ** 2
    for key in ("in_channels", "out_channels", "input_channels", "num_channels"):
        if config.get(key, expected) != expected:
            raise UserError(
                f"autoencoder {name}: {key} is {config[key]}, but pictures have {expected} channels"
                f"{' with their opacity' if rule.alpha else ''}{' in patches' if expected > 4 else ''}; {ways_out}"
            )
