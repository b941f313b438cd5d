"""The last expression of a cell in its rich form, from real ranks, and the page that shows it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

import workbench as wb


@pytest.fixture(scope="module")
def cluster():
    with wb.launch(3) as made:
        yield made


class Tags(HTMLParser):
    """Every opening tag has its end, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_frame_is_a_table(cluster):
    result = cluster.execute("import pandas as pd\npd.DataFrame({'step': [1, 2], 'loss': [0.5, 0.25 + (rank == 2)]})")
    assert result[0].result_text.splitlines()[0].split() == ["step", "loss"]
    page = result._repr_html_()
    assert page.count("<table") == 2 and "ranks 0-1" in page and "rank 2" in page and not Tags(page).open


def test_a_figure_is_a_picture_and_equal_ones_are_shown_once(cluster):
    cell = "from matplotlib.figure import Figure\nfigure = Figure((2, 1)); axes = figure.subplots(); axes.plot([0, {}]); {}"
    page = cluster.execute(cell.format("1", "figure"))._repr_html_()
    assert page.count('src="data:image/png;base64,') == 1 and re.search(r'alt="picture of ranks 0-2: [^"]+"', page)
    assert cluster.execute(cell.format("rank", "axes"))._repr_html_().count('src="data:image/png;base64,') == 3


def test_figures_that_pyplot_left_open_are_shown_and_closed(cluster):
    result = cluster.execute("import matplotlib.pyplot as plt\nplt.figure(figsize=(2, 1)); plt.plot([1, 2]);")
    assert [len(result[r].shown) for r in range(3)] == [1, 1, 1] and result[0].result_text == ""
    assert result[1].shown[0].forms["image/png"][:4] == b"\x89PNG" and str(result) == "[ranks 0-2] a figure"
    assert cluster.execute("plt.get_fignums()", ranks=0)[0].result_text == "[]"
    assert [len(o.shown) for o in cluster.execute("plt.figure(figsize=(2, 1)); plt.plot([1, 2])").values()] == [1, 1, 1]
    assert cluster.execute("plt.get_backend().lower()", ranks=0)[0].result_text == "'agg'"


def test_a_tensor_tells_its_shape_and_range_and_where_ranks_differ(cluster):
    result = cluster.execute("x = torch.zeros(2, 3); x[1, 2] = 4 if rank == 1 else 0; x")
    assert str(result).splitlines()[0] == "[ranks 0, 2] Tensor [2, 3] float32, 24 B: min 0, mean 0, max 0"
    told = "1 of 6 values differ: first at [1, 2], 4 for 0; largest difference 4 at [1, 2] against ranks 0, 2"
    assert str(result).splitlines()[-1].endswith(f"  <- {told}") and told in result._repr_html_()


def test_tensors_of_equal_text_are_told_apart(cluster):
    result = cluster.execute("torch.ones(2) + (1e-6 if rank == 2 else 0)")
    assert {output.result_text for output in result.values()} == {"tensor([1., 1.])", "tensor([1.0000, 1.0000])"}
    result = cluster.execute("torch.full((2,), 0.5) + (1e-6 if rank == 2 else 0)")
    assert {o.result_text for o in result.values()} == {"tensor([0.5000, 0.5000])"}
    assert "largest difference 1.01e-06 at [0]" in str(result)


@pytest.mark.parametrize(
    "source, summary",
    [
        ("torch.arange(6).reshape(2, 3)", "Tensor [2, 3] int64, 48 B: min 0, mean 2.5, max 5"),
        ("torch.tensor([1.0, float('nan')], dtype=torch.bfloat16)", "Tensor [2] bfloat16, 4 B: min 1, mean 1, max 1, 1 nan"),
        ("torch.full((2,), float('nan'))", "Tensor [2] float32, 8 B: all nan"),
        ("torch.ones(0, 3)", "Tensor [0, 3] float32, 0 B"),
        ("torch.tensor([True])", "Tensor [1] bool, 1 B"),
        ("torch.nn.Parameter(torch.ones(1))", "Parameter [1] float32, 4 B: min 1, mean 1, max 1"),
        ("__import__('numpy').ones((1000, 500))", "ndarray [1000, 500] float64, 4.0 MB: min 1, mean 1, max 1"),
    ],
)
def test_summaries(cluster, source, summary):
    assert cluster.execute(source, ranks=1)[1].shown[0].summary == summary


@pytest.mark.parametrize(
    "source", ["torch.ones(2, device='meta')", "torch.eye(2).to_sparse()", "1j", "torch.ones(2) * 1j", "wb", "torch.Tensor", "10**400"]
)
def test_what_has_no_numbers_to_compare_is_text(cluster, source):
    output = cluster.execute(source, ranks=0)[0]
    assert output.shown == () and output.result_text


def test_a_form_that_fails_is_left_out(cluster):
    cell = "class Odd:\n    def _repr_html_(self): raise ValueError\n    def __repr__(self): return 'odd'\nOdd()"
    output = cluster.execute(cell, ranks=0)[0]
    assert output.shown == () and output.result_text == "odd"


def test_text_is_escaped_and_differing_numbers_are_marked(cluster):
    page = cluster.execute("print('<b>', 1.5 if rank == 1 else 1.0)")._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and ">1.5</mark>" in page and not Tags(page).open
    assert "+5.0e-01 (+50 %) against ranks 0, 2" in page


def test_each_ranks_text_is_one_click_away_where_ranks_differ(cluster):
    page = cluster.execute("print('same'); rank")._repr_html_()
    assert page.count("<details name=") == 3 and page.count("<summary>rank 1</summary>") == 1 and "<script" not in page
    assert "<details" not in cluster.execute("print('same')")._repr_html_()


def test_a_flood_shows_its_end_and_says_where_the_rest_is(cluster):
    result = cluster.execute("for i in range(5_000): print(f'{rank} line {i}')")
    page = result._repr_html_()
    assert "14,001 older lines of ranks 0-2: in the stdout and stderr of this result" in page
    assert "0 line 4999" in page and "0 line 4667" in page and "0 line 4666" not in page and len(page) < 200_000
    assert len(result[2].stdout.splitlines()) == 5_000
    text = repr(result)  # what a notebook keeps beside the page
    assert text.startswith("14,001 older lines of ranks 0-2: in the stdout and stderr of this result\n[rank 0] 0 line 4667\n")
    assert text.endswith("\n[rank 2] 2 line 4999") and len(text.splitlines()) == 1_000 and len(str(result).splitlines()) == 15_000


def test_a_flood_of_wide_lines_shows_fewer_of_them(cluster):
    result = cluster.execute("for i in range(1_000): print(f'{rank} line {i} ' + 'x' * 1_900)")
    page, text = result._repr_html_(), repr(result)
    told = "2,844 older lines of ranks 0-2: in the stdout and stderr of this result"
    assert told in page and text.startswith(f"{told}\n[rank 0] 0 line 948 xxx") and text.count("2 line 999 xxx") == 1
    assert len(page) < 700_000 and len(text) < 320_000


def test_errors_stand_apart_and_bars_stand_as_they_ended(cluster):
    result = cluster.execute("import sys\nfor i in range(3): print(f'\\r{i} of 3', end='', file=sys.stderr)\nprint('out')")
    assert str(result) == "[ranks 0-2] out\n[ranks 0-2] 2 of 3"
    assert result._repr_html_().index("out") < result._repr_html_().index('title="stderr"') < result._repr_html_().index("2 of 3")
