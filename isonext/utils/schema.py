"""What a file may hold: small checks that are put together to the schema of a checkpoint, meta.json or structure file.

    SPEC = {"channels": whole(1), "mean": listed(number())}
    spec = made_of(LatentSpec, SPEC, tree, "latents")       # a LatentSpec, or a Mismatch that names the place

A check takes a value and its place and returns the value. Nothing here goes deeper than its schema, and nothing trusts
a number before it was looked at.
"""

import dataclasses
import os
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from isonext.errors import UserError, brief

Check = Callable[[Any, str], Any]
T = TypeVar("T")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LARGEST = 2**53  # whole number: beyond it a float is not exact
LONGEST_NAME = 255  # bytes of a file's name


class Mismatch(ValueError):
    """What does not fit its schema: the place, the value, what was allowed."""

    def __init__(self, where: str, value: Any, allowed: str) -> None:
        super().__init__(f"{where[:200]} = {brief(value)}: must be {allowed}")


#################################################################################
#                              Numbers, texts, lists                            #
#################################################################################


def whole(low: int = 0, high: int = LARGEST) -> Check:
    def check(value: Any, where: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise Mismatch(where, value, f"a whole number from {low} to {high}")
        return value

    return check


def number(low: float = -1e12, high: float = 1e12) -> Check:
    """Finite, as the bounds are."""

    def check(value: Any, where: str) -> float:
        if type(value) not in (int, float) or not low <= value <= high:  # written so that NaN fails
            raise Mismatch(where, value, f"a number from {low:g} to {high:g}")
        return value

    return check


def flag(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise Mismatch(where, value, "true or false")
    return value


def text(*choices: str, longest: int = 4096) -> Check:
    """One line of text; of `choices`, where there are any."""

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) > longest or not is_one_line(value):
            raise Mismatch(where, value, f"a text of one line and at most {longest} letters")
        if choices and value not in choices:
            raise Mismatch(where, value, f"one of {', '.join(choices)}")
        return value

    return check


def listed(entry: Check, low: int = 0, high: int = LARGEST) -> Check:
    def check(value: Any, where: str) -> list:
        if not isinstance(value, list | tuple) or not low <= len(value) <= high:
            count = str(low) if low == high else f"{low} or more"
            raise Mismatch(where, value, f"a list of {count}")
        return [entry(part, f"{where}[{place}]") for place, part in enumerate(value)]

    return check


def mapped(entry: Check, key: Check | None = None) -> Check:
    """A dict of texts, or of what `key` checks, to entries."""
    key = key or text()

    def check(value: Any, where: str) -> dict:
        if not isinstance(value, dict):
            raise Mismatch(where, value, "an object of named entries")
        return {key(name, f"a name in {where}"): entry(part, f"{where}[{name}]") for name, part in value.items()}

    return check


def record(**entries: Check) -> Check:
    """A dict that has these entries; others that it has stay as they are."""

    def check(value: Any, where: str) -> dict:
        if not isinstance(value, dict):
            raise Mismatch(where, value, "an object of named entries")
        missing = [name for name in entries if name not in value]
        if missing:
            raise Mismatch(where, sorted(map(str, value))[:8], f"with the entry {missing[0]}")
        return value | {name: entry(value[name], f"{where}.{name}") for name, entry in entries.items()}

    return check


def made_of(kind: type[T], checks: dict[str, Check], tree: Any, where: str) -> T:
    """A dataclass of the entries in `tree`, those with a check checked; the ones it does not have are refused."""
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    needed = {
        name
        for name, entry in fields.items()
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    }
    if not isinstance(tree, dict) or not needed <= tree.keys() or not tree.keys() <= fields.keys():
        names = sorted(map(str, tree))[:8] if isinstance(tree, dict) else tree
        raise Mismatch(where, names, f"an object of {', '.join(fields)}")
    values = {name: checks[name](value, f"{where}.{name}") if name in checks else value for name, value in tree.items()}
    return kind(**values)


#################################################################################
#                                Tensors and names                              #
#################################################################################


def dense(ndim: int | None = None, dtypes: Iterable[torch.dtype] = FLOATS) -> Check:
    """A tensor of finite numbers that are all in memory: not sparse, quantised, nested, or one number repeated."""

    def check(value: Any, where: str) -> Tensor:
        if not isinstance(value, Tensor):
            raise Mismatch(where, value, "a tensor")
        dtype, shape = str(value.dtype).removeprefix("torch."), "nested" if value.is_nested else tuple(value.shape)
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
        if not plain or value.is_quantized or value.dtype not in dtypes or ndim not in (None, value.ndim):
            allowed = f"dense, of {'any' if ndim is None else ndim} dimensions and a usual type of numbers"
            raise Mismatch(where, f"{dtype} {shape} {value.layout} on {value.device.type}", allowed)
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise Mismatch(where, f"{dtype} {shape}", "as large in memory as it says")
        if not torch.isfinite(value).all():
            raise Mismatch(where, f"{dtype} {shape}", "of finite numbers")
        return value.detach()

    return check


def not_negative(shape: tuple[int, ...] | None = None) -> Check:
    """A dense tensor without a number below 0; of this shape, where one is given."""

    def check(value: Any, where: str) -> Tensor:
        found = dense()(value, where)
        if shape not in (None, tuple(found.shape)):
            raise Mismatch(where, tuple(found.shape), f"of shape {shape}")
        if (found < 0).any():
            raise Mismatch(where, found.min().item(), "0 or more")
        return found

    return check


def is_one_line(value: str) -> bool:
    """Whether a text is printed as one line, and can be encoded: no control characters, no halves of letters."""
    return value.isprintable() or not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value)


def style_name(value: Any, where: str) -> str:
    """A style's name, which becomes part of files' names: never a path, nor hidden."""
    text(longest=LONGEST_NAME)(value, where)
    if not _is_file_name(value) or "\\" in value or value.startswith("."):
        raise Mismatch(where, value, "a name that a folder can have, without separators and no dot in front")
    return value


def placed(folder: Path, name: str) -> Path:
    """folder / name; UserError where that would lie anywhere but in the folder."""
    if not _is_file_name(name):
        raise UserError(f"{folder}: {brief(name)} cannot be the name of a file there; rename the style")
    return folder / name


def _is_file_name(name: str) -> bool:
    fits = len(name.encode(errors="surrogatepass")) <= LONGEST_NAME
    return fits and name not in ("", ".", "..") and "\0" not in name and Path(name).name == name


def is_inside(entry: str) -> bool:
    """Whether a path `<style>/<name>` with forward slashes stays where it starts."""
    odd = ("\\", ":") if os.name == "nt" else ()
    parts = entry.split("/")
    return (
        len(parts) > 1
        and "\0" not in entry
        and not any(part in ("", ".", "..") for part in parts)
        and not any(letter in entry for letter in odd)
    )
