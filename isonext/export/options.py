"""What export.py is asked for, as data. Imports nothing that takes long."""

from dataclasses import dataclass
from pathlib import Path

from isonext.errors import UserError

FORMATS = ("safetensors", "onnx")
LONGEST_LICENSE = 200  # letters


@dataclass(frozen=True)
class ExportOptions:
    checkpoint: str
    output: Path  # a folder that is not there yet, or empty
    format: str = "safetensors"  # or onnx
    pictures: Path | None = None  # one folder a style, for the samples of the card; None: held-out ones, where they lie
    license: str = ""  # of the card
    opset: int | None = None  # of onnx; None: the exporter's own choice
    overrides: tuple[str, ...] = ()  # of the inference section: section.key=value
    autoencoder: str | None = None  # where it lies now, if not where it lay in training

    def __post_init__(self) -> None:
        if self.opset is not None and self.format != "onnx":
            raise UserError("--opset is of --format onnx")
        if len(self.license) > LONGEST_LICENSE or not self.license.isprintable():
            raise UserError(f"--license: must be one line of at most {LONGEST_LICENSE} letters, such as mit")
