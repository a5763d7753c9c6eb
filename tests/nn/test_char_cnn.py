"""Words from characters by hand in float64: convolutions, the maximum, highway layers, ids that are no characters."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import elmo as oracle
from oracles.compiling import quick_jit

from ctx_jax.nn.char_cnn import ACTIVATIONS, CharCNN
from ctx_jax.nn.parameters import Bound

FILTERS = ((3, 4), (1, 2), (5, 6))
CHARACTERS, SIZE = 20, 9


@functools.cache
def bound(**options):
    sizes = {
        "num_characters": CHARACTERS,
        "character_dim": 3,
        "filters": FILTERS,
        "num_highway": 2,
        "projection_dim": 7,
        "activation": "relu",
    } | options
    return Bound(lambda rngs: CharCNN(**sizes, rngs=rngs))


def params(seed=0, **options):
    return oracle.random_params(bound(**options).shapes, seed, 1.5)


def words(seed=1, count=12, size=SIZE):
    """Random ones; one of a single character over and over, one of absent characters alone, one of both."""
    ids = np.random.default_rng(seed).integers(1, CHARACTERS, (count, size)).astype(np.int16)
    ids[0] = 5
    ids[1] = 0
    ids[2, 4:] = 0
    return ids


def names(p):
    return oracle.original_names({"words": p, "forward": {}, "backward": {}})


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_convolution_by_hand(activation):
    """Character by character: the largest of kernel · window + bias over all windows, then the activation."""
    p, ids = params(), words()
    table = np.concatenate([np.zeros((1, 3)), p["table"]]).astype(np.float64)
    expected = np.zeros((len(ids), 12))
    for number, word in enumerate(ids):
        at = 0
        for (width, count), kernel, bias in zip(FILTERS, p["kernels"].values(), p["biases"].values(), strict=True):
            for filter_ in range(count):
                values = []
                for place in range(SIZE - width + 1):
                    value = float(bias[filter_])
                    for offset in range(width):
                        value += table[word[place + offset]] @ kernel[offset, :, filter_].astype(np.float64)
                    values.append(value)
                largest = max(values)
                expected[number, at] = max(largest, 0) if activation == "relu" else np.tanh(largest)
                at += 1
    run = quick_jit(lambda p, ids: bound(activation=activation)(p).convolve(ids))
    np.testing.assert_allclose(run(p, ids), expected, rtol=0, atol=2e-6)
    if activation == "relu":
        assert 0.02 < (expected == 0).mean() < 0.98


@pytest.mark.parametrize("num_highway", [0, 1, 2])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_equals_the_twin(activation, num_highway):
    options = {"activation": activation, "num_highway": num_highway}
    p, ids = params(**options), words()
    found = quick_jit(lambda p, ids: bound(**options)(p)(ids))(p, ids)
    expected = np.stack([oracle.word_vector(names(p), word, activation) for word in ids])
    assert found.shape == (12, 7)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    if num_highway:
        swapped = [oracle.word_vector(names(p), word, activation, ["highway gate swapped"]) for word in ids]
        assert np.abs(swapped - expected).max() > 0.1


def test_the_maximum_comes_before_the_activation(monkeypatch):
    """No one can tell with relu or tanh, which keep the order; with a parabola one can."""
    monkeypatch.setitem(ACTIVATIONS, "parabola", jnp.square)
    p, ids = params(), words()
    found = quick_jit(lambda p, ids: bound(activation="parabola")(p).convolve(ids))(p, ids)
    largest = np.stack([oracle.convolve(names(p), word.astype(int), "relu", ["no activation"]) for word in ids])
    np.testing.assert_allclose(found, largest**2, rtol=0, atol=2e-5)
    assert (largest < -0.1).any()


def test_padding_is_convolved_like_any_character():
    """A filter that answers to the last character alone gives its answer for a word of one letter."""
    p = jax.tree.map(np.zeros_like, params())
    p["table"][18] = 2.0
    p["kernels"]["0"][:] = 1.0
    ids = np.array([[1] + [19] * 8, [1] * 9, [1] * 8 + [19]], np.int32)
    found = np.asarray(quick_jit(lambda p, ids: bound()(p).convolve(ids))(p, ids))
    np.testing.assert_allclose(found[:, 0], [3 * 3 * 2, 0, 3 * 2])
    # Longer padding is no news, a word cut before its padding is.
    shorter = np.asarray(quick_jit(lambda p, ids: bound()(p).convolve(ids))(p, ids[:, :5]))
    np.testing.assert_allclose(shorter[:, 0], [3 * 3 * 2, 0, 0])


def test_a_highway_with_numbers_on_paper(monkeypatch):
    """A gate wide open gives what is new, never negative; a shut one x; one half open the mean of both."""
    x, new = np.array([[1.0, -2.0, 0.5]]), np.array([[0.0, 3.0, 0.25]])
    biases = np.array([-1.0, 3.0, 0.25])
    for gate, expected in ((40.0, new), (-40.0, x), (0.0, (x + new) / 2)):
        found = through_highways(monkeypatch, x, [(np.zeros((2, 3, 3)), np.stack([biases, np.full(3, gate)]))])
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_published_highway(monkeypatch, reference):
    """AllenNLP's, where the gate is that of x: ours is its complement, σ(-z) = 1 - σ(z)."""
    case = json.loads((reference / "elmo_allennlp" / "published_cases.json").read_text())["highway"]
    layers = []
    for number in range(case["layers"]):
        fill, bias = case[f"layer{number}"]["weight_fill"], case[f"layer{number}"]["bias_fill"]
        weights = np.full((2, 2, 2), fill) * np.array([1, -1]).reshape(2, 1, 1)
        layers.append((weights, np.full((2, 2), bias) * np.array([[1], [-1]])))
    found = through_highways(monkeypatch, np.array(case["input"], np.float64), layers)
    np.testing.assert_allclose(found, case["expected"], rtol=0, atol=0.6 * 10.0 ** -case["decimals"])
    negated = np.array([1, -1])
    swapped = [(weights * negated.reshape(2, 1, 1), bias * negated.reshape(2, 1)) for weights, bias in layers]
    wrong = through_highways(monkeypatch, np.array(case["input"], np.float64), swapped)
    assert np.abs(wrong - case["expected"]).max() > 0.5


