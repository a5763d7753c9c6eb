"""Vectors of sentences, and the advice: what to use."""

from __future__ import annotations

import math

from ctx_jax.atlas.report.numbers import best, number, points, shown
from ctx_jax.atlas.report.page import table
from ctx_jax.atlas.report.plots import Block, HeatMap, named
from ctx_jax.atlas.report.summary import title
from ctx_jax.atlas.results import Atlas, ModelAtlas, SentenceScore


def blocks(atlas: Atlas) -> list[Block]:
    """A heat map for each model and corpus: pooling and repair by layer."""
    found: list[HeatMap] = []
    for model in atlas.models:
        for corpus in dict.fromkeys(score.corpus for score in model.sentences):
            there = [score for score in model.sentences if score.corpus == corpus]
            found.append(_heat_map(len(found) + 1, model, corpus, there))
    return [found]


def advice(atlas: Atlas) -> list[Block]:
    """A table for each model."""
    return [_advice(model) for model in atlas.models if model.advice]


def _heat_map(place: int, model: ModelAtlas, corpus: str, scores: list[SentenceScore]) -> HeatMap:
    named_layers = dict.fromkeys(score.layer for score in scores)
    numbered = sorted((layer for layer in named_layers if layer.isdigit()), key=int)
    columns = numbered + [layer for layer in named_layers if not layer.isdigit()]
    rows = list(dict.fromkeys((score.pooling, score.repair) for score in scores))
    known = {(score.pooling, score.repair, score.layer): number(score.spearman) for score in scores}
    values = [[known.get((*row, column), float("nan")) for column in columns] for row in rows]
    there = [value for row in values for value in row if math.isfinite(value)]
    low, high = min(there, default=0.0), max(there, default=1.0)
    scale = max(high - low, 1e-9)
    return HeatMap(
        named("sentences", place, model.name, corpus), f"{model.name}: {corpus}",
        "Spearman × 100. Dark is high over the whole table; each row's best layer has a frame.",
        [f"{pooling}, {repair}" for pooling, repair in rows], columns, "layer", "kinds of pooling and repair", values,
        [[(value - low) / scale for value in row] for row in values], 1, [best(row) for row in values],
    )  # fmt: skip


def _advice(model: ModelAtlas) -> str:
    head = ["task", "metric", "best layer", "score", "last layer", "mix", "fewest layers within a point", "their score",
            "their FLOPs, %", "in words"]  # fmt: skip
    rows = [
        [title(model, one.task), one.metric, str(one.best_layer), shown(points(one.best_score)),
         shown(points(one.last_score)), shown(points(one.mix_score)), str(one.shorter),
         shown(points(one.shorter_score)), shown(points(one.shorter_flops), 0), one.text]
        for one in model.advice
    ]  # fmt: skip
    return table(f"{model.name}: scores × 100", head, rows, text=[1, 9])
