"""The structure file: a picture's structure, and all that it takes to go back, or on to other styles.

It is a safetensors file with the lattice state of one picture where its inversion ended, at t = 1 - strength; of a
transfer by map, where its one leg ended:

    position, defect        (1, C, h, w) int32, or int64 where a number is too large for that

and, as JSON in its metadata, everything that fixes the velocity field to the last bit. From there the inversion run
backwards gives the picture, and a generation leg gives it in another style. By map, the leg run backwards gives the
picture, and from there another leg goes to another style. (Files of format 1 also hold the state at
the end of that leg, which nothing needs.)
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from isonext.checkpoint import checkpoint_digest
from isonext.config import SETTINGS, config_from_dict
from isonext.data.store import shown
from isonext.errors import UserError
from isonext.flow.certificate import _bytes
from isonext.flow.solvers import LatticeState
from isonext.flow.transfer import EXACT, TransferSettings
from isonext.pipeline import Pipeline
from isonext.utils.device import device_name
from isonext.utils.io import written_whole
from isonext.utils.schema import Mismatch, dense, flag, listed, made_of, number, record, style_name, text, whole
from model import ARITHMETIC

FORMAT = 2
REMEDIES = {
    "checkpoint": "give the checkpoint it was made with",
    "autoencoder": "give the one it was made with by --set autoencoder.name=FOLDER",
    "precision": "leave --precision out",
    "compiled": "leave --compile out",
    "device": "use the same, with as many threads (OMP_NUM_THREADS)",
    "torch": "install that version",
    "network": "use the version of this program that made it",
}
LARGEST_SIDE = 2**20  # pixels
SUFFIX = ".safetensors"
TENSORS = {1: ("position", "defect", "end_position", "end_defect"), 2: ("position", "defect")}  # by format
INTEGERS = (torch.int32, torch.int64)
STOP = {"strength": number(0, 1), "skip": whole(), "seed": whole(0, 2**63 - 1)}  # of the settings, beside a config's
_bit = text(longest=200)
BITS = record(checkpoint=_bit, precision=text("bf16", "fp32"), compiled=flag, tf32=flag, device=_bit, torch=_bit)
RECORD = {
    "source": style_name,
    "target": style_name,
    "size": lambda value, where: tuple(listed(whole(1, LARGEST_SIDE), 2, 2)(value, where)),
    "original": text(),
    # Files from before the network's arithmetic was written down have the first.
    "bits": lambda value, where: {"network": 1} | BITS(value, where),
}


#################################################################################
#                               The structure file                              #
#################################################################################


@dataclass
class Structure:
    state: LatticeState  # where the inversion ended, or the leg of map
    source: str  # style names
    target: str
    settings: TransferSettings
    size: tuple[int, int]  # of the picture: height, width
    original: str  # digest of the latents that the picture was encoded to
    bits: dict[str, str | bool | int]  # what else fixes the network's bits: see `fixed_bits`


def fixed_bits(pipeline: Pipeline) -> dict[str, str | bool | int]:
    """What fixes the network's output to the last bit, beside its input."""
    assert pipeline.path is not None  # it came from a file
    return {
        "checkpoint": checkpoint_digest(pipeline.path),
        "autoencoder": pipeline.codec.digest,
        "precision": "bf16" if pipeline.bf16 else "fp32",
        "compiled": pipeline.compiled,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "device": device_name(pipeline.device),
        "torch": torch.__version__,
        "network": ARITHMETIC,
    }


def save_structure(structure: Structure, path: Path) -> None:
    tensors = {name: _narrowed(getattr(structure.state, name)) for name in TENSORS[FORMAT]}
    tree = {name: getattr(structure, name) for name in ("source", "target", "size", "original", "bits")}
    tree |= {"format": FORMAT, "settings": asdict(structure.settings)}
    written = json.dumps(tree, sort_keys=True)
    metadata = {"structure": written, "sha256": _seal(written, tensors)}
    with written_whole(path) as beside:
        save_file(tensors, beside, metadata)


