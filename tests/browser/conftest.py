"""One JupyterLab and one Chromium for all browser tests; a page with a notebook for each. Pictures are kept in `.workbench/browser`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import leaks
import pytest
from playwright.sync_api import Browser, sync_playwright

from browser.lab import PICTURES, Lab, Notebook, start_browser


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """As for every test, but the browser's helpers come and go as it likes; that it ends them is held over the session."""
    before = leaks.Belongings.now()
    yield
    left = [what for what in leaks.left_since(before) if "/chromium" not in what]
    assert not left, "left behind: " + "; ".join(left)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = start_browser(playwright)
        page = browser.new_page()  # what Chromium starts with its first page stays until its end
        page.goto("about:blank")
        yield browser
        browser.close()


@pytest.fixture
def open_notebook(lab: Lab, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Notebook]]:
    """Open a notebook by its name; after the test its page is pictured, what the page complained of is told, and its kernel ends."""
    context = browser.new_context(viewport={"width": 1280, "height": 1400})
    context.set_default_timeout(20_000)
    complaints: list[str] = []

    def hear(text: str) -> None:
        if "Canceled future" not in text:  # what JupyterLab says of its own requests when a kernel restarts
            complaints.append(text)

    def open_it(name: str) -> Notebook:
        page = context.new_page()
        page.on("pageerror", lambda error: hear(str(error)))
        page.on("console", lambda message: hear(message.text) if message.type == "error" else None)
        return Notebook(page, lab.url(name))

    yield open_it
    heard = list(complaints)  # what pages say while their kernels are taken from them is no complaint
    for page in context.pages:
        page.screenshot(path=PICTURES / f"{request.node.name}.png")
        page.evaluate("() => window.jupyterapp?.serviceManager.sessions.shutdownAll()")
    context.close()
    assert not heard, f"the page complained: {heard}"
