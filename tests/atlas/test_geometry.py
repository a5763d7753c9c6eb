"""The shape of spaces, beside loops over all pairs and spaces whose shape is known."""

import itertools
import tracemalloc

import numpy as np
import pytest

from ctx_jax import InputError
from ctx_jax.atlas.geometry import (
    cka_matrix,
    effective_rank,
    geometry,
    linear_cka,
    mean_cosine,
    occurrences,
    one_of_each,
    outliers,
    participation_ratio,
    with_their_mean,
)
from ctx_jax.encoder import vectors as vectors_module
from ctx_jax.encoder.vectors import moments


@pytest.fixture(params=[2**22, 48], ids=["one block", "many blocks"])
def blocked(request, monkeypatch):
    monkeypatch.setattr(vectors_module, "_BLOCK", request.param)


def made(count=60, width=8, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, width)) + rng.uniform(-1, 1, width)).astype(np.float32)


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def pairs_mean(vectors):
    """The definition, pair by pair."""
    kept = [vector for vector in vectors if vector.any()]
    found = [cosine(a, b) for a, b in itertools.permutations(kept, 2)]
    return sum(found) / len(found) if found else 0.0


def explained(vectors):
    squares = np.linalg.svd(vectors.astype(np.float64), compute_uv=False) ** 2
    return squares[0] / squares.sum()


def everything(vectors, types, sentences, chosen):
    """All numbers of a layer by loops: what `geometry` says."""
    words = [np.flatnonzero(types == t) for t in np.unique(types)]
    words = [rows for rows in words if len(rows) >= 5]
    texts = [np.flatnonzero(sentences == s) for s in np.unique(sentences)]
    texts = [rows for rows in texts if len(rows) >= 2]
    centred = lambda x: x - x.mean(0, dtype=np.float64)
    spectrum = np.linalg.svd(centred(vectors), compute_uv=False) ** 2
    shares = spectrum / spectrum.sum()
    inside = [
        np.mean([cosine(vector, vectors[rows].mean(0)) for vector in vectors[rows] if vector.any()]) for rows in texts
    ]
    return {
        "anisotropy": pairs_mean(vectors[chosen]),
        "self_similarity": np.mean([pairs_mean(vectors[rows]) for rows in words]),
        "intra_sentence": np.mean(inside),
        "explained_uncentred": np.mean([explained(vectors[rows]) for rows in words]),
        "explained_centred": np.mean([explained(centred(vectors[rows])) for rows in words]),
        "explained_anisotropy": explained(vectors[chosen]),
        "norm": np.mean([np.sqrt((v.astype(np.float64) ** 2).sum()) for v in vectors]),
        "effective_rank": np.exp(-sum(p * np.log(p) for p in shares)),
        "participation_ratio": spectrum.sum() ** 2 / (spectrum**2).sum(),
    }


def test_geometry_is_what_loops_say(blocked, tmp_path):
    rng = np.random.default_rng(3)
    features = np.stack([made(90, 8, seed) for seed in range(3)])
    features[1, [4, 17, 40]] = 0
    types, sentences = rng.integers(0, 12, 90), np.sort(rng.integers(0, 25, 90)) * 7
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    found = geometry(mapped, types, sentences, corpus="made", sample=9, cka_words=90, seed=5)
    chosen = one_of_each(sentences, 9, np.random.default_rng(5))
    assert len(chosen) == 9
    assert len(set(sentences[chosen])) == 9
    for layer, vectors in enumerate(features):
        for name, value in everything(vectors, types, sentences, chosen).items():
            assert getattr(found, name)[layer] == pytest.approx(value, rel=1e-6), name
    assert (found.corpus, found.words) == ("made", 90)
    np.testing.assert_allclose(found.cka, [[gram_cka(a, b) for b in features] for a in features], rtol=1e-9)


def test_the_seed_says_which_words():
    features, types = made(200)[None], np.zeros(200, int)
    of = lambda seed: geometry(features, types, np.arange(200), corpus="", sample=20, seed=seed).anisotropy[0]
    assert of(0) == of(0)
    assert of(0) != of(1)


@pytest.mark.parametrize("count", [3, 6, 40, 260])
def test_occurrences_by_either_matrix(blocked, count):
    """Fewer vectors than dimensions or more, few enough for LAPACK or not."""
    x = made(count, 230 if count == 260 else 16)
    similarity, uncentred, centred = occurrences(x, np.arange(count))
    assert similarity == pytest.approx(pairs_mean(x) if count < 100 else mean_cosine(x), rel=1e-9)
    assert uncentred == pytest.approx(explained(x), rel=1e-9)
    assert centred == pytest.approx(explained(x - x.mean(0, dtype=np.float64)), rel=1e-9)


