"""What inference.py and sample.py are asked for, as data. A command reads its flags into one of these and passes it on.

An option out of its range, or at odds with another one, is a UserError that names its flag. Nothing here imports torch,
so that a command refuses bad flags at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isonext.errors import UserError

LARGEST_SIDE = 16384  # pixels: a picture of it has 800 MB before the network sees it


def check_range(flag: str, value: float | None, low: float, high: float | None = None) -> None:
    """UserError unless `value` lies in the range, both ends included; None is a flag that was not given."""
    if value is not None and not (low <= value and (high is None or value <= high)):  # written so that NaN fails
        raise UserError(f"--{flag} {value}: must be {f'{low} or more' if high is None else f'from {low} to {high}'}")


#################################################################################
#                                 What they share                               #
#################################################################################


@dataclass(frozen=True)
class NetworkOptions:
    """Which network, and how it runs."""

    checkpoint: str
    device: str = "auto"
    precision: str = "auto"  # or bf16, fp32; auto: as trained, BF16 where the device has it
    compile: str = "auto"  # or on, off; auto: where there are pictures enough to pay for it
    tile: int = 1024  # pixels: a VAE takes larger pictures in tiles; 0: never
    batch_size: int = 8  # pictures at once
    autoencoder: str | None = None  # where it lies now, if not where it lay in training

    def __post_init__(self) -> None:
        check_range("batch_size", self.batch_size, 1, 65536)


@dataclass(frozen=True)
class SettingsOptions:
    """Where the settings of the solver come from: the checkpoint's, or a config's, under --set, under the flags."""

    config: str | None = None  # a file whose inference section takes the place of the checkpoint's
    overrides: tuple[str, ...] = ()  # section.key=value
    flags: dict[str, Any] = field(default_factory=dict)  # keys of the inference section that were given as flags
    strength: float = 1.0
    seed: int = 0  # of flowedit's noise

    def __post_init__(self) -> None:
        check_range("strength", self.strength, 0, 1)
        check_range("seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True)
class TargetOptions:
    """Which styles to give a picture: one, all of them, or those on the way from one to another."""

    style: str | None = None  # an id, a name, or all
    interpolate: tuple[str, str] | None = None
    frames: int = 9  # of an interpolation, both ends included

    def __post_init__(self) -> None:
        check_range("frames", self.frames, 2, 10_000)

    @property
    def several(self) -> bool:
        return self.interpolate is not None or self.style == "all"


#################################################################################
#                             One for each thing to do                          #
#################################################################################


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
    min_structure: float | None = None  # SSIM to the picture that must be left
    certify: bool = False
    save_structure: Path | None = None
    compare: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_range("size", self.size, 1, LARGEST_SIDE)
        check_range("min_structure", self.min_structure, -1, 1)
        if self.compare and self.targets.several:
            raise UserError("--compare is for one target; the sheet of several shows the picture already")
        if self.save_structure and (self.targets.several or self.input.is_dir()):
            raise UserError("--save_structure keeps one picture's way to one style; give one picture and one target")


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
    seed: int = 0  # of the noise
    npz: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_range("num_samples", self.num_samples, 1)
        check_range("num_samples_per_style", self.num_samples_per_style, 1)
        check_range("seed", self.seed, 0)
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output {self.output}: is a file; give a folder")
