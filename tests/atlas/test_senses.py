"""Disambiguation beside scikit-learn, word by word, and by counts done by hand."""

import tracemalloc

import numpy as np
import pytest

from ctx_jax import InputError
from ctx_jax.atlas.records import Senses
from ctx_jax.atlas.senses import Disambiguation, sense_task, wic_threshold
from ctx_jax.encoder import vectors as vectors_module


def senses(lemmas, keys):
    count = len(lemmas)
    keys = [(key,) if isinstance(key, str) else key for key in keys]
    zeros = np.zeros(count, np.int64)
    return Senses([["w"]] * count, zeros, np.tile([0, 1], (count, 1)), lemmas, keys, [str(n) for n in range(count)])


def made(count, seed, width=6):
    """Words with two to four senses, and vectors near those of their sense, of several lengths."""
    rng = np.random.default_rng(seed)
    places = np.random.default_rng(9).standard_normal((5, 4, width))
    words = rng.integers(0, 5, count)
    which = np.minimum(rng.integers(0, 4, count), 1 + words % 3)
    vectors = places[words, which] + 0.9 * rng.standard_normal((count, width))
    vectors *= rng.uniform(0.2, 5, (count, 1))
    return senses([f"w{w}" for w in words], [f"w{w}_{s}" for w, s in zip(words, which, strict=True)]), vectors.astype(
        np.float32
    )


@pytest.fixture(params=[2**22, 42], ids=["one block", "many blocks"])
def blocked(request, monkeypatch):
    monkeypatch.setattr(vectors_module, "_BLOCK", request.param)


def of_word(occurrences, vectors, word):
    rows = [row for row, lemma in enumerate(occurrences.lemmas) if lemma == word]
    return rows, vectors[rows].astype(np.float64), [occurrences.keys[row][0] for row in rows]


def test_one_nn_is_scikit_learns(blocked):
    neighbors = pytest.importorskip("sklearn.neighbors")
    (train, x), (test, y) = made(300, 0), made(80, 1)
    found = Disambiguation(train, test).one_nn(x, y)
    for word in set(test.lemmas):
        _, vectors, keys = of_word(train, x, word)
        rows, asked, _ = of_word(test, y, word)
        model = neighbors.KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(vectors, keys)
        assert [found[row] for row in rows] == model.predict(asked).tolist()


