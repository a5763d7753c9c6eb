"""Which layer to use, and how many layers are enough, of what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ctx_jax.atlas.results import Advice, SentenceScore, Task
from ctx_jax.flops.architectures import EncoderConfig, encoder_cost

LENGTH = 128
"""Of the rows that FLOPs are counted in."""
WITHIN = 0.01
"""What a shorter model may lose: one point."""


def layer_flops(config: EncoderConfig) -> list[float]:
    """FLOPs a token of all that comes before each layer's output, in products, in rows of 128."""
    cost = lambda layers: encoder_cost(dataclasses.replace(config, num_layers=layers), length=LENGTH).matrix_flops
    layers = [cost(layers) / LENGTH for layers in range(1, config.num_layers + 1)]
    # A layer costs what a second one adds; the rest of the first is what comes before all of them.
    one = cost(2) / LENGTH - layers[0]
    return [layers[0] - one, *layers]


def advise(task: Task, flops: list[float]) -> Advice | None:
    """Of a task's first probe; None where nothing was probed. A mix reads all layers, and costs as much as the last."""
    if not task.probes:
        return None
    probe = task.probes[0]
    means = [score.mean for score in probe.layers]
    low = probe.layers[means.index(max(means))].low
    what = lambda layer: f"Layer {layer} knows most ({100 * means[layer]:.1f})"
    mix = probe.mix.mean if probe.mix else None
    return _advice(task.name, probe.metric, means, low, flops, what, mix)


def advise_sentences(corpus: str, scores: list[SentenceScore], flops: list[float]) -> Advice | None:
    """Of the scores of a corpus of pairs: single layers, each with the pooling and the repair that suit it best."""
    best: dict[int, SentenceScore] = {}
    for score in scores:
        if score.corpus == corpus and score.layer.isdigit():
            layer = int(score.layer)
            best[layer] = max(best.get(layer, score), score, key=lambda each: each.spearman)
    if not best:
        return None
    values = [best[layer].spearman / 100 for layer in sorted(best)]
    what = lambda layer: f"Layer {layer}, {best[layer].pooling}, {best[layer].repair}: {best[layer].spearman:.1f}"
    return _advice(corpus, "Spearman", values, max(values), flops, what, None)


def _advice(
    name: str,
    metric: str,
    values: list[float],
    low: float,
    flops: list[float],
    what: Callable[[int], str],
    mix: float | None,
) -> Advice:
    """The best layer is the lowest of those at `low` or above, the end of the interval of the highest."""
    top = max(values)
    best = next(layer for layer, value in enumerate(values) if value >= low)
    shorter = next(layer for layer, value in enumerate(values) if value >= top - WITHIN)
    share = flops[shorter] / flops[-1] if flops[-1] else 1.0
    text = f"{what(best)}; the last one has {100 * (values[-1] - top):+.1f}."
    if shorter < len(values) - 1:
        text += f" Layers 0 to {shorter}: {share:.0%} of the FLOPs, {100 * (values[shorter] - top):+.1f}."
    if mix is not None:
        text += f" A mix of all: {100 * mix:.1f}."
    return Advice(name, metric, best, values[best], values[-1], mix, shorter, values[shorter], share, text)
