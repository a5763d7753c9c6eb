"""Vectors of words on the disk: what they are the means of, and that they are made once."""

import numpy as np
import pytest

from ctx_jax.arrays import Representations
from ctx_jax.atlas.cache import Cache
from ctx_jax.atlas.features import span_features, windows, word_features, word_means
from ctx_jax.errors import InputError


class Counted:
    """An encoder that counts what it is asked for."""

    def __init__(self, encoder):
        self.encoder, self.texts = encoder, 0
        self.config, self.params, self.width = encoder.config, encoder.params, encoder.width
        self.lengths = encoder.lengths

    def encode(self, texts, **options):
        self.texts += len(texts)
        return self.encoder.encode(texts, **options)


SENTENCES = [["the", "topics", "of", "a", "class"], ["x"], [], ["functions", "are", "objects"] * 3]


@pytest.fixture(scope="module", params=["bert", "elmo"])
def encoder(request, tiny_encoders):
    return tiny_encoders[request.param]


def test_a_words_vector_is_the_mean_of_its_sub_words_at_every_layer(encoder, tmp_path):
    found = word_features(encoder, SENTENCES, Cache(tmp_path), dtype="float32")
    assert found.starts.tolist() == [0, 5, 6, 6, 15]
    assert found.vectors.shape == (15, encoder.config.num_layers + 1, encoder.width)
    for number, words in enumerate(SENTENCES):
        if not words:
            continue
        encoded = encoder.encode([words])
        for layer in range(encoder.config.num_layers + 1):
            (expected,) = encoded.words(layer=layer)
            own = found.layers()[layer, found.starts[number] : found.starts[number + 1]]
            np.testing.assert_allclose(own, expected, atol=2e-5)


def test_half_precision_is_rounding_alone(encoder, tmp_path):
    whole = word_features(encoder, SENTENCES, Cache(tmp_path), dtype="float32").vectors
    half = word_features(encoder, SENTENCES, Cache(tmp_path)).vectors
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, whole, rtol=2**-10, atol=1e-6)


def test_what_is_there_is_not_made_again(encoder, tmp_path):
    counted = Counted(encoder)
    first = word_features(counted, SENTENCES, Cache(tmp_path)).vectors
    assert counted.texts == 3
    again = word_features(counted, SENTENCES, Cache(tmp_path)).vectors
    assert counted.texts == 3
    np.testing.assert_array_equal(first, again)
    word_features(counted, SENTENCES[:2], Cache(tmp_path))
    assert counted.texts == 5


def test_a_sentence_longer_than_the_model_takes_keeps_all_its_words(tiny_encoders, tmp_path):
    encoder = tiny_encoders["bert"]
    words = ["class", "object", "function", "topics"] * 40
    found = word_features(encoder, [words], Cache(tmp_path), dtype="float32").vectors
    assert len(found) == len(words) > encoder.config.max_length
    assert np.abs(found).max(axis=(1, 2)).min() > 0
    # The first words stand in the first row alone.
    rows = encoder.encode([words], on_too_long="split", stride=encoder.config.max_length // 4).words(layer=-1)
    assert len(rows) > 2
    np.testing.assert_allclose(found[:5, -1], rows[0][:5], atol=2e-5)


def test_means_over_split_rows_count_every_sub_word():
    """Two rows of one text that overlap in its second word."""
    layers = np.arange(2 * 2 * 4 * 3, dtype=np.float32).reshape(2, 2, 4, 3)
    ids = np.array([[-1, 0, 1, -1], [-1, 0, 1, 1]])
    found = Representations(layers[-1], layers, ids >= 0, word_ids=ids, texts=(0, 0), first_words=(0, 1))
    (means,) = word_means(found, [3])
    for layer in range(2):
        np.testing.assert_allclose(means[0, layer], layers[layer, 0, 1])
        np.testing.assert_allclose(means[1, layer], (layers[layer, 0, 2] + layers[layer, 1, 1]) / 2)
        np.testing.assert_allclose(means[2, layer], layers[layer, 1, 2:].mean(0))


def test_spans_are_means_of_words_and_of_no_others(encoder, tmp_path):
    sentence, spans = np.array([3, 0, 3, 0]), np.array([[1, 4], [0, 1], [8, 9], [2, 5]])
    found = span_features(encoder, SENTENCES, sentence, spans, Cache(tmp_path), dtype="float32")
    words = word_features(encoder, SENTENCES, Cache(tmp_path), dtype="float32")
    for place, (number, (begin, end)) in enumerate(zip(sentence, spans, strict=True)):
        expected = words.vectors[words.starts[number] + begin : words.starts[number] + end].mean(0)
        np.testing.assert_allclose(found[place], expected, atol=2e-5)


def test_windows_hold_every_sentence_with_words_once_and_are_bounded(tiny_encoders, monkeypatch):
    from ctx_jax.atlas import features

    monkeypatch.setattr(features, "WINDOW_BYTES", 40_000)
    encoder, rng = tiny_encoders["bert"], np.random.default_rng(0)
    # Few words may be many sub-words.
    sentences = [["w"] * count if count % 3 else ["力" * count] for count in rng.integers(1, 30, 200)]
    found = list(windows(encoder, sentences))
    assert sorted(np.concatenate(found).tolist()) == list(range(200))
    assert len(found) > 5
    for numbers in found:
        encoded = encoder.encode([sentences[number] for number in numbers], on_too_long="split")
        assert encoded.layers.nbytes <= 40_000 or len(numbers) == 1


def test_what_a_half_cannot_hold_is_refused(tiny_encoders, tmp_path):
    class Loud(Counted):
        def encode(self, texts, **options):
            found = super().encode(texts, **options)
            return found._replace(layers=found.layers + 1e5)

    with pytest.raises(InputError, match="more than float16 holds"):
        word_features(Loud(tiny_encoders["bert"]), SENTENCES, Cache(tmp_path))
    assert not list(tmp_path.glob("*.npy"))
    word_features(Loud(tiny_encoders["bert"]), SENTENCES, Cache(tmp_path), dtype="float32")
    with pytest.raises(InputError, match="expected 'float16' or 'float32'"):
        word_features(tiny_encoders["bert"], SENTENCES, Cache(tmp_path), dtype="int8")


def test_a_cache_keeps_values_and_refuses_what_is_not_its(tmp_path, monkeypatch):
    cache, made = Cache(tmp_path / "new"), []
    make = lambda: made.append(1) or {"a": [1.5, None]}
    assert cache.value({"what": "x", "n": 1}, make) == cache.value({"n": 1, "what": "x"}, make) == {"a": [1.5, None]}
    assert len(made) == 1
    cache.value({"what": "x", "n": 2}, make)
    assert len(made) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a writable folder"):
        Cache(tmp_path / "file" / "below")
    for path in cache.folder.iterdir():
        path.write_text("{")
    with pytest.raises(InputError, match="delete it"):
        cache.value({"what": "x", "n": 1}, make)
    monkeypatch.setattr("ctx_jax.atlas.cache.MADE", -1)  # another way of making numbers
    cache.value({"what": "x", "n": 1}, make)
    assert len(made) == 3
