# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The page, in a browser whose microphone hears a recording."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from serving import open_model, running
from ttt_omni.serving.server import Limits


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUESTION = Path(__file__).parent.parent / "examples" / "question.wav"
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream"]
ALLOWED = ["--use-fake-ui-for-media-stream", f"--use-file-for-fake-audio-capture={QUESTION}"]
PHONE = {"width": 390, "height": 844}
TIMEOUT = 60_000  # ms

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Playwright's event loop
]


@pytest.fixture(scope="module")
def parts(tiny_model_dir):
    return open_model(tiny_model_dir)


@pytest.fixture
def address(parts, tmp_path):
    with running(*parts, tmp_path, Limits(new_tokens=48)) as (address, _):
        yield f"http://{address}"


@pytest.fixture
def chromium():
    """Opens a browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:

        def launch(*flags, bypass_csp=True):  # which `wait_for_function` needs
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])
            context = browser.new_context(viewport=PHONE, bypass_csp=bypass_csp)
            context.set_default_timeout(TIMEOUT)
            return context

        yield launch


def visit(context, address):
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    wait_for(page, "ready")
    return page, errors


def wait_for(page, *states):
    page.wait_for_selector(", ".join(f"body[data-state={state}]" for state in states))


def hold(page, milliseconds):
    box = page.locator("#talk").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    wait_for(page, "listening")
    page.wait_for_timeout(milliseconds)
    page.mouse.up()


def tokens(page):
    return int(page.locator("#numbers b").nth(1).inner_text().replace(",", ""))


def answered(page, more_than):
    page.wait_for_function("!answering")
    page.wait_for_function(f"+document.querySelectorAll('#numbers b')[1].textContent.replace(/,/g, '') > {more_than}")


def test_speaks_hears_interrupts_and_resumes(chromium, address):
    page, errors = visit(chromium(*ALLOWED), address)
    assert tokens(page) == 0 and page.locator("#download").is_disabled()
    hold(page, 1500)
    wait_for(page, "speaking")
    answered(page, 300)
    samples, peak = page.evaluate("[heard.samples, heard.peak]")
    assert samples > 2400 and peak > 0.01
    assert page.locator("#log li.you").inner_text().startswith("(spoken, 1.")
    answer = page.locator("#log li.model").inner_text()
    assert answer
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/page.png")

    page.fill("#typed", "And what else?")
    page.press("#typed", "Enter")
    wait_for(page, "speaking")
    answered(page, tokens(page))
    page.wait_for_function("player.milliseconds() > 100")
    before = tokens(page)
    page.click("#stop")
    page.wait_for_function(f"+document.querySelectorAll('#numbers b')[1].textContent.replace(/,/g, '') < {before}")
    assert "cut" in page.locator("#log li.model").nth(1).get_attribute("class")
    assert not page.evaluate("player.busy()")

    left, said = tokens(page), page.locator("#log li").all_inner_texts()
    page.reload()
    wait_for(page, "ready")
    page.wait_for_function("document.querySelectorAll('#numbers b').length")
    assert tokens(page) == left and page.locator("#log li").all_inner_texts() == said
    hold(page, 1000)
    answered(page, left)

    with page.expect_download() as download:
        page.click("#download")
    last = tokens(page)
    page.click("#fresh")
    page.wait_for_function("document.querySelectorAll('#numbers b')[1]?.textContent === '0'")
    page.locator("#file").set_input_files(download.value.path())
    answered(page, last - 1)
    assert tokens(page) == last and errors == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # on a phone


def test_open_microphone(chromium, address, tmp_path):
    """Someone who speaks and pauses is answered, and cuts the answer off when he speaks again; under its policy."""
    speech, rate = soundfile.read(QUESTION)
    soundfile.write(tmp_path / "paused.wav", np.concatenate([speech, np.zeros(2 * rate)]), rate)
    flags = [flag.replace(str(QUESTION), str(tmp_path / "paused.wav")) for flag in ALLOWED]
    page, errors = visit(chromium(*flags, bypass_csp=False), address)
    page.click("#open")
    page.locator("#log li.model").nth(1).wait_for()
    page.locator("#log li.cut").first.wait_for()
    page.click("#open")
    assert page.evaluate("heard.peak") > 0.01 and errors == []


def test_without_microphone(chromium, address):
    """It says so, and one can type."""
    page, errors = visit(chromium("--deny-permission-prompts"), address)
    page.click("#open")
    page.wait_for_selector("#notice:visible")
    assert "No microphone is allowed" in page.locator("#notice").inner_text()
    page.fill("#typed", "Hello.")
    page.click("#send")
    answered(page, 0)
    assert page.locator("#log li.model").inner_text() and errors == []


def test_key(chromium, parts, tmp_path):
    with running(*parts, tmp_path, Limits(new_tokens=8), api_keys=("secret",)) as (address, _):
        page = chromium(*ALLOWED).new_page()
        page.goto(f"http://{address}")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        wait_for(page, "ready")
        page.fill("#typed", "Hello.")
        page.press("#typed", "Enter")
        answered(page, 0)
