"""The server that shows the page, and what it refuses before anything looks at it."""

import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from isonext.app.options import AppOptions
from isonext.errors import UserError, first_line
from isonext.utils.device import pick_device

MOST_BYTES = 64 * 2**20  # of what a browser sends at once
IN_LINE = 32  # jobs that may wait

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def serve(options: AppOptions) -> int:
    """Show the page until Ctrl-C."""
    for flag, place in (("runs", options.runs), ("pictures", options.pictures)):
        if place.exists() and not place.is_dir():
            raise UserError(f"--{flag} {place}: is a file; give a folder")
    check_address(options.host, options.port)
    pick_device(options.device)
    with tempfile.TemporaryDirectory(prefix="isonext_app_") as folder:
        page = show_page(options, Path(folder))
        page.block_thread()
    return 0


def check_address(host: str, port: int | None) -> None:
    """UserError where nothing can listen there; gradio would try all its ports, and try again."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port or 0), family=family):
            pass
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        where = f"--host {host}" if port is None else f"--host {host} --port {port}"
        raise UserError(f"{where}: cannot be listened at ({reason}); give another") from None


def show_page(options: AppOptions, folder: Path) -> Any:
    """The page, served by a thread of its own: a gradio Blocks. Uploads and results lie in `folder`.

    What gradio reads from the environment is set before it is imported: nothing is sent anywhere.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("gradio is not installed; run pip install -r requirements/app.txt") from None
    from isonext.app.page import build_page, launch

    return launch(build_page(options, folder), options)


class Gate:
    """ASGI middleware: no bodies that are too large, and no requests for other machines' files by way of this one."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if _asks_for_an_address(scope["path"]):
            return await _refuse(send, 403, "not an address that is served here")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MOST_BYTES:
            return await _refuse(send, 413, f"at most {MOST_BYTES >> 20} MiB at once")
        taken = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MOST_BYTES:  # sent in chunks, of which nobody said how many there are
                return {"type": "http.disconnect"}
            return message

        await self.app(scope, counted, send)


def _asks_for_an_address(path: str) -> bool:
    """gradio would fetch `/file=https://...` and `/proxy=...` for whoever asks."""
    name = path.removeprefix("/gradio_api").lstrip("/").lower()
    rest = name.removeprefix("file=").removeprefix("file/").lstrip("/")
    return name.startswith("proxy=") or (rest != name and ":/" in rest.partition("?")[0][:16])


async def _refuse(send: Send, status: int, why: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": why.encode()})
