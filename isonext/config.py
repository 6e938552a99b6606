"""The config: every key of `config.json` with its default, its type, its range and the reason for it.

    config = load_config("config.json", ["training.learning_rate=1e-5"])
    config.training.batch_size

An unknown key, a wrong type and a value out of range are errors that name the key and what is allowed.
`None` and "auto" mean "counted or chosen for you": see the line of the key.

    python -m isonext.config        # writes docs/config.md, and docs/config_zh.md with the help of docs/config_zh.json
"""

import dataclasses
import difflib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from isonext.errors import UserError, brief


def key(default: Any, why: str, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """One config key: its default, the reason behind it, and what is allowed (bounds are inclusive)."""
    metadata = {"why": why, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    type: str = key(
        "isonext",
        "the network: a convolutional one for transfers at any size, or a transformer of one size",
        choices=("isonext", "dit"),
    )
    latent_channels: int | None = key(None, "counted from the latent store; must agree with it if given", 1, 65536)
    hidden_dim: int = key(384, "width D: 384 fits 8 GB, 512 fits 12 GB", 8, 65536)
    num_layers: int = key(12, "depth N, every block at full resolution", 1, 1000)
    num_styles: int | None = key(None, "counted from the latent store; must agree with it if given", 1, 10**6)
    time_dim: int = key(256, "width of the embedding of t (even); isonext: and of the joint condition", 2, 65536)
    kernel_size: int = key(7, "isonext: depthwise kernel (odd); 7 is ConvNeXt's", 1, 31)
    style_dim: int = key(256, "isonext: width of a style's embedding", 1, 65536)
    num_groups: int = key(32, "isonext: groups of AdaGN; must divide hidden_dim", 1, 65536)
    expansion: int = key(4, "isonext: the pointwise layers widen D this many times", 1, 64)
    patch_size: int = key(2, "dit: side of a token in latent cells; 1 costs 16 times the attention of 2", 1, 64)
    num_heads: int = key(6, "dit: attention heads; D over heads must be a multiple of 4", 1, 4096)
    mlp_ratio: float = key(4.0, "dit: the MLP widens D this many times", 0.5, 64)
    norm: str = key("layer", "dit: rms is cheaper and has weights of its own", choices=("layer", "rms"))
    mlp: str = key("gelu", "dit: swiglu learns faster at the same size", choices=("gelu", "swiglu"))
    pos: str = key("rope", "dit: places turn queries and keys, or are added once", choices=("rope", "sincos"))
    qk_norm: bool = key(False, "dit: normed queries and keys keep large models from diverging")


@dataclass
class TrainingConfig:
    batch_size: int = key(64, "pictures an optimiser step, over all processes", 1, 10**6)
    micro_batch_size: int | Literal["auto"] | None = key(
        "auto", "pictures at once on a device, same gradients; auto is what fits, null the whole batch", 1
    )
    learning_rate: float = key(1e-4, "AdamW's peak rate; small models (D 128) take 1e-3 to 4e-3", 0, 1000)
    stage1_epochs: int = key(200, "passes over the training pictures; with balance equal, as many draws", 1)
    stage2_epochs: int = key(40, "the same in stage 2, over the teacher's pairs", 1)
    stage2_pairs: int = key(4096, "transfers by stage 1, made at the start, that stage 2 learns from", 1, 10**6)
    stage2_scales: tuple[float, float] = key((1.0, 4.0), "cfg_scale of those pairs: stage 2 knows no other", 1, 100)
    balance: str = key(
        "natural",
        "natural draws every picture once an epoch; equal draws every style as often, its pictures in turn",
        choices=("natural", "equal"),
    )
    warmup_steps: int = key(500, "linear warm-up of the rate: early steps are noisy", 0)
    lr_schedule: str = key("cosine", "after the warm-up", choices=("cosine", "constant"))
    weight_decay: float = key(0.01, "AdamW's, on weights of two or more dimensions", 0)
    betas: tuple[float, float] = key((0.9, 0.99), "AdamW's: 0.99 forgets the loud early gradients sooner", 0, 0.9999)
    grad_clip: float = key(1.0, "largest gradient norm; 0 switches clipping off", 0)
    ema_decay: float = key(0.9995, "the averaged weights that are used for transfers", 0, 1)
    label_drop_prob: float = key(0.15, "labels replaced by the null style, so that it can guide", 0, 1)
    coupling: str = key("independent", "noise pairing; ot permutes noise inside a style", choices=("independent", "ot"))
    anchor_strength: float = key(0.8, "how far x0's low band carries the picture's layout; 0 is white noise", 0, 1)
    anchor_cells: int = key(2, "side in latent cells of the squares whose means are that low band", 1, 64)
    time_sampling: str = key("uniform", "how t is drawn", choices=("uniform", "logit_normal"))
    use_amp: bool = key(True, "the network runs in BF16, where the device has it (no loss scaling is needed)")
    tf32: bool = key(True, "TF32 for what stays float32 on CUDA")
    channels_last: bool = key(True, "NHWC memory: what depthwise and pointwise layers are fast in")
    compile: bool = key(True, "torch.compile; falls back with a warning where no compiler is found")
    gradient_checkpointing: bool | Literal["auto"] = key(
        "auto", "recompute blocks backwards: far less memory, a second forward; auto is off where 8 pictures fit so"
    )
    num_workers: int = key(4, "processes that decode pictures in preprocessing; 0 is in this process", 0, 256)
    log_every_steps: int = key(20, "a line in metrics.jsonl and TensorBoard", 1)
    save_every_epochs: int = key(10, "a checkpoint, and a preview picture where that is cheap", 1)
    keep_checkpoints: int = key(5, "newest epoch checkpoints kept; 0 keeps all", 0)
    val_every_epochs: int = key(
        5, "validation: the loss on fixed noise and times; figures of at most 32 transfers as often as is cheap", 1
    )
    seed: int = key(0, "randomness is a function of (seed, step)", 0, 2**31)


@dataclass
class DataConfig:
    raw_data_root: str = key("raw_data", "one folder of pictures a style")
    data_root: str = key("latents", "the latent store that preprocess_latents.py writes")
    num_classes: int | None = key(None, "styles; counted from the folders, must agree with them if given", 1, 10**6)
    image_size: int = key(512, "side of the training squares in pixels", 8, 8192)
    flip: bool = key(True, "also encode mirrored pictures; off where left and right differ in meaning")
    crops: int = key(
        0, "random crops a picture beside its centre square, 0.6 to 1 of its short side: more from few pictures", 0, 64
    )
    val_fraction: float = key(0.05, "held-out part, chosen by a hash of the file's name", 0, 0.9)
    split_by: str = key(
        "picture", "what is held out whole: a picture, a recording (folder-prefix), or a FILE.csv's groups"
    )
    format: str = key("pt", "a .pt a picture, or safetensors shards of many", choices=("pt", "safetensors"))


@dataclass
class AutoencoderConfig:
    name: str = key(
        "stabilityai/sd-vae-ft-mse", "a hub id, a local diffusers folder, a checkpoint file, dct, or dct:f4c12"
    )


@dataclass
class CheckpointConfig:
    save_dir: str = key("checkpoints", "checkpoints, previews, metrics.jsonl and TensorBoard logs")


@dataclass
class InferenceConfig:
    method: str = key(
        "alf",
        "alf is reversible bit for bit; flowedit does without an inversion; map, of stage 2, is exact in a few steps",
        choices=("alf", "euler", "midpoint", "heun", "rk4", "flowedit", "map"),
    )
    num_steps: int = key(20, "solver steps a leg", 1, 10000)
    time_grid: str = key("uniform", "cosine is finer towards both ends", choices=("uniform", "cosine"))
    time_shift: float = key(
        1.0, "above 1 the steps are finer towards the picture, below 1 towards structure", 0.01, 100
    )
    inversion: str = key(
        "explicit",
        "fixed_point solves for the inverse of a method other than alf, in float32",
        choices=("explicit", "fixed_point"),
    )
    tolerance: float = key(1e-5, "largest residual of a fixed point that counts as solved", 0)
    cfg_scale: float | Literal["auto"] = key(
        2.0, "guidance of the generation leg; 1 is none and costs half; auto is measured at the end of training", 0, 100
    )
    cfg_interval: tuple[float, float] = key((0.2, 0.8), "guidance acts for t inside it", 0, 1)
    guidance: str = key("source", "contrast with the source style, or the null style", choices=("source", "null"))
    cfg_rescale: float = key(0.0, "how far guidance's gain in contrast is taken back", 0, 1)
    latent_clamp: float | None = key(None, "bound of the final standardised latent; null is none", 0)
    noise_samples: int = key(1, "flowedit's noises, of which it takes the mean; each costs a transfer", 1, 1000)


# Which keys of the model section each type has for itself.
ONLY_OF = {
    "isonext": ("kernel_size", "style_dim", "num_groups", "expansion"),
    "dit": ("patch_size", "num_heads", "mlp_ratio", "norm", "mlp", "pos", "qk_norm"),
}
UNIONS = (types.UnionType, typing.Union)  # `int | None` is the one, `int | Literal["auto"]` the other
SETTINGS = tuple(entry.name for entry in dataclasses.fields(InferenceConfig))  # each of them a flag of inference.py
# Those that fix a leg: a kept structure brings them along.
OF_THE_LEGS = ("method", "num_steps", "time_grid", "time_shift", "inversion", "tolerance", "noise_samples")


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read and check a JSON config (`None`: all defaults), then apply `section.key=value` overrides."""
    tree = {} if path is None else _read_json(Path(path))
    return config_from_dict(apply_overrides(tree, overrides), where=str(path or "defaults"))


def config_from_dict(tree: dict, where: str = "config") -> Config:
    """Check a nested dict against the dataclasses; `where` names its origin in error messages."""
    config = Config()
    _check_sections(tree, where)
    for section, values in tree.items():
        _known(section, config, where, prefix="")
        target = getattr(config, section)
        hints = typing.get_type_hints(type(target))
        for name, value in values.items():
            _known(name, target, where, prefix=f"{section}.")
            spec = type(target).__dataclass_fields__[name].metadata
            setattr(target, name, _checked(value, hints[name], spec, f"{where}: {section}.{name}"))
    _check_together(config, where)
    return config


def apply_overrides(tree: dict, overrides: Iterable[str]) -> dict:
    """A copy of the config dict with `section.key=value` texts put in; values are JSON, or else plain text."""
    tree = {section: dict(values) for section, values in tree.items()}
    for text in overrides:
        name, equals, value = text.partition("=")
        section, _, entry = name.strip().partition(".")
        if not (equals and section and entry):
            raise UserError(f"--set {text}: write it as section.key=value, e.g. training.learning_rate=1e-5")
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = value
        tree.setdefault(section, {})[entry] = parsed
    return tree


def named_autoencoder(overrides: Iterable[str]) -> str | None:
    """What `--set autoencoder.name=...` says, if it is given."""
    given = apply_overrides({}, overrides).get("autoencoder", {})
    return config_from_dict({"autoencoder": given}, where="--set").autoencoder.name if "name" in given else None


def config_to_dict(config: Config) -> dict:
    """Plain dicts, lists and numbers: what checkpoints carry and `config_from_dict` reads."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _read_json(path: Path) -> dict:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: not a JSON text file, but a pipe or a device")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; give one with --config (see config.json)") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{path}: not a JSON text file") from None
    # Strings are matched first, so that a // inside one (a URL) is not taken for a comment.
    text = re.sub(r'("(?:\\.|[^"\\\n])*")|//[^\n]*', lambda match: match.group(1) or "", text)
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a config ({error})") from None
    _check_sections(tree, str(path))
    return tree


