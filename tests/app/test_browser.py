"""A person's way through the app in a real browser: overview, concept, name, pair, bench, ablation, reload."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlsplit

import pytest

pytest.importorskip("playwright")
pytest.importorskip("uvicorn")
pytest.importorskip("axe_playwright_python")

import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright

from rmscope.app.library import Library
from rmscope.app.server import create_app
from rmscope.run.run import Run
from tests.docs.pages import ROOT

CHROMIUM = shutil.which("chromium")
SCREENSHOTS = ROOT / "artifacts" / "screenshots"
"""Pages as they look at two widths, light and dark; not part of the project."""
expect.set_options(timeout=60_000)  # two test processes share the cores
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture
def address(app_run: Path) -> Iterator[str]:
    (app_run / "labels.sqlite").unlink(missing_ok=True)
    shutil.rmtree(app_run / "evidence" / "experiments", ignore_errors=True)
    config = uvicorn.Config(create_app(Library(app_run)), port=0, log_level="warning")  # type: ignore[arg-type]
    server, listening = uvicorn.Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    (app_run / "labels.sqlite").unlink(missing_ok=True)


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a browser that reports every console message and every request that leaves loopback."""
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 900})
        page.set_default_timeout(120_000)
        faults: list[str] = []
        page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: None if urlsplit(r.url).hostname == "127.0.0.1" else faults.append(r.url))
        yield page
        assert faults == []
        browser.close()


def settled(page: Page) -> None:
    """Waits until htmx has taken over what it put into the page: a click before that is an event that nobody hears."""
    page.wait_for_load_state()
    expect(page.locator(".htmx-request, .htmx-swapping, .htmx-settling, .htmx-added")).to_have_count(0)


def test_from_the_overview_to_a_named_concept_and_the_bench(page: Page, address: str) -> None:
    page.goto(address)
    rows = page.locator("a.row")
    listed = rows.count()
    assert listed > 3

    settled(page)
    page.get_by_label("Search").fill("nobody wrote this")
    expect(page.get_by_text("No concept matches")).to_be_visible()
    page.get_by_label("Search").fill("")
    expect(rows).to_have_count(listed)

    rows.first.click()
    expect(page.locator("article.example").first).to_be_visible()
    page.get_by_text("Name, star, note").click()
    page.get_by_label("Name", exact=True).fill("<b>flattery</b>")
    page.get_by_label("star").check()
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("★ <b>flattery</b>")
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("★ <b>flattery</b>")

    page.locator(".members th a").first.click()
    expect(page.get_by_role("heading", name="Where it fires")).to_be_visible()
    settled(page)
    page.locator("article.context button").first.click()
    expect(page.locator(".causes .peak").first).to_be_visible()
    page.get_by_role("button", name="Show the pairs that move most of all").click()
    page.get_by_label("the effect on the reward of ablating one token alone").check()
    expect(page.locator(".by-effect").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    before = page.url
    page.get_by_role("heading", level=1).click()  # the arrow keys of a field are the field's own
    page.keyboard.press("ArrowRight")
    page.wait_for_url(lambda url: url != before)
    page.keyboard.press("ArrowLeft")
    page.wait_for_url(before)
    page.get_by_text("One of the features of the concept").get_by_role("link").click()
    page.get_by_role("link", name="The whole pair").first.click()
    page.get_by_role("button", name="Run the model").click()
    expect(page.locator(".effects input[type=checkbox]").first).to_be_visible()
    assert page.locator(".strip").first.locator("mark").count() > 1
    settled(page)
    page.locator(".effects input[type=checkbox]").first.check()
    expect(page.locator("#joint")).to_contain_text("The preference")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("link", name="Try this pair on the bench").click()
    expect(page.get_by_label("Completion A")).not_to_have_value("")
    page.get_by_role("link", name="Pairs", exact=True).click()
    page.get_by_label("Search").fill("nobody wrote this")
    expect(page.get_by_text("No pair matches")).to_be_visible()
    page.get_by_role("link", name="Bench", exact=True).click()
    expect(page.get_by_role("status").first).to_contain_text("ready")
    page.get_by_label("Prompt").fill("What is the capital\nof France?")
    page.get_by_label("Completion A").fill("It is Paris, on the Seine.\n\nThanks for asking!")
    page.get_by_label("Completion B").fill("I don't know.")
    page.get_by_role("button", name="Add a completion").click()
    page.get_by_label("Completion C").fill("You're right, there is no problem at all.")
    page.get_by_role("button", name="Measure").click()
    expect(page.locator(".strip")).to_have_count(3)
    assert page.locator(".strip").first.locator("mark").count() > 5
    expect(page.locator(".effects").get_by_text("<b>flattery</b>").first).to_be_visible()

    boxes = page.locator(".effects input[type=checkbox]")
    settled(page)
    boxes.nth(0).check()
    boxes.nth(1).check()
    expect(page.locator("#joint")).to_contain_text("Without")
    expect(page.locator("#joint")).to_contain_text(" and ")
    expect(page.locator("#joint dd")).to_have_count(3)
    page.locator(".strength input").first.fill("1")
    expect(page.locator(".strength output").first).to_have_text("1, as it is")
    expect(page.locator("#joint")).to_contain_text("as it is")
    page.get_by_text("Save as an experiment").click()
    page.get_by_label("Name", exact=True).fill("typed-here")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".saved-as")).to_contain_text("rmscope experiment")
    boxes.nth(0).uncheck()
    boxes.nth(1).uncheck()
    expect(page.locator("#joint")).to_contain_text("Nothing is ticked")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_and_fits_in_both_widths_and_schemes(
    page: Page, address: str, app_run: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    run = Run.open(app_run)
    site, pair = run.sites[0], run.scores["pair"][0]
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    home = f"{address}/r/small-run"
    feature = run.features(site)["feature"][0]
    pages = {
        "overview": home,
        "concept": f"{home}/concepts/{run.concepts['concept'][0]}",
        "features": f"{home}/features",
        "feature": f"{home}/features/{site}/{feature}?panes=1",
        "pairs": f"{home}/pairs",
        "pair": f"{home}/pair/{quote(pair, safe='')}",
        "bench": f"{home}/bench",
        "glossary": f"{home}/glossary",
    }
    for name, where in pages.items():
        page.goto(where)
        if name == "pair":
            page.get_by_role("button", name="Run the model").click()
            expect(page.locator(".strip mark").first).to_be_visible()
        if name == "bench":
            page.get_by_role("button", name="Measure").click()
            expect(page.locator(".strip")).to_have_count(2)
            settled(page)
            page.locator(".effects input[type=checkbox]").first.check()
            expect(page.locator("#joint dd").first).to_be_visible()
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", full_page=True)
        found = [v for v in Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")]
        told = [(v["id"], [node["html"][:120] for node in v["nodes"][:3]]) for v in found]
        assert told == [], name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