def test_vectors_that_are_all_the_same():
    x = np.repeat(made(1), 30, 0) + np.float32(0.1)
    assert mean_cosine(x) == pytest.approx(1, abs=1e-12)
    assert occurrences(x, np.arange(30)) == pytest.approx((1, 1, 1), abs=1e-12)
    found = geometry(x[None], np.zeros(30, int), np.arange(30) // 3, corpus="")
    assert found.anisotropy == pytest.approx([1])
    assert found.intra_sentence == pytest.approx([1])
    assert (found.effective_rank, found.participation_ratio, found.cka) == ([0], [0], [[0]])


def test_zero_vectors_have_no_cosine():
    x = np.array([[0, 0], [1, 0], [0, 0], [1, 1]], np.float32)
    assert mean_cosine(x) == pytest.approx(np.sqrt(0.5))
    assert with_their_mean(x, np.arange(4)) == pytest.approx((cosine(x[1], x.mean(0)) + cosine(x[3], x.mean(0))) / 2)
    nothing = np.zeros((4, 2), np.float32)
    assert mean_cosine(nothing) == with_their_mean(nothing, np.arange(4)) == 0
    assert occurrences(nothing, np.arange(4)) == (0, 1, 1)
    opposite = np.array([[1, 2], [-1, -2]], np.float32)
    assert with_their_mean(opposite, np.arange(2)) == 0


def test_one_word_has_numbers():
    found = geometry(made(1)[None], np.array([3]), np.array([4]), corpus="")
    assert found.anisotropy == found.self_similarity == found.intra_sentence == [0]
    assert found.explained_uncentred == found.explained_centred == [0]
    assert (found.effective_rank, found.participation_ratio, found.cka) == ([0], [0], [[0]])
    assert found.norm[0] == pytest.approx(np.linalg.norm(made(1)))


def test_rare_types_and_sentences_of_a_word_are_left_out():
    x = made(11)
    types = np.array([0] * 5 + [1] * 4 + [2] * 2)
    found = geometry(x[None], types, np.array([0, 0, 0, *range(1, 9)]), corpus="")
    assert found.self_similarity[0] == pytest.approx(pairs_mean(x[:5]))
    assert found.intra_sentence[0] == pytest.approx(with_their_mean(x, np.arange(3)))


def test_ranks_of_known_spectra():
    for rank, dimensions in [(1, 5), (4, 4), (3, 7)]:
        spectrum = np.array([2.5] * rank + [0] * (dimensions - rank))
        assert effective_rank(spectrum) == pytest.approx(rank)
        assert participation_ratio(spectrum) == pytest.approx(rank)
    spectrum = np.array([0.5, 0.25, 0.25])
    assert effective_rank(spectrum) == pytest.approx(2**1.5)
    assert participation_ratio(spectrum) == pytest.approx(1 / 0.375)


def test_an_isotropic_gaussian_uses_all_dimensions():
    x = np.random.default_rng(0).standard_normal((20_000, 32)).astype(np.float32)
    found = geometry(x[None], np.arange(20_000), np.arange(20_000), corpus="", sample=20_000)
    # Of p = λ / Σλ with λ = 1 ± √(2 D / N) at most the losses are of the order of D / N.
    assert 31.9 < found.effective_rank[0] < 32
    assert 31.9 < found.participation_ratio[0] < 32
    assert abs(found.anisotropy[0]) < 1e-3
    assert found.outliers == [[]]


def test_planted_outliers_are_found():
    mean = np.random.default_rng(0).standard_normal(100) * 0.01
    mean[[7, 31]] = -3, 4
    found = outliers(mean)
    z = (mean - mean.mean()) / mean.std()
    assert found == [(31, pytest.approx(z[31])), (7, pytest.approx(z[7]))]
    assert outliers(np.ones(5)) == []


def gram_cka(x, y):
    """The other form, by inner products of words: tr(K H L H) of Kornblith et al. 2019, equations 3 and 4."""
    h = np.eye(len(x)) - 1 / len(x)
    of_x, of_y = (h @ (z.astype(np.float64) @ z.astype(np.float64).T) @ h for z in (x, y))
    hsic = lambda a, b: np.trace(a @ b)
    return hsic(of_x, of_y) / np.sqrt(hsic(of_x, of_x) * hsic(of_y, of_y))


def test_cka_is_that_of_inner_products(blocked):
    x, y = made(50, 8, 1) + 3, made(50, 5, 2)
    y[:, :3] += x[:, :3]
    assert linear_cka(x, y) == pytest.approx(gram_cka(x, y), rel=1e-9)
    assert linear_cka(y, x) == pytest.approx(linear_cka(x, y), rel=1e-12)
    assert 0.1 < linear_cka(x, y) < 0.9


def test_cka_sees_no_rotation_scale_or_shift():
    x = made(50, 8).astype(np.float64)
    turn = np.linalg.qr(np.random.default_rng(4).standard_normal((8, 8)))[0]
    assert linear_cka(x, 3 * x @ turn - 5) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, np.ones((50, 3))) == 0


def test_cka_of_some_rows():
    features = np.stack([made(60, 8, seed) for seed in range(3)])
    rows = np.array([3, 5, 8, 20, 21, 40, 59])
    found = cka_matrix(features, rows)
    expected = [[gram_cka(a[rows], b[rows]) for b in features] for a in features]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_what_does_not_go_together():
    features, ids = made(6)[None], np.arange(6)
    with pytest.raises(InputError, match="sentences: found shape"):
        geometry(features, ids, ids[:5], corpus="")
    with pytest.raises(InputError, match="types: found shape"):
        geometry(features, ids[:5], ids, corpus="")
    with pytest.raises(InputError, match="features: found shape"):
        geometry(features[:, :0], ids[:0], ids[:0], corpus="")
    with pytest.raises(InputError, match="NaN"):
        geometry(features * np.float32(np.nan), ids, ids, corpus="")
    with pytest.raises(InputError, match="found 6 and 5 vectors"):
        linear_cka(made(6), made(5))


def test_the_spectrum_of_a_point_is_nothing():
    assert not moments(np.full((100, 3), 0.1, np.float32)).spectrum().any()


def test_memory_is_that_of_blocks(tmp_path, monkeypatch):
    """A layer of 20,000 words takes 5 MB, 10 in float64; a block of 2**14 values 0.13."""
    monkeypatch.setattr(vectors_module, "_BLOCK", 2**14)
    np.save(tmp_path / "features.npy", np.random.default_rng(0).standard_normal((2, 20_000, 64), np.float32))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    types = np.minimum(np.random.default_rng(1).zipf(1.3, 20_000), 2000)
    tracemalloc.start()
    found = geometry(mapped, types, np.arange(20_000) // 20, corpus="", cka_words=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
    assert found.cka[0][0] == 1
