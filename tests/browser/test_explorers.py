"""Explorers under the hand: every slider, every rank, every menu; the picture follows within a tenth of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from playwright.sync_api import Locator, expect

from browser.lab import Lab, Notebook, milliseconds_until_changed

pytestmark = pytest.mark.browser

LIMIT_MS = 100.0
NUM_TIMES = 6  # even: what was moved to and fro stands where it stood
TESTS = Path(__file__).resolve().parent.parent
EXPLORERS = {
    "layout": "wb.view.layout_explorer(wb.Layout(world_size=16, tp=4, pp=2))",
    "many ranks": "wb.view.layout_explorer(wb.Layout(world_size=1024, tp=8, pp=8))",
    "length": "wb.view.length_explorer(make_run())",
    "memory": "wb.view.memory_explorer(make_run())",
    "collective": "with wb.launch(4) as cluster: trace = cluster.trace_collective('all_reduce')\nwb.view.trace_collective(trace)",
}
Open = Callable[[str], Notebook]


@pytest.fixture
def explorers(lab: Lab, open_notebook: Open) -> Iterator[dict[str, Locator]]:
    """The widget of each explorer, on one page."""
    first = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nimport workbench as wb\nfrom run_builders import make_run"
    notebook = open_notebook(lab.write("explorers.ipynb", [first, *EXPLORERS.values()]))
    notebook.run_all()
    assert notebook.text(0) == ""
    widgets = {name: notebook.cell(index + 1).locator(".jp-OutputArea-output").last for index, name in enumerate(EXPLORERS)}
    for widget in widgets.values():
        expect(widget.locator("svg").first).to_be_visible()
    yield widgets


def best_ms(widget: Locator, act: Callable[[int], None]) -> float:
    """The best of some, since another program may have the cores."""
    return min(milliseconds_until_changed(widget, partial(act, k)) for k in range(NUM_TIMES))


def move(slider: Locator) -> Callable[[int], None]:
    """A step to and fro with the arrow keys, away from the end it stands at."""
    is_at_end = slider.evaluate("(slider) => Number(slider.value) >= Number(slider.max)")
    keys = ("ArrowLeft", "ArrowRight") if is_at_end else ("ArrowRight", "ArrowLeft")
    slider.focus()
    return lambda k: slider.page.keyboard.press(keys[k % 2])


def movable(widget: Locator) -> list[str]:
    """Names of the sliders that have somewhere to go."""
    sliders = widget.locator("input[type=range]:enabled").all()
    return [str(slider.get_attribute("aria-label")) for slider in sliders if slider.evaluate("(slider) => slider.min !== slider.max")]


def choose(menu: Locator, values: list[str], k: int) -> None:
    menu.select_option(values[(k + 1) % 2])


def click_rank(widget: Locator, first: int, k: int) -> None:
    widget.locator(f"rect[data-rank='{first + k}']").click()


def walk(widget: Locator, k: int) -> None:
    widget.page.keyboard.press(("ArrowLeft", "ArrowRight")[k % 2])


def hover(chart: Locator, k: int) -> None:
    box = chart.bounding_box()
    assert box is not None
    chart.hover(position={"x": (0.3 + 0.1 * k) * box["width"], "y": box["height"] / 2})


def test_pictures_follow_sliders_clicks_menus_and_keys(explorers):
    """One test, since a page with them all takes longer to open than to try."""
    took: dict[str, float] = {}
    for name, widget in explorers.items():
        widget.scroll_into_view_if_needed()
        for label in movable(widget):
            took[f"{name}: slider {label}"] = best_ms(widget, move(widget.get_by_label(label, exact=True)))
        for menu in widget.locator("select:enabled").all() if name in ("length", "memory") else ():
            values = menu.evaluate("(menu) => [...menu.options].filter((option) => !option.disabled).map((option) => option.value)")
            if len(values) > 1:
                took[f"{name}: menu {menu.get_attribute('aria-label')}"] = best_ms(widget, partial(choose, menu, values))
    for name in ("layout", "many ranks"):
        widget = explorers[name]
        widget.scroll_into_view_if_needed()
        took[f"{name}: click on a rank"] = best_ms(widget, partial(click_rank, widget, 6))
        took[f"{name}: arrow key"] = best_ms(widget, partial(walk, widget))
    took["memory: mouse over the chart"] = best_ms(explorers["memory"], partial(hover, explorers["memory"].locator("[data-chart='time']")))
    print("\n" + "\n".join(f"{ms:6.0f} ms  {what}" for what, ms in took.items()))
    assert {what.partition(":")[0] for what in took} == set(EXPLORERS)
    assert not {what: round(ms) for what, ms in took.items() if ms > LIMIT_MS}
    labels = explorers["memory"].locator("[data-chart='time'] text").all_text_contents()
    axis = [text.split()[1] for text in labels if text.endswith("iB")]
    assert axis in (["MiB"] * len(axis), ["GiB"] * len(axis)) and axis
    click_rank(explorers["layout"], 6, 0)
    expect(explorers["layout"].locator("[role='status']").first).to_contain_text("rank 6")
    expect(explorers["layout"].locator("[data-axis='tp']").first).to_contain_text("4-7")
