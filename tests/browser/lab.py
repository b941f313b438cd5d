"""A real JupyterLab on loopback and its notebooks in Debian's Chromium, used as a person uses them: keys, clicks, the toolbar.

    Lab (the server, with folders of its own) -> Notebook (one document in a page) -> cells, outputs, times

Knows JupyterLab and Playwright. Does not know what the notebooks do.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import leaks
import nbformat
import psutil
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, Locator, Page, Playwright

import workbench as wb

PICTURES = Path(__file__).resolve().parent.parent.parent / ".workbench" / "browser"
START_LIMIT_S = 60.0
RUN_ALL_LIMIT_S = 200.0
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CHROMIUM_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-features=SpareRendererForSitePerProcess,OptimizationGuideOnDeviceModel",  # processes that no page asked for
)
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"checkForUpdates": False, "fetchNews": "false"},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # else cells off the screen are not in the page
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}
# From the first event that reaches the page to the first frame with a changed picture within an element, both in the page's own time.
WATCH = """(element) => {
    const times = { began: undefined, changed: undefined }, kinds = ["pointerdown", "pointermove", "keydown", "input", "change", "click"];
    const begin = () => { times.began ??= performance.now(); };
    const isPicture = (node) => Boolean((node.closest ? node : node.parentElement)?.closest("svg"));
    const bringsPicture = (node) => isPicture(node) || Boolean(node.querySelector?.("svg"));
    kinds.forEach((kind) => document.addEventListener(kind, begin, { capture: true }));
    const observer = new MutationObserver((records) => {
        const isChange = (record) => isPicture(record.target) || [...record.addedNodes].some(bringsPicture);
        if (times.began === undefined || !records.some(isChange)) return;
        observer.disconnect();
        kinds.forEach((kind) => document.removeEventListener(kind, begin, { capture: true }));
        requestAnimationFrame(() => { times.changed = performance.now(); });
    });
    observer.observe(element, { subtree: true, attributes: true, childList: true, characterData: true });
    element.wbTimes = times;
}"""
OUTPUTS = "() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells.map((cell) => cell.outputs ?? [])"
HAVE_RUN = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells]
    .every((cell) => cell.type !== "code" || (cell.executionCount && cell.executionState !== "running"))"""
IS_READY = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.connectionStatus === 'connected'"


def chromium() -> str:
    """Where the browser is.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        raise FileNotFoundError(
            "chromium is not installed\n`make test-browser` installs Debian's as root; else ask for: apt-get install chromium"
        )
    return found


def start_browser(playwright: Playwright) -> Browser:
    return playwright.chromium.launch(executable_path=chromium(), headless=True, args=list(CHROMIUM_OPTIONS))


class Lab:
    """A JupyterLab server of its own: its folders, a token, a process group; serves `folder / "notebooks"`."""

    def __init__(self, folder: Path) -> None:
        self.notebooks = folder / "notebooks"
        self._folder = folder
        self._port, self._token = wb.free_port(), secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.notebooks.mkdir(parents=True)
        settings = self._folder / "app_settings"
        settings.mkdir()
        (settings / "overrides.json").write_text(json.dumps(SETTINGS))
        options = [
            "--no-browser",
            *(["--allow-root"] if os.getuid() == 0 else []),
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={self._port}",
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={self._token}",
            f"--ServerApp.root_dir={self.notebooks}",
            "--LabApp.expose_app_in_browser=True",
            "--LabApp.extension_manager=readonly",
            f"--LabApp.app_settings_dir={settings}",
        ]
        with open(self._folder / "server.log", "wb") as log:
            command = [sys.executable, "-m", "jupyterlab", *options]
            self._process = subprocess.Popen(
                command, env=self._environment(), cwd=self.notebooks, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._wait_until_it_answers()

    def _environment(self) -> dict[str, str]:
        """The user's own, with no folder that the user has, and without what ipykernel takes for a test of itself."""
        names = [f"JUPYTER_{kind}_DIR" for kind in ("CONFIG", "DATA", "RUNTIME")]
        names += ["JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR"]
        kept = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        return {**kept, **{name: str(self._folder / name.lower()) for name in names}}

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        limit = time.monotonic() + START_LIMIT_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/api/status?token={self._token}", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
                if self._process.poll() is not None or time.monotonic() > limit:
                    log = (self._folder / "server.log").read_text()[-2000:]
                    raise RuntimeError(f"JupyterLab did not answer within {START_LIMIT_S:.0f} s; its last lines:\n{log}") from error
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(20)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._port}/doc/tree/{name}?token={self._token}&reset"

    def write(self, name: str, cells: Sequence[str]) -> str:
        """Write a notebook of code cells."""
        notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata={"kernelspec": KERNEL})
        nbformat.write(notebook, self.notebooks / name)
        return name

    def kernels(self) -> list[psutil.Process]:
        """The kernels' processes."""
        assert self._process is not None
        children = psutil.Process(self._process.pid).children()
        return [child for child in children if "ipykernel" in leaks.command_of(child)]


class Notebook:
    """One notebook, open in a page with a kernel of its own."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        page.goto(url)
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_function(IS_READY, timeout=60_000)

    def run_all(self) -> None:
        """Run > Run All Cells, to the end: the command itself returns at the first error, also at one that the cell's tag allows."""
        self.page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_function(HAVE_RUN, timeout=RUN_ALL_LIMIT_S * 1000)

    def run(self, index: int) -> None:
        """Run one cell, to its end."""
        self.begin(index)
        self.wait()

    def begin(self, index: int) -> None:
        """Run one cell, and return at once."""
        self.page.evaluate(
            """(index) => {
                const panel = window.jupyterapp.shell.currentWidget;
                panel.content.activeCellIndex = index;
                window.wbDone = window.jupyterapp.commands.execute('notebook:run-cell');
            }""",
            index,
        )

    def wait(self) -> None:
        """Wait for the cell that `begin` began."""
        self.page.evaluate("() => window.wbDone")

    def outputs(self, index: int) -> list[dict[str, Any]]:
        """What a cell has given so far, as nbformat has it."""
        found: list[list[dict[str, Any]]] = self.page.evaluate(OUTPUTS)
        return found[index]

    def text(self, index: int) -> str:
        """What a cell has printed, raised and shown as text."""
        parts = []
        for output in self.outputs(index):
            plain = output.get("data", {}).get("text/plain", "")
            raised = f"{output['ename']}: {output['evalue']}" if output["output_type"] == "error" else ""
            parts += ["".join(output.get("text", "")), "".join(plain), raised]
        return "\n".join(part for part in parts if part)

    def cell(self, index: int) -> Locator:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def press_stop(self) -> None:
        """The toolbar's stop button."""
        self._press("interrupt")

    def restart_kernel(self) -> None:
        """The toolbar's restart button, and yes in the dialog."""
        self._press("restart")
        self.page.locator(".jp-Dialog .jp-mod-accept").click()

    def _press(self, name: str) -> None:
        self.page.locator(f"[data-jp-item-name='{name}'] jp-button, [data-jp-item-name='{name}'] button").first.click()


def milliseconds_until_changed(widget: Locator, act: Callable[[], None]) -> float:
    """Act, and measure from the event's arrival in the page to the first frame in which a picture of the widget is another."""
    element = widget.element_handle()
    element.evaluate(WATCH)
    act()
    widget.page.wait_for_function("(element) => element.wbTimes.changed !== undefined", arg=element, timeout=10_000)
    took: float = element.evaluate("(element) => element.wbTimes.changed - element.wbTimes.began")
    return took
