"""Groups and their agreement with names, beside scikit-learn and loops over all pairs."""

import numpy as np
import pytest

from ctx_jax import InputError
from ctx_jax.atlas.clusters import adjusted_rand, b_cubed, cluster, k_means, pca_2d, silhouette, v_measure
from ctx_jax.encoder.vectors import moments, unit


def bunches(count=4, size=30, width=10, seed=0):
    rng = np.random.default_rng(seed)
    centres = 3 * np.linalg.qr(rng.standard_normal((width, width)))[0][:count]
    labels = np.repeat(np.arange(count), size)
    return centres[labels] + 0.4 * rng.standard_normal((len(labels), width)), labels


@pytest.mark.parametrize("count", [2, 4, 7])
def test_planted_groups_are_found(count):
    vectors, gold = bunches(count)
    found = cluster(vectors)
    assert found.labels.max() + 1 == count
    assert adjusted_rand(gold, found.labels) == 1
    assert found.silhouette > 0.5


def test_k_means_is_as_good_as_scikit_learns():
    clusters = pytest.importorskip("sklearn.cluster")
    vectors = unit(np.random.default_rng(1).standard_normal((200, 5)))
    labels = k_means(vectors, 6, seed=3)
    within = sum(np.square(vectors[labels == k] - vectors[labels == k].mean(0)).sum() for k in range(6))
    theirs = clusters.KMeans(6, n_init=10, random_state=0).fit(vectors).inertia_
    assert within < 1.03 * theirs
    np.testing.assert_array_equal(labels, k_means(vectors, 6, seed=3))
    counts = np.bincount(labels)
    assert len(counts) == 6
    assert (np.diff(counts) <= 0).all()
    # Nothing is nearer to another group's mean.
    means = np.stack([vectors[labels == k].mean(0) for k in range(6)])
    np.testing.assert_array_equal(np.square(vectors[:, None] - means).sum(-1).argmin(1), labels)


def test_fewer_vectors_that_differ_than_groups():
    vectors = np.repeat(np.eye(3), [5, 4, 3], 0)
    assert k_means(vectors, 6).tolist() == [0] * 5 + [1] * 4 + [2] * 3
    assert k_means(vectors, 1).tolist() == [0] * 12
    assert cluster(vectors).labels.tolist() == [0] * 5 + [1] * 4 + [2] * 3
    with pytest.raises(InputError, match="k: found 13, expected 1 to 12"):
        k_means(vectors, 13)


def test_one_group():
    for vectors in (np.ones((1, 3)), np.eye(2), np.ones((9, 3)), np.zeros((9, 3))):
        found = cluster(vectors)
        assert found.labels.tolist() == [0] * len(vectors)
        assert found.silhouette == 0
    with pytest.raises(InputError, match="vectors: found none"):
        cluster(np.ones((0, 3)))


def test_silhouette_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    vectors = unit(np.random.default_rng(1).standard_normal((60, 5)))
    labels = np.random.default_rng(2).integers(0, 5, 60)
    labels[0] = 9  # a group of one
    assert silhouette(vectors, labels) == pytest.approx(metrics.silhouette_score(vectors, labels, metric="cosine"))
    with pytest.raises(InputError, match="found one group"):
        silhouette(vectors, np.zeros(60))


def loops_b_cubed(gold, found):
    precision, recall = [], []
    for i in range(len(gold)):
        group = [j for j in range(len(gold)) if found[j] == found[i]]
        sense = [j for j in range(len(gold)) if gold[j] == gold[i]]
        both = len(set(group) & set(sense))
        precision.append(both / len(group))
        recall.append(both / len(sense))
    p, r = np.mean(precision), np.mean(recall)
    return p, r, 2 * p * r / (p + r)


@pytest.mark.parametrize("seed", range(6))
def test_agreement(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    gold, found = rng.integers(0, 4, 50), rng.integers(0, 1 + seed, 50)
    found = np.where(rng.random(50) < 0.4, gold, found)
    names = [f"sense {g}" for g in gold]
    assert adjusted_rand(names, found) == pytest.approx(metrics.adjusted_rand_score(gold, found), abs=1e-12)
    theirs = metrics.homogeneity_completeness_v_measure(gold, found)
    assert v_measure(names, found) == pytest.approx(theirs, abs=1e-12)
    assert b_cubed(names, found) == pytest.approx(loops_b_cubed(gold, found), abs=1e-12)


@pytest.mark.parametrize(
    ("gold", "found"), [([0, 0, 0], [1, 1, 1]), ([0, 1, 2], [2, 1, 0]), ([0, 0, 0], [0, 1, 2]), ([0], [5])]
)
def test_agreement_at_the_ends(gold, found):
    metrics = pytest.importorskip("sklearn.metrics")
    assert adjusted_rand(gold, found) == metrics.adjusted_rand_score(gold, found)
    assert v_measure(gold, found) == pytest.approx(metrics.homogeneity_completeness_v_measure(gold, found), abs=1e-12)
    assert b_cubed(gold, found) == pytest.approx(loops_b_cubed(gold, found))


def test_labels_that_do_not_go_together():
    for measure in (adjusted_rand, v_measure, b_cubed):
        with pytest.raises(InputError, match="found 2 and 1"):
            measure([1, 2], [1])
        with pytest.raises(InputError, match="found 0 and 0"):
            measure([], [])


def test_a_map_is_scikit_learns_pca_but_for_signs():
    decomposition = pytest.importorskip("sklearn.decomposition")
    vectors, _ = bunches(3)
    found = pca_2d(vectors.astype(np.float32))
    theirs = decomposition.PCA(2, svd_solver="full").fit_transform(vectors.astype(np.float32).astype(np.float64))
    np.testing.assert_allclose(np.abs(found), np.abs(theirs), atol=1e-9)


def test_a_map_is_never_mirrored():
    vectors, _ = bunches(3)
    order = np.random.default_rng(0).permutation(len(vectors))
    np.testing.assert_allclose(pca_2d(vectors[order]), pca_2d(vectors)[order], atol=1e-9)
    np.testing.assert_allclose(pca_2d(vectors + 7), pca_2d(vectors), atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_entry_of_an_axis_is_positive(seed):
    vectors, _ = bunches(3, seed=seed)
    for some in (vectors, -vectors):
        # The points times the vectors are the axes times their variance.
        axes = pca_2d(some).T @ (some - some.mean(0))
        assert (np.take_along_axis(axes, np.abs(axes).argmax(1, keepdims=True), 1) > 0).all()
        axes = moments(some).principal()[1].T
        assert (np.take_along_axis(axes, np.abs(axes).argmax(1, keepdims=True), 1) > 0).all()


def test_maps_of_little():
    assert pca_2d(np.ones((1, 5))).tolist() == [[0, 0]]
    assert not pca_2d(np.ones((4, 5))).any()
    np.testing.assert_allclose(pca_2d(np.array([[1.0], [3]])), [[-1, 0], [1, 0]])
    with pytest.raises(InputError, match="vectors: found none"):
        pca_2d(np.ones((0, 5)))