def _check_sections(tree: Any, where: str) -> None:
    if not isinstance(tree, dict):
        raise UserError(f"{where}: a config is a JSON object of sections, not {brief(tree)}")
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise UserError(f"{where}: {brief(section)} must be a JSON object, not {brief(values)}")
        for name in (section, *values):
            if not isinstance(name, str):  # in a checkpoint, which is not JSON
                raise UserError(f"{where}: {brief(name)} is no name of a key")


def _known(name: str, target: Any, where: str, prefix: str) -> None:
    names = [entry.name for entry in dataclasses.fields(target)]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, 1, 0.4)
        hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"known: {', '.join(names)}"
        raise UserError(f"{where}: unknown key {prefix}{name[:80]}; {hint}")


def _checked(value: Any, hint: Any, spec: types.MappingProxyType, where: str) -> Any:
    """`value` as the type of its key, or an error that says what is allowed."""
    allowed = _describe(hint, spec)
    if value is None and "null" in spec["choices"]:  # --set inference.guidance=null is read as JSON
        return "null"
    if typing.get_origin(hint) in UNIONS:  # `T | None`, `T | Literal["auto"]`: T comes first
        hint, *others = typing.get_args(hint)
        if any(value is None if other is types.NoneType else value in typing.get_args(other) for other in others):
            return value
    if typing.get_origin(hint) is tuple:
        entries = typing.get_args(hint)
        if not isinstance(value, list | tuple) or len(value) != len(entries):
            raise UserError(f"{where} = {brief(value)}: must be {allowed}")
        pairs = enumerate(zip(value, entries, strict=True))
        return tuple(_checked(entry, hint, spec, f"{where}[{number}]") for number, (entry, hint) in pairs)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = is_number if hint is float else isinstance(value, hint) and isinstance(value, bool) == (hint is bool)
    if fits and is_number:
        low, high = spec["low"], spec["high"]  # written so that NaN fails
        fits = (low is None or value >= low) and (high is None or value <= high) and abs(value) <= sys.float_info.max
    if not fits or (spec["choices"] and value not in spec["choices"]) or (hint is str and not _is_path(value)):
        raise UserError(f"{where} = {brief(value)}: must be {allowed}")
    return float(value) if hint is float else value


