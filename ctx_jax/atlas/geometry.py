"""The shape of each layer's space: how narrow it is, how much a word's vectors depend on their context, how many
dimensions are used (Ethayarajh 2019, whose equations are meant below).

Means over pairs are exact: of n unit vectors u, the mean cosine of all pairs i ≠ j is (‖Σu‖² - n) / (n² - n). A zero
vector has no direction and is left out of all that is made of cosines. A layer is read block by block, in float64.
"""

from __future__ import annotations

import itertools

import numpy as np
import scipy.sparse.linalg
from jaxtyping import Float, Int

from ctx_jax.atlas.results import Geometry
from ctx_jax.encoder.vectors import block_rows, blocks, moments, one_point, unit
from ctx_jax.errors import InputError

# Above this size Lanczos finds the largest eigenvalue sooner than LAPACK finds all.
_SMALL = 200


def geometry(
    features: Float[np.ndarray, "L N D"],
    types: Int[np.ndarray, "N"],
    sentences: Int[np.ndarray, "N"],
    *,
    corpus: str,
    least: int = 5,
    sample: int = 10_000,
    cka_words: int = 20_000,
    seed: int = 0,
) -> Geometry:
    """All of it, for all layers.

    Args:
      features: of each layer, layer 0 first, and occurrence; an array or what is indexed like one, a memory map.
      types: an id of the word that occurs.
      sentences: an id of the sentence that it occurs in.
      corpus: name.
      least: occurrences of a type that is looked at; the paper's 5.
      sample: random occurrences that `anisotropy` and `explained_anisotropy` are taken over, from a sentence each
        (the paper's section 3.3: of different contexts); as many as there are sentences if they are fewer.
      cka_words: random occurrences that layers are compared over, which takes D² multiplications a pair and word.
      seed: of both.

    Raises:
      InputError: shapes that do not go together, no words, or vectors that are not finite.
    """
    count = features.shape[1] if len(features.shape) == 3 else 0
    if not count or not len(features):
        raise InputError(f"features: found shape {list(features.shape)}, expected [L, N, D] with at least one word")
    for name, ids in (("types", types), ("sentences", sentences)):
        if np.shape(ids) != (count,):
            raise InputError(f"{name}: found shape {list(np.shape(ids))}, expected one id for each of {count} words")
    by_type, by_sentence = members(types, max(least, 2)), members(sentences, 2)
    rng = np.random.default_rng(seed)
    rows = one_of_each(sentences, sample, rng)
    compared = np.sort(rng.choice(count, min(cka_words, count), replace=False))
    layers = [_layer(features[layer], by_type, by_sentence, rows) for layer in range(len(features))]
    columns = {name: [layer[name] for layer in layers] for name in layers[0]}
    return Geometry(corpus=corpus, words=count, cka=cka_matrix(features, compared), **columns)


def _layer(vectors, by_type, by_sentence, rows) -> dict:
    found = moments(vectors)
    spectrum = found.spectrum()
    of_types = [occurrences(vectors, some) for some in by_type]
    mean = lambda values: float(np.mean(values)) if len(values) else 0.0
    return {
        "anisotropy": mean_cosine(vectors, rows),
        "self_similarity": mean([similarity for similarity, _, _ in of_types]),
        "intra_sentence": mean([with_their_mean(vectors, some) for some in by_sentence]),
        "explained_uncentred": mean([uncentred for _, uncentred, _ in of_types]),
        "explained_centred": mean([centred for _, _, centred in of_types]),
        "explained_anisotropy": occurrences(vectors, rows)[1] if len(rows) else 0.0,
        "norm": float(sum(np.linalg.norm(block, axis=1).sum() for block in blocks(vectors)) / len(vectors)),
        "effective_rank": effective_rank(spectrum),
        "participation_ratio": participation_ratio(spectrum),
        "outliers": outliers(found.mean),
    }


def members(ids: Int[np.ndarray, "N"], least: int) -> list[Int[np.ndarray, "M"]]:
    """Rows of each id that has at least so many, in order."""
    order = np.argsort(ids, kind="stable")
    _, starts = np.unique(np.asarray(ids)[order], return_index=True)
    return [rows for rows in np.split(order, starts[1:]) if len(rows) >= least]


def one_of_each(ids: Int[np.ndarray, "N"], most: int, rng: np.random.Generator) -> Int[np.ndarray, "M"]:
    """A random row of each of at most so many random ids, sorted."""
    shuffled = rng.permutation(len(ids))
    _, first = np.unique(np.asarray(ids)[shuffled], return_index=True)
    return np.sort(rng.permutation(shuffled[first])[:most])


def mean_cosine(vectors: Float[np.ndarray, "N D"], rows: Int[np.ndarray, "M"] | None = None) -> float:
    """Of all pairs i ≠ j, equation 1's inner sum; 0 where fewer than two vectors have a direction."""
    total, count = np.zeros(vectors.shape[1]), 0
    for block in blocks(vectors, rows):
        directions = unit(block)
        total += directions.sum(0)
        count += int(directions.any(1).sum())
    return _mean_cosine(total, count)


def _mean_cosine(total: Float[np.ndarray, "D"], count: int) -> float:
    return float((total @ total - count) / (count * (count - 1))) if count > 1 else 0.0


def with_their_mean(vectors: Float[np.ndarray, "N D"], rows: Int[np.ndarray, "M"]) -> float:
    """Mean cosine of the vectors with their mean, equation 2; 0 where the mean has no direction.

    Of one vector it would be 1 whatever the layer does: `geometry` leaves out sentences of one word.
    """
    total, directions, count = np.zeros(vectors.shape[1]), np.zeros(vectors.shape[1]), 0
    for block in blocks(vectors, rows):
        units = unit(block)
        total, directions = total + block.sum(0), directions + units.sum(0)
        count += int(units.any(1).sum())
    return float(directions @ unit(total)) / count if count else 0.0


