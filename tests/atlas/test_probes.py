"""Probes on vectors in which the answer was planted, beside scikit-learn and beside probes trained alone."""

import dataclasses

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from ctx_jax.atlas.features import Features
from ctx_jax.atlas.probes.examples import standardisation
from ctx_jax.atlas.probes.kinds import MLP, Edge, Linear
from ctx_jax.atlas.probes.labelling import (
    Controls,
    Probing,
    center_of_gravity,
    expected_layer,
    interval,
    label_task,
    micro_f1,
    mix_shares,
)
from ctx_jax.atlas.probes.sources import SpanSource, SpanWords
from ctx_jax.atlas.probes.training import Training, fit, mean_loss, predict
from ctx_jax.atlas.records import Edges
from ctx_jax.errors import InputError

CLASSES, WIDTH, LAYERS, PLANTED = 4, 12, 4, 2
KEY = jax.random.key(3)


def planted(count, seed, *, layer=PLANTED, strength=3.0):
    """Labels, and vectors in which one layer's direction says them; layers differ in size and place."""
    rng, axes = np.random.default_rng(seed), np.random.default_rng(7).standard_normal((CLASSES, WIDTH))
    labels = rng.integers(0, CLASSES, count)
    vectors = rng.standard_normal((count, LAYERS, WIDTH))
    if layer is not None:
        vectors[:, layer] += strength * axes[labels] / np.linalg.norm(axes, axis=1)[labels, None]
    vectors = vectors * (10.0 ** np.arange(-1, LAYERS - 1))[:, None] + np.arange(LAYERS)[:, None]
    return vectors.astype(np.float32), labels


def source(vectors, labels, of=SpanSource, **options):
    count = len(vectors)
    spans = np.stack([np.arange(count), np.arange(count) + 1], 1)
    return of(Features(vectors, np.array([0, count])), (spans,), labels, **options)


