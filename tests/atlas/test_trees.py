"""Structural probes: on vectors that hold a tree, and their scores beside naive ones."""

import itertools

import jax
import numpy as np
import pytest
from scipy import stats

from ctx_jax.atlas.features import Features
from ctx_jax.atlas.probes.labelling import Probing
from ctx_jax.atlas.probes.structural import Distance, TreeSource, rank_correlations, tree_depths, tree_distances, uuas
from ctx_jax.atlas.probes.training import Training, fit
from ctx_jax.atlas.probes.trees import tree_task
from ctx_jax.atlas.records import Trees
from ctx_jax.errors import InputError

WIDTH, PLANTED = 40, 1


def random_heads(rng, count):
    """A tree over words in random order."""
    order = rng.permutation(count)
    heads = np.full(count, -1)
    for place in range(1, count):
        heads[order[place]] = order[rng.integers(0, place)]
    return heads


def floyd_warshall(heads):
    count = len(heads)
    distances = np.full((count, count), np.inf)
    np.fill_diagonal(distances, 0)
    for word, head in enumerate(heads):
        if head >= 0:
            distances[word, head] = distances[head, word] = 1
    for k, i, j in itertools.product(range(count), repeat=3):
        distances[i, j] = min(distances[i, j], distances[i, k] + distances[k, j])
    return distances


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_distances_and_depths_of_trees(count):
    heads = random_heads(np.random.default_rng(count), count)
    expected = floyd_warshall(heads)
    np.testing.assert_array_equal(tree_distances(heads), expected)
    np.testing.assert_array_equal(tree_depths(heads), expected[int(np.flatnonzero(heads < 0)[0])])


def test_two_roots_are_a_step_apart():
    np.testing.assert_array_equal(tree_distances(np.array([-1, 0, -1])), [[0, 1, 1], [1, 0, 2], [1, 2, 0]])


def test_uuas_is_prims():
    """Against Prim's algorithm on the scored words alone."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        count = int(rng.integers(2, 15))
        heads, scored = random_heads(rng, count), rng.random(count) < 0.8
        distances = rng.random((count, count))
        distances = distances + distances.T
        words = np.flatnonzero(scored).tolist()
        inside, found = set(words[:1]), set()
        while len(inside) < len(words):
            a, b = min(((a, b) for a in inside for b in words if b not in inside), key=lambda pair: distances[pair])
            inside.add(b)
            found.add(frozenset((a, b)))
        gold = {frozenset((w, int(heads[w]))) for w in words if heads[w] >= 0 and scored[heads[w]]}
        assert uuas(distances, heads, scored) == (len(found & gold), len(gold))


def test_equal_vectors_make_no_tree_but_an_answer():
    assert uuas(np.zeros((4, 4)), np.array([-1, 0, 1, 2]), np.ones(4, bool))[1] == 3


def test_rank_correlations_average_by_length():
    rng = np.random.default_rng(0)
    found, gold, expected = [], [], {}
    for count in (4, 5, 5, 9, 60):
        distances = tree_distances(random_heads(rng, count))
        ours = rng.random((count, count))
        found.append(ours)
        gold.append(distances)
        if 5 <= count <= 50:
            rows = [stats.spearmanr(a, b).statistic for a, b in zip(ours, distances, strict=True)]
            expected.setdefault(count, []).append(np.mean(rows))
    assert rank_correlations(found, gold) == pytest.approx(np.mean([np.mean(v) for v in expected.values()]))


def made(count, seed):
    """Trees, and vectors of three layers whose middle one is a sum of a word's ancestors."""
    rng, axes = np.random.default_rng(seed), np.linalg.qr(np.random.default_rng(1).standard_normal((WIDTH, WIDTH)))[0]
    heads = [random_heads(rng, int(rng.integers(5, 14))) for _ in range(count)]
    starts = np.concatenate([[0], np.cumsum([len(tree) for tree in heads])])
    vectors = 0.1 * rng.standard_normal((starts[-1], 3, WIDTH))
    for number, tree in enumerate(heads):
        names = rng.permutation(WIDTH)
        for word in range(len(tree)):
            here = word
            while here >= 0:
                vectors[starts[number] + word, PLANTED] += axes[names[here]]
                here = tree[here]
    relations = [["root" if head < 0 else "left" if head < w else "right" for w, head in enumerate(t)] for t in heads]
    trees = Trees([["w"] * len(tree) for tree in heads], heads, [np.ones(len(tree), bool) for tree in heads], relations)
    return Features(vectors.astype(np.float32), starts), trees


