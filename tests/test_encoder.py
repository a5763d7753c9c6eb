"""The encoder in use: what comes out does not depend on company, and bad input is named."""

import json
import shutil

import jax
import numpy as np
import pytest

from ctx_jax import Encoder, InputError
from ctx_jax.checkpoint import Checkpoints, save_weights
from ctx_jax.data.corpus import Corpus
from ctx_jax.encoder import BertEncoder, cosine
from ctx_jax.encoder.batches import compiled_shapes
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.nn.parameters import Bound
from ctx_jax.text.load import load_tokenizer

CONFIG = BertConfig(
    vocab_size=600, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=64, max_position_embeddings=48
)
TEXTS = [
    "The assignment statement binds names to values.",
    "A set is empty.",
    "",
    ["Names", "", "refer", "to", "objects", "."],
    "Émigré naïve 力 🙂 text\twith   spaces",
    "Expressions yield values; statements are executed, one after the other, in the order in which they are written.",
]


@pytest.fixture(scope="module")
def bound():
    return Bound(lambda rngs: BertWithHeads(CONFIG, rngs=rngs))


@pytest.fixture(scope="module")
def encoder(bound, topics_corpus):
    # Matrices eight times as large as at the start of training, so that attention is not uniform.
    grow = lambda path, x: x * 8 if path[-1].key in ("kernel", "table") else x
    params = jax.tree_util.tree_map_with_path(grow, bound.init(jax.random.key(0)))
    return BertEncoder(CONFIG, params, load_tokenizer(topics_corpus / "tokenizer"))


@pytest.fixture(scope="module")
def encoded(encoder):
    return encoder.encode(TEXTS)


def test_shapes_and_tokens(encoder, encoded):
    batch, length = encoded.mask.shape
    assert batch == len(TEXTS)
    assert encoded.layers.shape == (4, batch, length, 32)
    assert encoded.last.shape == (batch, length, 32)
    assert encoded.layers.dtype == encoded.last.dtype == np.float32
    np.testing.assert_array_equal(encoded.last, encoded.layers[-1])
    assert [len(row) for row in encoded.tokens] == encoded.mask.sum(1).tolist()
    assert all(row[0] == "[CLS]" and row[-1] == "[SEP]" for row in encoded.tokens)
    assert encoded.tokens[2] == ("[CLS]", "[SEP]")
    assert not encoded.layers[:, ~encoded.mask].any()


@pytest.mark.parametrize("batch_tokens", [1, 48, 150, 8192])
def test_vectors_do_not_depend_on_batch_padding_or_order(encoder, encoded, batch_tokens):
    order = np.random.default_rng(batch_tokens).permutation(len(TEXTS))
    other = encoder.encode([TEXTS[i] for i in order], batch_tokens=batch_tokens)
    for place, i in enumerate(order):
        count = encoded.mask[i].sum()
        np.testing.assert_allclose(other.layers[:, place, :count], encoded.layers[:, i, :count], rtol=1e-5, atol=2e-6)
    alone = encoder.encode(TEXTS[1])
    np.testing.assert_allclose(alone.last[0], encoded.last[1, : alone.mask.shape[1]], rtol=1e-5, atol=2e-6)


def test_ids_give_what_the_text_gives(encoder, encoded):
    specials = encoder.tokenizer.specials
    ids = np.full(encoded.mask.shape, specials.pad)
    for row, tokens in zip(ids, encoded.tokens, strict=True):
        row[: len(tokens)] = [encoder.tokenizer.token_id(token) for token in tokens]
    found = encoder.encode_ids(ids, encoded.mask.astype(int))
    np.testing.assert_allclose(found.layers, encoded.layers, rtol=1e-5, atol=2e-6)
    assert found.tokens is None
    with pytest.raises(InputError, match="ids were given"):
        found.words()
    types = np.zeros_like(ids)
    types[:, 3:] = 1
    assert not np.allclose(encoder.encode_ids(ids, encoded.mask, types).last, encoded.last)