def edges(labels, words=None, per_sentence=5):
    """One-word sentences' worth of labels, some to a sentence."""
    count = len(labels)
    words = words or [f"w{place}" for place in range(count)]
    sentences = [words[begin : begin + per_sentence] for begin in range(0, count, per_sentence)]
    place = np.arange(count)
    first = np.stack([place % per_sentence, place % per_sentence + 1], 1)
    return Edges(sentences, place // per_sentence, first, None, [f"c{label}" for label in labels])


def features(vectors, per_sentence=5):
    return Features(vectors, np.append(np.arange(0, len(vectors), per_sentence), len(vectors)))


@pytest.fixture(scope="module")
def data():
    return {"train": planted(600, 0), "dev": planted(150, 1), "test": planted(300, 2)}


@pytest.fixture(scope="module")
def fitted(data):
    train, dev = source(*data["train"]), source(*data["dev"])
    return fit(Linear(WIDTH, CLASSES), train, dev, Training(epochs=40, batch_size=32, learning_rate=0.01, seeds=2), KEY)


def accuracy(fitted, source):
    return (np.concatenate(list(predict(fitted, source)), axis=2) == source.classes).mean(-1)


@pytest.mark.parametrize(("kind", "of"), [(Linear, SpanSource), (MLP, SpanSource), (Edge, SpanWords)])
@pytest.mark.parametrize("at_once", [1, LAYERS], ids=["one after the other", "vmapped"])
def test_probes_trained_together_are_those_trained_alone(data, monkeypatch, kind, of, at_once):
    """As a processor takes layers and as an accelerator does. There the products of all layers are one, and round
    otherwise; of an edge probe's tanh and normalisation Adam makes more in weights whose gradients are tiny. What it
    has learnt, the loss and what it says, is the same as closely as of the others.
    """
    within = 1e-5 if kind is Edge and at_once > 1 else 1e-6
    training = Training(epochs=3, batch_size=32, seeds=2)
    monkeypatch.setattr("ctx_jax.atlas.probes.training._at_once", lambda members: min(at_once, members))
    together = fit(kind(WIDTH, CLASSES), source(*data["train"], of), source(*data["dev"], of), training, KEY)
    for layer in range(LAYERS):
        alone = {split: source(vectors[:, layer : layer + 1], labels, of) for split, (vectors, labels) in data.items()}
        one = fit(kind(WIDTH, CLASSES), alone["train"], alone["dev"], training, KEY)
        for name, leaf in one.params.items():
            np.testing.assert_allclose(together.params[name][:, layer], leaf[:, 0], atol=within, err_msg=name)
        np.testing.assert_allclose(together.loss[:, layer], one.loss[:, 0], atol=1e-6)
        said = [np.concatenate(list(predict(*each)), axis=2) for each in
                ((together, source(*data["test"], of)), (one, alone["test"]))]  # fmt: skip
        np.testing.assert_array_equal(said[0][:, layer], said[1][:, 0])
    # The last layer's first seed, by itself.
    single = fit(kind(WIDTH, CLASSES), alone["train"], alone["dev"], dataclasses.replace(training, seeds=1), KEY)
    for name, leaf in single.params.items():
        np.testing.assert_allclose(together.params[name][0, -1], leaf[0, 0], atol=within, err_msg=name)


def test_what_is_one_piece_is_read_once(data, monkeypatch):
    read, vectors = [], SpanSource.vectors
    monkeypatch.setattr(SpanSource, "vectors", lambda self, *args: read.append(len(self)) or vectors(self, *args))
    train, dev = source(*data["train"]), source(*data["dev"])
    fit(Linear(WIDTH, CLASSES), train, dev, Training(epochs=4, seeds=1), KEY)
    assert sorted(read) == [150, 600]
    read.clear()
    fit(Linear(WIDTH, CLASSES), source(*data["train"], size=512), dev, Training(epochs=4, seeds=1), KEY)
    assert sorted(read) == [150] + [600] * 2 * 5  # two pieces: once for the moments, then in each epoch


def test_an_accelerator_takes_as_many_examples_as_its_share_of_memory_holds(monkeypatch):
    vectors, spans = np.zeros((9000, 13, 768), np.float16), np.stack([np.arange(9000), np.arange(9000) + 1], 1)
    one = lambda count: SpanSource(Features(vectors, np.array([0, 9000])), (spans,) * count, np.zeros(9000)).size
    assert one(1) == 4096
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert one(1) == 16384  # all of them
    monkeypatch.setattr("ctx_jax.atlas.probes.sources.DEVICE_BYTES", 13 * 768 * 2 * 9000)
    assert (one(1), one(2), one(3)) == (8192, 4096, 4096)


def test_pieces_do_not_wait_in_memory(monkeypatch):
    """The next one is given to the device when it is done with the one before."""
    from ctx_jax.atlas.probes import training

    rng = np.random.default_rng(0)
    vectors, labels = rng.standard_normal((2048, 3, 128)).astype(np.float32), rng.integers(0, 3, 2048)
    run, ready = training._run, []

    def told(probe, held, *args, **options):
        ready.append(all(leaf.is_ready() for leaf in jax.tree.leaves(held[0])))
        return run(probe, held, *args, **options)

    monkeypatch.setattr(training, "_run", told)
    monkeypatch.setattr(training, "_at_once", lambda members: members)
    pieces = source(vectors, labels, size=256)
    fit(MLP(128, 3, hidden=256), pieces, source(vectors[:64], labels[:64]), Training(epochs=1, batch_size=8), KEY)
    assert ready == [True] * 8


def test_the_planted_layer_is_found_and_the_others_are_at_chance(data, fitted):
    """As good as scikit-learn's on the layer that knows; the others no better than a guess may be."""
    test = source(*data["test"])
    found = accuracy(fitted, test)
    chance = 1 / CLASSES + 3 * np.sqrt(0.25 * 0.75 / len(test))
    for layer in range(LAYERS):
        (x, y), (x_test, y_test) = data["train"], data["test"]
        mean, deviation = x[:, layer].mean(0), x[:, layer].std(0)
        theirs = LogisticRegression(C=1e4, max_iter=1000).fit((x[:, layer] - mean) / deviation, y)
        expected = theirs.score((x_test[:, layer] - mean) / deviation, y_test)
        if layer == PLANTED:
            assert expected > 0.8
            np.testing.assert_allclose(found[:, layer], expected, atol=0.02)
        else:
            assert (found[:, layer] < chance).all()


def test_long_training_reaches_the_optimum_of_scikit_learn(data):
    """The loss of a softmax regression is convex: both must come to one place."""
    x, y = data["train"]
    same = source(x, y)
    training = Training(epochs=500, batch_size=600, learning_rate=0.2, seeds=1)
    fitted = fit(Linear(WIDTH, CLASSES), same, same, training, KEY)
    loss = mean_loss(fitted, same)
    mean, scale = (np.asarray(part[0]) for part in standardisation(same))
    for layer in range(LAYERS):
        z = (x[:, layer] - mean[layer]) * scale[layer]
        theirs = LogisticRegression(C=1e8, tol=1e-8, max_iter=5000).fit(z, y)
        optimum = -theirs.predict_log_proba(z)[np.arange(len(y)), y].mean()
        assert optimum - 1e-5 < loss[0, layer] < optimum + 2e-3


def test_standardisation_is_that_of_all_examples(data):
    x, y = data["train"]
    mean, scale = (np.asarray(part[0]) for part in standardisation(source(x, y, size=128)))
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scale, 1 / x.astype(np.float64).std(0), rtol=1e-5)
    x = x.copy()
    x[:, 1, 3] = 5.0  # says nothing
    assert np.asarray(standardisation(source(x, y))[1][0])[1, 3] == 0