def _is_path(value: str) -> bool:
    """Whether a text can be a file's name: the system takes no NUL, and no halves of letters."""
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _describe(hint: Any, spec: types.MappingProxyType) -> str:
    if spec["choices"]:
        return "one of " + ", ".join(spec["choices"])
    if typing.get_origin(hint) in UNIONS:
        hint, *others = typing.get_args(hint)
        words = ["null" if other is types.NoneType else ", or ".join(typing.get_args(other)) for other in others]
        return ", or ".join([_describe(hint, spec), *words])
    if typing.get_origin(hint) is tuple:
        count = len(typing.get_args(hint))
        return f"a list of {count}, each {_describe(typing.get_args(hint)[0], spec)}"
    noun = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]
    low, high = spec["low"], spec["high"]
    if low is not None and high is not None:
        return f"{noun} from {low} to {high}"
    return noun if low is None else f"{noun}, {low} or more"


def _check_together(config: Config, where: str) -> None:
    """What no single key can tell."""
    model, low_high, scales = config.model, config.inference.cfg_interval, config.training.stage2_scales
    for kind, names in ONLY_OF.items():
        for name in names if kind != model.type else ():
            if getattr(model, name) != ModelConfig.__dataclass_fields__[name].default:
                raise UserError(f"{where}: model.{name} is a key of model.type {kind}; this one is {model.type}")
    if model.type == "isonext":
        _divides(where, model, "num_groups")
        if model.kernel_size % 2 == 0:
            raise UserError(f"{where}: model.kernel_size = {model.kernel_size}: must be odd")
    else:
        _divides(where, model, "num_heads", 4)
    if model.time_dim % 2:
        raise UserError(f"{where}: model.time_dim = {model.time_dim}: must be even")
    if low_high[0] > low_high[1]:
        raise UserError(f"{where}: inference.cfg_interval = {list(low_high)}: its start lies behind its end")
    if scales[0] > scales[1]:
        raise UserError(f"{where}: training.stage2_scales = {list(scales)}: the first is larger than the second")


