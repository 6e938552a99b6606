"""A model to give away, as a folder of data: what export.py writes, and load_checkpoint reads.

model.safetensors   network.<weight> (the averaged ones), base.<tensor>, of stage 2 teacher.<weight>; as JSON in its
                    metadata, what they are
config.json         the sections of the config that a transfer needs, which a receiver may edit
README.md           the model card, which nothing reads
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from isonext.data.autoencoder import weights_digest
from isonext.errors import UserError, first_line
from isonext.utils.schema import Mismatch, mapped, record, text, whole

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FORMAT = 1
NETWORK, BASE, TEACHER = "network.", "base.", "teacher."  # in front of the tensors' names
HEADER = record(format=whole(), checkpoint=text(longest=64), entries=mapped(lambda value, where: value))


def write_model(folder: Path, tensors: Mapping[str, Tensor], header: dict[str, Any], config: dict[str, Any]) -> None:
    """Both files; `header` is {"checkpoint": SHA-256 of what it came from, "entries": those of a checkpoint}."""
    plain = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    written = json.dumps(header | {"format": FORMAT}, sort_keys=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(plain, folder / WEIGHTS, {"isonext": written, "sha256": weights_digest(plain, written)})
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors writes for this user alone


def read_header(folder: Path) -> dict[str, Any]:
    """What the tensors are; UserError in one line where the folder is none of export.py."""
    return _read(folder, tensors=False)[0]


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors, of which not a bit has changed since they were written."""
    return _read(folder, tensors=True)


def _read(folder: Path, tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = folder / WEIGHTS
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: is a folder without {name}; give a checkpoint, or a model of export.py")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except Exception as error:  # safetensors stumbles over many things in a damaged file
        raise UserError(f"{path}: damaged, or not of safetensors ({first_line(error)})") from None
    if "isonext" not in metadata:
        raise UserError(f"{path}: of another program: its metadata has no entry isonext")
    written = metadata["isonext"]
    try:
        header = HEADER(json.loads(written), "header")
    except Mismatch as error:
        raise UserError(f"{path}: damaged ({error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged (its header is no JSON: {first_line(error)[:80]})") from None
    if header["format"] != FORMAT:
        raise UserError(f"{path}: model format {header['format']}, this program reads {FORMAT}")
    if tensors and weights_digest(found, written) != metadata.get("sha256"):
        raise UserError(f"{path}: was changed after it was written: its checksum does not fit")
    return header, found
