"""What a model makes of one word: clusters of its occurrences layer by layer, their neighbours, and maps of them."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ctx_jax.atlas.clusters import adjusted_rand, cluster, pca_2d, v_measure
from ctx_jax.atlas.geometry import mean_cosine
from ctx_jax.atlas.occurrences import Occurrences, other_words, span_vectors
from ctx_jax.atlas.records import Words
from ctx_jax.atlas.results import LayerSenses, SenseCluster, SenseMap, WordSenses
from ctx_jax.encoder.base import Encoder
from ctx_jax.encoder.shards import fingerprint
from ctx_jax.encoder.vectors import unit
from ctx_jax.errors import InputError

CONTEXTS = 5
"""Of each cluster."""
NEIGHBOURS = 10
"""Of each cluster."""
OTHER_WORDS = 2000
"""Occurrences of other words among which the neighbours are."""
CONTEXT_WORDS = 8
"""On each side of the word where it is shown."""
LEAST = 5
"""Vectors of which UMAP makes something."""
Method = Callable[[Float[np.ndarray, "N D"]], Float[np.ndarray, "N 2"]]
"""From vectors to places on a map."""


def word_senses(
    encoder: Encoder,
    word: str,
    occurrences: Occurrences,
    layers: Sequence[int],
    *,
    model: str,
    corpus: str,
    with_umap: bool = False,
    seed: int = 0,
    encoded: Callable[[int], object] = lambda count: None,
    clustered: Callable[[int], object] = lambda count: None,
) -> WordSenses:
    """Looks at the occurrences on some layers.

    Args:
      encoder: of words.
      word: what the occurrences are of.
      occurrences: one or more.
      layers: numbers from 0.
      model: its name.
      corpus: name of where the occurrences are from.
      with_umap: a second map, by UMAP.
      seed: of the clusters, of the other words and of UMAP.
      encoded: is told how many sentences were encoded.
      clustered: is told how many layers were done.

    Raises:
      InputError: no such layer, a sentence that cannot be encoded, vectors that are not finite, or no UMAP.
    """
    methods = map_methods(seed, len(occurrences.sentence), with_umap)
    numbers, count = sorted(set(layers)), len(occurrences.sentence)
    sentence, spans = other_words(occurrences, OTHER_WORDS, seed)
    vectors = span_vectors(
        encoder,
        occurrences.sentences,
        np.concatenate([occurrences.sentence, sentence]),
        np.concatenate([occurrences.spans, spans]),
        numbers,
        encoded,
    )
    if not np.isfinite(vectors).all():
        raise InputError(f"{model}: found vectors with NaN or infinity, expected finite numbers")
    own, others = vectors[:, :count], vectors[:, count:]
    contexts = [
        context(occurrences.sentences[number], span)
        for number, span in zip(occurrences.sentence, occurrences.spans, strict=True)
    ]
    names = [occurrences.sentences[number][begin] for number, (begin, _) in zip(sentence, spans, strict=True)]
    found = []
    for number, its, theirs in zip(numbers, own, others, strict=True):
        found.append(_layer(number, its, occurrences.senses, contexts, theirs, names, seed))
        clustered(1)
    best = _best(found)
    senses, sense = _colours(occurrences.senses, found[numbers.index(best)].labels)
    maps = sense_maps(word, senses, sense, contexts, dict(zip(numbers, own, strict=True)), methods)
    return WordSenses(
        word=word,
        model=model,
        fingerprint=fingerprint(encoder),
        corpus=corpus,
        sentences=occurrences.read,
        occurrences=occurrences.found,
        cut=occurrences.cut,
        best=best,
        layers=found,
        maps=maps,
    )


def context(words: Words, span: Int[np.ndarray, "2"]) -> str:
    """A span between « and » with CONTEXT_WORDS on each side, and … where there are more; no blank before a comma."""
    begin, end = (int(place) for place in span)
    before, after = words[max(begin - CONTEXT_WORDS, 0) : begin], words[end : end + CONTEXT_WORDS]
    shown = " ".join([*before, "«", *words[begin:end], "»", *after])
    shown = re.sub(r"([(\[]) | (?=[.,;:!?)\]](?: |$))", r"\1", shown)
    return "… " * (begin > CONTEXT_WORDS) + shown + " …" * (len(words) - end > CONTEXT_WORDS)


def map_methods(seed: int, count: int, with_umap: bool) -> dict[str, Method]:
    """How so many vectors are drawn; raises as `umap_2d`."""
    return {"PCA": pca_2d, **({"UMAP": umap_2d(seed, count)} if with_umap else {})}


def sense_maps(
    word: str,
    senses: list[str],
    sense: list[int],
    contexts: list[str],
    layers: Mapping[int, Float[np.ndarray, "N D"]],
    methods: Mapping[str, Method],
) -> list[SenseMap]:
    """A map by each method, of the vectors of each layer; arguments as `SenseMap` has them."""
    return [
        SenseMap(word, method, senses, sense, contexts, {str(n): _points(draw(x)) for n, x in layers.items()})
        for method, draw in methods.items()
    ]


def umap_2d(seed: int, count: int) -> Method:
    """Coordinates by UMAP with cosines (McInnes et al. 2018), of so many vectors.

    Raises:
      InputError: umap-learn is not installed, or there are fewer than five vectors, of which UMAP makes nothing.
    """
    try:
        umap = importlib.import_module("umap")
    except ImportError as error:
        raise InputError("umap: not installed; expected pip install umap-learn") from error
    if count < LEAST:
        raise InputError(f"umap: found {count} occurrences, expected five or more")
    make = lambda: umap.UMAP(n_neighbors=min(15, count - 1), metric="cosine", random_state=seed, n_jobs=1)
    return lambda vectors: make().fit_transform(vectors)


def _layer(
    number: int,
    vectors: Float[np.ndarray, "N D"],
    senses: Sequence[str] | None,
    contexts: Sequence[str],
    others: Float[np.ndarray, "M D"],
    names: Sequence[str],
    seed: int,
) -> LayerSenses:
    found = cluster(vectors, seed=seed)
    directions, beside = unit(vectors.astype(np.float64)), unit(others.astype(np.float64))
    known = senses is not None and len(set(senses)) > 1
    clusters = []
    for group in range(found.labels.max() + 1):
        members = np.flatnonzero(found.labels == group)
        centre = unit(directions[members].mean(0))
        nearest = members[np.argsort(-(directions[members] @ centre), kind="stable")]
        cosines = beside @ centre
        words: dict[str, tuple[str, float]] = {}
        for at in np.argsort(-cosines, kind="stable"):
            words.setdefault(names[at].casefold(), (names[at], round(float(cosines[at]), 4)))
            if len(words) == NEIGHBOURS:
                break
        counts = Counter(senses[at] for at in members) if senses is not None else Counter()
        shown = list(dict.fromkeys(contexts[at] for at in nearest))[:CONTEXTS]
        clusters.append(SenseCluster(len(members) / len(vectors), shown, [*words.values()], dict(counts.most_common())))
    return LayerSenses(
        layer=number,
        silhouette=found.silhouette,
        self_similarity=mean_cosine(vectors),
        ari=adjusted_rand(senses, found.labels) if known else None,
        v_measure=v_measure(senses, found.labels).f1 if known else None,
        labels=found.labels.tolist(),
        clusters=clusters,
    )


def _best(layers: Sequence[LayerSenses]) -> int:
    """See `WordSenses.best`."""
    of_context = [layer for layer in layers if layer.layer > 0] or layers
    return max(of_context, key=lambda layer: layer.silhouette if layer.ari is None else layer.ari).layer


def _colours(senses: Sequence[str] | None, labels: Sequence[int]) -> tuple[list[str], list[int]]:
    """Names and of each point a place among them, the most frequent first."""
    if senses is None:
        return [f"cluster {group + 1}" for group in range(max(labels) + 1)], list(labels)
    names = [name for name, _ in Counter(senses).most_common()]
    return names, [names.index(sense) for sense in senses]


def _points(coordinates: Any) -> list[tuple[float, float]]:
    """As numbers of five digits, which a map does not show."""
    return [(float(f"{x:.5g}"), float(f"{y:.5g}")) for x, y in np.asarray(coordinates, np.float64)]
