"""The page in a browser: transfers, settings that are moved, structures taken back, two at once, hostile uploads."""

import io
import re
import shutil
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from browser import SECONDS, need_browser, opened_browser, served
from helpers import ROOT

need_browser()

from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402
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
    expect.set_options(timeout=1000 * SECONDS)
    with opened_browser() as browser:
        yield browser


@pytest.fixture
def page(browser, address) -> Page:
    """A tab of the browser, with the page in it and its checkpoint settled."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB", accept_downloads=True)
    page = context.new_page()
    open_page(page, address)
    yield page
    context.close()


def open_page(page: Page, address: str, settled: bool = True) -> None:
    page.goto(address)
    if settled:
        expect(page.get_by_label("Style to give it")).to_have_value("warm")


def drop(page: Page, path: Path) -> None:
    page.locator("#picture input[type=file]").set_input_files(path)


def transfer(page: Page, picture: Path) -> str:
    """Drop a picture, press the button; returns what the page says was done."""
    drop(page, picture)
    expect(page.get_by_text("Guessed style")).to_be_visible(timeout=30_000)
    page.get_by_role("button", name="Transfer", exact=True).click()
    expect(report(page)).to_have_value(re.compile("certificate"))
    return report(page).input_value()


def report(page: Page):
    return page.locator("#report textarea")


def shown(page: Page, number: int) -> np.ndarray:
    """The pixels of the slider's picture: 0 before, 1 after."""
    address = page.locator("#slider img").nth(number).get_attribute("src")
    return fetch(page, address)


def fetch(page: Page, address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.request.get(address).body()))).astype(int)