def load_structure(path: Path) -> Structure:
    """Read and check; a truncated, edited or foreign file is refused in one line."""
    if not path.is_file():
        raise UserError(f"{path}: no such structure file")
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        written, seal = metadata["structure"], metadata["sha256"]
        tree = json.loads(written)
        known = TENSORS.get(tree.pop("format"))
        if known is None:
            raise UserError(f"{path}: a structure file of another version of this program; make it anew")
        if names != set(known) or _seal(written, {name: tensors[name] for name in known}) != seal:
            raise UserError(f"{path}: was changed after it was written: its checksum does not fit")
        state = _state_of(tensors)
        settings = _settings_of(tree.pop("settings"), str(path))
        return made_of(Structure, RECORD, tree | {"state": state, "settings": settings}, "structure")
    except UserError:
        raise
    except Mismatch as error:
        raise UserError(f"{path}: damaged, or not a structure file of --save_structure ({error})") from None
    except Exception as error:  # safetensors and json stumble over many things in a damaged file
        kind = type(error).__name__
        raise UserError(f"{path}: damaged, or not a structure file of --save_structure ({kind})") from None


def _state_of(tensors: dict[str, Tensor]) -> LatticeState:
    """The state of one picture, int64."""
    position, defect = (dense(4, INTEGERS)(tensors[name], name) for name in TENSORS[FORMAT])
    if position.shape != defect.shape or len(position) != 1 or not position.numel():
        shapes = tuple(position.shape), tuple(defect.shape)
        raise Mismatch("position, defect", shapes, "of one shape (1, C, h, w)")
    return LatticeState(position.long(), defect.long())


def _settings_of(tree: Any, where: str) -> TransferSettings:
    """The settings of a transfer by an exact method: those of a config, and where it stopped."""
    settings = made_of(TransferSettings, STOP, tree, "settings")
    config = config_from_dict({"inference": {name: tree[name] for name in SETTINGS if name in tree}}, where)
    settings = replace(settings, **asdict(config.inference))
    if settings.method not in EXACT or settings.inversion != "explicit" or settings.skip > settings.num_steps:
        raise Mismatch(
            "settings", f"{settings.method}, skip {settings.skip}", "of alf or map, with steps that are left"
        )
    return settings


def refuse_other_bits(structure: Structure, pipeline: Pipeline, path: Path, names: tuple[str, ...] = ()) -> None:
    """UserError that says what differs between the run that made the file and this one; `names`: look at these only."""
    here = fixed_bits(pipeline)
    for name, there in structure.bits.items():
        if here.get(name) != there and (not names or name in names):
            values = f"{str(there)[:48]}; here it is {str(here.get(name))[:48]}"
            raise UserError(f"{path}: made with another {name}: {values}; {REMEDIES.get(name, 'make the file anew')}")


def refuse_other_shape(structure: Structure, pipeline: Pipeline, path: Path) -> None:
    """UserError where the file's latents are not those of a picture of its size under this checkpoint."""
    cells = (math.ceil(side / pipeline.codec.factor) for side in structure.size)
    expected, found = (1, pipeline.spec.channels, *cells), structure.state.position.shape
    if found != expected:
        raise UserError(
            f"{path}: holds latents {shown(found)}, but a picture of its size has {shown(expected)} under this "
            "checkpoint; give the one it was made with, or make the file anew"
        )
    pipeline.check_size(path, structure.size[::-1])


def _narrowed(points: Tensor) -> Tensor:
    """Of its own memory, on the CPU, in int32 where that holds every number."""
    points, limits = points.cpu().contiguous(), torch.iinfo(torch.int32)
    fits = bool((points >= limits.min).all() and (points <= limits.max).all())
    return points.to(torch.int32 if fits else torch.int64, copy=True)


def _seal(written: str, tensors: dict[str, Tensor]) -> str:
    """A checksum against accidents and edits; not a signature."""
    seal = hashlib.sha256(written.encode())
    for name, tensor in tensors.items():
        seal.update(str((name, tensor.dtype, tuple(tensor.shape))).encode() + _bytes(tensor))
    return seal.hexdigest()
