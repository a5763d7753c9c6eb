"""Maps of a word's occurrences as a picture."""

from __future__ import annotations

import importlib
import math
import os
from typing import Any

from ctx_jax.atlas.results import SenseMap
from ctx_jax.errors import InputError


def matplotlib(part: str) -> Any:
    """A part of matplotlib, which is imported when something is drawn.

    Raises:
      InputError: it is not installed.
    """
    try:
        return importlib.import_module(f"matplotlib.{part}")
    except ImportError as error:
        raise InputError("matplotlib: not installed; expected pip install 'ctx-jax[atlas]'") from error


def draw_map(map: SenseMap, path: str | os.PathLike[str]) -> None:
    """Writes a picture, a panel for each layer, in the format that the path ends with.

    Raises:
      InputError: matplotlib is not installed, or the path cannot be written.
    """
    columns = min(len(map.layers), 4)
    rows = math.ceil(len(map.layers) / columns)
    figure = matplotlib("figure").Figure(figsize=(3 * columns, 3 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, (layer, points) in zip(panels, map.layers.items(), strict=False):
        panel.set_axis_on()
        panel.set(xticks=[], yticks=[], title=f"layer {layer}")
        for sense, name in enumerate(map.senses):
            mine = [point for point, its in zip(points, map.sense, strict=True) if its == sense]
            panel.scatter([x for x, _ in mine], [y for _, y in mine], s=6, label=name, color=f"C{sense % 10}")
    figure.suptitle(f"{map.word}, {map.method}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}), expected a writable path") from error
