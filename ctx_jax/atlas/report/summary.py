"""The few lines that a reader wants first."""

from __future__ import annotations

import math

from ctx_jax.atlas.report.numbers import MISSING, best, count, number, points, shown
from ctx_jax.atlas.results import Advice, Atlas, Geometry, ModelAtlas


def summary(atlas: Atlas) -> list[str]:
    """Up to five lines a model: best layers, shape, what the last layer loses, what truncation saves, sentences.

    A line whose part is missing is left out.
    """
    found = []
    for model in atlas.models:
        texts = [_layers(model), _shape(model), _last(model), _shorter(model), _sentences(model)]
        found += [f"{model.name}: {text}" for text in texts if text]
    return found


def title(model: ModelAtlas, name: str) -> str:
    """Of a task, for people; its name where no task has it."""
    return next((task.title for task in model.tasks if task.name == name), name)


def _layers(model: ModelAtlas) -> str:
    told = {advice.task: advice.best_layer for advice in model.advice}
    said = []
    for task in model.tasks:
        layer = told.get(task.name, best(task.probes[0].layers) if task.probes else None)
        said.append(f"{task.title} {MISSING if layer is None else layer}")
    for senses in model.senses:
        at = best(senses.centroid)
        said.append(f"senses of {senses.name} {MISSING if at is None else at}")
    about = f"{model.architecture}, {count(model.parameters)} parameters"
    return f"{about}. Best layers of 0 to {model.num_layers}: {', '.join(said)}." if said else f"{about}."


def _shape(model: ModelAtlas) -> str:
    if not model.geometry:
        return ""
    geometry: Geometry = model.geometry[0]
    values = geometry.anisotropy
    at = best(values)
    if at is None:
        return ""
    return (
        f"anisotropy, the mean cosine of two random words: {shown(values[0], 3)} at layer 0, {shown(values[at], 3)} at "
        f"layer {at}, where it is highest, {shown(values[-1], 3)} at the last."
    )


def _loss(advice: Advice) -> float:
    return points(advice.best_score) - points(advice.last_score)


def _last(model: ModelAtlas) -> str:
    known = [advice for advice in model.advice if not math.isnan(_loss(advice))]
    if not known:
        return ""
    worst = max(known, key=_loss)
    mean = sum(map(_loss, known)) / len(known)
    most = f"most on {title(model, worst.task)}, {shown(_loss(worst))} less than layer {worst.best_layer}"
    return f"the last layer loses {shown(mean)} points over {len(known)} tasks in the mean, {most}."


def _shorter(model: ModelAtlas) -> str:
    known = [advice for advice in model.advice if not math.isnan(number(advice.shorter_flops))]
    if not known:
        return ""
    least = min(known, key=lambda advice: advice.shorter_flops)
    most = max(known, key=lambda advice: advice.shorter_flops)
    text = f"{least.shorter} of {model.num_layers} layers are within a point of the best for {title(model, least.task)}"
    text += f", at {points(least.shorter_flops):.0f} % of the FLOPs"
    if most.shorter != least.shorter:
        text += f"; {most.shorter} ({points(most.shorter_flops):.0f} %) are for every task"
    return text + "."


def _sentences(model: ModelAtlas) -> str:
    known = [score for score in model.sentences if not math.isnan(number(score.spearman))]
    if not known:
        return ""
    top = max(known, key=lambda score: score.spearman)
    recipe = f"layer {top.layer}, pooling {top.pooling}, repair {top.repair}"
    return f"best sentence vectors: {recipe}; Spearman {shown(top.spearman)} on {top.corpus}."
