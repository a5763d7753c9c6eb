import io
import json
import pickle
import random
import re

import numpy as np
import pytest
import sentencepiece

from ctx_jax.errors import InputError
from ctx_jax.text.load import load_tokenizer
from ctx_jax.text.sentencepiece import SentencePiece
from ctx_jax.text.sentencepiece_training import train_sentencepiece

SPACE = "▁"
ALPHABET = (
    "abcdeABCéÉïüßÅİıΑΣςжЙאकहि한カ\u0301\u0308\u200d\u200b\ufeff\u00ad\x00\x07\x7f\ufffd"
    "    \t\n\r\u00a0\u3000.,!?'-<>[]«…。力加勝😀👩½Ⅸﬁ㌔１２3ＡＢ▁"
)


def sentences(count, seed=0):
    """Made-up text with letters of several scripts, in which some words are frequent."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdefghijklmnoprstuy") for _ in range(rng.randint(1, 7))) for _ in range(300)]
    words += ["naïve", "café", "Über", "ﬁne", "力", "жук", "New", "York", "don't", "1/2", "X,"]
    return [" ".join(rng.choice(words) for _ in range(rng.randint(3, 15))) for _ in range(count)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return train_sentencepiece(sentences(2000), 300, folder, character_coverage=1.0, lowercase=False)


@pytest.fixture(scope="session")
def raw(trained):
    return sentencepiece.SentencePieceProcessor(model_file=str(trained.path))


@pytest.fixture(scope="session")
def with_bytes(tmp_path_factory):
    """A model that spells what it does not know in UTF-8 bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(500)), model_writer=model, vocab_size=400, byte_fallback=True, minloglevel=4
    )
    path = tmp_path_factory.mktemp("bytes") / "bytes.model"
    path.write_bytes(model.getvalue())
    return SentencePiece(path)


@pytest.fixture(scope="session", params=["trained", "with_bytes", "albert_base_v2", "xlnet_base_cased", "test_model"])
def any_model(request):
    name = request.param
    if name in ("trained", "with_bytes"):
        return request.getfixturevalue(name)
    vocabularies = request.getfixturevalue("data") / "vocab"
    if name == "test_model":
        return SentencePiece(vocabularies / "sentencepiece_test" / "test_model.model")
    return SentencePiece(vocabularies / name / "spiece.model")


@pytest.fixture(scope="session")
def albert(data):
    return SentencePiece(data / "vocab" / "albert_base_v2" / "spiece.model")


def random_text(rng, length=30):
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(length)))


def spelled(tokenizer, text):
    """Each piece with what it covers in the text and its word."""
    pieces = tokenizer.encode(text)
    joined = text if isinstance(text, str) else " ".join(text)
    spans = [joined[start:end] for start, end in pieces.offsets]
    return list(zip(tokenizer.tokens(pieces.ids), spans, pieces.words.tolist(), strict=True))


# Ids.


def test_ids_are_the_models_own(trained, raw):
    rng = random.Random(1)
    texts = [*sentences(100, seed=1), *(random_text(rng) for _ in range(300))]
    for text, pieces in zip(texts, trained.encode_batch(texts), strict=True):
        assert pieces.ids.tolist() == raw.encode(text)
        for alone, together in zip(trained.encode(text), pieces, strict=True):
            np.testing.assert_array_equal(alone, together)
            assert alone.dtype == np.int32


def test_published_albert(data):
    # huggingface/transformers tests/models/albert/test_tokenization_albert.py, test_full_tokenizer: keep_accents=True.
    path = data / "vocab" / "albert_base_v2" / "spiece.model"
    tokenizer = SentencePiece(path, lowercase=True, strip_accents=False)
    assert tokenizer.encode("This is a test").ids.tolist() == [48, 25, 21, 1289]
    pieces = tokenizer.encode("I was born in 92000, and this is falsé.")
    assert pieces.ids.tolist() == [31, 23, 386, 19, 561, 3050, 15, 17, 48, 25, 8256, 18, 1, 9]


# Offsets and words.


def test_offsets_of_hard_texts(albert):
    assert spelled(albert, "Hello World") == [("▁hello", "Hello", 0), ("▁world", "World", 1)]
    assert spelled(albert, "naïve \t café") == [("▁naive", "naïve", 0), ("▁cafe", "café", 1)]
    assert spelled(albert, "e\u0301x") == [("▁ex", "e\u0301x", 0)]
    assert spelled(albert, "ＡＢ ﬁligature")[:2] == [("▁ab", "ＡＢ", 0), ("▁fili", "ﬁli", 1)]
    assert spelled(albert, "x½ ") == [("▁x", "x", 0), ("1", "½", 0), ("<unk>", "½", 0), ("2", "½", 0)]
    assert spelled(albert, " 😀 a") == [("▁", "", 0), ("<unk>", "😀", 0), ("▁a", "a", 1)]
    assert spelled(albert, "ὈΔΟΣ İ") == [("▁", "", 0), ("<unk>", "ὈΔΟΣ", 0), ("▁i", "İ", 1)]
    assert spelled(albert, "") == spelled(albert, "\u200b \t") == []


