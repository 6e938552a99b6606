"""The one error that a user sees, and what is told of those of others."""

import json
import os
from typing import Any


class UserError(Exception):
    """Bad input. Its one line says what was wrong, where, and what to do; the command exits with status 2."""


class WriteError(UserError, OSError):
    """A file that could not be written; `strerror` is the reason alone."""

    def __init__(self, path: str | os.PathLike, reason: str) -> None:
        super().__init__(
            f"{path}: could not be written ({reason}); make room, or choose another place, and run it again"
        )
        self.strerror = reason


def brief(value: Any) -> str:
    """A value for people, as JSON where it has that form: one line, at most 80 letters."""
    try:
        shown = json.dumps(value, default=lambda other: type(other).__name__)
    except (ValueError, TypeError, RecursionError):  # of too many digits, of keys that are no texts, too deep
        shown = f"a {type(value).__name__}"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says anything, or the name of its type where there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