def wait_until(page: Page, condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        page.wait_for_timeout(50)


#################################################################################
#                                   Transfers                                   #
#################################################################################


def test_a_picture_is_transferred_and_taken_back_to_equal_pixels(page, folder, tmp_path):
    said = transfer(page, folder / "raw_data/warm/003.png")
    expect(page.get_by_text("Guessed style")).to_contain_text("warm")
    expect(page.get_by_label("Style of the picture")).to_have_value("warm")
    expect(page.get_by_label("Style to give it")).to_have_value("cold")  # not the one that it has already
    assert re.search(r"certificate: exact \(0 of 768 elements differ\).* sha256 [0-9a-f]{64}$", said)
    before = shown(page, 0)
    with page.expect_download() as download:
        page.locator("#files a").nth(1).click()
    download.value.save_as(tmp_path / "kept.safetensors")
    page.get_by_text("From a structure file: on").click()
    page.locator("#structure input[type=file]").set_input_files(tmp_path / "kept.safetensors")
    page.get_by_role("button", name="Back to the picture").click()
    expect(page.locator("#kept_report textarea")).to_have_value(re.compile("exact"))
    back = fetch(page, page.locator("#kept img").get_attribute("src"))
    assert back.shape == (32, 32, 3) and np.array_equal(back, before)
    page.get_by_role("button", name="To the style above").click()
    expect(page.locator("#kept_report textarea")).to_have_value(re.compile("with the defects"))
    onward = fetch(page, page.locator("#kept img").get_attribute("src"))
    assert np.array_equal(onward, shown(page, 1))


def test_a_setting_that_is_moved_is_followed_without_a_second_inversion(page, folder):
    said = transfer(page, folder / "raw_data/cold/005.png")
    first = shown(page, 1)
    evaluations = int(said.partition(" ")[0])
    handle = page.locator("#scale input[type=range]")
    handle.focus()
    for _ in range(3):
        handle.press("ArrowRight")  # by the keyboard, as by the hand
    assert page.locator("#scale input[type=number]").input_value() == "1.8"
    expect(report(page)).not_to_have_value(said)
    moved = int(report(page).input_value().partition(" ")[0])
    assert moved <= evaluations - 20, "20 steps backwards were not run again"
    assert not np.array_equal(shown(page, 1), first)


def test_all_styles_come_as_a_gallery(page, folder):
    drop(page, folder / "raw_data/cold/001.png")
    expect(page.get_by_text("Guessed style")).to_contain_text("cold")
    page.get_by_role("button", name="All styles").click()
    expect(page.locator("#gallery .caption-label")).to_have_text(["cold", "warm"])
    expect(report(page)).to_have_value(re.compile(r"exact \(0 of 1536 elements"))


def test_two_tabs_at_once_wait_in_line_and_each_gets_its_own(page, browser, address, folder, tmp_path):
    other = browser.new_context(locale="en-GB").new_page()
    open_page(other, address)
    large = tmp_path / "large.png"
    Image.open(folder / "raw_data/cold/006.png").resize((256, 256)).save(large)
    pictures = {page: large, other: folder / "raw_data/warm/006.png"}
    for tab, picture in pictures.items():
        drop(tab, picture)
        expect(tab.get_by_text("Guessed style")).to_be_visible()
    page.get_by_text("More settings").first.click()
    page.get_by_label("Steps a leg").first.fill("150")
    for tab in pictures:
        tab.get_by_role("button", name="Transfer", exact=True).click()
    expect(other.get_by_text("queue: 1/1").first).to_be_visible()
    for tab, picture in pictures.items():
        expect(report(tab)).to_have_value(re.compile("certificate: exact"))
        gap = np.abs(shown(tab, 0) - np.asarray(Image.open(picture)).astype(int)).mean()
        assert gap < 20, "the picture that was dropped in this tab, but for what the codec loses"
    other.context.close()


def test_a_bad_picture_is_a_sentence_and_the_page_goes_on(page, folder, tmp_path):
    (tmp_path / "cat.png").write_bytes(b"no picture at all")
    drop(page, tmp_path / "cat.png")
    said = page.get_by_text(re.compile("^cat.png: not a picture$"))  # and no place on the server
    expect(said).to_have_count(1)
    page.get_by_role("button", name="Transfer", exact=True).click()
    expect(said).to_have_count(2)
    page.locator("#picture").get_by_label("Remove Image").click()
    transfer(page, folder / "raw_data/cold/002.png")


def test_a_checkpoint_that_is_deleted_while_listed_is_a_sentence(page, folder):
    spare = folder / "checkpoints/spare"
    shutil.copytree(folder / "checkpoints", spare, ignore=shutil.ignore_patterns("spare", "tensorboard"))
    page.get_by_role("button", name="Look again").click()
    page.locator("#checkpoint input").click()
    page.get_by_role("option", name="spare/stage1_epoch4.pt").click()
    shutil.rmtree(spare)
    drop(page, folder / "raw_data/cold/002.png")
    expect(page.get_by_text("spare/stage1_epoch4.pt: no such checkpoint here, or no longer").first).to_be_visible()


#################################################################################
#                              Samples and training                             #
#################################################################################


def test_samples_come_as_a_grid_and_one_by_one(page):
    page.get_by_role("tab", name="Sample").click()
    page.locator("#count input[type=number]").fill("2")
    page.locator("#generate").click()
    expect(page.locator("#singles .caption-label")).to_have_text(["cold", "cold", "warm", "warm"])
    assert fetch(page, page.locator("#grid img").get_attribute("src")).shape[0] == 3 * 6 + 2 * 32


@pytest.mark.slow
def test_training_is_started_stopped_and_gone_on_with_and_survives_the_page(page, browser, address, folder):
    run = folder / "checkpoints" / "pets"
    shutil.copytree(folder / "raw_data", folder / "raw_data" / "pets")  # a data set below the root
    page.get_by_role("tab", name="Train").click()
    choose(page, "#folder", "raw_data/pets")
    page.locator("#epochs input").fill("100000")
    page.locator("#epochs input").press("Tab")
    expect(page.locator("#commands textarea")).to_have_value(re.compile("stage1_epochs=100000"))
    page.get_by_role("button", name="Look at the folder").click()
    expect(page.locator("#found textarea")).to_have_value(re.compile("style 0 cold: 16 pictures\n"))
    page.get_by_role("button", name="Start, or go on").click()
    expect(page.locator("#status")).to_contain_text("pets: training, step")
    page.close()  # the training goes on without it

    other = browser.new_context(locale="en-GB").new_page()
    open_page(other, address, settled=False)
    other.get_by_role("tab", name="Train").click()
    choose(other, "#run", "pets")
    expect(other.locator("#status")).to_contain_text("of 100000")
    expect(other.locator("#losses svg").first).to_be_visible()
    expect(other.locator("#figures table")).to_contain_text("SSIM")
    expect(other.locator("#previews img").first).to_be_visible()
    other.get_by_role("tab", name="Transfer").click()
    drop(other, folder / "raw_data/cold/002.png")
    expect(other.get_by_text("pets: is being trained and has the device").first).to_be_visible()
    other.get_by_role("tab", name="Train").click()
    other.get_by_role("button", name="Stop").click()
    expect(other.locator("#status")).to_contain_text("pets: not under way")
    assert (run / "stage1_interrupted.pt").exists()
    expect(other.locator("#log textarea")).to_have_value(re.compile("go on with --resume"))
    other.get_by_role("tab", name="Transfer").click()  # which could not be settled while the training had the device
    expect(other.get_by_label("Style to give it")).to_have_value("warm")
    other.get_by_role("tab", name="Train").click()
    stopped = len((run / "metrics.jsonl").read_text().splitlines())

    choose(other, "#folder", "raw_data/pets")
    other.locator("#epochs input").fill("100000")
    other.locator("#epochs input").press("Tab")
    expect(other.locator("#commands textarea")).to_have_value(re.compile("--resume"))
    other.get_by_role("button", name="Start, or go on").click()
    wait_until(other, lambda: len((run / "metrics.jsonl").read_text().splitlines()) > stopped)
    other.get_by_role("button", name="Stop").click()
    expect(other.locator("#status")).to_contain_text("pets: not under way")
    other.context.close()


def choose(page: Page, field: str, name: str) -> None:
    page.locator(f"{field} input").click()
    page.get_by_role("option", name=name, exact=True).click()


#################################################################################
#                        What a browser may not do, and looks                   #
#################################################################################


def test_the_http_api_does_the_same_and_takes_nothing_that_is_not_listed(address, folder, tmp_path):
    client = Client(address, verbose=False, download_files=str(tmp_path))
    picture = handle_file(folder / "raw_data/cold/003.png")
    pair, said, files = client.predict(NAME, picture, "cold", "warm", steps=3, api_name="/transfer")
    assert "certificate: exact" in said and [Path(file).name for file in files] == ["003_warm.png", "003.safetensors"]
    onward, line, _ = client.predict(NAME, handle_file(files[1]), "warm", scale=1.5, api_name="/restyle")
    assert line.startswith("certificate: exact") and Path(onward).exists()
    gallery, line = client.predict(NAME, picture, "cold", steps=3, api_name="/all_styles")
    assert [entry["caption"] for entry in gallery] == ["cold", "warm"] and "1536 elements" in line
    _, samples = client.predict(NAME, ["warm"], 2, 7, steps=2, api_name="/sample")
    assert [entry["caption"] for entry in samples] == ["warm", "warm"]
    back, line, _ = client.predict(NAME, handle_file(files[1]), api_name="/restore")
    assert line.startswith("certificate: exact")
    assert np.array_equal(np.asarray(Image.open(back)), np.asarray(Image.open(pair[0])))
    for change, words in (
        ({"checkpoint": "../../etc/passwd"}, "no such checkpoint here"),
        ({"checkpoint": str(folder / "checkpoints" / NAME)}, "no such checkpoint here"),
        ({"source": "<img src=x onerror=alert(1)>"}, "&lt;img"),
        ({"steps": 10**9}, "greater than maximum value 200"),
        ({"strength": 1.5}, "greater than maximum value 1"),
        ({"method": "rm -rf"}, "not in the list of choices"),
    ):
        values = {"checkpoint": NAME, "picture": picture, "source": "cold", "target": "warm"} | change
        with pytest.raises(AppError, match=re.escape(words)):
            client.predict(**values, api_name="/transfer")
    names = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    assert names == {"/transfer", "/all_styles", "/restyle", "/restore", "/sample"}


def test_the_example_of_the_docs_runs(address, folder, monkeypatch, tmp_path):
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs/app.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    here = {"http://127.0.0.1:7860": address, "stage1_epoch200.pt": NAME, "photo": "cold", "painting": "warm"}
    here["cat.jpg"] = (folder / "raw_data/cold/003.png").as_posix()
    for written, value in here.items():
        assert written in block
        block = block.replace(written, value)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    found: dict = {}
    exec(block, found)
    assert "certificate: exact" in found["report"] and len(found["pair"]) == 2 and len(found["files"]) == 2


def call_raw(page: Page, address: str, picture: object) -> str:
    """What the API says to a request that no client of gradio's would send."""
    data = [NAME, picture, "cold", "warm", 1, 2, False, "alf", 3, 0, 0, True, False]
    called = page.request.post(f"{address}/gradio_api/call/transfer", data={"data": data}).json()
    return page.request.get(f"{address}/gradio_api/call/transfer/{called['event_id']}").text()


def test_a_file_of_the_server_or_an_address_is_no_picture(page, address, folder):
    inside = str(folder / "raw_data/cold/003.png")  # in the working directory of the server, and a picture
    for path in (inside, "/etc/passwd", "raw_data/cold/003.png", "http://127.0.0.1:1/a.png", f"file://{inside}"):
        for picture in ({"path": path}, {"path": path, "url": path}, path):
            meta = {"meta": {"_type": "gradio.FileData"}} if isinstance(picture, dict) else {}
            answer = call_raw(page, address, picture | meta if meta else picture)
            assert answer.startswith("event: error") and "certificate" not in answer, picture
            assert not path.startswith("http") or isinstance(picture, str) or "send a file, not an address" in answer, (
                picture
            )
    assert page.request.post(f"{address}/gradio_api/run/transfer", data={"data": []}).status == 404


def test_files_of_the_server_are_not_served_and_large_ones_not_taken(page, address, folder):
    inside = folder / "checkpoints" / NAME
    for path in (
        "/etc/passwd",
        "..%2F..%2F..%2Fetc%2Fpasswd",
        inside,
        "%2Fetc%2Fpasswd",
        "https://example.org/",
        "app.py",
    ):
        assert page.request.get(f"{address}/gradio_api/file={path}").status == 403, path
    assert page.request.get(f"{address}/gradio_api/proxy=https://example.org/").status == 403
    connection = HTTPConnection(urlsplit(address).netloc, timeout=SECONDS)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("content-length", str(65 * 2**20))
    connection.endheaders()
    assert connection.getresponse().status == 413


def test_nothing_is_fetched_from_elsewhere_and_nothing_goes_wrong_in_the_browser(browser, address):
    page, hosts, errors = browser.new_page(locale="en-GB"), set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    open_page(page, address)
    assert hosts - {""} == {urlsplit(address).netloc} and errors == []
    page.close()


def test_a_telephone_has_no_sideways_scrolling_and_chinese_is_chinese(browser, address, folder):
    page = browser.new_page(viewport={"width": 360, "height": 740}, locale="zh-CN", has_touch=True)
    page.goto(address)
    expect(page.get_by_label("目标风格")).to_have_value("warm")
    drop(page, folder / "raw_data/cold/004.png")
    expect(page.get_by_text("推测的风格：cold")).to_be_visible()
    page.get_by_role("button", name="转换", exact=True).click()
    expect(report(page)).to_have_value(re.compile("^63 次网络计算"))
    page.locator("#scale input[type=range]").press("ArrowRight")
    expect(report(page)).to_have_value(re.compile("^42 次网络计算"))
    for tab in ("风格转换", "训练", "采样"):
        page.get_by_role("tab", name=tab).click()
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()


def test_dark_is_dark(browser, address):
    shades = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme, locale="en-GB")
        open_page(page, address)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shades.append(sum(map(int, re.findall(r"\d+", colour)[:3])))
        page.close()
    assert shades[0] > 600 and shades[1] < 150


def test_where_there_are_no_runs_and_no_pictures_the_page_says_what_to_do(browser, tmp_path):
    with served(tmp_path) as address:
        page = browser.new_page(locale="en-GB")
        page.goto(address)
        expect(page.locator("#nothing")).to_contain_text("No checkpoint here yet. Train one: open the tab Train")
        page.get_by_role("tab", name="Train").click()
        expect(page.get_by_text("No pictures here yet.")).to_be_visible()
        (tmp_path / "raw_data" / "photo").mkdir(parents=True)
        page.get_by_role("button", name="Look again").click()
        expect(page.get_by_text("No pictures here yet.")).to_be_hidden()
        expect(page.locator("#folder input")).to_have_value("raw_data")
        page.close()
