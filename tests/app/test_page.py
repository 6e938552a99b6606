"""The page in a browser: transfers, settings that are moved, structures taken back, two at once, hostile uploads."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import need_browser, opened_browser, served

need_browser()

from playwright.sync_api import Page, expect  # noqa: E402

NAME = "stage1_epoch4.pt"


@pytest.fixture(scope="module")
def folder(studio, tmp_path_factory) -> Path:
    """A folder of this file's own, in which a user has trained."""
    return shutil.copytree(studio, tmp_path_factory.mktemp("app") / "studio")


@pytest.fixture(scope="module")
def address(folder):
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with opened_browser() as browser:
        yield browser


@pytest.fixture
def page(browser, address) -> Page:
    """A tab of the browser, with the page in it and its checkpoint settled."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB", accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(30_000)
    open_page(page, address)
    yield page
    context.close()


def open_page(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.get_by_label("Style to give it")).to_have_value("warm", timeout=30_000)


def drop(page: Page, path: Path) -> None:
    page.locator("#picture input[type=file]").set_input_files(path)


def transfer(page: Page, picture: Path) -> str:
    """Drop a picture, press the button; returns what the page says was done."""
    drop(page, picture)
    expect(page.get_by_text("Guessed style")).to_be_visible(timeout=30_000)
    page.get_by_role("button", name="Transfer", exact=True).click()
    expect(report(page)).to_have_value(re.compile("certificate"), timeout=30_000)
    return report(page).input_value()


def report(page: Page):
    return page.locator("#report textarea")


def shown(page: Page, number: int) -> np.ndarray:
    """The pixels of the slider's picture: 0 before, 1 after."""
    address = page.locator("#slider img").nth(number).get_attribute("src")
    return fetch(page, address)


def fetch(page: Page, address: str) -> np.ndarray:
    import io

    return np.asarray(Image.open(io.BytesIO(page.request.get(address).body()))).astype(int)


def test_a_picture_is_transferred_and_taken_back_to_equal_pixels(page, folder, tmp_path):
    said = transfer(page, folder / "raw_data/warm/003.png")
    expect(page.get_by_text("Guessed style")).to_contain_text("warm")
    assert re.search(r"certificate: exact \(0 of 768 elements differ\).* sha256 [0-9a-f]{64}$", said)
    before = shown(page, 0)
    with page.expect_download() as download:
        page.locator("#files a").nth(1).click()
    download.value.save_as(tmp_path / "kept.safetensors")
    page.get_by_text("From a structure file: on").click()
    page.locator("#structure input[type=file]").set_input_files(tmp_path / "kept.safetensors")
    page.get_by_role("button", name="Back to the picture").click()
    expect(page.locator("#kept_report textarea")).to_have_value(re.compile("exact"), timeout=30_000)
    back = fetch(page, page.locator("#kept img").get_attribute("src"))
    assert back.shape == (32, 32, 3) and np.array_equal(back, before)
