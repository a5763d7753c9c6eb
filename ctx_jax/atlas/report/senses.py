"""Words and their senses: disambiguation by layer and by frequency, and maps."""

from __future__ import annotations

import pathlib

from ctx_jax.atlas.report.drawing import draw
from ctx_jax.atlas.report.numbers import number, points
from ctx_jax.atlas.report.page import heading
from ctx_jax.atlas.report.plots import Block, Curves, Line, Plot, Scatter, depth_note, depths, named
from ctx_jax.atlas.report.published import published
from ctx_jax.atlas.results import Atlas, ModelAtlas, SenseMap, SenseTask
from ctx_jax.errors import InputError

UNIT = "accuracy, × 100"


def blocks(atlas: Atlas) -> list[Block]:
    """By layer, by frequency, maps."""
    tasks: dict[str, list[tuple[int, ModelAtlas, SenseTask]]] = {}
    for style, model in enumerate(atlas.models):
        for task in model.senses:
            tasks.setdefault(task.name, []).append((style, model, task))
    plots = [_by_layer(place, there) for place, there in enumerate(tasks.values(), 1)]
    several = [one for there in tasks.values() for one in there if one[2].by_frequency]
    plots += [_by_frequency(place, model, task) for place, (_, model, task) in enumerate(several, 1)]
    maps: list[Plot] = []
    for model in atlas.models:
        for found in model.maps:
            maps += [_map(len(maps) + at, model.name, found, layer) for at, layer in enumerate(_in_order(found), 1)]
    plots = [plot for plot in plots if plot.drawn]
    return ([*depth_note(plots), plots] if plots else []) + ([heading("Maps of senses"), maps] if maps else [])


def write_map(found: SenseMap, model: str, folder: pathlib.Path) -> list[str]:
    """Draws a map, a file for each layer, and returns their names.

    Raises:
      InputError: matplotlib is not installed, or the folder cannot be written.
    """
    names = []
    for layer in _in_order(found):
        names.append(f"{found.method.lower()}-{layer}.svg")
        picture, _ = draw(_map(1, model, found, layer))
        try:
            (folder / names[-1]).write_text(picture, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}), expected a writable folder") from error
    return names


def _by_layer(place: int, there: list[tuple[int, ModelAtlas, SenseTask]]) -> Curves:
    lines, baselines, task = [], {}, there[0][2]
    for style, model, found in there:
        wanted = [("nearest mean", found.centroid), ("1-NN", found.one_nn), ("macro-F1", found.macro_f1)]
        for dashes, (what, values) in enumerate(wanted):
            if values:
                layers = depths(model.num_layers, values)
                numbers = [points(value) for value in values]
                lines.append(Line(f"{model.name}, {what}", layers, model.num_layers, numbers, style, dashes))
        baselines.setdefault("most frequent sense", points(found.most_frequent))
    for one in published("1-nn of SemCor") if "semcor" in task.name.lower() else []:
        values = [points(value) for value in one.values.values()]
        lines.append(
            Line(f"{one.model}, 1-NN", list(one.values), one.num_layers, values, None, joined=False, source=one.source)
        )
    caption = f"{task.lemmas} words, {task.train} training occurrences, {task.test} test occurrences."
    caption += " Grey: a published model." if any(line.source for line in lines) else ""
    return Curves(named("senses", place, task.name), f"Senses: {task.name}", caption, UNIT, lines, 1, baselines)


def _by_frequency(place: int, model: ModelAtlas, task: SenseTask) -> Curves:
    lines = [
        Line(f"{name} in training", depths(model.num_layers, values), model.num_layers, [points(v) for v in values], at)
        for at, (name, values) in enumerate(task.by_frequency.items())
    ]
    return Curves(
        named("senses-frequency", place, model.name, task.name), f"{model.name}: {task.name} by frequency",
        "By the nearest mean; how often the right sense occurs in training.", UNIT, lines,
    )  # fmt: skip


def _in_order(found: SenseMap) -> list[str]:
    return sorted(found.layers, key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else 0, layer))


def _map(place: int, model: str, found: SenseMap, layer: str) -> Scatter:
    places = [(number(x), number(y)) for x, y in found.layers[layer]]
    kinds = []
    for at, name in enumerate(found.senses):
        mine = [point for point, sense in enumerate(found.sense) if sense == at]
        kinds.append((name, [places[point] for point in mine], [found.contexts[point] for point in mine]))
    return Scatter(
        named("map", place, model, found.word, layer), f"{found.word}: {model}, layer {layer} ({found.method})",
        f"{found.method}; each point is an occurrence. Hovering shows its context.", kinds,
    )  # fmt: skip
