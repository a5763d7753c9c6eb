"""What probes learnt: a plot for each task, a heat map of them all, and what is known of each besides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from ctx_jax.atlas.report.numbers import best, number, points, shown
from ctx_jax.atlas.report.page import paragraph, table
from ctx_jax.atlas.report.plots import Block, Curves, HeatMap, Line, Mark, depth_note, depths, named
from ctx_jax.atlas.report.published import published
from ctx_jax.atlas.results import Atlas, ModelAtlas, Probe, Score, Task

READING = (
    "Bands are 95 % intervals. Grey lines are baselines, grey crosses published models on other data. A mark right of "
    "the last layer is a learnt mix of all layers. Selectivity is the score less that of the control task."
)


class Probed(NamedTuple):
    """One kind of probe on one task, with a model that it was tried on.

    Attributes:
      style: the model's number.
      model: it.
      task: as it has it.
      probe: likewise.
    """

    style: int
    model: ModelAtlas
    task: Task
    probe: Probe

    @property
    def title(self) -> str:
        """With the kind, where a task has several."""
        several = len(self.task.probes) > 1
        return f"{self.task.title}, {self.probe.kind}, {self.probe.metric}" if several else self.task.title


def curves(atlas: Atlas) -> list[Block]:
    """A plot for each task and kind of probe, then a table."""
    groups: dict[tuple[str, str, str], list[Probed]] = {}
    for one in _probed(atlas):
        groups.setdefault((one.task.name, one.probe.kind, one.probe.metric), []).append(one)
    plots = [_curves(place, group) for place, group in enumerate(groups.values(), 1)]
    plots += [_mixes(place, group) for place, group in enumerate(groups.values(), 1)]
    shown_ones = [plot for plot in plots if plot.drawn]
    facts = _facts(list(groups.values()))
    return [paragraph(READING), *depth_note(shown_ones), shown_ones, facts] if plots else []


def heat_maps(atlas: Atlas) -> list[Block]:
    """One for each model."""
    return [[_heat_map(style, model) for style, model in enumerate(atlas.models) if any(t.probes for t in model.tasks)]]


def _probed(atlas: Atlas) -> Iterator[Probed]:
    for style, model in enumerate(atlas.models):
        for task in model.tasks:
            for probe in task.probes:
                yield Probed(style, model, task, probe)


def _curves(place: int, group: list[Probed]) -> Curves:
    lines, lower, marks, baselines = [], [], [], {}
    for style, model, task, probe in group:
        layers = depths(model.num_layers, probe.layers)
        low, high = ([points(_bound(score, side)) for score in probe.layers] for side in ("low", "high"))
        scores = [points(score) for score in probe.layers]
        lines.append(Line(model.name, layers, model.num_layers, scores, style, 0, low, high))
        if probe.mix is not None:
            mean, low, high = points(probe.mix), points(_bound(probe.mix, "low")), points(_bound(probe.mix, "high"))
            marks.append(Mark(f"{model.name}, mix of layers {shown(mean)}", mean, low, high, style))
        if probe.control is not None:
            left = [one - points(other) for one, other in zip(scores, probe.control, strict=True)]
            lower.append(Line(f"{model.name}, selectivity", layers, model.num_layers, left, style, 1))
        metrics = {each.metric for each in task.probes}
        for name, value in task.baselines.items():
            # A name may end in the metric that the baseline is of; without it it is of all.
            of = name.rpartition(" (")[2].removesuffix(")")
            if of == probe.metric or of not in metrics:
                baselines.setdefault(name, points(value))
    first = group[0]
    if first.task.name.rsplit("/", 1)[-1] == "pos" and first.probe.kind == "linear":
        lines += [
            Line(one.model, list(one.values), one.num_layers, [points(v) for v in one.values.values()], None,
                 joined=False, source=one.source)
            for one in published("pos")
        ]  # fmt: skip
        baselines |= {
            f"{one.model}, its best layer ({one.source})": points(one.best)
            for one in published("pos")
            if one.best is not None
        }
    caption = f"{first.probe.kind.capitalize()} probe; {first.task.name}, {first.task.train} training examples, "
    caption += f"{first.task.test} test examples"
    caption += f", {first.task.classes} classes" if first.task.classes else ""
    caption += f", {first.task.seeds} seeds."
    return Curves(
        named("task", place, first.task.name, first.probe.kind), first.title, caption, f"{first.probe.metric}, × 100",
        lines, 1, baselines, marks, lower, "selectivity",
    )  # fmt: skip


def _mixes(place: int, group: list[Probed]) -> Curves:
    """What each layer adds to those below it, and what share of the mix of all it has."""
    lines, shares = [], []
    for style, model, _, probe in group:
        if probe.cumulative is not None:
            layers = depths(model.num_layers, probe.cumulative)
            low, high = ([points(_bound(score, side)) for score in probe.cumulative] for side in ("low", "high"))
            scores = [points(score) for score in probe.cumulative]
            lines.append(Line(f"{model.name}, layers 0 to l", layers, model.num_layers, scores, style, 0, low, high))
        if probe.mix_weights is not None:
            layers = depths(model.num_layers, probe.mix_weights)
            weights = [points(number(weight)) for weight in probe.mix_weights]
            shares.append(Line(f"{model.name}, share in the mix of all", layers, model.num_layers, weights, style, 1))
    first = group[0]
    caption = f"{first.probe.kind.capitalize()} probe on learnt mixes of layers 0 to l; beneath it the weights of the "
    caption += f"mix of all layers, which sum to 100; {first.task.name}."
    return Curves(
        named("mixes", place, first.task.name, first.probe.kind), f"{first.title}: mixes of layers", caption,
        f"{first.probe.metric}, × 100", lines, 1, lower=shares, lower_unit="share, × 100",
    )  # fmt: skip


def _bound(score: Score | None, side: str) -> float:
    return number(None if score is None else getattr(score, side))


def _heat_map(style: int, model: ModelAtlas) -> HeatMap:
    rows = [Probed(style, model, task, probe) for task in model.tasks for probe in task.probes]
    for row in rows:
        depths(model.num_layers, row.probe.layers)
    values = [[points(score) for score in row.probe.layers] for row in rows]
    tops = [best(row) for row in values]
    shares = [
        [float("nan") if top is None or row[top] <= 0 else value / row[top] for value in row]
        for row, top in zip(values, tops, strict=True)
    ]
    least = min((share for row in shares for share in row if math.isfinite(share)), default=0.0)
    scale = max(1 - least, 1e-9)
    return HeatMap(
        named("heat", style + 1, model.name), f"{model.name}: tasks by layers",
        f"Scores × 100. Dark: near the task's best layer, which has a frame; the lightest cell has {100 * least:.0f} % "
        "of its task's best.",
        [row.title for row in rows], [str(layer) for layer in range(model.num_layers + 1)], "layer", "tasks", values,
        [[(share - least) / scale for share in row] for row in shares], 1, tops,
    )  # fmt: skip


def _facts(groups: list[list[Probed]]) -> str:
    head = ["task", "model", "best layer", "score", "mix", "expected layer", "centre of gravity", "bits a label",
            "compression", "seconds"]  # fmt: skip
    rows = []
    for group in groups:
        for one in group:
            at, probe = best(one.probe.layers), one.probe
            bits = [number(value) for value in probe.bits or []]
            fewest = best([-value for value in bits])
            least = float("nan") if fewest is None else bits[fewest]
            ratio = number(probe.uniform_bits) / least if least else float("nan")
            rows.append([
                one.title, one.model.name, shown(at, 0), shown(None if at is None else points(probe.layers[at])),
                shown(points(probe.mix)), shown(probe.expected_layer, 2), shown(probe.center_of_gravity, 2),
                shown(least, 3) + ("" if fewest is None else f" (layer {fewest})"), shown(ratio),
                shown(one.task.seconds),
            ])  # fmt: skip
    caption = "Of each task; bits at the layer with the fewest. Seconds are of all of a task's probes."
    return table(caption, head, rows, text=[1])