def test_offsets_agree_with_the_library_on_plain_text(trained, raw):
    for text in sentences(100, seed=2):
        text = re.sub("[^a-z ]", "", text)
        expected = raw.encode(text, return_type="offset_mapping")["offsets"]
        pieces = trained.encode(text)
        # But for the space before a word, which the library counts in.
        stripped = [[end - len(text[start:end].lstrip()), end] for start, end in expected]
        assert pieces.offsets.tolist() == stripped
        words = [text[s:e] for s, e in (pieces.offsets[pieces.words == w][[0, -1], [0, 1]] for w in set(pieces.words))]
        assert words == text.split()


def test_offsets_of_random_texts(any_model):
    """What a piece covers normalises to the piece, or to more where pieces share a character; nothing is left out."""
    rng = random.Random(3)
    texts = [random_text(rng) for _ in range(400)]
    model = any_model._model
    for text, pieces in zip(texts, any_model.encode_batch(texts), strict=True):
        folded, _ = any_model._fold(text)
        starts, ends = pieces.offsets.T
        assert (np.diff(starts) >= 0).all()
        assert (np.diff(ends) >= 0).all()
        assert (starts <= ends).all()
        assert set(np.diff(pieces.words)) <= {0, 1}
        if model.normalize(folded) != "":
            assert pieces.words[0] == 0
        for index, token, (start, end) in zip(pieces.ids, any_model.tokens(pieces.ids), pieces.offsets, strict=True):
            if token == SPACE:
                assert start == end
            elif model.is_byte(int(index)):
                assert int(token[1:-1], 16) in model.normalize(any_model._fold(text[start:end])[0]).encode()
            elif not model.is_unknown(int(index)):
                part = model.normalize(any_model._fold(text[start:end])[0])
                assert token.removeprefix(SPACE) in part, (text, token)
        covered = np.zeros(len(text), bool)
        for start, end in pieces.offsets:
            covered[start:end] = True
        assert all(covered[i] for i, c in enumerate(text) if c.isalnum()), text


def test_bytes_cover_their_character(with_bytes):
    rows = spelled(with_bytes, "ab 勝q勝 é")
    assert [token for token, span, word in rows if span == "勝"] == ["<0xE5>", "<0x8B>", "<0x9D>"] * 2
    assert [word for token, span, word in rows if span == "勝"] == [1] * 6


def test_words_of_a_lone_space_mark(trained):
    rows = spelled(trained, "\u4e00 力 ab")
    assert [(token, word) for token, _, word in rows][:2] == [(SPACE, 0), ("[UNK]", 0)]
    assert rows[-1][2] == 2


def test_words_of_a_model_without_a_space_before_the_first(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(500)),
        model_writer=model,
        vocab_size=300,
        add_dummy_prefix=False,
        control_symbols=["[MASK]"],
        minloglevel=4,
    )
    (tmp_path / "bare.model").write_bytes(model.getvalue())
    tokenizer = SentencePiece(tmp_path / "bare.model")
    pieces = tokenizer.encode("ab cd[MASK]ab")
    assert tokenizer.continues_word[pieces.ids[0]]
    words = ["".join("ab cd[MASK]ab"[s:e] for s, e in pieces.offsets[pieces.words == word]) for word in range(4)]
    assert words == ["ab", "cd", "[MASK]", "ab"]


def test_words_given(any_model):
    rng = random.Random(4)
    lists = [[random_text(rng, 8) for _ in range(rng.randrange(8))] for _ in range(100)]
    for words, pieces in zip(lists, any_model.encode_batch(lists), strict=True):
        alone = [any_model.encode(word) for word in words]
        starts = np.cumsum([0] + [len(word) + 1 for word in words])
        expected = [len(piece.ids) for piece in alone]
        assert np.bincount(pieces.words, minlength=len(words)).tolist() == expected
        assert pieces.ids.tolist() == [index for piece in alone for index in piece.ids]
        offsets = [(piece.offsets + start).tolist() for piece, start in zip(alone, starts, strict=False)]
        assert pieces.offsets.tolist() == [span for spans in offsets for span in spans]


def test_words_and_their_string_agree(trained):
    for text in sentences(50, seed=5):
        string, words = trained.encode(text), trained.encode(text.split())
        for a, b in zip(string, words, strict=True):
            np.testing.assert_array_equal(a, b)


def test_continues_word(any_model):
    tokens = any_model.tokens(range(any_model.vocab_size))
    for index, (token, continues) in enumerate(zip(tokens, any_model.continues_word, strict=True)):
        if any_model._model.is_control(index):
            assert not continues
        else:
            assert continues == (not token.startswith(SPACE)), token


# Special tokens.


