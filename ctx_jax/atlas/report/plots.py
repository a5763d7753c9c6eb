"""What is drawn, before it is drawn: the numbers of each plot, and the words beside them."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ctx_jax.atlas.report.numbers import shown
from ctx_jax.atlas.report.page import paragraph
from ctx_jax.errors import InputError


class Line(NamedTuple):
    """One curve over layers.

    Attributes:
      label: in the legend.
      layers: of the values.
      num_layers: L of its model.
      values: NaN where there is none.
      style: which colour and marker, a number for each model; None for published ones, which are grey.
      dashes: which pattern: 0 is a solid line.
      low: of the band; None without.
      high: see low.
      joined: neighbouring layers by a line.
      source: of published ones.
    """

    label: str
    layers: Sequence[int]
    num_layers: int
    values: Sequence[float]
    style: int | None = 0
    dashes: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    joined: bool = True
    source: str = ""

    @property
    def drawn(self) -> bool:
        """Is there anything to see?"""
        return any(map(math.isfinite, self.values))


class Mark(NamedTuple):
    """One value that belongs to no layer, drawn right of the last one.

    Attributes:
      label: in the legend.
      value: of it.
      low: of its interval.
      high: see low.
      style: as of lines.
    """

    label: str
    value: float
    low: float
    high: float
    style: int


class Curves(NamedTuple):
    """Curves over layers.

    Attributes:
      name: of the files, unique.
      title: above it.
      caption: beneath it; what a reader needs to know besides.
      unit: of the vertical axis.
      lines: curves.
      digits: after the point, in its table.
      baselines: level lines.
      marks: of mixes of layers.
      lower: curves in an axis of their own beneath, with the same horizontal one.
      lower_unit: of that axis.
    """

    name: str
    title: str
    caption: str
    unit: str
    lines: list[Line]
    digits: int = 1
    baselines: Mapping[str, float] = types.MappingProxyType({})
    marks: Sequence[Mark] = ()
    lower: Sequence[Line] = ()
    lower_unit: str = ""

    @property
    def drawn(self) -> bool:
        """Is there anything to see?"""
        return any(line.drawn and line.style is not None for line in self.lines)

    @property
    def relative(self) -> bool:
        """Is the horizontal axis l/L? It is, where models have different numbers of layers."""
        return len({line.num_layers for line in [*self.lines, *self.lower]}) > 1

    @property
    def alt(self) -> str:
        """For who cannot see it."""
        said = []
        for line in self.lines:
            there = [(value, layer) for value, layer in zip(line.values, line.layers, strict=True) if value == value]
            if there:
                (low, at_low), (high, at_high) = min(there), max(there)
                said.append(
                    f"{line.label}: from {shown(low, self.digits)} at layer {at_low} "
                    f"to {shown(high, self.digits)} at layer {at_high}"
                )
        return f"{self.title}: {self.unit} over layers. " + "; ".join(said) + "."


class HeatMap(NamedTuple):
    """A table of coloured cells.

    Attributes:
      name: of the files, unique.
      title: above it.
      caption: beneath it.
      rows: their names.
      columns: their names.
      across: what columns are.
      down: what rows are.
      values: [rows, columns], as they are written into cells.
      shades: [rows, columns], from 0 to 1: dark is 1.
      digits: after the point.
      marked: of each row, the column whose cell has a frame; None without.
      written: cells have their numbers in them, else their colours alone.
    """

    name: str
    title: str
    caption: str
    rows: list[str]
    columns: list[str]
    across: str
    down: str
    values: list[list[float]]
    shades: list[list[float]]
    digits: int
    marked: Sequence[int | None]
    written: bool = True

    @property
    def alt(self) -> str:
        """For who cannot see it."""
        said = [
            f"{row}: {shown(values[best], self.digits)} at {self.columns[best]}"
            for row, values, best in zip(self.rows, self.values, self.marked, strict=True)
            if best is not None
        ]
        where = f"{self.title}: {len(self.rows)} {self.down} by {len(self.columns)} {self.across}"
        return f"{where}. Highest: {'; '.join(said)}." if said else f"{where}."


class Scatter(NamedTuple):
    """Points of several kinds.

    Attributes:
      name: of the files, unique.
      title: above it.
      caption: beneath it.
      kinds: name, points and the words of each, which hovering shows.
    """

    name: str
    title: str
    caption: str
    kinds: list[tuple[str, list[tuple[float, float]], list[str]]]

    @property
    def alt(self) -> str:
        """For who cannot see it."""
        return f"{self.title}. Points of " + ", ".join(f"{name} ({len(places)})" for name, places, _ in self.kinds)


Plot = Curves | HeatMap | Scatter
Block = str | Sequence[Plot]
"""A piece of a section: HTML, or plots side by side."""


def depth_note(plots: Sequence[Plot]) -> list[str]:
    """Says so, where a plot's horizontal axis is not the number of the layer."""
    text = "Where models have different numbers of layers the horizontal axis is the relative depth l/L."
    return [paragraph(text)] if any(isinstance(plot, Curves) and plot.relative for plot in plots) else []


def named(part: str, place: int, *texts: str) -> str:
    """A name for files and ids: `task-2-en-ewt-ud-pos`. Part and place make it unique."""
    words = re.findall(r"[a-z0-9]+", " ".join(texts).lower())
    return "-".join([part, str(place), *words])[:60].rstrip("-")


def depths(num_layers: int, values: Sequence[float]) -> range:
    """Layers of the values.

    Raises:
      InputError: they are not one for each layer.
    """
    if len(values) != num_layers + 1:
        raise InputError(f"atlas: found {len(values)} values, expected {num_layers + 1}, one for each layer from 0")
    return range(num_layers + 1)
