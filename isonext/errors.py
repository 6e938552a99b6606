"""The one error that a user sees, and what is told of those of others."""

import json
import os
from typing import Any

# What torch says of a CPU's memory: that there is none, or that no machine has as much.
NO_MEMORY = (
    "DefaultCPUAllocator",
    "not enough memory",
    "Storage size calculation overflowed",
    "multiplication overflow",
)


class UserError(Exception):
    """Bad input. Its one line says what was wrong, where, and what to do; the command exits with status 2."""


class WriteError(UserError, OSError):
    """A file that could not be written; `strerror` is the reason alone, `errno` the system's number if it has one."""

    def __init__(self, path: str | os.PathLike, reason: str, number: int | None = None) -> None:
        self.line = f"{path}: could not be written ({reason}); make room, or choose another place, and run it again"
        super().__init__(self.line)
        self.strerror, self.errno = reason, number

    def __str__(self) -> str:  # an OSError's would be made of its number and reason
        return self.line


def brief(value: Any) -> str:
    """A value for people, as JSON where it has that form: one line, at most 80 letters."""
    try:
        shown = json.dumps(value, default=lambda other: type(other).__name__)
    except (ValueError, TypeError, RecursionError):  # of too many digits, of keys that are no texts, too deep
        shown = f"a {type(value).__name__}"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had, on a device or on the CPU, where torch has no type for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported for --help
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says anything, or the name of its type where there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
