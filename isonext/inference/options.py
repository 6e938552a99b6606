"""What inference.py and sample.py are asked for, as data: the flags, read and checked by the commands.

Nothing here imports torch, so that a command refuses bad flags at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class NetworkOptions:
    """Which network, and how it runs."""

    checkpoint: str
    device: str = "auto"
    precision: str = "auto"  # or bf16, fp32; auto: as trained, BF16 where the device has it
    compile: str = "auto"  # or on, off; auto: where there are pictures enough to pay for it
    tile: int = 1024  # pixels: a VAE takes larger pictures in tiles; 0: never


@dataclass(frozen=True)
class SettingsOptions:
    """Where the settings of the solver come from: the checkpoint's, or a config's, under --set, under the flags."""

    config: str | None = None  # a file whose inference section takes the place of the checkpoint's
    overrides: tuple[str, ...] = ()  # section.key=value
    flags: dict[str, Any] = field(default_factory=dict)  # keys of the inference section that were given as flags
    strength: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class TargetOptions:
    """Which styles to give a picture: one, all of them, or those on the way from one to another."""

    style: str | None = None  # an id, a name, or all
    interpolate: tuple[str, str] | None = None
    frames: int = 9  # of an interpolation, both ends included


@dataclass(frozen=True)
class TransferOptions:
    """--input: a picture, a latent of the store, or a folder of pictures."""

    network: NetworkOptions
    settings: SettingsOptions
    targets: TargetOptions
    input: Path
    output: Path
    source_style: str
    size: int | None = None  # pixels of the short side, to which pictures are resized first
    batch_size: int = 8  # for a folder
    min_structure: float | None = None  # SSIM to the picture that must be left
    certify: bool = False
    save_structure: Path | None = None
    compare: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class RestyleOptions:
    """--from_structure: other styles of a structure that was kept."""

    network: NetworkOptions
    settings: SettingsOptions
    targets: TargetOptions
    structure: Path
    output: Path
    certify: bool = False


@dataclass(frozen=True)
class RestoreOptions:
    """--restore: the original of a structure that was kept."""

    network: NetworkOptions
    structure: Path
    output: Path


@dataclass(frozen=True)
class SampleOptions:
    """sample.py: pictures from noise."""

    network: NetworkOptions
    settings: SettingsOptions
    output: Path
    styles: tuple[str, ...] = ()  # all there are if empty
    num_samples_per_style: int = 4
    num_samples: int | None = None  # in all, the styles in turn
    batch_size: int = 16
    npz: bool = False
    overwrite: bool = False
