"""The structure file: a picture's structure, and all that it takes to go back, or on to other styles.

It is a safetensors file with the lattice state of one picture where its inversion ended, at t = 1 - strength,

    position, defect        (1, C, h, w) int32, or int64 where a number is too large for that

and, as JSON in its metadata, everything that fixes the velocity field to the last bit. From there the inversion run
backwards gives the picture, and a generation leg gives it in another style. (Files of format 1 also hold the state at
the end of that leg, which nothing needs.)
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from isonext.errors import UserError
from isonext.flow.certificate import _bytes
from isonext.flow.solvers import LatticeState
from isonext.flow.transfer import TransferSettings
from isonext.pipeline import Pipeline
from isonext.utils.device import device_name
from isonext.utils.io import written_whole
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
SUFFIX = ".safetensors"
TENSORS = {1: ("position", "defect", "end_position", "end_defect"), 2: ("position", "defect")}  # by format


#################################################################################
#                               The structure file                              #
#################################################################################


@dataclass
class Structure:
    state: LatticeState  # where the inversion ended
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
        "checkpoint": _file_sha256(pipeline.path),
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
    record = {name: getattr(structure, name) for name in ("source", "target", "size", "original", "bits")}
    record |= {"format": FORMAT, "settings": asdict(structure.settings)}
    text = json.dumps(record, sort_keys=True)
    metadata = {"structure": text, "sha256": _seal(text, tensors)}
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
        text, seal = metadata["structure"], metadata["sha256"]
        record = json.loads(text)
        known = TENSORS.get(record.pop("format"))
        if known is None:
            raise UserError(f"{path}: a structure file of another version of this program; make it anew")
        if names != set(known) or _seal(text, {name: tensors[name] for name in known}) != seal:
            raise UserError(f"{path}: was changed after it was written: its checksum does not fit")
        settings, size = record.pop("settings"), tuple(record.pop("size"))
        settings = TransferSettings(**settings | {"cfg_interval": tuple(settings["cfg_interval"])})
        record["bits"] = {"network": 1} | record["bits"]  # of files from before it was written down
        state = LatticeState(tensors["position"].long(), tensors["defect"].long())
        return Structure(state=state, settings=settings, size=size, **record)
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        kind = type(error).__name__
        raise UserError(f"{path}: damaged, or not a structure file of --save_structure ({kind})") from None


def refuse_other_bits(structure: Structure, pipeline: Pipeline, path: Path, names: tuple[str, ...] = ()) -> None:
    """UserError that says what differs between the run that made the file and this one; `names`: look at these only."""
    here = fixed_bits(pipeline)
    for name, there in structure.bits.items():
        if here[name] != there and (not names or name in names):
            values = f"{str(there)[:48]}; here it is {str(here[name])[:48]}"
            raise UserError(f"{path}: made with another {name}: {values}; {REMEDIES.get(name, 'make the file anew')}")


def _narrowed(points: Tensor) -> Tensor:
    """Of its own memory, on the CPU, in int32 where that holds every number."""
    points, limits = points.cpu().contiguous(), torch.iinfo(torch.int32)
    fits = bool((points >= limits.min).all() and (points <= limits.max).all())
    return points.to(torch.int32 if fits else torch.int64, copy=True)


def _seal(text: str, tensors: dict[str, Tensor]) -> str:
    """A checksum against accidents and edits; not a signature."""
    seal = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        seal.update(str((name, tensor.dtype, tuple(tensor.shape))).encode() + _bytes(tensor))
    return seal.hexdigest()


def _file_sha256(path: Path) -> str:
    seal = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            seal.update(block)
    return seal.hexdigest()
