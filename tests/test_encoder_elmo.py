"""ELMo in use: the vectors of the model on each text alone, whatever stands beside it; mixes; texts that go on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.compiling import quick_jit
from test_experiment import train
from test_experiment_elmo import tiny_experiment

from ctx_jax import Encoder, InputError, cli
from ctx_jax.encoder import ElmoEncoder
from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining, without_ends, zero_state
from ctx_jax.nn.parameters import Bound
from ctx_jax.nn.scalar_mix import ScalarMix
from ctx_jax.text.characters import Characters

CONFIG = ElmoConfig(
    filters=((1, 4), (3, 6)),
    character_dim=4,
    max_characters=12,
    num_highway=1,
    lstm_dim=12,
    projection_dim=6,
    vocab_size=9,
)
BOUND = Bound(lambda rngs: ElmoForPreTraining(CONFIG, rngs=rngs))
TEXTS = [
    ["The", "river", "bank", "was", "flooded", "."],
    ["A", "bank", "lends", "money", "."],
    ["naïve", "日本語", "🙂", "", "incomprehensibilities"],
    ["bank"],
    [],
    ["The", "set", "is", "empty", ",", "and", "so", "is", "the", "river", "bank", "."] * 3,
]


@pytest.fixture(scope="module")
def encoder():
    # Larger than at birth, so that neighbours matter.
    params = jax.tree.map(lambda leaf: leaf * 2, BOUND.init(jax.random.key(0)))
    return ElmoEncoder(CONFIG, params)


@quick_jit
def model(params, ids, lengths, state):
    found, state = BOUND(params).encoder(ids, lengths, state)
    return without_ends(found), state


def alone(encoder, words, state=None):
    ids, lengths = Characters(CONFIG.max_characters).batch([words])
    state = zero_state(CONFIG, 1) if state is None else state
    wide = np.zeros((1, 44, CONFIG.max_characters), np.int16)
    wide[:, : ids.shape[1]] = ids
    found, state = model(encoder.params, wide, lengths, state)
    return np.asarray(found.layers)[:, 0, : len(words)], state


def test_each_text_has_the_vectors_that_it_has_alone(encoder):
    for batch_tokens in (1, 90, 8192):
        encoded = encoder.encode(TEXTS, batch_tokens=batch_tokens)
        assert encoded.layers.shape == (3, 6, 36, 12)
        assert encoded.layers.dtype == np.float32
        np.testing.assert_array_equal(encoded.layers[-1], encoded.last)
        for row, words in enumerate(TEXTS):
            expected, _ = alone(encoder, words)
            np.testing.assert_allclose(encoded.layers[:, row, : len(words)], expected, rtol=0, atol=1e-5)
            assert not encoded.layers[:, row, len(words) :].any()
            assert encoded.mask[row].sum() == len(words) == encoded.num_words[row]
            assert encoded.tokens[row] == tuple(words)


def test_short_texts_share_rows_and_do_not_see_each_other(encoder):
    """60 short texts beside one of 90 words fill a few rows of 96, and each has the vectors that it has alone."""
    fresh = ElmoEncoder(CONFIG, encoder.params)
    rng = np.random.default_rng(3)
    words = ["the", "bank", "of", "a", "river", "money", "."]
    texts = [[str(w) for w in rng.choice(words, n)] for n in [90, *rng.integers(0, 12, 60)]]
    seen = []
    run = fresh._contextualise
    fresh._contextualise = lambda params, rows, *rest: (seen.append(rows), run(params, rows, *rest))[1]
    encoded = fresh.encode(texts)
    filled = sum(rows.lengths.sum() for rows in seen)
    assert filled == sum(len(text) + 2 for text in texts)
    used = sum((rows.lengths > 0).sum() * rows.vectors.shape[1] for rows in seen)
    assert filled > 0.9 * used
    for row, text in enumerate(texts):
        expected = fresh.encode([text]).layers[:, 0]
        np.testing.assert_allclose(encoded.layers[:, row, : len(text)], expected, rtol=0, atol=1e-6)


def test_order_and_repetition_change_nothing(encoder):
    once = encoder.encode(TEXTS)
    turned = encoder.encode([*TEXTS[::-1], *TEXTS])
    for row, words in enumerate(TEXTS):
        for other in (len(TEXTS) - 1 - row, len(TEXTS) + row):
            np.testing.assert_allclose(
                turned.layers[:, other, : len(words)], once.layers[:, row, : len(words)], rtol=0, atol=1e-5
            )


def test_a_word_in_two_contexts_has_two_vectors_above_layer_0(encoder):
    encoded = encoder.encode(TEXTS[:2])
    river, money = encoded.layers[:, 0, 2], encoded.layers[:, 1, 1]
    np.testing.assert_allclose(river[0], money[0], rtol=0, atol=1e-6)
    assert (np.abs(river - money).max(1)[1:] > 1e-2).all()


def test_strings_are_split_and_words_have_vectors(encoder):
    text = encoder.encode("The river bank was flooded.")
    np.testing.assert_array_equal(text.last, encoder.encode([TEXTS[0]]).last)
    (words,) = text.words(layer=1)
    np.testing.assert_array_equal(words, text.layers[1, 0])
    assert text.sentences().shape == (1, 12)


def test_only_the_last_layer(encoder):
    encoded = encoder.encode(TEXTS, layers="last")
    assert encoded.layers is None
    np.testing.assert_allclose(encoded.last, encoder.encode(TEXTS).last, rtol=0, atol=1e-6)


def test_pooled_streamed_and_chosen_layers(encoder):
    encoded = encoder.encode(TEXTS)
    for pool in ("mean", "max", "cls"):
        every = encoder.encode(TEXTS, layers="all", pool=pool)
        for layer in range(3):
            np.testing.assert_allclose(every[layer], encoded.sentences(pool, layer=layer), rtol=0, atol=1e-5)
        np.testing.assert_allclose(list(encoder.encode_stream(TEXTS, pool=pool)), every[-1], rtol=0, atol=1e-5)
    some = encoder.encode(TEXTS, layers=[1])
    np.testing.assert_allclose(some.layer(1), encoded.layers[1], rtol=0, atol=1e-5)


def test_texts_that_go_on_carry_their_state(encoder):
    first, second = [TEXTS[0], TEXTS[5]], [TEXTS[1], TEXTS[3]]
    _, state = encoder.encode_on(first)
    found, _ = encoder.encode_on(second, state)
    for row in range(2):
        _, own = alone(encoder, first[row])
        expected, _ = alone(encoder, second[row], own)
        np.testing.assert_allclose(found.layers[:, row, : len(second[row])], expected, rtol=0, atol=1e-5)
    fresh, _ = encoder.encode_on(second)
    assert np.abs(fresh.layers[1:] - found.layers[1:]).max() > 1e-3
    # And encode, which carries nothing, is not touched by it.
    np.testing.assert_allclose(encoder.encode(second).last, fresh.last, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="found 3, expected 2"):
        encoder.encode_on(TEXTS[:3], state)


def test_the_character_cnn_sees_a_word_once(encoder, monkeypatch):
    fresh = ElmoEncoder(CONFIG, encoder.params)
    seen = []
    run = fresh._words
    monkeypatch.setattr(
        fresh, "_words", lambda params, ids: (seen.append((ids != 0).any(1).sum()), run(params, ids))[1]
    )
    fresh.encode([["a", "b", "a"], ["b", "c"]])
    assert sum(seen) == 5  # with <S> and </S>
    fresh.encode([["c", "a", "d"]])
    assert sum(seen) == 6


def test_remembered_words_are_bounded_and_forgetting_changes_nothing(encoder, monkeypatch):
    import ctx_jax.encoder.elmo as module

    monkeypatch.setattr(module, "WORDS_REMEMBERED", 6)
    fresh = ElmoEncoder(CONFIG, encoder.params)
    for words in (TEXTS[0], TEXTS[1], TEXTS[5], TEXTS[0]):
        found = fresh.encode([words])
        np.testing.assert_allclose(found.last, encoder.encode([words]).last, rtol=0, atol=1e-5)
    assert len(fresh._known) <= max(6, len(set(TEXTS[0])) + 2)


def test_few_shapes_are_compiled(encoder):
    fresh = ElmoEncoder(CONFIG, encoder.params)
    rng = np.random.default_rng(0)
    for _ in range(12):
        lengths = rng.integers(0, 40, rng.integers(1, 9))
        fresh.encode([["w"] * int(n) for n in lengths], batch_tokens=8 * 48)
    # Rows of 1, 2, 4, 8; lengths of 8, 12, 16, 24, 32, 48.
    assert fresh._contextualise._cache_size() <= 4 * 6
    assert fresh._words._cache_size() <= 2


def test_mix_is_the_scalar_mix(encoder):
    encoded = encoder.encode(TEXTS)
    weights, gamma = np.array([0.3, -1.0, 2.0], np.float32), 0.7
    mix = ScalarMix(3)
    mix.weights[...], mix.gamma[...] = jnp.asarray(weights), jnp.float32(gamma)
    np.testing.assert_allclose(encoded.mix(weights, gamma=gamma), mix(encoded.layers), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="one for each of 3 layers"):
        encoded.mix([1.0, 2.0])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "found none"),
        ([None], r"texts\[0\]: found None"),
        ([["a"], b"bytes"], r"texts\[1\]: found b'bytes'"),
        ([["a", 3]], r"texts\[0\]: found \['a', 3\]"),
    ],
)
def test_bad_texts(encoder, texts, message):
    with pytest.raises(InputError, match=message):
        encoder.encode(texts)


def test_a_run_is_loaded_and_encodes(words_corpus, tmp_path, capsys):
    tiny, run = tiny_experiment(words_corpus), tmp_path / "run"
    train(dataclasses.replace(tiny, steps=2), run)
    loaded = Encoder.from_pretrained(run)
    assert isinstance(loaded, ElmoEncoder)
    assert loaded.config == tiny.model
    encoded = loaded.encode(["The set is empty.", "It is set to None."])
    assert encoded.layers.shape == (3, 2, 6, 2 * tiny.model.projection_dim)
    assert cli.main(["encode", str(run), "The set is empty.", "--out", str(tmp_path / "v.npz")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "v.npz")["layers"], encoded.layers[:, :1, :5], rtol=0, atol=1e-5)
    capsys.readouterr()
    assert cli.main(["fill-mask", str(run), "A [MASK]."]) == 2
    assert "no masked language model" in capsys.readouterr().err
