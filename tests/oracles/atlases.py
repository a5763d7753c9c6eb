"""Atlases with every part, made of formulas: no number means anything, all can be found again."""

from __future__ import annotations

import math

from ctx_jax.atlas.results import (
    Advice,
    Atlas,
    Geometry,
    ModelAtlas,
    Probe,
    Score,
    SenseMap,
    SenseTask,
    SentenceScore,
    Task,
)

TASKS = {
    "en_ewt-ud/pos": ("part of speech", 17, "linear", "accuracy", 0.84, 0.11, 0.4),
    "en_ewt-ud/trees": ("dependency trees", 0, "distance", "UUAS", 0.31, 0.42, 0.6),
    "ewt_propbank/srl": ("semantic roles", 28, "edge", "micro-F1", 0.55, 0.21, 0.75),
}


def two_models() -> Atlas:
    """A transformer of 6 layers and an LSTM of 2, with all parts."""
    models = [model("minilm", "BERT", 6, 384, 0.0), model("elmo", "ELMo", 2, 1024, 0.02)]
    cka = [[1 / (1 + abs(one / 6 - other / 2)) for other in range(3)] for one in range(7)]
    return Atlas(
        models, {"minilm × elmo": cka}, "ctx-jax atlas minilm elmo --out atlas", "2 cores, no accelerator",
        "2026-01-02T03:04:05", 1234.5, 2_345_678_901,
    )  # fmt: skip


def model(name: str, kind: str, num_layers: int, width: int, shift: float) -> ModelAtlas:
    """With all parts; `shift` moves its numbers."""
    depth = [layer / num_layers for layer in range(num_layers + 1)]
    tasks = [task(entry, depth, shift) for entry in TASKS.items()]
    words = SenseMap(
        "bank", "PCA", ["money", "river", "row"], [point % 3 for point in range(30)],
        [f"… the «bank» of number {point} …" for point in range(30)],
        {str(layer): [(point % 3 * (1 + layer) + math.sin(point), math.cos(3 * point)) for point in range(30)]
         for layer in (num_layers, 0)},
    )  # fmt: skip
    sentences = [
        SentenceScore("STS-B", layer, pooling, repair, 50 + 3 * a + 5 * b - 2 * c + 100 * shift)
        for a, layer in enumerate([*map(str, range(num_layers + 1)), "first + last", "all"])
        for b, pooling in enumerate(["mean", "first", "max"])
        for c, repair in enumerate(["none", "centred", "whitened", "3 components less"])
    ]
    return ModelAtlas(
        name, "0123abcd" * 8, f"{kind}, {num_layers} layers of {width}", num_layers, width, 22_713_216,
        [1e6 * layer for layer in range(num_layers + 1)], tasks, [geometry(num_layers, width, depth, shift)],
        [senses("SemCor to ALL", depth, shift), senses("CoarseWSD-20", depth, shift + 0.1)], [words], sentences,
        [advice(one, num_layers) for one in tasks],
    )  # fmt: skip


def task(entry: tuple, depth: list[float], shift: float) -> Task:
    """Probes on it."""
    name, (title, classes, kind, metric, low, gain, peak) = entry
    scores = [low + shift + gain * (1 - (at - peak) ** 2 / max(peak, 1 - peak) ** 2) for at in depth]
    weights = [math.exp(-((at - peak) ** 2)) for at in depth]
    probe = Probe(
        kind, metric, [interval(score) for score in scores], interval(max(scores) + 0.011),
        [weight / sum(weights) for weight in weights], [interval(0.55 + 0.1 * at) for at in depth],
        [3.0 - score for score in scores], 4.0, [interval(score) for score in sorted(scores)], 1.25, 1.75,
    )  # fmt: skip
    probes = [probe]
    if name.endswith("trees"):
        probes.append(Probe("depth", "root accuracy", [interval(score + 0.2) for score in scores]))
    baselines = {"majority": 0.171, "word type": low + 0.02, "chance": 1 / 17}
    return Task(name, title, 12543, 2077, classes, baselines, probes, 5, 321.5)


def interval(mean: float) -> Score:
    """Lopsided, so that low and high cannot be taken for each other."""
    return Score(mean, mean - 0.008, mean + 0.005)


def geometry(num_layers: int, width: int, depth: list[float], shift: float) -> Geometry:
    """A space that grows narrower."""
    outliers = [[(layer * 31 + k, 3.5 + k + layer) for k in range(layer + 2)] for layer in range(num_layers + 1)]
    cka = [[1 / (1 + abs(one - other)) for other in depth] for one in depth]
    return Geometry(
        "wikitext2", 100_000, [0.05 + 0.4 * at + shift for at in depth], [1 - 0.3 * at for at in depth],
        [0.2 + 0.5 * at for at in depth], [0.9 - 0.3 * at for at in depth], [0.4 - 0.2 * at for at in depth],
        [0.1 + 0.05 * at for at in depth], [10 + 5 * at for at in depth], [width * (0.6 - 0.3 * at) for at in depth],
        [width * (0.4 - 0.3 * at) for at in depth], outliers, cka,
    )  # fmt: skip


def senses(name: str, depth: list[float], shift: float) -> SenseTask:
    """Better with depth, worse for rare senses."""
    grow = lambda start: [start + shift + 0.15 * at for at in depth]
    frequency = {"1-4": grow(0.35), "5-19": grow(0.5), "20+": grow(0.62)} if name.startswith("SemCor") else {}
    return SenseTask(name, 226_036, 7_253, 1_234, grow(0.55), grow(0.53), 0.652, frequency, grow(0.45))


def advice(task: Task, num_layers: int) -> Advice:
    """Of its first probe."""
    scores = [score.mean for score in task.probes[0].layers]
    best = scores.index(max(scores))
    shorter = next(layer for layer, score in enumerate(scores) if score > max(scores) - 0.01)
    mix = task.probes[0].mix.mean
    text = f"Layer {best} is best for {task.title}; a model of {shorter} layers is as good within a point."
    return Advice(
        task.name, task.probes[0].metric, best, scores[best], scores[-1], mix, shorter, scores[shorter],
        shorter / num_layers, text,
    )  # fmt: skip