def occurrences(vectors: Float[np.ndarray, "N D"], rows: Int[np.ndarray, "M"]) -> tuple[float, float, float]:
    """Of a word type: mean cosine of pairs (equation 1), and how much of its vectors the first direction explains.

    That share, σ₁² / Σσ² of the singular values, is equation 3. The paper's text means the vectors as they are, its
    code the vectors about their mean. Where all vectors are the same, up to rounding, one explains them whole: 1.

    Returns:
      The mean cosine; the share, uncentred; the share, centred.
    """
    count, width = len(rows), vectors.shape[1]
    directions, pointed = np.zeros(width), 0
    # The smaller of the two matrices of inner products has the same spectrum.
    few = count <= min(width, block_rows(width))
    inner = np.zeros((count, count) if few else (width, width))
    total = np.zeros(width)
    for block in blocks(vectors, rows):
        units = unit(block)
        directions += units.sum(0)
        pointed += int(units.any(1).sum())
        total += block.sum(0)
        inner += block @ block.T if few else block.T @ block
    if few:
        across = inner.mean(0)
        centred = inner - across - across[:, None] + across.mean()
    else:
        centred = inner - np.outer(total, total) / count
    whole, spread = np.trace(inner), np.trace(centred)
    same = one_point(max(spread, 0.0) / count, (whole - spread) / count)
    return _mean_cosine(directions, pointed), _share(inner, whole), 1.0 if same else _share(centred, spread)


def _share(inner: Float[np.ndarray, "M M"], whole: float) -> float:
    """Of the largest eigenvalue; 1 where there is nothing to explain."""
    if whole <= 0:
        return 1.0
    if len(inner) <= _SMALL:
        largest = np.linalg.eigvalsh(inner)[-1]
    else:
        # SciPy's own start is another one each time.
        start = np.random.default_rng(0).standard_normal(len(inner))
        largest = scipy.sparse.linalg.eigsh(inner, 1, which="LA", v0=start, return_eigenvectors=False)[0]
    return float(min(largest / whole, 1.0))


def effective_rank(spectrum: Float[np.ndarray, "D"]) -> float:
    """The exponential of the entropy of λ / Σλ (Roy and Vetterli 2007, definition 1); 0 for a single point."""
    total = spectrum.sum()
    if total <= 0:
        return 0.0
    shares = spectrum[spectrum > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def participation_ratio(spectrum: Float[np.ndarray, "D"]) -> float:
    """(Σλ)² / Σλ²; 0 for a single point."""
    squares = np.square(spectrum).sum()
    return float(spectrum.sum() ** 2 / squares) if squares > 0 else 0.0


def outliers(mean: Float[np.ndarray, "D"], most: float = 3.0) -> list[tuple[int, float]]:
    """Dimensions whose mean is further from the mean of all means than so many standard deviations, and how many.

    The furthest comes first (Kovaleva et al. 2021; Timkey and van Schijndel 2021 ask which of them make the cosine).
    """
    deviation = mean.std()
    if deviation == 0:
        return []
    z = (mean - mean.mean()) / deviation
    far = np.flatnonzero(np.abs(z) > most)
    return [(int(dimension), float(z[dimension])) for dimension in far[np.argsort(-np.abs(z[far]), kind="stable")]]


def linear_cka(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "N K"]) -> float:
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), Frobenius norms of centred vectors (Kornblith et al. 2019, section 3).

    From 0 to 1, the same under rotations and scales of either side; 0 where a side is a single point. It is too high
    where words are not many times as many as dimensions.

    Raises:
      InputError: the two are not of the same words, or not finite.
    """
    if len(x) != len(y):
        raise InputError(f"linear_cka: found {len(x)} and {len(y)} vectors, expected as many")
    own = _own(x), _own(y)
    return _cka(x, y, *own)


def cka_matrix(features: Float[np.ndarray, "L N D"], rows: Int[np.ndarray, "M"]) -> list[list[float]]:
    """Linear CKA of each layer with each, over some words; two layers' rows are in memory at a time."""
    own = [_own(features[layer][rows]) for layer in range(len(features))]
    result = np.diag([1.0 if norm > 0 else 0.0 for _, norm in own])
    for a in range(len(features) - 1):
        x = features[a][rows]
        for b in range(a + 1, len(features)):
            result[a, b] = result[b, a] = _cka(x, features[b][rows], own[a], own[b])
    return result.tolist()


def _own(x: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, "D"], float]:
    """Mean of the vectors and ‖XᵀX‖ of the centred ones; 0 for a single point."""
    found = moments(x)
    if one_point(np.trace(found.covariance), np.square(found.mean).sum()):
        return found.mean, 0.0
    return found.mean, float(np.linalg.norm(found.covariance)) * len(x)


def _cka(x: np.ndarray, y: np.ndarray, own_x: tuple[np.ndarray, float], own_y: tuple[np.ndarray, float]) -> float:
    (mean_x, norm_x), (mean_y, norm_y) = own_x, own_y
    if not norm_x or not norm_y:
        return 0.0
    cross = np.zeros((y.shape[1], x.shape[1]))
    step = min(block_rows(x.shape[1]), block_rows(y.shape[1]))
    for start, stop in itertools.pairwise([*range(0, len(x), step), len(x)]):
        some_x, some_y = (np.asarray(side[start:stop], np.float64) for side in (x, y))
        cross += (some_y - mean_y).T @ (some_x - mean_x)
    return float(np.square(cross).sum() / (norm_x * norm_y))
