"""What was asked for last is kept, and no more of it than memory allows."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from isonext.flow.solvers import LatticeState
from isonext.flow.transfer import Inverted, TransferSettings
from isonext.pipeline import Pipeline, Style

Value = TypeVar("Value")
MOST_ELEMENTS = 2**25  # of the inversions that are kept together: 256 MiB on the lattice


class Recent:
    """The values of the last keys, at most `most` of them, of at most `elements` elements together."""

    def __init__(self, most: int, elements: int | None = None, count: Callable[[Any], int] = lambda value: 0) -> None:
        self.most, self.elements, self.count = most, elements, count
        self.values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made where it is not there; what was not asked for the longest goes."""
        if key not in self.values:
            self.values[key] = make()
        self.values.move_to_end(key)
        while len(self.values) > 1 and self._is_too_much():
            self.values.popitem(last=False)
        return self.values[key]

    def _is_too_much(self) -> bool:
        total = sum(map(self.count, self.values.values()))
        return len(self.values) > self.most or (self.elements is not None and total > self.elements)


def remember_inversions(pipeline: Pipeline, most: int = 16) -> Recent:
    """Make `pipeline.invert` return what it found before for the same latents, style and legs, with no evaluations.

    Target, scale, guidance, clamp and seed do not change an inversion unless they change the grid.
    """
    invert, known = pipeline.invert, Recent(most, MOST_ELEMENTS, _elements)

    def remembered(latents: Tensor, source: Style, settings: TransferSettings) -> Inverted:
        key = (
            *(_digest(latents), tuple(latents.shape), _digest(source) if isinstance(source, Tensor) else source),
            *(_of_inversion(settings), tuple(settings.grid), pipeline.bf16, pipeline.compiled),
        )
        there = key in known.values
        found: Inverted = known.get(key, lambda: invert(latents, source, settings))
        return replace(found, nfe=0) if there else found

    pipeline.invert = remembered  # type: ignore[method-assign]
    return known


def _of_inversion(settings: TransferSettings) -> TransferSettings:
    """The settings less what matters to the generation leg alone; guidance moves the grid, which is looked at apart."""
    plain = replace(settings, cfg_scale=1.0, guidance="source", cfg_interval=(0.0, 1.0), cfg_rescale=0.0, seed=0)
    return replace(plain, latent_clamp=None) if settings.method == "alf" else plain


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _elements(found: Inverted) -> int:
    state = found.state
    return 2 * state.position.numel() if isinstance(state, LatticeState) else state.numel()
