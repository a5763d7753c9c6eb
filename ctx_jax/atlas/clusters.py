"""Senses that nobody named: clusters of a word's occurrences, how well they agree with names, and maps of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ctx_jax.encoder.vectors import one_point, oriented, unit
from ctx_jax.errors import InputError

_STARTS = 10
_ROUNDS = 100


class Clusters(NamedTuple):
    """Occurrences in groups.

    Attributes:
      labels: of each occurrence, from 0, the largest group first.
      silhouette: see `silhouette`; 0 where there is one group.
    """

    labels: Int[np.ndarray, "N"]
    silhouette: float


class Agreement(NamedTuple):
    """Precision, recall and their harmonic mean; of V-measure homogeneity, completeness and V."""

    precision: float
    recall: float
    f1: float


def cluster(vectors: Float[np.ndarray, "N D"], *, most: int = 10, seed: int = 0) -> Clusters:
    """K-means of unit vectors, for the k from 2 to `most` whose silhouette is largest, the lowest of equals.

    There is one group where no k has a silhouette above 0: few occurrences, or none that differ.

    Raises:
      InputError: there are no vectors.
    """
    if not len(vectors):
        raise InputError("vectors: found none, expected one or more")
    directions = unit(np.asarray(vectors, np.float64))
    best = Clusters(np.zeros(len(directions), np.int64), 0.0)
    if one_point(directions.var(0).sum(), np.square(directions.mean(0)).sum()):
        return best
    for k in range(2, min(most, len(directions) - 1) + 1):
        labels = k_means(directions, k, seed=seed)
        if (score := silhouette(directions, labels)) > best.silhouette:
            best = Clusters(labels, score)
    return best


def k_means(vectors: Float[np.ndarray, "N D"], k: int, *, seed: int = 0) -> Int[np.ndarray, "N"]:
    """Lloyd's algorithm, the best of ten starts by k-means++ (Arthur and Vassilvitskii 2007).

    Returns:
      The group of each vector, from 0, the largest first; fewer than k where fewer vectors differ.

    Raises:
      InputError: k is not from 1 to the number of vectors.
    """
    if not 1 <= k <= len(vectors):
        raise InputError(f"k: found {k}, expected 1 to {len(vectors)}, the number of vectors")
    vectors = np.asarray(vectors, np.float64)
    rng = np.random.default_rng(seed)
    labels, _ = min((_lloyd(vectors, _start(vectors, k, rng)) for _ in range(_STARTS)), key=lambda found: found[1])
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return rank[places]


def _start(vectors: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Centres that are vectors, each drawn by its squared distance from the nearest before it."""
    chosen = [int(rng.integers(len(vectors)))]
    nearest = np.square(vectors - vectors[chosen[0]]).sum(1)
    for _ in range(k - 1):
        if nearest.sum() == 0:
            break
        chosen.append(int(rng.choice(len(vectors), p=nearest / nearest.sum())))
        nearest = np.minimum(nearest, np.square(vectors - vectors[chosen[-1]]).sum(1))
    return vectors[chosen]


def _lloyd(vectors: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, float]:
    labels = np.full(len(vectors), -1)
    squares = np.square(vectors).sum(1)
    for _ in range(_ROUNDS):
        distances = np.square(centres).sum(1) - 2 * vectors @ centres.T
        before, labels = labels, distances.argmin(1)
        if np.array_equal(before, labels):
            break
        # A group that lost all its vectors keeps its centre, and may win some back.
        for group in np.unique(labels):
            centres[group] = vectors[labels == group].mean(0)
    return labels, float((squares + distances.min(1)).sum())


def silhouette(directions: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"]) -> float:
    """Mean of (b - a) / max(a, b) (Rousseeuw 1987): a and b are the mean cosine distance to one's own group and to the
    nearest other; 0 for a group of one. Sums of unit vectors say it without a distance for each pair.

    Raises:
      InputError: there are not two groups.
    """
    names, groups, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise InputError("labels: found one group, expected two or more")
    sums = np.zeros((len(names), directions.shape[1]))
    np.add.at(sums, groups, directions)
    cosines = directions @ sums.T
    rows = np.arange(len(groups))
    own = np.square(directions).sum(1)
    within = 1 - (cosines[rows, groups] - own) / np.maximum(counts[groups] - 1, 1)
    between = 1 - cosines / counts
    between[rows, groups] = np.inf
    other = between.min(1)
    larger = np.maximum(within, other)
    values = np.divide(other - within, larger, out=np.zeros(len(rows)), where=(larger > 0) & (counts[groups] > 1))
    return float(values.mean())


def adjusted_rand(gold: Any, found: Any) -> float:
    """Share of pairs that both put together or both apart, adjusted for chance (Hubert and Arabie 1985, equation 5).

    1 where both are the same, and where they leave no choice: all in one group, or each in its own.
    """
    table = _table(gold, found)
    pairs = lambda counts: (counts * (counts - 1) / 2).sum()
    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    total = pairs(table.sum(keepdims=True))
    expected = rows * columns / total if total else 0.0
    most = (rows + columns) / 2
    return float((both - expected) / (most - expected)) if most != expected else 1.0


def v_measure(gold: Any, found: Any) -> Agreement:
    """Homogeneity, completeness and V (Rosenberg and Hirschberg 2007, with β = 1)."""
    table = _table(gold, found)
    joint, of_gold, of_found = _entropy(table), _entropy(table.sum(1)), _entropy(table.sum(0))
    shared = of_gold + of_found - joint
    homogeneity = shared / of_gold if of_gold else 1.0
    completeness = shared / of_found if of_found else 1.0
    return Agreement(homogeneity, completeness, _harmonic(homogeneity, completeness))


def b_cubed(gold: Any, found: Any) -> Agreement:
    """B³ (Bagga and Baldwin 1998): of those in an occurrence's group the share of its own sense, and the other way."""
    table = _table(gold, found)
    squares, total = np.square(table), table.sum()
    precision = float((squares / table.sum(0)).sum() / total)
    recall = float((squares / table.sum(1, keepdims=True)).sum() / total)
    return Agreement(precision, recall, _harmonic(precision, recall))


def _table(gold: Any, found: Any) -> Float[np.ndarray, "G F"]:
    """How many occurrences have each pair of labels."""
    if len(gold) != len(found) or not len(gold):
        raise InputError(f"labels: found {len(gold)} and {len(found)}, expected as many, and some")
    rows, columns = (np.unique(np.asarray(labels), return_inverse=True)[1] for labels in (gold, found))
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    return table


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    # Of one share, 1 · log 1 is -0.
    return max(float(-(shares * np.log(shares)).sum()), 0.0)


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def pca_2d(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N 2"]:
    """Coordinates along the first two principal components, zeros where there are fewer.

    The largest entry of each component is positive, so that a map is not mirrored the next time.

    Raises:
      InputError: there are no vectors.
    """
    if not len(vectors):
        raise InputError("vectors: found none, expected one or more")
    centred = np.asarray(vectors, np.float64) - np.mean(vectors, 0, dtype=np.float64)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(centred), 2))
    points[:, : len(components[:2])] = centred @ oriented(components[:2].T)
    return points
