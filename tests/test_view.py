"""Figures read back from their artists, the notebook's face of a run, and the report."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image
from run_builders import MIB, make_batch, make_memory, make_run, make_sleep, make_spans

import workbench as wb
from workbench.records import Span
from workbench.run import Run
from workbench.view.report import Section, write_report
from workbench.view.style import FULL_SIZE, OKABE_ITO, SMALL_SIZE, PictureAxes, alt_text, figure_png, rank_blocks, rank_color


@pytest.mark.parametrize(
    "view, needed",
    [
        ("layout_explorer", "a layout, such as wb.Layout(world_size=8, tp=2) or cluster.layout"),
        ("plot_layout", "a layout, such as wb.Layout(world_size=8, tp=2) or cluster.layout"),
        ("length_explorer", "a run: what wb.rollout gave, or wb.load_run(folder)"),
        ("memory_explorer", "a run: what wb.rollout gave, or wb.load_run(folder)"),
        ("live", "a cluster that is up: what wb.launch gave"),
    ],
)
def test_what_a_view_cannot_show_is_told(view, needed):
    with pytest.raises(TypeError) as caught:
        getattr(wb.view, view)(pd.DataFrame())
    assert str(caught.value) == f"{view}(DataFrame): nothing to show there\nneeded: {needed}"


PLOTS = ("plot_lengths", "plot_timeline", "plot_memory")


def title(ax: Axes) -> str:
    return ax.get_title(loc="left").replace("\n", " ")


def legend_labels(ax: Axes) -> list[str]:
    """Labels as a person reads them: row by row."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    places = {text: text.get_window_extent() for legend in figure.legends for text in legend.get_texts()}
    return [text.get_text() for text in sorted(places, key=lambda text: (-round(places[text].y0 / 4), places[text].x0))]


def bars(ax: Axes) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


# What every figure keeps to


