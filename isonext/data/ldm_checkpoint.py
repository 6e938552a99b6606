"""A checkpoint file of latent diffusion's AutoencoderKL, or of VA-VAE or FLUX.2, laid out alike, as diffusers' model.

Of a whole Stable Diffusion or FLUX its autoencoder is taken. What the file means is read off it: channels, levels,
blocks and where attention lies, from the names and shapes of its weights. diffusers' own conversion wants a config
beside the file and knows of no attention but the middle one's.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isonext.errors import UserError, first_line
from isonext.utils.io import load_data

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
PARTS = ("first_stage_model.", "vae.")  # what the weights' names start with in files that hold more than them

# What training leaves beside the autoencoder: its loss with the discriminator; VA-VAE's frozen foundation model and the
# projection to its features; the counters of an average whose weights have taken the place of the others.
IGNORED = ("loss.", "foundation_model.", "linear_proj.")
IGNORED_KEYS = ("model_ema.decay", "model_ema.num_updates")

ADVICE = "give a whole checkpoint of a latent-diffusion AutoencoderKL or VA-VAE, a TAESD's pair, or a diffusers folder"
NORM = "bn."  # FLUX.2's batch norm over packed latents, the one thing in which its file differs
COUNTER = f"{NORM}num_batches_tracked"  # of its training; not all files have it
NESTED = ("encoder.quant_conv.", "decoder.post_quant_conv.")  # FLUX.2 has them in its halves, others beside them
GROUPS = 32  # of every GroupNorm, in all of them; the only figure that the weights do not tell

# Parts of a name in diffusers, and in latent diffusion. The levels of the decoder are numbered from the other end.
NAMES = {
    r"down_blocks\.(\d+)\.downsamplers\.0": r"down.\1.downsample",
    r"down_blocks\.(\d+)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d+)\.attentions": r"down.\1.attn",
    r"up_blocks\.(\d+)\.upsamplers\.0": r"up.\1.upsample",
    r"up_blocks\.(\d+)\.resnets": r"up.\1.block",
    r"up_blocks\.(\d+)\.attentions": r"up.\1.attn",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"group_norm": "norm",
    r"to_out\.0": "proj_out",
    r"to_([qkv])": r"\1",
}


def is_checkpoint(name: str) -> bool:
    """Whether an autoencoder's name means a checkpoint file, be it there or not."""
    path = Path(name)
    return path.is_file() or (path.suffix in SUFFIXES and not path.is_dir())


def read_weights(path: str | Path) -> dict[str, Any]:
    """Name -> weight of a checkpoint file; of a file that holds more than an autoencoder, those of its part alone.

    A file of weights alone, or one with them under `state_dict`; nothing in it is run. UserError if it is unreadable.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"autoencoder {path}: no such file; {ADVICE}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    tree = load_data(path, "VAE checkpoint", foreign=True)
    weights = tree.get("state_dict", tree) if isinstance(tree, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f"autoencoder {path}: holds no weights by name; {ADVICE}")
    weights = {str(key): value for key, value in weights.items()}
    return {name: weights[key] for name, key in _own_names(weights).items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The weights of other parts, gigabytes of them, are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(key) for name, key in _own_names(file.keys()).items()}
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, or not a VAE checkpoint ({first_line(error)})") from None


def _own_names(keys: Iterable[str]) -> dict[str, str]:
    """The autoencoder's name of a weight -> the file's."""
    keys = list(keys)
    part = next((part for part in PARTS if any(key.startswith(f"{part}encoder.") for key in keys)), "")
    return {key.removeprefix(part): key for key in keys if key.startswith(part)}


def build(weights: dict[str, Tensor], path: str | Path) -> "AutoencoderKL | AutoencoderKLFlux2":
    """diffusers' AutoencoderKL with these weights, which latent diffusion's names go by; `path` is for the errors.

    Its scale is 1 and its shift 0, whatever the file was trained for: the store standardises each channel. FLUX.2's has
    its statistics in the file. A weight that is missing, of another shape or not known is a UserError that names it.
    """
    import diffusers  # seconds to import, so only where it is used

    weights = {_flat_name(key): value for key, value in weights.items() if not _is_ignored(key)}
    check_tensors(weights, path)
    config, flux2 = read_architecture(weights, path), _is_flux2(weights)
    weights = {COUNTER: torch.tensor(0)} | weights if flux2 else weights
    try:
        with torch.device("meta"):  # the weights below take the place of random ones, which would take seconds to draw
            vae: Any = diffusers.AutoencoderKLFlux2(**config) if flux2 else diffusers.AutoencoderKL(**config)
    except (AttributeError, TypeError):
        known = f"diffusers {diffusers.__version__} does not know"
        raise UserError(f"autoencoder {path}: is FLUX.2's, which {known}; update it") from None
    state = vae.state_dict()
    keys = {ldm_name(key, len(config["block_out_channels"])): key for key in state}
    check_names(keys, weights, path)
    converted = {key: shaped(weights[name], state[key], name, path) for name, key in keys.items()}
    vae.load_state_dict(converted, assign=True)
    return vae


def read_architecture(weights: dict[str, Tensor], path: str | Path) -> dict:
    """The arguments of diffusers' class, from the names and shapes of the weights.

    FLUX and Stable Diffusion 3 have neither of the 1x1 convolutions round the latents.
    """
    quant = any(key.startswith(("quant_conv.", "post_quant_conv.")) for key in weights)
    levels = _count(weights, r"encoder\.down\.(\d+)\.")
    widths = _widths(weights, "encoder.down", levels, path)

    statistics: dict[str, Any] = {"scaling_factor": 1.0}
    if _is_flux2(weights):  # FLUX.2's small decoder has widths of its own
        statistics = {"decoder_block_out_channels": _widths(weights, "decoder.up", levels, path)}

    def attends(part: str, level: int) -> bool:
        return any(key.startswith(f"{part}.{level}.attn.") for key in weights)

    down = ["AttnDownEncoderBlock2D" if attends("encoder.down", i) else "DownEncoderBlock2D" for i in range(levels)]
    up = ["AttnUpDecoderBlock2D" if attends("decoder.up", i) else "UpDecoderBlock2D" for i in range(levels)]
    return {
        "block_out_channels": widths,
        "layers_per_block": _count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": down,
        "up_block_types": up[::-1],
        "latent_channels": _width(weights, "post_quant_conv.bias" if quant else "encoder.conv_out.bias", path)
        // (1 if quant else 2),
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
        "norm_num_groups": GROUPS,
        **statistics,
    }


def ldm_name(key: str, levels: int) -> str:
    """Latent diffusion's name of the weight that diffusers calls `key`, in a model of so many levels."""
    key = re.sub(r"(?<=up_blocks\.)\d+", lambda level: str(levels - 1 - int(level[0])), key)
    for pattern, name in NAMES.items():
        key = re.sub(rf"(?<=\.){pattern}(?=\.)", name, key)
    return key