def test_centroids_are_scikit_learns(blocked):
    """Its nearest centroid is Euclidean: of directions the nearest to a direction is that of the largest cosine."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    (train, x), (test, y) = made(300, 0), made(80, 1)
    found = Disambiguation(train, test).centroid(x, y)
    for word in set(test.lemmas):
        _, vectors, keys = of_word(train, x, word)
        rows, asked, _ = of_word(test, y, word)
        model = neighbors.NearestCentroid().fit(vectors, keys)
        model.centroids_ /= np.linalg.norm(model.centroids_, axis=1, keepdims=True)
        asked /= np.linalg.norm(asked, axis=1, keepdims=True)
        assert [found[row] for row in rows] == model.predict(asked).tolist()


def test_macro_f1_is_scikit_learns():
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    (train, x), (test, y) = made(300, 0), made(80, 1)
    task = Disambiguation(train, test)
    found = task.centroid(x, y)
    scores = []
    for word in set(test.lemmas):
        rows, _, keys = of_word(test, y, word)
        scores.append(f1_score(keys, [found[row] for row in rows], average="macro"))
    assert task.macro_f1(found) == pytest.approx(np.mean(scores), rel=1e-12)
    assert task.accuracy(found) == np.mean([f == k[0] for f, k in zip(found, test.keys, strict=True)])


TRAIN = senses(
    ["bank"] * 8 + ["bass"] * 2,
    ["shore"] + ["money"] * 5 + [("money", "shore"), ("shore", "money")] + ["fish", "voice"],
)


def test_the_commonest_sense():
    """`money` occurs 7 times and `shore` 3; of two as common the first by name."""
    test = senses(["bank", "bank", "bass", "bass"], ["shore", ("shore", "money"), "voice", "fish"])
    task = Disambiguation(TRAIN, test)
    assert task.most_frequent() == ["money", "money", "fish", "fish"]
    assert task.accuracy(task.most_frequent()) == 0.5


def test_a_lemma_without_training_falls_back():
    test = senses(["perch", "perch", "bank"], ["fish", "branch", "money"])
    train, asked = np.ones((10, 2)), np.ones((3, 2))
    for fallback, answers, accuracy in [(None, [None, None], 1 / 3), ({"perch": "branch"}, ["branch"] * 2, 2 / 3)]:
        task = Disambiguation(TRAIN, test, fallback)
        for found in (task.most_frequent(), task.centroid(train, asked), task.one_nn(train, asked)):
            assert found[:2] == answers
        assert task.accuracy(task.most_frequent()) == pytest.approx(accuracy)
    assert task.macro_f1(task.most_frequent()) == pytest.approx(((2 / 3 + 0) / 2 + 1) / 2)
    assert Disambiguation(TRAIN, test).macro_f1([None, None, "money"]) == pytest.approx((0 + 1) / 2)


def test_the_fallback_is_for_lemmas_that_training_lacks_only():
    test = senses(["bank"], ["money"])
    assert Disambiguation(TRAIN, test, {"bank": "shore"}).most_frequent() == ["money"]


def test_without_any_training():
    test = senses(["bank"], ["money"])
    found = sense_task("x", senses([], []), np.zeros((2, 0, 3)), test, np.ones((2, 1, 3)), {"bank": "money"})
    assert (found.centroid, found.one_nn, found.most_frequent) == ([1, 1], [1, 1], 1)
    assert found.by_frequency == {"0": [1, 1]}


def test_one_sense_only():
    train, test = senses(["w"] * 3, ["a"] * 3), senses(["w"] * 2, ["a", "b"])
    task = Disambiguation(train, test)
    found = task.centroid(np.ones((3, 2)), -np.ones((2, 2)))
    assert found == task.one_nn(np.ones((3, 2)), -np.ones((2, 2))) == ["a", "a"]
    assert task.macro_f1(found) == pytest.approx((2 / 3 + 0) / 2)


def test_a_zero_vector_gets_the_commonest_sense_by_centroid_and_the_first_neighbour():
    train, test = senses(["w"] * 3, ["a", "b", "b"]), senses(["w"], ["b"])
    task, vectors = Disambiguation(train, test), np.eye(3)
    assert task.centroid(vectors, np.zeros((1, 3))) == ["b"]
    assert task.one_nn(vectors, np.zeros((1, 3))) == ["a"]


def test_an_occurrence_with_two_senses_is_of_both_and_answers_its_first():
    train = senses(["w"] * 2, [("a", "b"), "c"])
    test = senses(["w"] * 2, ["a", ("b", "a")])
    task, x = Disambiguation(train, test), np.array([[1.0, 0], [0, 1]])
    near = np.array([[1.0, 0.1], [1, 0.1]])
    assert task.one_nn(x, near) == ["a", "a"]
    assert task.centroid(x, near) == ["a", "a"]
    assert task.accuracy(["a", "a"]) == 1
    assert task.macro_f1(["a", "a"]) == 1
    # The second's key is its first, as the answer is none of them.
    assert task.macro_f1(["a", "c"]) == pytest.approx((1 + 0 + 0) / 3)


def test_rare_senses_apart():
    train = senses(["w"] * 30, ["a"] * 20 + ["b"] * 5 + ["c"] * 4 + ["d"])
    test = senses(["w"] * 6, ["a", "b", "c", "d", "e", ("e", "a")])
    found = Disambiguation(train, test).by_frequency(["a", "b", "a", "d", "a", "e"])
    assert found == {"0": 0, "1-4": 0.5, "5-19": 1, "20+": 1}
    assert list(found) == ["0", "1-4", "5-19", "20+"]
    other = senses(["w"], ["b"])
    assert Disambiguation(train, other).by_frequency(["a"]) == {"5-19": 0}


def test_another_lemmas_senses_are_no_candidates():
    """CoarseWSD-20's protocol: even if its vectors are nearer."""
    train = senses(["w", "v"], ["w_a", "v_a"])
    task, x = Disambiguation(train, senses(["w"], ["w_a"])), np.array([[0, 1.0], [1, 0]])
    assert task.centroid(x, x[1:]) == task.one_nn(x, x[1:]) == ["w_a"]


