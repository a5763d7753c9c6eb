"""Plots as SVG and PNG, the same bytes each time. The one file that knows matplotlib.

Colours are those of Okabe and Ito (2008, "Color universal design"), which people of all kinds of colour vision tell
apart; markers and dashes tell the same, so that a print in grey says it too.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
import re
import warnings
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ctx_jax.atlas.report.numbers import shown
from ctx_jax.atlas.report.page import plain
from ctx_jax.atlas.report.plots import Curves, HeatMap, Plot, Scatter
from ctx_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*"]
DASHES: list[Any] = ["solid", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1))]
BASELINES: list[Any] = [(0, (6, 2)), (0, (3, 2)), (0, (1, 2)), (0, (6, 2, 1, 2))]
GREY = "#767676"
GREY_MARKERS = {True: "x", False: "+"}
"""Of published values: of all layers, of some."""
MARKED = 13
"""Markers of a line, at most."""
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ctx-jax",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
}
WIDTH = 3.6
"""Inches of a small plot: 346 px, nearly what a telephone has."""
TITLE = 36
"""Letters of a line of a small plot's title."""
LABEL = 48
"""Letters of a line of its legend."""
PIXELS = 150
"""Of an inch, in the PNG."""


def require_matplotlib() -> None:
    """Raises: InputError: it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("report: found no matplotlib, expected it installed: pip install 'ctx-jax[atlas]'")


def draw(plot: Plot) -> tuple[str, bytes]:
    """The plot as an SVG element, whose ids begin with the plot's name, and as a PNG file.

    Raises:
      InputError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # PNGs show boxes for letters that the font has not; SVGs are shown with the reader's fonts.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        if isinstance(plot, Curves):
            figure, tips = _curves(plot), {}
        elif isinstance(plot, HeatMap):
            figure, tips = _heat_map(plot), {}
        else:
            figure, tips = _scatter(plot)
        figure.draw_without_rendering()  # lays out once, for both files
        figure.set_layout_engine("none")
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg")
        figure.savefig(png, format="png", dpi=PIXELS, metadata={"Software": None})
    return _finished(svg.getvalue(), plot, tips), png.getvalue()


