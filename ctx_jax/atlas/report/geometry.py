"""The shape of each layer's space."""

from __future__ import annotations

from collections.abc import Callable

from ctx_jax.atlas.report.numbers import MISSING, number, shown
from ctx_jax.atlas.report.page import heading, table
from ctx_jax.atlas.report.plots import Block, Curves, HeatMap, Line, depth_note, depths, named
from ctx_jax.atlas.report.published import published
from ctx_jax.atlas.results import Atlas, Geometry, ModelAtlas

Values = Callable[[Geometry], list[float]]
WRITTEN = 14
"""Layers up to which cells of CKA hold numbers."""
WIDEST = 5
"""Outlier dimensions that are named; of more, how many there are."""


def blocks(atlas: Atlas) -> list[Block]:
    """For each corpus: curves, CKA, outlier dimensions; then CKA of models with each other."""
    corpora = dict.fromkeys(geometry.corpus for model in atlas.models for geometry in model.geometry)
    found: list[Block] = []
    for place, corpus in enumerate(corpora, 1):
        there = [
            (style, model, geometry)
            for style, model in enumerate(atlas.models)
            for geometry in model.geometry
            if geometry.corpus == corpus
        ]
        words = ", ".join(f"{geometry.words} words by {model.name}" for _, model, geometry in there)
        found.append(heading(f"{corpus}: {words}"))
        curves = _curves(place, there)
        found += [*depth_note(curves), curves]
        found.append([_cka(place, style, model, geometry) for style, model, geometry in there if geometry.cka])
        found += [_outliers(model, geometry) for _, model, geometry in there if any(geometry.outliers)]
    return [*found, [_between(place, names, cka) for place, (names, cka) in enumerate(atlas.cka.items(), 1)]]


def _less(one: Values, other: Values) -> Values:
    return lambda geometry: [number(a) - number(b) for a, b in zip(one(geometry), other(geometry), strict=False)]


def _curves(place: int, there: list[tuple[int, ModelAtlas, Geometry]]) -> list[Curves]:
    anisotropy: Values = lambda geometry: geometry.anisotropy
    self_similarity: Values = lambda geometry: geometry.self_similarity
    intra_sentence: Values = lambda geometry: geometry.intra_sentence
    uncentred: Values = lambda geometry: geometry.explained_uncentred
    random: Values = lambda geometry: geometry.explained_anisotropy
    wanted: list[tuple[str, str, int, list[tuple[str, Values]]]] = [
        ("Anisotropy", "mean cosine", 3, [("", anisotropy)]),
        ("Self-similarity", "mean cosine", 3,
         [("raw", self_similarity), ("adjusted", _less(self_similarity, anisotropy))]),
        ("Intra-sentence similarity", "mean cosine", 3,
         [("raw", intra_sentence), ("adjusted", _less(intra_sentence, anisotropy))]),
        ("Explained variance", "share of variance", 3,
         [("uncentred", uncentred), ("adjusted", _less(uncentred, random)),
          ("centred", lambda geometry: geometry.explained_centred)]),
        ("Norm", "mean length of a vector", 2, [("", lambda geometry: geometry.norm)]),
        ("Dimensions in use", "dimensions", 1,
         [("effective rank", lambda geometry: geometry.effective_rank),
          ("participation ratio", lambda geometry: geometry.participation_ratio)]),
    ]  # fmt: skip
    plots = []
    for title, unit, digits, variants in wanted:
        lines = []
        for style, model, geometry in there:
            for dashes, (variant, values) in enumerate(variants):
                if numbers := [number(value) for value in values(geometry)]:
                    layers = depths(model.num_layers, numbers)
                    label = f"{model.name}, {variant}" if variant else model.name
                    lines.append(Line(label, layers, model.num_layers, numbers, style, dashes))
        if not any(line.drawn for line in lines):
            continue
        for one in published(title.lower()):
            joined = len(one.values) == one.num_layers + 1
            values = list(one.values.values())
            lines.append(
                Line(one.model, list(one.values), one.num_layers, values, None, joined=joined, source=one.source)
            )
        caption = "Adjusted: less what random words give in the same layer." if len(variants) > 1 else ""
        caption = caption if any(variant == "adjusted" for variant, _ in variants) else ""
        plot = Curves(named(f"geometry-{place}", len(plots) + 1, title), title, caption, unit, lines, digits)
        if any(line.source for line in lines):
            caption = f"{caption} Grey: published models on other text; marks alone where a paper gives some layers."
        plots.append(plot._replace(caption=caption.strip()))
    return plots


def _cka(place: int, style: int, model: ModelAtlas, geometry: Geometry) -> HeatMap:
    names = [str(layer) for layer in range(len(geometry.cka))]
    name = named(f"cka-{place}", style + 1, model.name)
    return _alike(name, f"{model.name}: CKA of its layers", names, names, "layer", geometry.cka)


def _between(place: int, names: str, cka: list[list[float]]) -> HeatMap:
    first, _, second = names.partition(" × ")
    return _alike(
        named("cka-models", place, names), f"CKA: {names}", [f"{first} {row}" for row in range(len(cka))],
        [str(column) for column in range(len(cka[0]) if cka else 0)], f"layer of {second}", cka,
    )  # fmt: skip


def _alike(name: str, title: str, rows: list[str], columns: list[str], across: str, cka: list[list[float]]) -> HeatMap:
    values = [[number(value) for value in row] for row in cka]
    return HeatMap(name, title, "1, the darkest: alike but for a rotation.", rows, columns, across, "layers", values,
                   values, 2, [None] * len(rows), len(columns) <= WRITTEN)  # fmt: skip


def _outliers(model: ModelAtlas, geometry: Geometry) -> str:
    rows = []
    for layer, found in enumerate(geometry.outliers):
        widest = sorted(found, key=lambda pair: (-abs(number(pair[1])), pair[0]))[:WIDEST]
        said = ", ".join(f"{dimension} (z {shown(z)})" for dimension, z in widest)
        said += f" and {len(found) - WIDEST} more" if len(found) > WIDEST else ""
        rows.append([str(layer), str(len(found)), said or MISSING])
    caption = f"{model.name}: outlier dimensions of {model.width}, those farthest out first"
    return table(caption, ["layer", "how many", "dimensions"], rows, text=[2])
