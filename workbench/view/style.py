"""How every figure looks: one palette, one style context, one way to put labels where they do not overlap.

Colours are Okabe and Ito's set, which stays apart for colour-blind readers (https://jfly.uni-koeln.de/color/); nothing is told by colour
alone, so each kind also has a hatch or a label. Figures are `matplotlib.figure.Figure`, never pyplot's: nothing is global, nothing has to
be closed.
"""

from __future__ import annotations

import base64
import html
import struct
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

__all__ = [
    "FINISH_STYLES",
    "PROCESS_COLORS",
    "SPAN_STYLES",
    "PictureAxes",
    "RankBlock",
    "add_legend",
    "alt_text",
    "figure_png",
    "house_style",
    "img_tag",
    "label_times",
    "is_small",
    "new_axes",
    "rank_blocks",
    "rank_color",
    "set_finding",
    "show_empty",
    "static_face",
]

FULL_SIZE = (6.4, 3.6)  # inches
SMALL_SIZE = (3.3, 2.5)  # three beside each other in a notebook
DPI = 144
HEADROOM = 1.08  # of an axis over the tallest that stands on it; bars of no height keep matplotlib from leaving any

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#7F7F7F")
SPAN_STYLES = {  # span -> (face colour, hatch)
    "start": ("#BFBFBF", ""),
    "gather": ("#56B4E9", ""),
    "generate": ("#0072B2", ""),
    "scatter": ("#E69F00", ""),
    "sleep": ("#CC79A7", "////"),
    "wake_up": ("#F0E442", "...."),
    "update_weights": ("#D55E00", "xxxx"),
}
FINISH_STYLES = {  # finish reason -> (face colour, hatch)
    "stop": ("#0072B2", ""),
    "length": ("#E69F00", "////"),
    "abort": ("#BFBFBF", "...."),
    "error": ("#D55E00", "xxxx"),
}
PROCESS_COLORS = {"engine": "#4D4D4D", "driver": "#D9D9D9"}
IDLE_COLOR = "#EFEFEF"
INK = "#262626"