def through_highways(monkeypatch, x, layers):
    """Each row of x as a word of one character, through nothing but highway layers: [2, in, out] and [2, out]."""
    monkeypatch.setitem(ACTIVATIONS, "identity", lambda x: x)
    rows, width = x.shape
    cnn = Bound(
        lambda rngs: CharCNN(
            num_characters=rows + 1,
            character_dim=width,
            filters=((1, width),),
            num_highway=len(layers),
            projection_dim=width,
            activation="identity",
            rngs=rngs,
        )
    )
    p = {
        "table": x,
        "kernels": {"0": np.eye(width)[None]},
        "biases": {"0": np.zeros(width)},
        "highway": {str(i): {"kernel": weights.swapaxes(0, 1), "bias": b} for i, (weights, b) in enumerate(layers)},
        "projection": {"kernel": np.eye(width), "bias": np.zeros(width)},
    }
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), p)
    assert jax.tree.map(np.shape, p) == jax.tree.map(lambda leaf: leaf.shape, cnn.shapes)
    return np.asarray(quick_jit(lambda p, ids: cnn(p)(ids))(p, np.arange(1, rows + 1, dtype=np.int32)[:, None]))


def test_an_id_outside_the_table_is_seen():
    p, ids = params(), np.full((4, SIZE), 3, np.int32)
    run = quick_jit(lambda p, ids: bound()(p)(ids))
    assert np.isfinite(run(p, ids)).all()
    for wrong in (CHARACTERS, 1000, -1, -CHARACTERS):
        ids[1, 4] = wrong
        found = np.isnan(run(p, ids))
        assert found[1].all(), wrong
        assert not found[[0, 2, 3]].any(), wrong


