"""The generator of damaged files: a good one, every field of it replaced by wrong values, one at a time.

Nothing here harms any software: the values are of the wrong type or size, and only what this project checks sees them.
"""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from isonext.errors import UserError

DEEP = "a list in a list, a hundred thousand times"  # stands for it, since it cannot be written otherwise
PLAIN = {  # what JSON can say
    "nothing": None,
    "true": True,
    "minus one": -1,
    "zero": 0,
    "a fraction": 0.5,
    "a million millions": 10**12,
    "more digits than are read": 10**4299,
    "no number": math.nan,
    "infinity": math.inf,
    "a huge fraction": -1e300,
    "no text": "",
    "the folder above": "..",
    "a way out": "../../outside",
    "an absolute path": "/outside/x",
    "a NUL": "a\0b",
    "two lines": "a\nb",
    "half a letter": "\ud800",
    "a long text": "x" * 45_000,
    "no list": [],
    "a list of nothing": [None],
    "a list too long": [0] * 5000,
    "no object": {},
    "an object in an object": {"a": {"b": None}},
    "deep": DEEP,
}


@functools.cache
def deep_list() -> list:
    inner: list = []
    for _ in range(100_000):
        inner = [inner]
    return inner


def wrong_tensors() -> dict[str, Any]:
    """What a file of torch can say beyond JSON; shapes are those of nothing in the files."""
    torch.manual_seed(0)
    return {
        "bytes": b"\0",
        "a number in a tensor": torch.tensor(3.0),
        "an empty tensor": torch.empty(0),
        "another shape": torch.zeros(1, 2, 3, 4, 5),
        "no dimension": torch.zeros(2, 0, 2),
        "no numbers": torch.full((2, 2), math.nan),
        "truths": torch.ones(12, 4, 4, dtype=torch.bool),
        "eight bits": torch.ones(12, 4, 4).to(torch.float8_e5m2),
        "complex": torch.ones(12, 4, 4, dtype=torch.complex64),
        "sparse": torch.ones(12, 4, 4).to_sparse(),
        "of no memory": torch.ones(12, 4, 4, device="meta"),
        "quantised": torch.quantize_per_tensor(torch.ones(12, 4, 4), 0.1, 0, torch.quint8),
        "one number in a petabyte": torch.ones(1).expand(10**5, 10**5, 10**5),
        "a list of tensors": [torch.zeros(2)],
    }


def fields(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every field; of a list, or a dict of many alike, the first ones alone."""
    if path:
        yield path
    if isinstance(tree, dict):
        few = list(tree)[: None if len(path) < 1 or len(tree) < 20 else 2]
        for name in few:
            yield from fields(tree[name], (*path, name))
    if isinstance(tree, list | tuple) and tree:
        yield from fields(tree[0], (*path, 0))


def with_field(tree: Any, path: tuple, value: Any) -> Any:
    """A copy in which the field has the value; `...` takes it away. What is not on the path is shared."""
    name, *rest = path
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if rest:
        copy[name] = with_field(tree[name], tuple(rest), value)
    elif value is ...:
        del copy[name]
    else:
        copy[name] = value
    return copy


def named(path: tuple) -> str:
    return ".".join(map(str, path))


def judge(load: Callable[[], Any], path: Path) -> str | None:
    """What is wrong with how `load` takes a file; None where it loads, or refuses it in one line with its name."""
    try:
        load()
    except UserError as error:
        line = str(error)
        if "\n" in line or len(line) > 1000 or str(path.parent) not in line:
            return f"a line as this: {line[:300]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None