def test_a_mix_finds_its_layer_and_what_each_adds(data):
    train, dev, test = (source(*data[split]) for split in ("train", "dev", "test"))
    mixes = np.tril(np.ones((LAYERS, LAYERS), bool))
    training = Training(epochs=12, batch_size=32, learning_rate=1e-2, seeds=2)
    fitted = fit(Linear(WIDTH, CLASSES), train, dev, training, KEY, allowed=mixes)
    shares = mix_shares(fitted)
    np.testing.assert_allclose(shares.sum(1), 1)
    assert (shares[~mixes] == 0).all()
    assert shares[-1].argmax() == PLANTED
    scores = accuracy(fitted, test).mean(0)
    assert expected_layer(scores) == pytest.approx(PLANTED, abs=0.35)
    assert scores[PLANTED - 1] < 0.4 < 0.7 < scores[PLANTED]


def test_expected_layer_and_center_of_gravity_by_hand():
    assert expected_layer([0.2, 0.3, 0.7, 0.7]) == pytest.approx((1 * 0.1 + 2 * 0.4) / 0.5)
    assert expected_layer([0.5, 0.4]) is None
    assert expected_layer([0.5, 0.4, 0.505]) is None  # 22 of 2
    assert center_of_gravity([0.5, 0.25, 0.25]) == pytest.approx(0.75)


def test_an_interval_is_students():
    """Of 1, 2, 3: mean 2, standard error 1/√3, t(0.975, 2) = 4.302653."""
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert interval([0.4]).low == interval([0.4]).high == 0.4


def random_spans(rng, words, count, longest):
    begins = rng.integers(0, words - longest, count)
    return np.stack([begins, begins + rng.integers(1, longest + 1, count)], 1)


def test_an_edge_probe_is_that_of_tenney():
    """Each word projected, attention over the projected words, tanh, layer normalisation, a product: in float64."""
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((200, 1, WIDTH))
    spans = random_spans(rng, 200, 30, 7), random_spans(rng, 200, 30, 4)
    probe = Edge(WIDTH, CLASSES, spans=2, projected=6, hidden=8)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), probe.init(KEY))
    words = SpanWords(Features(vectors, np.array([0, 200])), spans, np.zeros(30)).pieces()
    features = tuple(span[0, :30].astype(np.float32) for span in next(words).features)
    assert features[0].shape == (30, 8, WIDTH)
    found = probe.logits(jax.tree.map(np.float32, params), features)
    for row, both in zip(found, zip(*spans, strict=True), strict=True):
        pooled = []
        for number, (begin, end) in enumerate(both):
            projected = vectors[begin:end, 0] @ params["projection"][number].T + params["projection_bias"][number]
            weights = np.exp(projected @ params["attention"][number])
            pooled.append(weights @ projected / weights.sum())
        hidden = np.tanh(params["hidden"] @ np.concatenate(pooled) + params["hidden_bias"])
        normed = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5) * params["norm"] + params["norm_bias"]
        np.testing.assert_allclose(row, params["kernel"] @ normed + params["bias"], rtol=2e-4, atol=2e-4)