def test_last_layer_alone(encoder, encoded):
    last = encoder.encode(TEXTS, layers="last")
    assert last.layers is None
    np.testing.assert_allclose(last.last, encoded.last, rtol=1e-5, atol=2e-6)
    with pytest.raises(InputError, match="layers='all'"):
        last.layer(0)


def test_only_the_layers_that_were_asked_for(encoder, encoded):
    some = encoder.encode(TEXTS, layers=[2, 0])
    assert some.last is None
    assert some.numbers == (2, 0)
    for layer in (0, 2):
        np.testing.assert_allclose(some.layer(layer), encoded.layers[layer], rtol=1e-5, atol=2e-6)
    with pytest.raises(InputError, match="one of those that were asked for"):
        some.layer(1)
    np.testing.assert_allclose(encoder.encode(TEXTS, layers=[-1]).last, encoded.last, rtol=1e-5, atol=2e-6)
    with pytest.raises(InputError, match="layers: found 4, expected 0 to 3"):
        encoder.encode(TEXTS, layers=[4])


@pytest.mark.parametrize("pool", ["mean", "max", "cls"])
def test_vectors_pooled_on_the_device_are_those_pooled_on_the_host(encoder, encoded, pool):
    for batch_tokens in (60, 8192):
        every = encoder.encode(TEXTS, layers="all", pool=pool, batch_tokens=batch_tokens)
        assert every.shape == (4, len(TEXTS), 32)
        for layer in range(4):
            expected = encoded.sentences(pool, layer=layer)
            np.testing.assert_allclose(every[layer], expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(encoder.encode(TEXTS, pool=pool), every[-1], rtol=1e-5, atol=2e-6)
    some = encoder.encode(TEXTS, pool=pool, layers=[1, -1])
    np.testing.assert_allclose(some, every[[1, 3]], rtol=1e-5, atol=2e-6)


def test_a_stream_is_the_list_window_by_window(encoder, monkeypatch):
    import ctx_jax.encoder.base as module

    expected = encoder.encode(TEXTS, pool="mean")
    monkeypatch.setattr(module, "WINDOW", 4)
    taken = []

    def texts():
        for number in range(17):
            taken.append(number)
            yield TEXTS[number % len(TEXTS)]

    stream = encoder.encode_stream(texts())
    first = next(stream)
    assert len(taken) <= 12  # no more than the window at work and two ahead
    found = [first, *stream]
    assert len(found) == 17
    for number, vector in enumerate(found):
        np.testing.assert_allclose(vector, expected[number % len(TEXTS)], rtol=1e-5, atol=2e-6)
    every = list(encoder.encode_stream(TEXTS, layers="all", pool="cls"))
    assert {vector.shape for vector in every} == {(4, 32)}
    np.testing.assert_allclose(encoder.encode(TEXTS * 3, pool="mean")[: len(TEXTS)], expected, rtol=1e-5, atol=2e-6)
    with pytest.raises(InputError, match=r"texts\[1\].*counted from texts\[4\]"):
        list(encoder.encode_stream([*TEXTS[:5], None]))


def test_compilations_are_bounded_whatever_comes(topics_corpus, bound, encoder):
    fresh = BertEncoder(CONFIG, encoder.params, encoder.tokenizer)
    rng = np.random.default_rng(0)
    word = TEXTS[0].split()[0]
    for _ in range(12):
        lengths = rng.integers(0, rng.integers(2, 40), rng.integers(1, 400))
        fresh.encode([[word] * int(n) for n in lengths], pool="mean", batch_tokens=200)
    shapes = compiled_shapes(CONFIG.max_length, 200, fresh.mesh.size)
    assert 3 < fresh._forward._cache_size() <= len(shapes)
    assert fresh.warm_up(pool="mean", batch_tokens=200) == len(shapes)
    before = fresh._forward._cache_size()
    assert before == len(shapes)
    fresh.encode(TEXTS, pool="mean", batch_tokens=200)
    assert fresh._forward._cache_size() == before


def test_threads_may_share_an_encoder(encoder, encoded):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda number: encoder.encode([TEXTS[number % 6]]).last, range(24)))
    for number, last in enumerate(found):
        row = number % 6
        np.testing.assert_allclose(last[0], encoded.last[row, : last.shape[1]], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "median"}, "pool: found 'median'"),
        ({"pool": "mean", "on_too_long": "split"}, "has no one vector"),
        ({"batch_tokens": 0}, "batch_tokens: found 0"),
        ({"layers": "first"}, "layers: found 'first'"),
        ({"on_too_long": "ignore"}, "on_too_long: found 'ignore'"),
    ],
)
def test_bad_options_are_named(encoder, options, message):
    with pytest.raises(InputError, match=message):
        encoder.encode(TEXTS, **options)


