"""What the server refuses before anything looks at it, and the sentences of the page in two languages."""

import asyncio
import re
import socket

import pytest

from helpers import call_within, refused
from isonext.app import server
from isonext.app.server import MOST_BYTES, Gate
from isonext.app.words import LOCALES, WORDS, say, translations


def ask(path: str, headers: dict[str, str] | None = None, parts: tuple[bytes, ...] = ()) -> tuple[int, int]:
    """The status of a request through the gate, and how many bytes of its body came to the other side."""
    told, taken = [], []

    async def application(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            taken.append(len(message["body"]))
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200 if message["type"] == "http.request" else 499})

    async def send(message):
        told.append(message)

    waiting = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    waiting.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive():
        return waiting.pop(0)

    encoded = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "path": path, "headers": encoded}
    asyncio.run(Gate(application)(scope, receive, send))
    return told[0]["status"], sum(taken)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://169.254.169.254/latest",
        "/gradio_api/file=https://example.org/a.png",
        "/gradio_api/file/HTTPS://example.org/a.png",
        "/gradio_api/file=ftp:/example.org",
        "/gradio_api/proxy=http://127.0.0.1:22",
        "/proxy=x",
        "/file=https://example.org",
    ],
)
def test_no_address_is_fetched_for_a_browser(path):
    assert ask(path)[0] == 403


@pytest.mark.parametrize("path", ["/", "/gradio_api/file=/tmp/a/b.png", "/gradio_api/upload", "/config"])
def test_other_requests_pass(path):
    assert ask(path, parts=(b"abc", b"de")) == (200, 5)


def test_a_body_that_says_it_is_too_large_is_refused_and_one_that_does_not_say_is_cut_off():
    assert ask("/gradio_api/upload", {"content-length": str(MOST_BYTES)})[0] == 200
    assert ask("/gradio_api/upload", {"content-length": str(MOST_BYTES + 1)}) == (413, 0)
    assert ask("/gradio_api/upload", {"content-length": "many"}) == (413, 0)
    block = bytes(2**20)
    status, taken = ask("/gradio_api/upload", parts=(block,) * ((MOST_BYTES >> 20) + 2))
    assert (status, taken) == (499, MOST_BYTES)


def test_bad_flags_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused(call_within(tmp_path, "app", "--port", "70000"), "--port 70000: must be from 1 to 65535")
    refused(call_within(tmp_path, "app", "--runs", "file"), "--runs file: is a file; give a folder")
    refused(call_within(tmp_path, "app", "--pictures", "file"), "--pictures file: is a file; give a folder")


def test_an_address_or_a_device_that_is_not_there_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused(call_within(tmp_path, "app", "--port", port), f"--host 127.0.0.1 --port {port}: cannot be listened at")
    refused(call_within(tmp_path, "app", "--host", "nowhere.invalid"), "--host nowhere.invalid: cannot be listened at")
    refused(call_within(tmp_path, "app", "--device", "abacus"), "--device abacus cannot be used here")


def test_without_gradio_a_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    monkeypatch.setattr(server.os, "environ", dict(server.os.environ))
    refused(call_within(tmp_path, "app"), "gradio is not installed; run pip install -r requirements/app.txt")


def test_every_sentence_has_both_languages_with_the_same_places_for_values():
    for key, (english, chinese) in WORDS.items():
        assert re.findall(r"\{.*?\}", english) == re.findall(r"\{.*?\}", chinese), key
        assert re.search("[一-鿿，]", chinese) and not re.search("[一-鿿]", english), key
    assert set(translations()) == set(LOCALES)


@pytest.mark.parametrize(
    ("accepted", "language"), [("zh-CN,zh;q=0.9,en;q=0.8", 1), ("ZH", 1), ("en-GB,zh;q=0.5", 0), ("", 0), ("fr", 0)]
)
def test_a_sentence_is_in_the_language_that_the_browser_asks_for_first(accepted, language):
    assert say("transfer", {"accept-language": accepted}) == WORDS["transfer"][language]
    assert say("transfer", None) == WORDS["transfer"][0]