def test_the_loss_of_an_edge_probe_is_the_binary_cross_entropy_of_its_labels():
    rng = np.random.default_rng(6)
    probe = Edge(WIDTH, CLASSES)
    params, words = probe.init(KEY), rng.standard_normal((20, 3, WIDTH)).astype(np.float32)
    params |= {"kernel": 5 * params["kernel"]}
    targets = rng.integers(-1, CLASSES, 20)  # -1: none of them
    said = 1 / (1 + np.exp(-np.float64(probe.logits(params, (words,)))))
    right = targets[:, None] == np.arange(CLASSES)
    expected = -np.log(np.where(right, said, 1 - said)).sum(1)
    np.testing.assert_allclose(probe.losses(params, (words,), targets), expected, rtol=1e-5)
    np.testing.assert_array_equal(probe.predict(params, (words,)), said > 0.5)


def test_the_words_of_long_spans_are_the_first_and_the_last():
    rng = np.random.default_rng(8)
    vectors = rng.standard_normal((300, 2, WIDTH)).astype(np.float16)
    spans = random_spans(rng, 300, 90, 70)
    spans[0] = 10, 42  # just as long as may be
    (piece,) = SpanWords(Features(vectors, np.array([0, 300])), (spans,), np.zeros(90)).pieces()
    for found, (begin, end) in zip(piece.features[0].swapaxes(0, 1), spans, strict=False):
        kept = np.arange(begin, end)
        kept = kept if len(kept) <= 32 else np.concatenate([kept[:16], kept[-16:]])
        np.testing.assert_array_equal(found[:, : len(kept)], vectors[kept].swapaxes(0, 1))
        assert not found[:, len(kept) :].any()


def test_micro_f1_is_that_of_scikit_learn(data):
    """Also where the test has labels that training lacks."""
    x, y = data["test"]
    y = np.where(np.arange(len(y)) % 7 == 0, -1, y)
    training = Training(epochs=2, batch_size=32, seeds=3)
    test = source(x, y, SpanWords)
    fitted = fit(Edge(WIDTH, CLASSES), source(*data["train"], SpanWords), test, training, KEY)
    said = np.concatenate(list(predict(fitted, test)), axis=2)
    unseen = np.eye(CLASSES + 1, dtype=bool)[y]  # -1 is the last
    for layer, score in enumerate(micro_f1(fitted, test)):
        with_unseen = np.pad(said[:, layer], ((0, 0), (0, 0), (0, 1)))
        seeds = [f1_score(unseen, each, average="micro") for each in with_unseen]
        assert score.mean == pytest.approx(np.mean(seeds), abs=1e-12)
        assert score.high == pytest.approx(interval(seeds).high, abs=1e-12)
    assert micro_f1(fitted, test)[PLANTED].mean > 0.6


def test_spans_are_the_means_of_their_words():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((400, 3, 5)).astype(np.float32)
    begin = rng.integers(0, 390, 150)
    spans = np.stack([begin, begin + rng.integers(1, 10, 150)], 1)
    found = SpanSource(Features(vectors, np.array([0, 400])), (spans,), np.zeros(150)).vectors(spans, 160)
    expected = [vectors[a:b].astype(np.float64).mean(0) for a, b in spans]
    np.testing.assert_allclose(found[:, :150].swapaxes(0, 1), expected, atol=1e-6)
    assert not found[:, 150:].any()


@pytest.mark.parametrize("count", [1, 63, 64, 65, 300])
def test_pieces_hold_every_example_once_drawn_or_not(count):
    vectors, labels = planted(count, 5)
    one = source(vectors, labels, size=128)
    assert sum(one.counts()) == len(one) == count
    for rng in (None, np.random.default_rng(1)):
        pieces = list(one.pieces(rng))
        assert len({len(piece.weights) for piece in pieces}) == 1
        seen = np.concatenate([piece.features[0].swapaxes(0, 1)[piece.weights > 0] for piece in pieces])
        order = np.lexsort(seen[:, 0].T), np.lexsort(vectors[:, 0].T)
        np.testing.assert_array_equal(seen[order[0]], vectors[order[1]])


