"""The page in a real browser: app.py as a command, and the system's Chromium, which playwright drives."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers import Command

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--no-first-run")
SECONDS = 60  # that anything may take on a busy machine


def need_browser() -> None:
    """Skip, by name, what is missing here; .ci/run installs it."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements/app.txt")
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -r requirements/dev.txt")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: make browser", allow_module_level=True)


@contextmanager
def served(folder: Path, *flags: str | Path) -> Iterator[str]:
    """app.py at work in `folder`, as a user would start it; yields its address."""
    server = Command(folder, "app.py", "--device", "cpu", *flags)
    try:
        end = time.monotonic() + 3 * SECONDS
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", server.stdout)):
            assert server.process.poll() is None and time.monotonic() < end, server.stdout + server.stderr
            time.sleep(0.05)
        yield found[0]
    finally:
        server.process.send_signal(2)
        server.finish(SECONDS)


@contextmanager
def opened_browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()