def _is_ignored(key: str) -> bool:
    return key.startswith(IGNORED) or key in IGNORED_KEYS


def _is_flux2(weights: dict[str, Tensor]) -> bool:
    return any(key.startswith(NORM) for key in weights)


def _flat_name(key: str) -> str:
    return key.partition(".")[2] if key.startswith(NESTED) else key


def _count(weights: dict[str, Tensor], pattern: str) -> int:
    """How many numbers stand in this place of the names."""
    return len({found[1] for found in (re.match(pattern, key) for key in weights) if found})


def _widths(weights: dict[str, Tensor], part: str, levels: int, path: str | Path) -> list[int]:
    """Channels of each level of a half."""
    widths = [_width(weights, f"{part}.{level}.block.0.conv2.bias", path) for level in range(max(levels, 1))]
    if any(width % GROUPS for width in widths):
        raise UserError(f"autoencoder {path}: {widths} channels by level are not multiples of {GROUPS}; {ADVICE}")
    return widths


def _width(weights: dict[str, Tensor], bias: str, path: str | Path) -> int:
    """Channels that come out of the layer with this bias."""
    if bias not in weights:
        raise UserError(f"autoencoder {path}: the weight {bias} is missing; {ADVICE}")
    return weights[bias].numel()


def check_tensors(weights: dict[str, Any], path: str | Path) -> None:
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"autoencoder {path}: {key} is no weight; {ADVICE}")


def check_names(known: dict[str, str], weights: dict[str, Tensor], path: str | Path) -> None:
    """UserError that names one of those that are missing among the weights, or of those that are not known."""
    missing = [name for name in known if name not in weights]
    extra = [key for key in weights if key not in known]
    for names, one, more in ((missing, "is missing", "are missing"), (extra, "is unknown", "are unknown")):
        if names:
            found = (
                f"the weight {names[0]} {one}" if len(names) == 1 else f"{len(names)} weights {more}, e.g. {names[0]}"
            )
            raise UserError(f"autoencoder {path}: {found}; {ADVICE}")


def shaped(weight: Tensor, like: Tensor, name: str, path: str | Path) -> Tensor:
    """With type and shape of the model's; attention's 1x1 convolutions become the matrices they are. Another shape is a
    UserError."""
    if weight.shape not in (like.shape, (*like.shape, 1, 1)):
        raise UserError(
            f"autoencoder {path}: {name} has the shape {list(weight.shape)}, not {list(like.shape)}; {ADVICE}"
        )
    return weight.reshape(like.shape).to(like.dtype)
