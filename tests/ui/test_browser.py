"""The page in a headless Chromium: a click on a patch changes the picture and the explanation, and nothing is fetched from elsewhere."""

import os
import re
import shutil

import pytest

from vtr.ui.serve import served

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(session):
    with served(session, ["fastv", "visionzip"], 64) as address:
        yield address


@pytest.fixture
def page(request, address):
    """The page at some width, with every request to elsewhere and every error of the console noted."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as library:
        browser = library.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": request.param, "height": 900})
        page.set_default_timeout(120_000)
        page.foreign, page.errors = [], []
        page.on("request", lambda one: page.foreign.append(one.url) if re.match(r"(http|ws)s?://(?!127\.0\.0\.1)", one.url) else None)
        page.on("console", lambda one: page.errors.append(one.text) if one.type == "error" else None)
        page.goto(address)
        yield page
        browser.close()


@pytest.mark.parametrize("page", [1440, 800], indirect=True)
def test_a_click_on_a_patch_changes_picture_and_explanation(page, tmp_path):
    page.locator(".thumbnail-item").nth(2).click()
    page.get_by_text("384 x 384 pixels, 576 visual tokens").wait_for()
    page.get_by_role("button", name="Compare").click()
    picture, told = page.locator("#vtr-picture img"), page.locator("#vtr-explanation")
    picture.wait_for()
    page.wait_for_function("document.querySelector('#vtr-picture img').naturalWidth == 720")
    assert "Click a patch" in told.inner_text()
    page.get_by_role("radio", name="visionzip").click()
    page.get_by_text("1. boundary before the projector: merges tokens, 64 left").wait_for()
    assert "Click a patch" in told.inner_text(), "no token is asked about before a click"
    page.get_by_role("radio", name="fastv").click()
    page.get_by_text("1. LLM layer 2: removes tokens, 64 left").wait_for()
    before = picture.get_attribute("src")
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] * 0.5, "y": box["height"] * 0.02})  # the first row, in the middle
    page.get_by_text("is row 1, column 13").wait_for()
    assert picture.get_attribute("src") != before and "At LLM layer 2: rank" in told.inner_text()
    assert page.get_by_label("token", exact=True).input_value() == "12"

    page.get_by_role("button", name="Give it back").click()
    page.get_by_text("With token 12 back, 65 tokens left, the answer").wait_for()
    marked = picture.get_attribute("src")
    page.get_by_text("before any step").click()
    page.wait_for_function("old => document.querySelector('#vtr-picture img').src != old", arg=marked)
    page.get_by_role("radio", name="visionzip").click()
    page.get_by_text("At the boundary before the projector").wait_for()
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    widest = page.evaluate("Math.max(...[...document.querySelectorAll('.gradio-container *')].map(e => e.getBoundingClientRect().right))")
    assert widest <= page.viewport_size["width"], "nothing sticks out at the side"
    assert not page.foreign and not page.errors