def rank_color(rank: int) -> str:
    """The colour of a rank, everywhere: 8 hues, then lighter, darker and palest forms of them; repeats from rank 32 on."""
    hue = OKABE_ITO[rank % 8]
    return to_hex(_mix(hue, *(("#FFFFFF", 0.0), ("#FFFFFF", 0.5), ("#000000", 0.45), ("#FFFFFF", 0.75))[rank // 8 % 4]))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBlock:
    """Neighbouring ranks drawn as one, with the name and colour they go by."""

    ranks: tuple[int, ...]
    label: str
    color: str


def rank_blocks(ranks: Sequence[int], *, max_blocks: int = 8) -> list[RankBlock]:
    """Ranks in at most `max_blocks` blocks: each one its own ("rank 3", in its own colour), or of 32 always four ("ranks 4-7")."""
    size = -(-len(ranks) // max_blocks) or 1
    if size == 1:
        return [RankBlock(ranks=(rank,), label=f"rank {rank}", color=rank_color(rank)) for rank in ranks]
    blocks = [tuple(ranks[i : i + size]) for i in range(0, len(ranks), size)]
    return [RankBlock(ranks=block, label=_span(block), color=rank_color(i)) for i, block in enumerate(blocks)]


def _span(ranks: tuple[int, ...]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


def _mix(color: str, other: str, share: float) -> tuple[float, float, float]:
    red, green, blue = (a * (1 - share) + b * share for a, b in zip(to_rgb(color), to_rgb(other), strict=True))
    return red, green, blue


@contextmanager
def house_style(*, is_small: bool = False) -> Iterator[None]:
    """The house's matplotlib settings, for the length of a `with` block only."""
    size = 7.5 if is_small else 9.0
    with matplotlib.rc_context(
        {
            "font.size": size,
            "axes.titlesize": size + 1,
            "axes.labelsize": size,
            "legend.fontsize": size - 1,
            "xtick.labelsize": size - 0.5,
            "ytick.labelsize": size - 0.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#8C8C8C",
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.axisbelow": True,
            "hatch.linewidth": 0.5,
            "legend.frameon": False,
            "figure.facecolor": "white",
            "axes.facecolor": "white",
        }
    ):
        yield


class PictureAxes(Axes):
    """Axes that a notebook shows as their figure's picture: figures of the house are not pyplot's, so nothing else would show them."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        figure = self.get_figure(root=True)
        assert isinstance(figure, Figure)
        return static_face(figure_png(figure), alt_text(self))


def new_axes(size: tuple[float, float] = FULL_SIZE) -> Axes:
    """Axes of a figure of their own, `size` inches."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot(axes_class=PictureAxes)


def is_small(ax: Axes | None, size: tuple[float, float]) -> bool:
    """Whether to draw with small letters: axes narrower than 4.5 inches."""
    return (size[0] if ax is None else _width_pt(ax) / 72 * 1.25) < 4.5


def set_finding(ax: Axes, text: str, *, num_label_rows: int = 0) -> None:
    """Set the title, the figure's finding, in as many lines as the width asks for, above `num_label_rows` of event labels."""
    font_pt = matplotlib.rcParams["axes.titlesize"]
    num_letters = max(16, int(_width_pt(ax) / (0.56 * font_pt)))
    lines = textwrap.wrap(text.replace(" %", "\u00a0%"), num_letters)  # never parts a number from its percent sign
    ax.set_title("\n".join(lines).replace("\u00a0", " "), loc="left", pad=6 + num_label_rows * _label_height_pt())


def label_times(ax: Axes, events: Sequence[tuple[float, str]], *, max_rows: int = 3) -> int:
    """Mark times by thin lines, named above the axes in rows so that no two names overlap.

    Args:
        events: (x in data units, name); the x limits of `ax` must be final.
        max_rows: names that find no room in so many rows are left out, and a row above says how many.

    Returns:
        Number of rows used, for `set_finding`.
    """
    font_pt = matplotlib.rcParams["legend.fontsize"]
    low, high = ax.get_xlim()
    width = _width_pt(ax)
    ends = [float("-inf")] * max_rows  # right end of the last name in each row, points
    num_hidden = 0
    for x, name in sorted(events):
        ax.axvline(x, color="#595959", linewidth=0.7, linestyle=(0, (3, 2)), zorder=1.5)
        at = (x - low) / (high - low) * width
        length = (len(name) + 1) * 0.6 * font_pt
        left = min(at, width - length)
        row = next((r for r in range(max_rows) if ends[r] <= left), None)
        if row is None:
            num_hidden += 1
            continue
        ends[row] = left + length
        offset = (left - at, 2 + row * _label_height_pt())
        _annotate(ax, name, (x, 1.0), xycoords=ax.get_xaxis_transform(), xytext=offset, textcoords="offset points", va="bottom")
    num_rows = sum(end > float("-inf") for end in ends)
    if num_hidden:
        place = dict(xycoords="axes fraction", xytext=(0, 2 + num_rows * _label_height_pt()), textcoords="offset points")
        _annotate(ax, f"+{num_hidden} more", (1.0, 1.0), **place, va="bottom", ha="right")
    return num_rows + bool(num_hidden)


def _annotate(ax: Axes, text: str, at: tuple[float, float], **placing: Any) -> None:
    ax.annotate(text, at, fontsize=matplotlib.rcParams["legend.fontsize"], **placing)


def _label_height_pt() -> float:
    return float(matplotlib.rcParams["legend.fontsize"]) * 1.3


def _width_pt(ax: Axes) -> float:
    """Width of the axes, points; before the layout has run, guessed from the figure's."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    if isinstance(ax, PictureAxes):
        return float(figure.get_size_inches()[0]) * 72 * 0.84
    return float(ax.get_window_extent().width) / figure.dpi * 72


def add_legend(ax: Axes, handles: Sequence[Any]) -> None:
    """Name the kinds: under the axes in the house's own figures, inside in the axes of others."""
    if not handles:
        return
    if not isinstance(ax, PictureAxes):
        ax.legend(handles=list(handles), loc="best", frameon=True)
        return
    figure, part = ax.get_figure(root=True), ax.get_figure(root=False)  # the same, unless the figure has several parts
    assert isinstance(figure, Figure) and part is not None
    font_pt = matplotlib.rcParams["legend.fontsize"]
    widest = max(len(str(handle.get_label())) for handle in handles) * 0.55 * font_pt + 5 * font_pt
    num_columns = max(1, min(len(handles), int(float(figure.get_size_inches()[0]) * 72 / widest)))
    by_row = [handle for column in range(num_columns) for handle in handles[column::num_columns]]  # matplotlib fills columns first
    part.legend(handles=by_row, loc="outside lower center", ncols=num_columns, handlelength=1.6, columnspacing=1.4)


def show_empty(ax: Axes, text: str) -> Axes:
    """Say in words that there is nothing to draw."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes)
    return ax


def alt_text(ax: Axes) -> str:
    """The figure in one sentence, for those who cannot see it: its finding and its axes."""
    finding = " ".join((ax.get_title(loc="left") or " ".join(t.get_text() for t in ax.texts)).split())
    labels = [label for label in (ax.get_ylabel(), ax.get_xlabel()) if label]
    return finding + (f" ({' over '.join(labels)})" if labels else "")


def figure_png(figure: Figure, *, dpi: int = DPI) -> bytes:
    """The figure as a PNG of 128 colours, to the eye the same at a third of the bytes: notebooks stay small."""
    raw, packed = BytesIO(), BytesIO()
    figure.savefig(raw, format="rgba", dpi=dpi, facecolor="white")
    size = (int(figure.bbox.width / figure.dpi * dpi), int(figure.bbox.height / figure.dpi * dpi))
    picture = Image.frombuffer("RGBA", size, raw.getvalue()).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(packed, "PNG")
    return packed.getvalue()


def static_face(png: bytes, words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Data and metadata of a picture and what it says; it stands for a widget too, where that cannot live.

    As HTML it has the words as alt text, which pages give to no PNG; there it is under the key of `IPython.display.Image`.
    """
    width, height = _size_of(png)
    data = {"text/html": _img(png, words), "image/png": base64.b64encode(png).decode("ascii"), "text/plain": words}
    return data, {"image/png": {"width": width, "height": height, "alt": words}}


def img_tag(ax: Axes) -> str:
    """The whole figure of these axes as an HTML image that carries picture and alt text within itself."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return _img(figure_png(figure), alt_text(ax))


def _img(png: bytes, words: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(words, quote=True)}" width="{_size_of(png)[0]}">'


def _size_of(png: bytes) -> tuple[int, int]:
    """Width and height at 100 points an inch."""
    width, height = struct.unpack(">II", png[16:24])  # of a PNG's first chunk
    return round(width * 100 / DPI), round(height * 100 / DPI)