def test_control_labels_are_of_word_types_and_as_frequent_as_real_ones():
    rng = np.random.default_rng(0)
    classes = rng.choice(4, 4000, p=[0.5, 0.3, 0.15, 0.05])
    words = [f"w{number}" for number in range(4000)]
    controls = Controls(classes, seed=1)
    drawn = controls(edges(classes, words), np.arange(4000))
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    repeated = edges(classes, [words[place % 10] for place in range(4000)])
    again = controls(repeated, np.arange(4000))
    assert (again == np.tile(again[:10], 400)).all()
    assert (again[:10] == drawn[:10]).all()
    assert (Controls(classes, seed=2)(edges(classes, words), np.arange(4000)) != drawn).mean() > 0.3


@pytest.fixture(scope="module")
def task(data):
    splits = {split: (features(vectors), edges(labels)) for split, (vectors, labels) in data.items()}
    probing = Probing(("linear", "mlp"), Training(epochs=5, batch_size=32, seeds=2, learning_rate=5e-3))
    return label_task("planted/labels", "planted", splits, probing)


def test_a_task_says_all(task, data):
    linear, mlp = task.probes
    assert (linear.kind, mlp.kind, task.classes, task.train, task.test) == ("linear", "mlp", CLASSES, 600, 300)
    for probe in task.probes:
        means = [score.mean for score in probe.layers]
        assert int(np.argmax(means)) == PLANTED
        assert means[PLANTED] > 0.8
    labels = data["test"][1]
    commonest = np.bincount(data["train"][1]).argmax()
    assert task.baselines["majority"] == pytest.approx((labels == commonest).mean())
    assert max(score.mean for score in linear.control) < 0.45  # no word comes twice: nothing to remember
    assert linear.mix.mean > 0.6 > 0.4 > linear.layers[0].mean
    assert np.argmax(linear.mix_weights) == PLANTED
    # Fewer bits where the labels are known, no more than a uniform code and what learning costs elsewhere.
    assert np.argmin(linear.bits) == PLANTED
    assert linear.bits[PLANTED] + 0.4 < min(bits for layer, bits in enumerate(linear.bits) if layer != PLANTED)
    assert linear.uniform_bits == 2.0


def test_a_word_type_baseline_knows_the_words(data):
    vectors, labels = data["train"]
    words = [f"{'abcd'[label]}{place % 3}" for place, label in enumerate(labels)]
    splits = {"train": (features(vectors), edges(labels, words)), "test": (features(vectors), edges(labels, words))}
    probing = Probing(("linear",), Training(epochs=1, seeds=1), controls=False, mixes=False, code=False)
    assert label_task("words/labels", "", splits, probing).baselines["word type"] == 1.0


def test_labels_that_training_lacks_are_wrong_and_not_lost(data):
    vectors, labels = data["test"]
    strange = edges(labels)._replace(labels=["new"] * len(labels))
    splits = {"train": (features(data["train"][0]), edges(data["train"][1])), "test": (features(vectors), strange)}
    probing = Probing(("linear",), Training(epochs=1, seeds=1), controls=False, mixes=False, code=False)
    found = label_task("strange/labels", "", splits, probing)
    assert found.test == len(labels)
    assert [score.mean for score in found.probes[0].layers] == [0.0] * LAYERS


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"train"}, "found no test split"),
        ({"test"}, "found no train split"),
        ({"train", "test", "one class"}, "found 1 classes"),
    ],
)
def test_what_cannot_be_probed_is_refused(data, splits, words):
    given = {split: (features(data[split][0]), edges(data[split][1])) for split in splits & {"train", "test"}}
    if "one class" in splits:
        vectors, labels = data["train"]
        given["train"] = features(vectors), edges(np.zeros_like(labels))
    with pytest.raises(InputError, match=words):
        label_task("bad/labels", "", given)