def _divides(where: str, model: ModelConfig, name: str, unit: int = 1) -> None:
    """model.hidden_dim must be a multiple of model.<name> * unit."""
    count, dim = getattr(model, name), model.hidden_dim
    if dim % (count * unit):
        raise UserError(
            f"{where}: model.{name} = {count} must divide model.hidden_dim = {dim}"
            + (f" into multiples of {unit}" if unit > 1 else "")
        )


#################################################################################
#                      The pages docs/config.md and config_zh.md                #
#################################################################################

DOCS = Path(__file__).resolve().parents[1] / "docs"
HEAD = """# Config keys

[中文](config_zh.md) · [Usage guide](../USAGE_GUIDE.md)

`python -m isonext.config` writes this page from `isonext/config.py`. Change that file, not this page.

A config is a JSON file; `//` comments are allowed. Every key may be left out. An unknown key is an error that names the
nearest known one; a wrong type or value is an error that says what is allowed. `--set training.learning_rate=1e-5`
overrides one key, for every command that reads a config."""


def config_page(translation: dict | None = None) -> str:
    """All keys as Markdown, in English or in the language of a translation: see docs/config_zh.json.

    KeyError where the translation lacks a key's reason.
    """
    lines = [HEAD] if translation is None else list(translation["head"])
    columns = "key | default | allowed | why" if translation is None else translation["columns"]
    for section in dataclasses.fields(Config):
        lines += ["", f"## {section.name}", "", f"| {columns} |", "| --- | --- | --- | --- |"]
        keys: Any = section.type  # the section's dataclass
        hints = typing.get_type_hints(keys)
        for entry in dataclasses.fields(keys):
            allowed, why = _describe(hints[entry.name], entry.metadata), entry.metadata["why"]
            if translation is not None:
                why = translation["why"][f"{section.name}.{entry.name}"]
                for pattern, words in translation["phrases"].items():
                    allowed = re.sub(pattern, words, allowed)
            lines.append(f"| `{entry.name}` | `{json.dumps(entry.default)}` | {allowed} | {why} |")
    return "\n".join(lines) + "\n"


def write_config_pages() -> None:
    chinese = json.loads((DOCS / "config_zh.json").read_text(encoding="utf-8"))
    for name, text in (("config.md", config_page()), ("config_zh.md", config_page(chinese))):
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"written: {DOCS / name}")


if __name__ == "__main__":
    write_config_pages()