@pytest.fixture(scope="module")
def splits():
    return {"train": made(150, 0), "dev": made(30, 1), "test": made(40, 2)}


def test_the_layer_that_holds_the_tree_is_found(splits):
    task = tree_task("made/tree", "tree", splits, Probing(training=Training(epochs=25, seeds=1, learning_rate=5e-3)))
    named = {(probe.kind, probe.metric): [score.mean for score in probe.layers] for probe in task.probes}
    assert list(named) == [
        ("distance", "UUAS"), ("distance", "DSpr."), ("depth", "root accuracy"), ("depth", "NSpr."),
        ("arcs", "UAS"), ("arcs", "LAS"),
    ]  # fmt: skip
    for key in (("distance", "UUAS"), ("distance", "DSpr."), ("depth", "NSpr.")):
        assert int(np.argmax(named[key])) == PLANTED, key
    assert named["distance", "UUAS"][PLANTED] > 0.85 > 0.5 > named["distance", "UUAS"][0]
    assert all(las <= uas for las, uas in zip(named["arcs", "LAS"], named["arcs", "UAS"], strict=True))
    assert set(task.baselines) == {"neighbours (UUAS)", "word before (UAS)"}


def test_trees_trained_together_are_those_trained_alone(splits):
    training = Training(epochs=2, batch_size=10, seeds=1)
    sources = [TreeSource(*splits[split], np.arange(len(splits[split][1].heads))) for split in ("train", "dev")]
    together = fit(Distance(WIDTH, 16), *sources, training, jax.random.key(0))
    for layer in range(3):
        alone = []
        for split in ("train", "dev"):
            features, trees = splits[split]
            own = features._replace(vectors=np.ascontiguousarray(features.vectors[:, layer : layer + 1]))
            alone.append(TreeSource(own, trees, np.arange(len(trees.heads))))
        one = fit(Distance(WIDTH, 16), *alone, training, jax.random.key(0))
        np.testing.assert_allclose(together.params["projection"][:, layer], one.params["projection"][:, 0], atol=1e-6)


def test_baselines_of_a_chain():
    """Each word's head is the word before, the first one's nothing: neighbours are all right."""
    heads = [np.arange(-1, 8)] * 12
    starts = np.arange(0, 9 * 13, 9)
    vectors = np.random.default_rng(0).standard_normal((108, 1, 4)).astype(np.float32)
    trees = Trees([["w"] * 9] * 12, heads, [np.ones(9, bool)] * 12)
    both = {"train": (Features(vectors, starts), trees), "test": (Features(vectors, starts), trees)}
    task = tree_task("chain/tree", "", both, Probing(training=Training(epochs=1, seeds=1)))
    assert task.baselines == {"neighbours (UUAS)": 1.0, "word before (UAS)": 1.0}
    assert [probe.metric for probe in task.probes][-1] == "UAS"  # no relations, no LAS


def test_no_sentence_of_use_is_an_error(splits):
    features, _ = splits["train"]
    empty = Features(features.vectors[:0], np.array([0]))
    with pytest.raises(InputError, match="no sentence of 1 to 64 words in test"):
        tree_task("e/tree", "", {**splits, "test": (empty, Trees([], [], []))}, Probing(training=Training(epochs=1)))