def test_a_huge_text_spoils_nothing(encoder, encoded):
    huge = "statement " * 300_000
    with pytest.raises(InputError, match=r"texts\[1\]: found"):
        encoder.encode([TEXTS[0], huge])
    found = encoder.encode([TEXTS[0], huge], on_too_long="truncate")
    count = encoded.mask[0].sum()
    np.testing.assert_allclose(found.last[0, :count], encoded.last[0, :count], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_sentences_are_pooled_over_tokens(encoded, layer):
    for pool, function in {
        "mean": lambda x: x.mean(0),
        "max": lambda x: x.max(0),
        "cls": lambda x: x[0],
    }.items():
        found = encoded.sentences(pool, layer=layer)
        for row in range(len(TEXTS)):
            vectors = encoded.layers[layer][row][encoded.mask[row]]
            np.testing.assert_allclose(found[row], function(vectors), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="pool"):
        encoded.sentences("median")


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_words_are_pooled_over_their_pieces(encoder, encoded, pool):
    words = encoded.words(layer=1, pool=pool)
    assert len(words[3]) == 6
    assert not words[3][1].any()  # the empty word
    assert len(words[2]) == 0
    for row, text in enumerate(TEXTS):
        pieces = encoder.tokenizer.encode(text)
        vectors = encoded.layers[1, row, 1 : 1 + len(pieces.ids)]
        for word in set(pieces.words.tolist()):
            own = vectors[pieces.words == word]
            expected = {"mean": own.mean(0), "first": own[0], "last": own[-1]}[pool]
            np.testing.assert_allclose(words[row][word], expected, rtol=1e-5, atol=1e-6)


def test_long_texts_are_an_error_truncated_or_split(encoder):
    text = " ".join(["statement"] * 60)
    with pytest.raises(InputError, match=r"texts\[1\].*max_length = 48"):
        encoder.encode(["short", text])
    assert encoder.encode(text, on_too_long="truncate").mask.shape == (1, 48)
    split = encoder.encode(["short", text], on_too_long="split", stride=4)
    assert split.texts[0] == 0
    assert set(split.texts[1:]) == {1}
    assert len(split.texts) > 2
    inside = sum(len(row) - 2 for row, of in zip(split.tokens, split.texts, strict=True) if of == 1)
    assert inside - 4 * (len(split.texts) - 2) == len(encoder.tokenizer.encode(text).ids)
    assert all(len(words) for words in split.words())


def test_fill_mask_is_the_softmax_of_the_logits(encoder, bound):
    text = "The [MASK] statement is [MASK] ."
    found = encoder.fill_mask(text, top=600)
    pieces = encoder.tokenizer.encode(text)
    specials = encoder.tokenizer.specials
    ids = np.array([[specials.cls, *pieces.ids, specials.sep]])
    model = bound(encoder.params)
    with jax.numpy_dtype_promotion("standard"):
        logits = np.asarray(model.masked_lm_logits(model.encoder(jax.numpy.asarray(ids)).last[0]), np.float64)
    places = np.flatnonzero(ids[0] == specials.mask)
    assert len(found) == len(places) == 2
    for place, candidates in zip(places, found, strict=True):
        probabilities = np.exp(logits[place] - np.logaddexp.reduce(logits[place]))
        assert [c.probability for c in candidates] == sorted((c.probability for c in candidates), reverse=True)
        for candidate in candidates:
            expected = probabilities[encoder.tokenizer.token_id(candidate.token)]
            np.testing.assert_allclose(candidate.probability, expected, rtol=2e-4)
    with pytest.raises(InputError, match=r"found no \[MASK\]"):
        encoder.fill_mask("nothing to fill")


@pytest.mark.parametrize("texts", [[], [None], [b"bytes"], ["lone \ud800 surrogate"], [["word", 3]]])
def test_bad_texts_are_named(encoder, texts):
    with pytest.raises(InputError, match="texts"):
        encoder.encode(texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[2, 600, 3]],), "input_ids: found 2 to 600, expected 0 to 599"),
        (([[2, -1, 3]],), "input_ids: found -1"),
        (([2, 3],), "input_ids"),
        (([[2.0, 3.0]],), "input_ids"),
        ((np.zeros((1, 49), int),), "rows of 49, the model takes 48"),
        (([[2, 5, 3]], [[1, 1]]), "attention_mask: found shape"),
        (([[2, 5, 3]], [[1, 1, 2]]), "attention_mask: found 1 to 2"),
        (([[2, 5, 3]], None, [[0, 0, 2]]), "token_type_ids"),
    ],
)
def test_bad_ids_are_named(encoder, arguments, message):
    with pytest.raises(InputError, match=message):
        encoder.encode_ids(*arguments)