def _finished(svg: bytes, plot: Plot, tips: dict[str, list[str]]) -> str:
    """Its SVG, fit to stand in a page among others: no ids that clash, no style that reaches out."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        parent.tag = parent.tag.rsplit("}", 1)[-1]
        for name, value in list(parent.attrib.items()):
            del parent.attrib[name]
            name = name.rsplit("}", 1)[-1]
            if name == "id":
                value = f"{plot.name}-{value}"
            elif name == "href":
                value = value.replace("#", f"#{plot.name}-", 1)
            parent.attrib[name] = re.sub(r"url\(#", f"url(#{plot.name}-", value)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == "metadata" or (child.tag == "defs" and child.find("style") is not None):
                parent.remove(child)
    for group, texts in tips.items():
        uses = list(root.iterfind(f".//g[@id='{plot.name}-{group}']//use"))
        for use, text in zip(uses, texts, strict=True):
            ElementTree.SubElement(use, "title").text = text
    width = float(root.attrib["width"].removesuffix("pt"))
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-label": plain(plot.alt)}
    root.attrib["style"] = f"stroke-linejoin:round;stroke-linecap:butt;width:{width * 4 / 3:.0f}px"
    del root.attrib["width"], root.attrib["height"]
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _curves(plot: Curves) -> Figure:
    entries: list[tuple[Any, str]] = []
    lower = [line for line in plot.lower if line.drawn]
    figure = _figure(WIDTH, 3.5 if lower else 2.5)
    if lower:
        axes, beneath = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    else:
        axes = beneath = figure.subplots()
    axes.set_title(_wrapped(plot.title, TITLE))
    _lines(axes, plot.lines, plot.relative, entries)
    end = 1.0 if plot.relative else max(line.num_layers for line in plot.lines)
    for place, mark in enumerate(mark for mark in plot.marks if math.isfinite(mark.value)):
        at = end * (1.08 + 0.05 * place)
        bar = axes.errorbar(
            [at], [mark.value], [[_gap(mark.value, mark.low)], [_gap(mark.high, mark.value)]],
            fmt=MARKERS[mark.style % len(MARKERS)], color=COLOURS[mark.style % len(COLOURS)],
            markerfacecolor="white", markersize=6, capsize=2, linewidth=1,
        )  # fmt: skip
        entries.append((bar, mark.label))
    _baselines(axes, plot, entries)
    axes.set_ylabel(plot.unit)
    if lower:
        _lines(beneath, lower, plot.relative, entries)
        beneath.set_ylabel(plot.lower_unit)
    _ticks(beneath, plot.relative, end, bool(plot.marks))
    _legend(figure, entries)
    return figure


def _legend(figure: Figure, entries: list[tuple[Any, str]]) -> None:
    """Beneath the plot, which grows by it."""
    labels = [_wrapped(label, LABEL) for _, label in entries]
    height = figure.get_figheight() + sum(0.06 + 0.125 * len(label.split("\n")) for label in labels)
    figure.set_size_inches(figure.get_figwidth(), height)
    figure.legend(
        [handle for handle, _ in entries], labels, loc="outside lower left", handlelength=3.2, labelspacing=0.25,
        borderaxespad=0.2,
    )  # fmt: skip


def _lines(axes: Axes, lines: Any, relative: bool, entries: list[tuple[Any, str]]) -> None:
    for line in lines:
        if not line.drawn:
            continue
        x = [layer / max(line.num_layers, 1) if relative else layer for layer in line.layers]
        colour = GREY if line.style is None else COLOURS[line.style % len(COLOURS)]
        marker = GREY_MARKERS[line.joined] if line.style is None else MARKERS[line.style % len(MARKERS)]
        (drawn,) = axes.plot(
            x, line.values, color=colour, marker=marker,
            linestyle=DASHES[line.dashes % len(DASHES)] if line.joined else "none",
            markerfacecolor=colour if line.dashes == 0 else "white",
            markevery=math.ceil(len(x) / MARKED),
            markersize=7 if line.style is None else 4.5, markeredgewidth=1.6 if line.style is None else 1,
        )  # fmt: skip
        if line.low is not None and line.high is not None:
            axes.fill_between(x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        entries.append((drawn, f"{line.label} ({line.source})" if line.source else line.label))


def _baselines(axes: Axes, plot: Curves, entries: list[tuple[Any, str]]) -> None:
    """Level lines. One far off would flatten the curves: it is named, with an arrow that says where it lies."""
    seen = [
        value
        for line in plot.lines
        for values in (line.values, line.low or (), line.high or ())
        for value in values
        if math.isfinite(value)
    ]
    low, high = min(seen), max(seen)
    room = max(high - low, 0.02 * abs(high))
    from matplotlib.lines import Line2D

    for place, (name, value) in enumerate(plot.baselines.items()):
        label = f"{name} {shown(value, plot.digits)}"
        if not math.isfinite(value):
            handle = Line2D([], [], linestyle="none")
        elif value < low - room or value > high + room:
            handle = Line2D([], [], color=GREY, linestyle="none", marker="v" if value < low else "^")
            label += ", below the axis" if value < low else ", above the axis"
        else:
            handle = axes.axhline(value, color=GREY, linewidth=1, linestyle=BASELINES[place % len(BASELINES)])
        entries.append((handle, label))


def _ticks(axes: Axes, relative: bool, end: float, mixes: bool) -> None:
    step = max(1, math.ceil(end / 12))
    ticks = [0, 0.25, 0.5, 0.75, 1] if relative else list(range(0, int(end) + 1, step))
    names = [f"{tick:g}" for tick in ticks]
    if mixes:
        ticks, names = [*ticks, end * 1.1], [*names, "mix"]
    axes.set_xticks(ticks, names)
    axes.set_xlabel("relative depth l/L" if relative else "layer")


def _heat_map(plot: HeatMap) -> Figure:
    from matplotlib.patches import Rectangle

    rows = [_wrapped(row, 34) for row in plot.rows]
    cell = 0.2 if not plot.written else 0.42 if len(plot.columns) <= 14 else 0.36
    longest = max(len(part) for row in rows for part in row.split("\n"))
    tall = [max(1, row.count("\n") + 1) for row in rows]
    height = max(0.27 if plot.written else cell, 0.16 * max(tall))
    figure = _figure(0.4 + 0.075 * longest + cell * len(plot.columns), 1.0 + height * len(rows))
    axes = figure.subplots()
    colours = _shades()
    for y, (values, shades) in enumerate(zip(plot.values, plot.shades, strict=True)):
        for x, (value, shade) in enumerate(zip(values, shades, strict=True)):
            missing = not math.isfinite(shade)
            colour = "#ffffff" if missing else colours(min(max(shade, 0.0), 1.0))
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.6))
            if plot.written:
                best = plot.marked[y] == x
                axes.text(
                    x + 0.5, y + 0.5, shown(value, plot.digits), ha="center", va="center", fontsize=7.5,
                    color="white" if _luminance(colour) < 0.18 else "black", fontweight="bold" if best else "normal",
                )  # fmt: skip
        if (best := plot.marked[y]) is not None:
            inset = (best + 0.04, y + 0.06)
            axes.add_patch(Rectangle(inset, 0.92, 0.88, fill=False, edgecolor=COLOURS[1], linewidth=1.4, zorder=3))
    axes.set(xlim=(0, len(plot.columns)), ylim=(len(rows), 0))
    step = 1 if plot.written else math.ceil(len(plot.columns) / 13)
    axes.set_xticks([x + 0.5 for x in range(0, len(plot.columns), step)], plot.columns[::step])
    if max(map(len, plot.columns)) > 5:
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(plot.across)
    figure.suptitle(_wrapped(plot.title, int(figure.get_figwidth() * 11)), x=0.01, ha="left", size=9.5, weight="bold")
    return figure


def _shades() -> Any:
    """White to dark blue, in even steps of lightness: it prints."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shades", ["#f7fbff", "#9ecae1", "#3182bd", "#08306b"])