def test_the_id_0_is_the_zero_vector_and_the_last_id_the_last_row():
    p = params()
    run = quick_jit(lambda p, ids: bound()(p).convolve(ids))
    ids = np.stack([np.zeros(SIZE), np.full(SIZE, CHARACTERS - 1), np.ones(SIZE)]).astype(np.int32)
    found = np.asarray(run(p, ids))
    np.testing.assert_allclose(found[0], np.maximum(np.concatenate(list(p["biases"].values())), 0), atol=1e-7)
    for number, row in ((1, -1), (2, 0)):
        sums = [p["table"][row].astype(np.float64) @ kernel.sum(0) for kernel in p["kernels"].values()]
        expected = np.maximum(np.concatenate(sums) + np.concatenate(list(p["biases"].values())), 0)
        np.testing.assert_allclose(found[number], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_gradients_by_finite_differences(activation):
    """Of every leaf along random directions; words with equal windows and absent characters among them."""
    p, ids = params(activation=activation), words(count=6)
    towards = np.random.default_rng(2).normal(size=(6, 7)).astype(np.float32)
    found = quick_jit(jax.grad(lambda p: (bound(activation=activation)(p)(ids) * towards).sum()))(p)

    def loss(leaves):
        w = names(jax.tree.unflatten(jax.tree.structure(p), leaves))
        return sum(oracle.word_vector(w, word, activation) @ aim for word, aim in zip(ids, towards, strict=True))

    wide = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(p)]
    rng, h = np.random.default_rng(3), 1e-6
    for number, (leaf, slope) in enumerate(zip(wide, jax.tree.leaves(found), strict=True)):
        assert slope.shape == leaf.shape
        assert np.abs(slope).max() > 1e-3
        for _ in range(4):
            direction = rng.normal(size=leaf.shape)
            ends = [loss([*wide[:number], leaf + sign * h * direction, *wide[number + 1 :]]) for sign in (1, -1)]
            expected = (ends[0] - ends[1]) / (2 * h)
            assert np.vdot(slope, direction) == pytest.approx(expected, abs=5e-6 * float(np.linalg.norm(slope))), number


def test_equal_places_share_their_gradient():
    """A word of one character over and over: as much for the kernel as one place would give."""
    p = params()
    for kernel in p["kernels"].values():
        kernel[:] = np.abs(kernel)
    p["table"][:] = np.abs(p["table"])
    run = quick_jit(jax.grad(lambda p, ids: bound()(p).convolve(ids).sum()))
    found = run(p, np.full((1, SIZE), 5, np.int32))
    for kernel in found["kernels"].values():
        np.testing.assert_allclose(kernel, np.broadcast_to(p["table"][4][None, :, None], kernel.shape), rtol=1e-6)
    everything = sum(kernel.sum((0, 2)) for kernel in p["kernels"].values())
    np.testing.assert_allclose(found["table"][4], everything, rtol=1e-5)
    assert not np.delete(np.asarray(found["table"]), 4, axis=0).any()


def test_bfloat16_rounds_a_little():
    """Largest difference by the largest value: measured 9e-3."""
    p, ids = params(), words(count=40)
    found = quick_jit(lambda p, ids: bound()(p)(ids, jnp.bfloat16))(p, ids)
    assert found.dtype == jnp.bfloat16
    expected = np.stack([oracle.word_vector(names(p), word, "relu") for word in ids])
    error = np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()
    assert 1e-3 < error < 2e-2


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_birth_is_bilm_tfs(activation):
    """model.py: characters ±1; filters ±0.05 with relu, of deviation √(1 / (W E)) with tanh; carry's bias -2."""
    filters = ((1, 50), (4, 150))
    options = {"num_characters": 262, "character_dim": 16, "filters": filters, "activation": activation}
    p = jax.tree.map(np.asarray, quick_jit(bound(**options).init)(jax.random.key(0)))
    assert p["table"].shape == (261, 16)
    assert 0.99 < np.abs(p["table"]).max() <= 1
    assert p["table"].std() == pytest.approx(1 / np.sqrt(3), rel=0.05)
    for number, (width, count) in enumerate(filters):
        kernel = p["kernels"][str(number)]
        assert kernel.shape == (width, 16, count)
        if activation == "relu":
            assert 0.049 < np.abs(kernel).max() <= 0.05
            assert kernel.std() == pytest.approx(0.05 / np.sqrt(3), rel=0.05)
        else:
            assert kernel.std() == pytest.approx((width * 16) ** -0.5, rel=0.05)
            assert np.abs(kernel).max() > 2.5 * (width * 16) ** -0.5
        assert not p["biases"][str(number)].any()
    for layer in p["highway"].values():
        assert layer["kernel"].shape == (200, 2, 200)
        assert not layer["bias"][0].any()
        assert (layer["bias"][1] == -2).all()
    assert p["projection"]["kernel"].shape == (200, 7)
    assert not p["projection"]["bias"].any()
