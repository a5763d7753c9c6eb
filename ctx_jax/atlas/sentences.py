"""How well the cosine of two texts' vectors agrees with people, for each layer, way of pooling and repair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float

from ctx_jax.atlas.results import SentenceScore
from ctx_jax.encoder.repair import Repair, all_but_the_top, apply, centre, whiten, zca
from ctx_jax.encoder.vectors import moments, unit
from ctx_jax.errors import InputError, did_you_mean

Pooled = Mapping[str, Float[np.ndarray, "L N D"]]
"""Vectors of texts by pooling: `cls`, `mean`, `max`."""

REPAIRS: dict[str, Callable[[np.ndarray], Repair] | None] = {
    "raw": None,
    "centre": centre,
    "all-but-the-top": all_but_the_top,
    "whiten": whiten,
    "zca": zca,
}
"""What a space can be repaired with."""

ENDS = "first+last"
"""Pooling: the mean of layer 1's and the last layer's mean (Su et al. 2021, section 4.1)."""


def spearman(cosines: Float[np.ndarray, "N"], gold: Float[np.ndarray, "N"]) -> float:
    """Rank correlation times 100, ranks of equals averaged; 0 where one side is all the same.

    Raises:
      InputError: there are not as many of both, or fewer than two.
    """
    if np.shape(cosines) != np.shape(gold) or len(cosines) < 2:
        raise InputError(f"spearman: found {np.shape(cosines)} and {np.shape(gold)}, expected as many, at least 2")
    if np.ptp(cosines) == 0 or np.ptp(gold) == 0:
        return 0.0
    return 100 * float(scipy.stats.spearmanr(cosines, gold).statistic)


def sts_scores(
    first: Pooled,
    second: Pooled,
    scores: Float[np.ndarray, "N"],
    train: Pooled,
    *,
    corpus: str,
    repairs: Sequence[str] = tuple(REPAIRS),
) -> list[SentenceScore]:
    """Spearman's correlation of cosines with people's scores, for layers × poolings × repairs.

    Where all training vectors of a layer are the same, as layer 0's of `[CLS]`, only `raw` is scored: nothing repairs a
    point. From `mean` comes `first+last`, too, in models of two layers or more; its `layer` is `1+12`, say.

    Args:
      first: vectors of the pairs' first texts.
      second: of the second.
      scores: of the pairs.
      train: vectors of the texts that repairs are fitted on; not the pairs themselves, or the test is not one.
      corpus: name.
      repairs: of `REPAIRS`.

    Raises:
      InputError: a repair that there is not, poolings or shapes that do not go together, or too few training vectors.
    """
    for name in repairs:
        if name not in REPAIRS:
            raise InputError(f"repairs: found {name!r}, expected {', '.join(REPAIRS)}{did_you_mean(name, REPAIRS)}")
    if not first.keys() == second.keys() == train.keys():
        found = " / ".join(", ".join(sorted(each)) or "none" for each in (first, second, train))
        raise InputError(f"poolings: found {found}, expected the same in first, second and train")
    results = []
    for pooling in first:
        sides = [first[pooling], second[pooling], train[pooling]]
        if any(side.shape != sides[0].shape for side in sides[:2]) or sides[2].shape[::2] != sides[0].shape[::2]:
            found = " / ".join(str(list(side.shape)) for side in sides)
            raise InputError(f"{pooling}: found shapes {found}, expected [L, N, D] twice and [L, M, D]")
        last = len(sides[0]) - 1
        for layer in range(last + 1):
            spaces = [side[layer] for side in sides]
            results += _of_space(spaces, scores, repairs, corpus, str(layer), pooling)
        if pooling == "mean" and last >= 2:
            spaces = [(np.asarray(side[1], np.float32) + np.asarray(side[last], np.float32)) / 2 for side in sides]
            results += _of_space(spaces, scores, repairs, corpus, f"1+{last}", ENDS)
    return results


def _of_space(
    spaces: list[np.ndarray],
    scores: Float[np.ndarray, "N"],
    repairs: Sequence[str],
    corpus: str,
    layer: str,
    pooling: str,
) -> list[SentenceScore]:
    first, second, train = spaces
    point = moments(train).spectrum()[0] == 0
    results = []
    for name in repairs:
        fit = REPAIRS[name]
        if fit is not None and point:
            continue
        repair = fit(train) if fit else None
        pair = [x if repair is None else np.asarray(apply(repair, np.asarray(x, np.float32))) for x in (first, second)]
        a, b = (unit(np.asarray(x, np.float64)) for x in pair)
        results.append(SentenceScore(corpus, layer, pooling, name, spearman((a * b).sum(1), scores)))
    return results
