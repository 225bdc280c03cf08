"""The page in headless Chromium; skipped where there is none. `pip install comad[browser]` and a Chromium bring it."""

import shutil

import pytest

from comad.report.page import write_report

from .conftest import write_run

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    with playwright.sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("no Chromium")
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, run, comparison, tmp_path):
    """Open the page in a window of some width; ``asked`` is all that it said on the console and wanted to load."""
    path = write_report([run, run, comparison], tmp_path / "page.html")

    def open_page(width, scheme="light", **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        asked = []
        page.on("console", lambda message: asked.append(message.text))
        page.on("pageerror", lambda error: asked.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith(("file:", "data:")) else asked.append(request.url)
        )
        page.goto(path.as_uri())
        page.wait_for_selector("canvas")
        return page, asked

    return open_page


@pytest.mark.parametrize("width", [400, 1600])
def test_it_renders_and_fits(opened, width):
    page, asked = opened(width)
    assert not asked
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for summary in page.locator("summary", has_text="More curves").all():
        summary.click()
    page.wait_for_function("document.querySelectorAll('canvas').length == document.querySelectorAll('.plot').length")
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width and not asked


def test_pointing_at_a_curve_reads_its_value(opened):
    page, _ = opened(1200)
    plot = page.locator("#run0-chart0")
    assert plot.locator(".u-value").all_inner_texts() == ["30", "0.03333", "0.02333"]
    plot.locator(".u-over").hover(position={"x": 1, "y": 50})
    assert plot.locator(".u-value").all_inner_texts() == ["1", "1", "0.7"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(opened, scheme):
    page, _ = opened(1200, scheme, bypass_csp=True)
    found = axe.Axe().run(page)
    assert not found.response["violations"], found.generate_report()


def test_hostile_names_run_nothing(browser, tmp_path):
    name = "</script><script>document.title='no'</script><img src=x onerror=\"document.title='no'\">"
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(write_report([write_run(tmp_path, names=(name, "b"), classes=(name, "x"), licence=name)]).as_uri())
    page.wait_for_selector("canvas")
    assert page.title() == f"Distilled from {name} and b" and not errors
    assert page.locator(".board th", has_text="document.title").inner_text() == name


def test_it_prints(opened):
    page, asked = opened(1200, "dark")
    assert page.pdf(format="A4").startswith(b"%PDF") and not asked
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    background = "getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()"
    assert page.evaluate(background) == "#1b1f24"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(background) == "#e8eaed"