def test_specials(trained, data):
    assert trained.specials == (0, 1, 2, 3, 4)
    vocabularies = data / "vocab"
    assert SentencePiece(vocabularies / "albert_base_v2" / "spiece.model").specials == (0, 1, 2, 3, 4)
    assert SentencePiece(vocabularies / "xlnet_base_cased" / "spiece.model").specials == (5, 0, 3, 4, 6)


def test_special_tokens_stay_whole(trained):
    rows = spelled(trained, "ab [MASK]ab[SEP] [CLS]")
    marked = [row for row in rows if row[0].startswith("[")]
    assert marked == [("[MASK]", "[MASK]", 1), ("[SEP]", "[SEP]", 3), ("[CLS]", "[CLS]", 4)]
    assert [row for row in spelled(trained, ["ab", "x[MASK]", ""]) if row[0] == "[MASK]"] == [("[MASK]", "[MASK]", 1)]
    assert spelled(trained, "[MASK]") == [("[MASK]", "[MASK]", 0)]


def test_a_model_without_a_mask_still_splits(with_bytes):
    assert len(with_bytes.encode("ab [MASK]").ids) > 2
    with pytest.raises(InputError, match=r"bytes.model: found no pad token, expected a piece \[PAD\] or <pad>"):
        _ = with_bytes.specials


# Case.


def test_folding_of_case(albert):
    path = albert.path
    raw = SentencePiece(path, lowercase=False, strip_accents=False)
    assert raw.encode("Hello").ids.tolist() == raw._model.encode("Hello")
    for text in ["HELLO Wörld", "ΑΣ", "İstanbul"]:
        lowered = SentencePiece(path, lowercase=True, strip_accents=False)
        assert lowered.encode(text).ids.tolist() == raw.encode(text.lower()).ids.tolist()


def test_a_sigma_that_ends_a_word(tmp_path):
    trained = train_sentencepiece(["λογος σοφος λογοσ"] * 9, 16, tmp_path, model_type="bpe", lowercase=False)
    tokenizer = SentencePiece(trained.path, lowercase=True)
    assert tokenizer.encode("ΛΟΓΟΣ ΣΟΦΟΣ").ids.tolist() == trained.encode("λογος σοφος").ids.tolist()
    assert trained.encode("λογος").ids.tolist() != trained.encode("λογοσ").ids.tolist()


def test_lowercase_from_the_model(tmp_path, trained):
    assert (SentencePiece(trained.path).lowercase, SentencePiece(trained.path).strip_accents) == (False, False)
    folding = train_sentencepiece(sentences(300), 100, tmp_path / "folding", lowercase=True, character_coverage=0.98)
    assert SentencePiece(folding.path).lowercase is False  # the model's own normalisation does it
    assert folding.encode("ABC").ids.tolist() == folding.encode("abc").ids.tolist()
    small = [re.sub("[^a-z ]", "", sentence) for sentence in sentences(300)]
    capitals_unknown = train_sentencepiece(small, 100, tmp_path / "small", lowercase=False)
    assert capitals_unknown.lowercase is False  # as trained, and as saved
    assert load_tokenizer(tmp_path / "small").lowercase is False
    assert SentencePiece(capitals_unknown.path).lowercase is True


# Files.


def test_save_and_pickle(trained, tmp_path):
    tokenizer = SentencePiece(trained.path, lowercase=True, strip_accents=False)
    tokenizer.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "spiece.model").read_bytes() == trained.path.read_bytes()
    text = "Naïve CAFÉ [MASK] ab"
    for again in (load_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
        assert (again.lowercase, again.strip_accents) == (True, False)
        for a, b in zip(again.encode(text), tokenizer.encode(text), strict=True):
            np.testing.assert_array_equal(a, b)
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert (config["do_lower_case"], config["keep_accents"], config["mask_token"]) == (True, True, "[MASK]")


def test_bad_files(tmp_path):
    for content in (b"", b"[PAD]\n[UNK]\n"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(InputError, match=r"bad.model: found no SentencePiece model"):
            SentencePiece(tmp_path / "bad.model")
    with pytest.raises(InputError, match=r"no.model: cannot be read \(No such file or directory\)"):
        SentencePiece(tmp_path / "no.model")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)),
        model_writer=model,
        vocab_size=100,
        treat_whitespace_as_suffix=True,
        minloglevel=4,
    )
    (tmp_path / "suffix.model").write_bytes(model.getvalue())
    with pytest.raises(InputError, match=r"suffix.model: found a model with ▁ behind words, expected it before them"):
        SentencePiece(tmp_path / "suffix.model")


def test_bad_texts(trained):
    with pytest.raises(InputError, match=r"texts\[1\]: found the lone surrogate '\\ud83d' at character 1"):
        trained.encode_batch(["a", "b\ud83d"])
    with pytest.raises(InputError, match=r"texts\[0\]: found None, expected a string or a list of words"):
        trained.encode(None)