def test_a_task_of_layers(tmp_path):
    (train, x), (test, y) = made(300, 0), made(80, 1)
    noise = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    np.save(tmp_path / "train.npy", np.stack([noise, x]))
    found = sense_task("made", train, np.load(tmp_path / "train.npy", mmap_mode="r"), test, np.stack([noise[:80], y]))
    task = Disambiguation(train, test)
    assert (found.name, found.train, found.test, found.lemmas) == ("made", 300, 80, 5)
    assert found.centroid == [task.accuracy(task.centroid(*pair)) for pair in [(noise, noise[:80]), (x, y)]]
    assert found.one_nn[1] == task.accuracy(task.one_nn(x, y))
    assert found.macro_f1[1] == task.macro_f1(task.centroid(x, y))
    assert found.by_frequency["20+"][1] == task.by_frequency(task.centroid(x, y))["20+"]
    assert found.centroid[1] > max(found.most_frequent, found.centroid[0])


def test_what_does_not_go_together():
    test = senses(["w"], ["a"])
    with pytest.raises(InputError, match="test: occurrence 0: found no sense"):
        Disambiguation(test, senses(["w"], [()]))
    with pytest.raises(InputError, match="test: found no occurrences"):
        Disambiguation(test, senses([], []))
    with pytest.raises(InputError, match="train: found 2 vectors, expected one for each of 1"):
        Disambiguation(test, test).centroid(np.ones((2, 3)), np.ones((1, 3)))
    with pytest.raises(InputError, match="found 2 and 1 layers"):
        sense_task("x", test, np.ones((2, 1, 3)), test, np.ones((1, 1, 3)))


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    count = rng.integers(1, 30)
    same = rng.random(count) < 0.5
    alike = np.round(rng.random(count) + 0.4 * same, 1)
    found = wic_threshold(alike, same, alike)
    tried = [-np.inf, *np.unique(alike), np.inf]
    assert found.dev_accuracy == max(np.mean((alike >= threshold) == same) for threshold in tried)
    assert np.mean(found.same == same) == found.dev_accuracy


def test_the_threshold_is_half_way():
    found = wic_threshold(np.array([0.9, 0.2, 0.6]), np.array([True, False, True]), np.array([0.39, 0.4, 0.41]))
    assert found.threshold == pytest.approx(0.4)
    assert found.same[[0, 2]].tolist() == [False, True]
    assert wic_threshold(np.array([0.1, 0.9]), np.array([True, True]), np.array([-2.0])).same.tolist() == [True]
    assert wic_threshold(np.array([0.1, 0.9]), np.array([False, False]), np.array([2.0])).same.tolist() == [False]
    with pytest.raises(InputError, match="dev: found 2 similarities for 1 answers"):
        wic_threshold(np.ones(2), np.array([True]), np.ones(1))


def test_memory_is_that_of_blocks(monkeypatch):
    """All cosines of a word with 4,000 occurrences and 3,000 to be told would take 96 MB."""
    monkeypatch.setattr(vectors_module, "_BLOCK", 2**14)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4000, 4)).astype(np.float32), rng.standard_normal((3000, 4)).astype(np.float32)
    task = Disambiguation(senses(["w"] * 4000, ["a", "b"] * 2000), senses(["w"] * 3000, ["a"] * 3000))
    tracemalloc.start()
    task.centroid(x, y)
    task.one_nn(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