@pytest.fixture
def folder(tmp_path, encoder, topics_corpus):
    record = {"model_type": "bert", "model": CONFIG.__dict__}
    (tmp_path / "config.json").write_text(json.dumps(record))
    save_weights(tmp_path / "weights", encoder.params, {})
    shutil.copytree(topics_corpus / "tokenizer", tmp_path / "tokenizer")
    return tmp_path


def test_from_pretrained(folder, encoder, encoded):
    loaded = Encoder.from_pretrained(folder)
    assert loaded.config == CONFIG
    np.testing.assert_array_equal(loaded.encode(TEXTS).layers, encoded.layers)


def test_a_folder_without_tokenizer_takes_ids_only(folder, encoder):
    shutil.rmtree(folder / "tokenizer")
    loaded = Encoder.from_pretrained(folder)
    ids = [[2, 30, 31, 3]]
    np.testing.assert_array_equal(loaded.encode_ids(ids).last, encoder.encode_ids(ids).last)
    with pytest.raises(InputError, match="no tokenizer"):
        loaded.encode("text")


def test_a_run_that_is_not_finished_gives_its_newest_checkpoint(folder, encoder):
    shutil.rmtree(folder / "weights")
    state = {"params": encoder.params, "optimizer": {"count": jax.numpy.zeros((), int)}}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, jax.tree.map(lambda x: x * 0, state), {})
        checkpoints.save(2, state, {})
    ids = [[2, 30, 31, 3]]
    found = Encoder.from_pretrained(folder).encode_ids(ids).last
    np.testing.assert_array_equal(found, encoder.encode_ids(ids).last)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "expected one of: a run directory"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda f: (f / "config.json").write_text('{"model_type": "brt", "model": {}}'), "did you mean 'bert'"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert", "model": {"hidden": 3}}'), "hidden"),
        (lambda f: shutil.rmtree(f / "weights"), "weights"),
    ],
)
def test_what_cannot_be_loaded_is_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        Encoder.from_pretrained(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        Encoder.from_pretrained(tmp_path / "nowhere")


def test_cosine():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 7))
    expected = [x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(cosine(a, b), expected, rtol=1e-12)


def test_the_corpus_brings_its_tokenizer(topics_corpus, encoder):
    assert (
        Corpus(topics_corpus).tokenizer.encode("A set").ids.tolist() == encoder.tokenizer.encode("A set").ids.tolist()
    )
