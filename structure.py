"""What a transfer keeps: the structure file, and the certificate that nothing was lost.

A structure file is a safetensors file with the lattice states of one picture at both ends of its generation leg,

    position, defect            (1, C, h, w) int64, at the structure, t = 1 - strength
    end_position, end_defect    the same at the transferred picture, t = 1

and, as JSON in its metadata, everything that fixes the velocity field to the last bit.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cli import UserError
from device import device_name
from files import written_whole
from pipeline import Pipeline
from solvers import LATTICE, LatticeState
from transfers import State, TransferSettings

FORMAT = 1
REMEDIES = {
    "checkpoint": "give the checkpoint it was made with",
    "precision": "leave --precision out",
    "compiled": "leave --compile out",
    "device": "use the same, with as many threads (OMP_NUM_THREADS)",
    "torch": "install that version",
}
SUFFIX = ".safetensors"
TENSORS = ("position", "defect", "end_position", "end_defect")


#################################################################################
#                                The certificate                                #
#################################################################################


class Certificate:
    """Compares where a transfer started with where its way back ended, as integers, over any number of pictures."""

    def __init__(self) -> None:
        self.elements = self.differing = self.largest = 0  # latent elements; the largest in lattice points
        self.pictures: set[str] = set()  # the SHA-256 of each one's starting positions

    def compare(self, start: State, back: State, count: int | None = None) -> None:
        """Take in a batch, or its first `count` pictures: the states before the transfer and after its way back."""
        (x, d), (x_back, d_back) = ([part[:count] for part in _integers(state)] for state in (start, back))
        change = torch.maximum((x - x_back).abs(), (d - d_back).abs())
        self.elements += change.numel()
        self.differing += int((change > 0).sum())
        self.largest = max(self.largest, int(change.max()))
        self.pictures.update(hashlib.sha256(_bytes(picture)).hexdigest() for picture in x)

    def include(self, other: "Certificate") -> None:
        """Take in what another process has compared."""
        self.elements += other.elements
        self.differing += other.differing
        self.largest = max(self.largest, other.largest)
        self.pictures |= other.pictures

    @property
    def exact(self) -> bool:
        return self.elements > 0 and self.differing == 0

    @property
    def sha256(self) -> str:
        """Of a picture's starting positions on the lattice; of several pictures, of their SHA-256 in sorted order, so
        that it does not matter how they were batched or shared out."""
        if len(self.pictures) == 1:
            return next(iter(self.pictures))
        return hashlib.sha256("".join(sorted(self.pictures)).encode()).hexdigest()

    def line(self, cause: str) -> str:
        """What is printed; `cause` is the likely reason where it does not hold."""
        if not self.elements:
            return "certificate: none, since nothing was made"
        if self.exact:
            return f"certificate: exact (0 of {self.elements} elements differ), sha256 {self.sha256}"
        return (
            f"certificate: NOT exact: {self.differing} of {self.elements} elements differ, "
            f"the largest by {self.largest * LATTICE:.2g} deviations; {cause}"
        )


def likely_cause(how: TransferSettings) -> str:
    if how.inversion == "fixed_point":
        return "a fixed point comes back to its tolerance, not to the bit; --method alf does"
    if how.method != "alf":
        return f"{how.method} is not its own inverse; --method alf is"
    return "the network gave other bits for the same input: kernels that are not deterministic, or another batch shape"


def digest(state: State) -> str:
    """SHA-256 of a state's positions: the fingerprint of latents, to the bit."""
    return hashlib.sha256(_bytes(_integers(state)[0])).hexdigest()


def _integers(state: State) -> tuple[Tensor, Tensor]:
    state = state if isinstance(state, LatticeState) else LatticeState.at_picture(state)
    return state.position, state.defect


def _bytes(points: Tensor) -> bytes:
    return points.cpu().contiguous().numpy().tobytes()


#################################################################################
#                               The structure file                              #
#################################################################################


@dataclass
class Structure:
    start: LatticeState  # at the structure
    end: LatticeState  # at the transferred picture
    source: str  # style names
    target: str
    how: TransferSettings
    size: tuple[int, int]  # of the picture: height, width
    original: str  # digest of the latents that the picture was encoded to
    bits: dict[str, str | bool]  # what else fixes the network's bits: see `fixed_bits`


def fixed_bits(pipeline: Pipeline) -> dict[str, str | bool]:
    """What fixes the network's output to the last bit, beside its input."""
    return {
        "checkpoint": _file_sha256(pipeline.path),
        "precision": "bf16" if pipeline.bf16 else "fp32",
        "compiled": pipeline.compiled,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "device": device_name(pipeline.device),
        "torch": torch.__version__,
    }


def save_structure(structure: Structure, path: Path) -> None:
    tensors = dict(zip(TENSORS, _parts(structure), strict=True))
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}  # safetensors shares none
    record = {name: getattr(structure, name) for name in ("source", "target", "size", "original", "bits")}
    record |= {"format": FORMAT, "settings": asdict(structure.how)}
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
        if record.pop("format") != FORMAT:
            raise UserError(f"{path}: a structure file of another version of this program; make it anew")
        if names != set(TENSORS) or _seal(text, tensors) != seal:
            raise UserError(f"{path}: was changed after it was written: its checksum does not fit")
        settings, size = record.pop("settings"), tuple(record.pop("size"))
        how = TransferSettings(**settings | {"cfg_interval": tuple(settings["cfg_interval"])})
        start, end = (LatticeState(*(tensors[name] for name in pair)) for pair in (TENSORS[:2], TENSORS[2:]))
        return Structure(start=start, end=end, how=how, size=size, **record)
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


def _parts(structure: Structure) -> tuple[Tensor, ...]:
    return structure.start.position, structure.start.defect, structure.end.position, structure.end.defect


def _seal(text: str, tensors: dict[str, Tensor]) -> str:
    """A checksum against accidents and edits; not a signature."""
    seal = hashlib.sha256(text.encode())
    for name in TENSORS:
        seal.update(str((name, tensors[name].dtype, tuple(tensors[name].shape))).encode() + _bytes(tensors[name]))
    return seal.hexdigest()


def _file_sha256(path: Path) -> str:
    seal = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            seal.update(block)
    return seal.hexdigest()