def ticks_out_of_view(ax: Axes) -> set[Text]:
    """Labels of ticks beyond the axes' limits, which matplotlib keeps but does not draw."""
    unseen: set[Text] = set()
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        unseen |= {label for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)}
    return unseen


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("size", [FULL_SIZE, SMALL_SIZE], ids=["full", "small"])
@pytest.mark.parametrize("num_ranks", [1, 4, 32])
@pytest.mark.parametrize("plot", PLOTS)
def test_no_two_texts_overlap_and_none_is_cut_off(plot, num_ranks, size, scale):
    figure = getattr(make_run(num_ranks=num_ranks), plot)(size=size).figure
    figure.set_dpi(100 * scale)
    figure.draw_without_rendering()
    unseen = ticks_out_of_view(figure.axes[0])
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in unseen]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(boxes) >= 10
    for (one, a), (two, b) in combinations(boxes, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width <= 0.5 or height <= 0.5, f"{one!r} lies on {two!r}"
    for name, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1, name
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, name


@pytest.mark.parametrize("plot, label", [("plot_lengths", "tokens"), ("plot_timeline", "seconds"), ("plot_memory", "seconds")])
def test_axes_name_their_units(plot, label):
    ax = getattr(make_run(), plot)()
    assert label in ax.get_xlabel() and (plot != "plot_memory" or "GiB" in ax.get_ylabel())


@pytest.mark.parametrize("plot", PLOTS)
def test_it_draws_on_the_axes_it_is_given_and_keeps_its_legend_inside(plot):
    figure = Figure(figsize=(9, 3))
    left, right = figure.subplots(1, 2)
    assert getattr(make_run(), plot)(right) is right
    assert not figure.legends and right.get_legend() is not None and not left.has_data()


@pytest.mark.parametrize("plot", PLOTS)
def test_an_empty_run_says_so_in_words(plot):
    ax = getattr(Run(batches={}), plot)()
    assert re.fullmatch(r"no (completions|spans|memory samples) to show", ax.texts[0].get_text()) and not ax.axison


@pytest.mark.parametrize("plot, table", [("plot_lengths", "completions"), ("plot_timeline", "timeline"), ("plot_memory", "memory")])
def test_a_table_is_drawn_like_its_run(plot, table):
    run = make_run()
    from_table = getattr(wb.view, plot)(getattr(run, table))
    assert from_table.get_xlabel() == getattr(run, plot)().get_xlabel() and from_table.has_data()


def test_a_notebook_shows_axes_as_a_picture_with_words_beside_it():
    ax = make_run().plot_lengths()
    assert isinstance(ax, PictureAxes)
    data, metadata = ax._repr_mimebundle_()
    words = alt_text(ax)
    assert words.endswith("(completions over completion length, tokens)")
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and data["text/plain"] == words
    assert metadata["image/png"] == {"width": 640, "height": 360, "alt": words}
    (image,) = Page(data["text/html"]).images
    assert image["alt"] == words and image["width"] == "640" and image["src"] == f"data:image/png;base64,{data['image/png']}"
    shown, _ = DisplayFormatter().format(ax)  # as IPython asks for it
    assert shown == data


@pytest.mark.parametrize("size", [FULL_SIZE, SMALL_SIZE, (5.01, 3.337)])
def test_pictures_are_sharp_and_small(size):
    ax = make_run(num_ranks=32).plot_memory(size=size)
    assert isinstance(ax.figure, Figure)
    data = figure_png(ax.figure, dpi=144)
    with Image.open(BytesIO(data)) as picture:
        assert picture.size == (int(size[0] * 144), int(size[1] * 144)) and len(data) < 40_000
        colors = {picture.convert("RGB").getpixel((x, picture.height // 2)) for x in range(picture.width)}
    assert len(colors) > 3  # not a blank


def test_figures_leave_matplotlibs_settings_and_pyplot_alone():
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import matplotlib\n"
        "def settings(): return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}  # that one imports pyplot\n"
        "before = settings()\n"
        "from run_builders import make_run\n"
        "run = make_run(); run.plot_lengths(); run.plot_timeline(); run.plot_memory(); run._repr_html_()\n"
        "assert settings() == before and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_no_two_of_the_first_32_ranks_share_a_colour():
    colors = [rank_color(rank) for rank in range(32)]
    assert len(set(colors)) == 32 and colors[:8] == [c.lower() for c in OKABE_ITO] and rank_color(32) == colors[0]


def test_many_ranks_are_named_in_blocks_of_neighbours():
    assert [block.label for block in rank_blocks(range(32))] == [f"ranks {4 * i}-{4 * i + 3}" for i in range(8)]
    assert rank_blocks([]) == []
    assert [rank for block in rank_blocks(range(13)) for rank in block.ranks] == list(range(13)) and len(rank_blocks(range(13))) <= 8


def test_a_rank_drawn_alone_keeps_its_own_colour():
    assert [(block.label, block.color) for block in rank_blocks([2, 5])] == [("rank 2", rank_color(2)), ("rank 5", rank_color(5))]


# Lengths


def test_bars_count_every_completion_once_by_reason():
    run = make_run()
    ax = run.plot_lengths()
    reasons = run.completions.finish_reason
    assert sum(bar.get_height() for bar in bars(ax)) == len(run.completions)
    hatched = [bar for bar in bars(ax) if bar.get_hatch()]
    assert sum(bar.get_height() for bar in hatched) == (reasons == "length").sum() > 0
    assert legend_labels(ax) == ["stopped by itself", "cut at the limit"]


def test_bars_by_rank_count_every_completion_once():
    ax = make_run().plot_lengths(by="origin_rank")
    assert sum(bar.get_height() for bar in bars(ax)) == len(make_run().completions)
    assert legend_labels(ax) == ["rank 0", "rank 1", "rank 2", "rank 3"]


def test_the_title_tells_the_finding():
    run = Run(batches={0: {0: make_batch(prompts=["a"], lengths=[[2, 4, 64, 6, 9]], failed=[4])}})
    assert title(run.plot_lengths()) == "4 completions: median 5 tokens, 25 % cut at 64, 1 failed"
    assert title(Run(batches={0: {0: make_batch()}}).plot_lengths()) == "1 completion: median 3 tokens, none cut"


def test_a_run_where_all_failed_says_how_many():
    ax = Run(batches={0: {0: make_batch(failed=[0])}}).plot_lengths()
    assert ax.texts[0].get_text() == "no completions to show (1 failed)"


def test_bins_lie_between_whole_numbers_and_stay_few():
    batch = make_batch(prompts=["a"], lengths=[[1, 5000, 37]], limit=10_000)
    edges = sorted({bar.get_x() for bar in bars(Run(batches={0: {0: batch}}).plot_lengths())})
    assert len(edges) <= 40 and all(edge % 1 == 0.5 for edge in edges)


def test_an_unknown_grouping_is_told():
    with pytest.raises(ValueError, match="by='prompt'.*'finish_reason' or by 'origin_rank'"):
        make_run().plot_lengths(by="prompt")


# Timeline


def test_a_row_for_each_rank_and_the_engine_on_top():
    ax = make_run(num_ranks=4).plot_timeline()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["engine", "rank 0", "rank 1", "rank 2", "rank 3"]
    low, high = ax.get_ylim()
    assert low > high  # the first row is on top


def test_bars_lie_where_and_as_long_as_the_spans():
    spans = [Span(step=0, rank=2, span="gather", start_s=11.0, end_s=11.5), Span(step=0, rank=0, span="generate", start_s=10.0, end_s=13.0)]
    ax = Run(batches={}, spans=spans, start_s=10.0).plot_timeline()
    drawn = {(bar.get_x(), round(bar.get_width(), 9), bar.get_y() + bar.get_height() / 2) for bar in bars(ax) if bar.get_zorder() == 2}
    assert drawn == {(1.0, 0.5, 1.0), (0.0, 3.0, 0.0)}
    idle = [bar for bar in bars(ax) if bar.get_zorder() == 0.5]
    assert len(idle) == 2 and all((bar.get_x(), bar.get_width()) == (0.0, 3.0) for bar in idle)
    assert legend_labels(ax) == ["gather", "generate", "idle"]


def test_the_title_gives_each_spans_share_of_the_time_overlaps_counted_once():
    spans = [Span(step=0, rank=r, span="generate", start_s=0.5 * r, end_s=2.0 + 0.5 * r) for r in range(2)]
    spans += [Span(step=0, rank=0, span="scatter", start_s=2.5, end_s=5.0)]
    assert title(Run(batches={}, spans=spans).plot_timeline()) == "1 step in 5 s: generate 50 %, scatter 50 %"


def test_marks_and_steps_are_named():
    ax = make_run().plot_timeline()
    assert sorted(text.get_text() for text in ax.texts) == ["after training", "step 0", "step 1"]


def test_marks_that_find_no_room_are_counted():
    marks = [Span(step=0, rank=-1, span="mark", start_s=1.0 + i / 100, end_s=1.0 + i / 100, label=f"mark number {i}") for i in range(9)]
    ax = Run(batches={}, spans=make_spans(num_ranks=1, num_steps=1), marks=marks).plot_timeline()
    assert "+6 more" in [text.get_text() for text in ax.texts]


def test_a_span_of_an_unknown_kind_is_drawn_and_named():
    ax = Run(batches={}, spans=[Span(step=0, rank=0, span="train", start_s=0, end_s=1)]).plot_timeline()
    assert legend_labels(ax) == ["train", "idle"]


# Memory


def stack_heights(ax: Axes) -> list[float]:
    """Height of each stacked layer at its first time, data units."""
    ends = [np.asarray(collection.get_paths()[0].vertices) for collection in ax.collections]
    return [float(np.ptp(v[v[:, 0] == v[:, 0].min(), 1])) for v in ends]


def test_layers_are_the_processes_pss_never_rss():
    ax = make_run(num_ranks=2).plot_memory()
    assert legend_labels(ax) == ["engine", "rank 0", "rank 1", "driver", "asleep"]
    assert stack_heights(ax) == pytest.approx([mib / 1024 for mib in (300, 20, 21, 180)])


def test_ranks_are_stacked_in_blocks_whose_heights_are_sums():
    ax = make_run(num_ranks=32).plot_memory()
    assert legend_labels(ax) == ["engine", *(f"ranks {4 * i}-{4 * i + 3}" for i in range(8)), "driver", "asleep"]
    assert stack_heights(ax)[1] == pytest.approx((20 + 21 + 22 + 23) / 1024)


def test_a_process_that_starts_late_counts_from_then_on_and_a_missed_reading_is_no_dip():
    memory = make_memory(num_ranks=1, duration_s=2.0)
    seen = [s for s in memory if s.process != "engine" or (s.time_s > 0.75 and abs(s.time_s - 1.2) > 0.01)]
    run = Run(batches={}, memory=seen)
    engine = np.asarray(run.plot_memory().collections[0].get_paths()[0].vertices)
    at = {round(float(x), 1): float(y) for x, y in engine if y > 0}
    assert min(at) == 0.8 and at[1.2] == pytest.approx(900 / 1024)


def test_the_title_gives_the_peak_and_what_is_left_asleep():
    ax = make_run(num_ranks=1).plot_memory()
    assert title(ax) == "1.07 GiB at the most, 0.488 GiB while the engine sleeps"  # 900 + 180 + 20 MiB, 300 + 180 + 20 MiB
    calm = Run(batches={}, memory=make_memory(num_ranks=1, engine_mib=300))
    assert title(calm.plot_memory()) == "500 MiB at the most, 300 MiB at the end"


def test_sleeps_wakes_and_marks_are_named_where_they_happened():
    ax = make_run().plot_memory()
    found = sorted((round(float(text.xy[0]), 2), text.get_text()) for text in ax.texts)  # type: ignore[attr-defined]
    assert found == [(0.0, "wake_up"), (1.9, "sleep"), (2.05, "after training"), (2.2, "wake_up"), (4.1, "sleep")]


def test_the_time_asleep_is_shaded_also_when_its_many_steps_are_not_named():
    shaded = [(round(bar.get_x(), 2), round(bar.get_width(), 2)) for bar in bars(make_run().plot_memory())]
    assert shaded == [(1.9, 0.3), (4.1, 0.0)] and "asleep" in legend_labels(make_run().plot_memory())
    ax = Run(batches={}, spans=make_spans(num_ranks=1, num_steps=9), memory=make_memory(num_ranks=1, duration_s=20)).plot_memory()
    assert len(bars(ax)) == 9 and not ax.texts


def test_one_sample_is_seen():
    ax = Run(batches={}, memory=make_memory(num_ranks=1, duration_s=0.1)).plot_memory()
    assert ax.get_xlim() == (0.0, 0.1) and sum(stack_heights(ax)) == pytest.approx(500)


def test_device_memory_is_a_line_of_its_own():
    frame = make_run(num_ranks=1).memory
    assert "GPU memory" not in legend_labels(wb.view.plot_memory(frame))
    used = frame.assign(device_used_bytes=np.where(frame.process == "engine", 5 * 1024 * MIB, 0))
    ax = wb.view.plot_memory(used)
    assert legend_labels(ax)[-1] == "GPU memory" and np.asarray(ax.lines[0].get_ydata())[0] == pytest.approx(5.0)


def test_unreadable_pss_is_said_not_replaced_by_rss():
    frame = make_run().memory.assign(pss_bytes=0)
    assert wb.view.plot_memory(frame).texts[0].get_text() == "the processes' memory (PSS) could not be read"


# Pages


class Page(HTMLParser):
    """What a page holds: tags, images, texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_a_notebook_shows_a_run_with_counts_sleeps_and_three_pictures():
    page = Page(make_run()._repr_html_())
    pngs = [base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,")) for image in page.images]
    assert len(pngs) == 3 and all(png.startswith(b"\x89PNG") for png in pngs)
    assert [str(image["alt"]).split(":")[0] for image in page.images[:2]] == ["48 completions", "2 steps in 4.1 s"]
    facts = dict(zip(page.words[page.words.index("steps") :], page.words[page.words.index("steps") + 8 :], strict=False))
    assert (facts["steps"], facts["ranks"], facts["completions"]) == ("2", "4", "48")
    assert "98 %" in page.words and "590.0" in page.words and "asleep" in page.words


def test_an_empty_run_has_a_face_too():
    page = Page(Run(batches={})._repr_html_())
    assert len(page.images) == 3 and "The engine did not sleep." in page.words and "none made" in page.words


def test_alt_text_is_the_finding_and_the_axes():
    run = Run(batches={0: {0: make_batch(prompts=["a"], lengths=[[2, 4]])}}, sleeps=[make_sleep()])
    assert alt_text(run.plot_lengths()) == "2 completions: median 3 tokens, none cut (completions over completion length, tokens)"
    assert alt_text(run.plot_memory()) == "no memory samples to show"


def test_a_report_is_one_file_with_everything_in_it(tmp_path):
    table = pd.DataFrame({"prompt": ["<b>1+1=</b>"], "tokens": [1.5]})
    sections = [
        Section(heading="Rollout & sleep", text="First.\n\nSecond <i>.", table=table, figures=[make_run().plot_lengths()]),
        Section(heading="Deadlock", output="rank 2 finished\n  the cell"),
    ]
    path = write_report(tmp_path / "new" / "report.html", "Four <ranks>", sections)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path.is_absolute() and page.tags.count("section") == 2 and page.tags.count("p") == 2 and len(page.images) == 1
    assert {"Four <ranks>", "Rollout & sleep", "Second <i>.", "<b>1+1=</b>", "rank 2 finished\n  the cell"} <= set(page.words)
    assert "b" not in page.tags and "script" not in page.tags and not re.search(r"(src|href)=\"(?!data:)", text) and "url(" not in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text
