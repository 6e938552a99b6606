"""The certificate that a way back lost nothing: integers compared, and their fingerprint."""

import hashlib

import torch
from torch import Tensor

from isonext.flow.solvers import LATTICE, LatticeState
from isonext.flow.transfer import EXACT, State, TransferSettings


class Certificate:
    """Compares where a transfer started with where its way back ended, as integers, over any number of pictures.

    The way back of alf and of map needs the defects that legs ended with: what they weigh is told beside the verdict.
    """

    def __init__(self) -> None:
        self.elements = self.differing = self.largest = 0  # latent elements; the largest in lattice points
        self.defects, self.defect_energy = 0, 0.0  # elements of defects, and the sum of their squares
        self.pictures: set[str] = set()  # the SHA-256 of each one's starting positions

    def compare(self, start: State, back: State, count: int | None = None) -> None:
        """Take in a batch, or its first `count` pictures: the states before the transfer and after its way back."""
        (x, d), (x_back, d_back) = ([part[:count] for part in _integers(state)] for state in (start, back))
        change = torch.maximum((x - x_back).abs(), (d - d_back).abs())
        self.elements += change.numel()
        self.differing += int((change > 0).sum())
        self.largest = max(self.largest, int(change.max()))
        self.pictures.update(hashlib.sha256(_bytes(picture)).hexdigest() for picture in x)

    def weigh(self, *ends: State | None, count: int | None = None) -> None:
        """Take in the defects of states at the ends of legs, of a batch or of its first `count` pictures."""
        for end in ends:
            if isinstance(end, LatticeState):
                defect = end.defect[:count].double() * LATTICE
                self.defects += defect.numel()
                self.defect_energy += defect.square().sum().item()

    def include(self, other: "Certificate") -> None:
        """Take in what another process has compared."""
        self.defects += other.defects
        self.defect_energy += other.defect_energy
        self.elements += other.elements
        self.differing += other.differing
        self.largest = max(self.largest, other.largest)
        self.pictures |= other.pictures

    @property
    def exact(self) -> bool:
        return self.elements > 0 and self.differing == 0

    @property
    def defect(self) -> float:
        """Root mean square of the defects, in deviations of the latents; 0 where nothing has one."""
        return (self.defect_energy / self.defects) ** 0.5 if self.defects else 0.0

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
            return (
                f"certificate: exact (0 of {self.elements} elements differ){self._with_defect()}, sha256 {self.sha256}"
            )
        return (
            f"certificate: NOT exact: {self.differing} of {self.elements} elements differ, "
            f"the largest by {self.largest * LATTICE:.2g} deviations; {cause}"
        )

    def _with_defect(self) -> str:
        return f", with the defects that the way back needs ({self.defect:.2g} rms)" if self.defects else ""


def likely_cause(settings: TransferSettings) -> str:
    if settings.inversion == "fixed_point":
        return "a fixed point comes back to its tolerance, not to the bit; --method alf does"
    if settings.method not in EXACT:
        return f"{settings.method} is not its own inverse; --method alf is"
    return "the network gave other bits for the same input: kernels that are not deterministic, or another batch shape"


def digest(state: State) -> str:
    """SHA-256 of a state's positions: the fingerprint of latents, to the bit."""
    return hashlib.sha256(_bytes(_integers(state)[0])).hexdigest()


def _integers(state: State) -> tuple[Tensor, Tensor]:
    state = state if isinstance(state, LatticeState) else LatticeState.at_picture(state)
    return state.position, state.defect


def _bytes(points: Tensor) -> bytes:
    return points.cpu().contiguous().numpy().tobytes()