def _luminance(colour: Any) -> float:
    """Relative luminance (WCAG 2): on less than 0.18 white is easier to read than black."""
    from matplotlib.colors import to_rgb

    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _scatter(plot: Scatter) -> tuple[Figure, dict[str, list[str]]]:
    entries, tips = [], {}
    figure = _figure(WIDTH, 3.3)
    axes = figure.subplots()
    axes.set_title(_wrapped(plot.title, TITLE))
    # Two cycles of different lengths: 77 senses until a colour and a marker meet again.
    looks = itertools.cycle(zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False))
    for place, ((name, places, texts), (colour, marker)) in enumerate(zip(plot.kinds, looks, strict=False)):
        there = [(x, y, text) for (x, y), text in zip(places, texts, strict=True) if math.isfinite(x + y)]
        (drawn,) = axes.plot(
            [x for x, _, _ in there], [y for _, y, _ in there], linestyle="none", color=colour, marker=marker,
            markersize=6, markeredgecolor="white", markeredgewidth=0.4, gid=f"kind-{place}",
        )  # fmt: skip
        tips[f"kind-{place}"] = [plain(f"{name}: {text}") for _, _, text in there]
        entries.append((drawn, f"{name} ({len(there)})"))
    axes.set_xticks([])
    axes.set_yticks([])
    _legend(figure, entries)
    return figure, tips


def _gap(high: float, low: float) -> float:
    return max(high - low, 0.0) if math.isfinite(high - low) else 0.0


def _wrapped(text: str, width: int) -> str:
    """In lines of at most so many letters, broken inside words where these are longer."""
    import textwrap

    return "\n".join(textwrap.wrap(plain(text), max(width, 12))) or " "
