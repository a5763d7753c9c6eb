"""The task of syntax: how much of the dependency trees each layer gives away."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Float, Int

from ctx_jax.atlas.features import Features
from ctx_jax.atlas.probes.kinds import Linear
from ctx_jax.atlas.probes.labelling import Probing, interval
from ctx_jax.atlas.probes.sources import SpanSource
from ctx_jax.atlas.probes.structural import Arcs, Depth, Distance, TreeSource, scored_trees, uuas
from ctx_jax.atlas.probes.training import Fitted, fit, predict
from ctx_jax.atlas.records import Trees
from ctx_jax.atlas.results import Probe, Score, Task
from ctx_jax.errors import InputError

SENTENCES = 20
"""Of a step (structural-probes, example configuration)."""


def tree_task(
    name: str,
    title: str,
    splits: Mapping[str, tuple[Features, Trees]],
    probing: Probing,
    told: Callable[[str], object] = lambda line: None,
) -> Task:
    """Trains and scores probes for distances, depths and arcs.

    Words without punctuation are scored, in sentences of at most 64 words. LAS asks a linear probe for the relation of
    each word to its head, and counts it where the arc is right.

    Args:
      name: of the task.
      title: for people.
      splits: `train` and `test`, and `dev` to choose epochs by; without it a tenth of the training sentences.
      probing: of it `training` and `seed`.
      told: is told what is done next.

    Raises:
      InputError: a split is missing or holds no sentence that can be used.
    """
    begun = time.monotonic()
    if missing := {"train", "test"} - splits.keys():
        raise InputError(f"{name}: found no {min(missing)} split, expected train and test")
    train, dev, test = _sources(name, splits)
    width = train.features.vectors.shape[2]
    training = replace(probing.training, batch_size=min(SENTENCES, len(train)))
    key = jax.random.key(probing.seed)
    probes = []
    for kind, probe, metrics in (
        ("distance", Distance(width), ("UUAS", "DSpr.")),
        ("depth", Depth(width), ("root accuracy", "NSpr.")),
    ):
        told(f"{name}: {kind}")
        scores = scored_trees(fit(probe, train, dev, training, key), test)
        probes += [Probe(kind, metric, layers) for metric, layers in zip(metrics, scores, strict=True)]
    told(f"{name}: arcs")
    arcs = fit(Arcs(width), train, dev, training, key)
    heads = _Heads(arcs, test)
    probes.append(Probe("arcs", "UAS", heads.scores()))
    if train.trees.relations is not None:
        told(f"{name}: relations")
        labels = sorted({label for number in train.sentences for label in train.trees.relations[number]})
        found = [_relations(source, labels) for source in (train, dev, test)]
        fitted = fit(Linear(width, len(labels), 2), found[0], found[1], probing.training, key)
        right = np.concatenate(list(predict(fitted, found[2])), axis=2) == found[2].classes
        probes.append(Probe("arcs", "LAS", heads.scores(right)))
    return Task(
        name, title, len(train), len(test), 0, _baselines(test), probes, probing.training.seeds,
        time.monotonic() - begun,
    )  # fmt: skip


def _sources(name: str, splits: Mapping[str, tuple[Features, Trees]]) -> tuple[TreeSource, TreeSource, TreeSource]:
    found = []
    for split in ("train", "dev", "test"):
        features, trees = splits[split if split in splits else "train"]
        numbers = np.arange(len(trees.heads))
        if split not in splits:
            numbers = numbers[numbers % 10 == 0]
        elif split == "train" and "dev" not in splits:
            numbers = numbers[numbers % 10 != 0]
        found.append(TreeSource(features, trees, numbers))
        if not len(found[-1]):
            raise InputError(f"{name}: found no sentence of 1 to 64 words in {split}")
    return tuple(found)


class _Heads:
    """Whether each scored word's head was found, in the order of the test sentences: [S, M, N]."""

    def __init__(self, fitted: Fitted, test: TreeSource):
        rows = [
            np.asarray(piece)[:, :, row, : len(test.trees.heads[number])]
            for piece, numbers in zip(predict(fitted, test), _numbers(test), strict=True)
            for row, number in enumerate(numbers)
        ]
        gold = [np.asarray(test.trees.heads[number]) for number in test.sentences]
        self.right = np.concatenate([row == heads for row, heads in zip(rows, gold, strict=True)], axis=2)
        self.scored = np.concatenate([np.asarray(test.trees.scored[number]) for number in test.sentences])

    def scores(self, also: np.ndarray | None = None) -> list[Score]:
        """Share of scored words that are right, in this and in `also`, of each layer."""
        right = self.right if also is None else self.right & also
        return [interval(seeds) for seeds in right[:, :, self.scored].mean(-1).T]


def _numbers(source: TreeSource) -> list[Int[np.ndarray, "n"]]:
    """Sentences of each piece."""
    return [some for _, _, some in source.pieces_of]


def _relations(source: TreeSource, labels: Sequence[str]) -> SpanSource:
    """Each word with its head, itself at a root, in the order of the source's sentences."""
    number = {label: place for place, label in enumerate(labels)}
    first, second, classes = [], [], []
    for sentence in source.sentences:
        heads = np.asarray(source.trees.heads[sentence])
        words = np.arange(len(heads))
        begin = source.features.starts[sentence]
        first.append(begin + words)
        second.append(begin + np.where(heads < 0, words, heads))
        classes += [number.get(label, -1) for label in source.trees.relations[sentence]]
    spans = tuple(np.stack([at, at + 1], axis=1) for at in (np.concatenate(first), np.concatenate(second)))
    return SpanSource(source.features, spans, np.array(classes))


def _baselines(test: TreeSource) -> dict[str, float]:
    """Each word's neighbour as its head: by UUAS, and the word before as UAS has it."""
    right = total = before = words = 0
    for number in test.sentences:
        heads, scored = np.asarray(test.trees.heads[number]), np.asarray(test.trees.scored[number])
        place = np.cumsum(scored)
        distances: Float[np.ndarray, "W W"] = np.abs(place[:, None] - place[None, :]).astype(np.float64)
        these = uuas(distances, heads, scored)
        right, total = right + these[0], total + these[1]
        before += int((heads == np.arange(len(heads)) - 1)[scored].sum())
        words += int(scored.sum())
    return {"neighbours (UUAS)": right / max(total, 1), "word before (UAS)": before / max(words, 1)}
