"""Sentence scores: SciPy's correlation of cosines done by hand, and repairs that help where they must."""

import numpy as np
import pytest
import scipy.stats

from ctx_jax import InputError
from ctx_jax.atlas.sentences import ENDS, REPAIRS, spearman, sts_scores

LAYERS, PAIRS, WIDTH = 4, 40, 6


def made(seed=0, count=PAIRS, poolings=("cls", "mean", "max")):
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal((LAYERS, count, WIDTH)) + 1).astype(np.float32) for name in poolings}


def cosines(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.array([x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b, strict=True)])


def by_hand(repair, train, x):
    """Each repair once more, by the singular values of the centred vectors."""
    train, x = train.astype(np.float64), x.astype(np.float64)
    if repair == "raw":
        return x
    mean = train.mean(0)
    _, s, v = np.linalg.svd(train - mean, full_matrices=False)
    values = s**2 / len(train)
    return {
        "centre": x - mean,
        "all-but-the-top": (x - mean) - np.outer((x - mean) @ v[0], v[0]),
        "whiten": (x - mean) @ v.T / np.sqrt(values),
        "zca": (x - mean) @ v.T / np.sqrt(values + 1e-5 * values[0]) @ v,
    }[repair]


def test_the_grid_is_what_hands_say():
    first, second, train = made(0), made(1), made(2, 200)
    gold = np.random.default_rng(3).integers(0, 6, PAIRS).astype(float)
    found = sts_scores(first, second, gold, train, corpus="made")
    assert len(found) == len({(s.layer, s.pooling, s.repair) for s in found}) == (3 * LAYERS + 1) * len(REPAIRS)
    for score in found:
        if score.pooling == ENDS:
            assert score.layer == "1+3"
            a, b, t = ((x["mean"][1] + x["mean"][3]) / 2 for x in (first, second, train))
        else:
            a, b, t = (x[score.pooling][int(score.layer)] for x in (first, second, train))
        expected = scipy.stats.spearmanr(cosines(*(by_hand(score.repair, t, x) for x in (a, b))), gold).statistic
        assert score.spearman == pytest.approx(100 * expected, abs=1e-6), score
        assert score.corpus == "made"


def test_whitening_hears_what_a_loud_dimension_drowned():
    rng = np.random.default_rng(0)
    loud = np.array([20, 1, 1, 1, 1, 1])
    make = lambda count: rng.standard_normal((count, WIDTH)) * loud
    a, train = make(200), make(500)
    gold = rng.random(200)
    # The quiet dimensions are as alike as people say; the loud one is noise.
    b = gold[:, None] * a + (1 - gold[:, None]) * make(200)
    b[:, 0] = 20 * rng.standard_normal(200)
    pooled = lambda x: {"cls": x[None].astype(np.float32)}
    found = {s.repair: s.spearman for s in sts_scores(pooled(a), pooled(b), gold, pooled(train), corpus="")}
    assert found["raw"] < 30
    assert found["all-but-the-top"] > 70
    assert found["whiten"] == pytest.approx(found["zca"], abs=1)
    assert found["whiten"] > 60


def test_spearman_averages_ties():
    gold = np.array([1, 2, 2, 3, 3, 3.0])
    said = np.array([0.1, 0.5, 0.5, 0.2, 0.9, 0.9])
    ranks = lambda x: np.array([(x < value).sum() + ((x == value).sum() + 1) / 2 for value in x])
    assert spearman(said, gold) == pytest.approx(100 * np.corrcoef(ranks(said), ranks(gold))[0, 1])
    assert spearman(said, -said) == pytest.approx(-100)
    assert spearman(np.ones(6), gold) == spearman(said, np.ones(6)) == 0
    for bad in (np.ones(5), np.ones(7)):
        with pytest.raises(InputError, match="spearman: found"):
            spearman(said, bad)
    with pytest.raises(InputError, match="at least 2"):
        spearman(said[:1], gold[:1])


def test_a_layer_that_is_a_point_is_scored_raw_only():
    first, second, train = (made(seed, poolings=("cls",)) for seed in range(3))
    for x in (first, second, train):
        x["cls"][0] = 0.1
    found = sts_scores(first, second, np.arange(PAIRS), train, corpus="")
    assert [(s.repair, s.spearman) for s in found if s.layer == "0"] == [("raw", 0)]
    assert {s.repair for s in found if s.layer == "1"} == set(REPAIRS)


def test_zero_vectors_are_like_nothing():
    first, second, train = (made(seed, poolings=("mean",)) for seed in range(3))
    first["mean"][:, 5] = 0
    found = sts_scores(first, second, np.arange(PAIRS), train, corpus="", repairs=["raw"])
    assert np.isfinite([s.spearman for s in found]).all()


def test_what_does_not_go_together():
    first, second, train = made(0), made(1), made(2)
    gold = np.arange(PAIRS)
    with pytest.raises(InputError, match=r"repairs: found 'whitten'.*did you mean 'whiten'"):
        sts_scores(first, second, gold, train, corpus="", repairs=["whitten"])
    with pytest.raises(InputError, match="poolings: found cls, max, mean / mean / cls, max, mean"):
        sts_scores(first, {"mean": second["mean"]}, gold, train, corpus="")
    with pytest.raises(InputError, match="max: found shapes"):
        sts_scores(first, {**second, "max": second["max"][:, :5]}, gold, train, corpus="")
    with pytest.raises(InputError, match="cls: found shapes"):
        sts_scores(first, second, gold, {**train, "cls": train["cls"][..., :3]}, corpus="")
    with pytest.raises(InputError, match="spearman: found"):
        sts_scores(first, second, gold[:7], train, corpus="")
