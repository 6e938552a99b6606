"""Components that take from a browser what it says and nothing else, and how errors are told.

gradio's own would decode a picture of any format before anybody looks at it, and would fetch a URL that stands in a
path's place. Its dropdowns check a choice against the list of when the page was made; here `runs.py` and the pipeline
check it against what there is now.
"""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from isonext.errors import UserError

Result = TypeVar("Result")
DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}  # of events: one runs, the others wait
NOT_ASKED: dict[str, Any] = {"api_visibility": "private"}  # of events that are the page's own


def told(work: Callable[..., Result], *arguments: Any) -> Result:
    """What `work(*arguments)` returns; a UserError is a sentence on the page, which shows it until it is closed."""
    try:
        return work(*arguments)
    except UserError as error:
        raise gr.Error(html.escape(str(error)), title="", duration=None, print_exception=False) from None


def number_in(name: str, value: Any, low: float, high: float) -> float:
    """`value`, a number from a browser; UserError where it is none, or out of range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name}: must be a number from {low:g} to {high:g}")
    return value


def sent(component: Any) -> Any:
    """A component for uploads that hands on the path of the file that a browser sent, which gradio sees to lie in its
    folder of uploads; not opened, and no address. (Not a subclass: gradio writes a file beside the source of each.)"""
    move = component.async_move_resource_to_block_cache

    async def move_file(path: Any) -> str | None:
        if "://" in str(path):
            raise gr.Error("send a file, not an address", title="", print_exception=False)
        return await move(path)

    def path_of(payload: Any) -> Path | None:
        path = getattr(getattr(payload, "root", payload), "path", None)
        return None if path is None else Path(path)

    component.async_move_resource_to_block_cache, component.preprocess = move_file, path_of
    return component


def choice(dropdown: gr.Dropdown) -> gr.Dropdown:
    """A dropdown whose choices change: what is chosen is looked up where it is used."""
    dropdown.preprocess = lambda payload: payload if isinstance(payload, str | list) else None
    return dropdown


def chosen_of(choices: list[tuple[str, str]], value: str | None) -> str | None:
    """What was chosen, if it is still there, or else the first of the choices (label, value)."""
    values = [found for _, found in choices]
    return value if value in values else next(iter(values), None)
