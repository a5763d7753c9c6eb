import json
import pickle
import random
import unicodedata

import numpy as np
import pytest

from ctx_jax.errors import InputError
from ctx_jax.text.inputs import model_inputs
from ctx_jax.text.load import load_tokenizer
from ctx_jax.text.wordpiece import WordPiece

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOY = [*SPECIALS, "un", "##want", "##ed", "want", "runn", "##ing", ",", "a", "b", "##b", "naive", "力"]
# Letters with and without accents, of several scripts; marks, controls, spaces, punctuation, CJK, emoji.
ALPHABET = (
    "abcABCéÉüßñçøÅǄİıΑΣςжЖйЙאבكहि한カ\u0301\u0308\u0327\u200d\u200b\ufeff\u00ad\x00\x07\x7f\ufffd"
    " \t\n\r\u00a0\u2003\u3000.,!?'\"-_$^`~«»—…。、[]#力加勝北区😀👩½Ⅸﬁ１２3"
)


@pytest.fixture
def make(tmp_path):
    def make(vocabulary, **options):
        path = tmp_path / "vocab.txt"
        path.write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
        return WordPiece(path, **options)

    return make


@pytest.fixture(scope="session")
def published(reference):
    return json.loads((reference / "tokenizers" / "published_cases.json").read_text())


@pytest.fixture(scope="session")
def uncased(data):
    return WordPiece(data / "vocab" / "bert_base_uncased" / "vocab.txt")


def split(tokenizer, text):
    return tokenizer.tokens(tokenizer.encode(text).ids)


def random_text(rng, alphabet=ALPHABET, length=40):
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(length)))


# What the original implementations gave.


def test_published_full(published, make):
    for case in published["full"]:
        pieces = make(case["vocab"]).encode(case["text"])
        assert pieces.ids.tolist() == case["ids"]
        assert split(make(case["vocab"]), case["text"]) == case["tokens"]


def test_published_basic(published, make):
    # A vocabulary of whole words alone: any other split than the published one gives [UNK].
    for case in published["basic"]:
        vocabulary = dict.fromkeys([*SPECIALS, *case["tokens"]])
        tokenizer = make(vocabulary, lowercase=case["do_lower_case"], strip_accents=case.get("strip_accents"))
        assert split(tokenizer, case["text"]) == case["tokens"], case
        assert set(tokenizer.encode(case["text"]).words) == set(range(len(case["tokens"])))


def test_published_wordpiece(published, make):
    for group in published["wordpiece"]:
        tokenizer = make(group["vocab"], lowercase=False)
        for text, expected in group["cases"]:
            assert split(tokenizer, text) == expected


def test_published_character_classes(published, make):
    def words(character):
        tokenizer = make([*SPECIALS, "ab", "a", "b", *"-$`."], lowercase=False)
        return split(tokenizer, f"a{character}b")

    for character, expected in published["is_whitespace"].items():
        assert (words(character) == ["a", "b"]) == expected, repr(character)
    for character, expected in published["is_control"].items():
        assert (words(character) == ["ab"]) == expected, repr(character)
    for character, expected in published["is_punctuation"].items():
        assert (words(character) == ["a", character, "b"]) == expected, repr(character)


def test_published_chinese_characters(published, make):
    case = published["chinese_chars"]
    assert split(make(case["vocab"]), case["text"]) == case["on"]
    assert split(make(case["vocab"], split_cjk=False), case["text"]) == case["off"]


def test_published_offsets(published, uncased):
    case = published["offsets_uncased"]
    (row,) = model_inputs(uncased, [case["text"]], max_length=32)
    assert uncased.tokens(row.input_ids) == case["tokens"]
    assert row.offsets.tolist() == case["offsets"]


def test_golden(reference, uncased):
    cases = json.loads((reference / "tokenizers" / "bert_uncased_golden.json").read_text())["cases"]
    assert len(cases) == 53
    for case in cases:
        pairs = [case["pair"]] if "pair" in case else None
        (row,) = model_inputs(uncased, [case["text"]], pairs, max_length=512)
        assert row.input_ids.tolist() == case["ids"], case["text"]
        assert uncased.tokens(row.input_ids) == case["tokens"]
        assert row.offsets.tolist() == case["offsets"]
        assert row.token_type_ids.tolist() == case["type_ids"]


# Against an implementation of its own.


def oracle(vocabulary, text, lowercase, limit):
    """BERT's tokenizer as its paper and code describe it, slowly; for characters without surprises."""
    words = [""]
    for character in text:
        category = unicodedata.category(character)
        if character.isspace():
            words.append("")
        elif category[0] == "P" or (character.isascii() and not character.isalnum()) or "一" <= character <= "龥":
            words += [character, ""]
        else:
            words[-1] += character
    tokens = []
    for word in filter(None, words):
        if lowercase:
            decomposed = unicodedata.normalize("NFD", word.lower())
            word = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
        start, found = 0, []
        while start < len(word) <= limit:
            prefix = "##" if start else ""
            ends = [end for end in range(start + 1, len(word) + 1) if prefix + word[start:end] in vocabulary]
            if not ends:
                break
            found.append(prefix + word[start : ends[-1]])
            start = ends[-1]
        tokens += found if start == len(word) else ["[UNK]"]
    return tokens


def test_oracle_on_random_vocabularies(make):
    rng = random.Random(0)
    longer = 0
    for trial in range(60):
        letters = "abcdé"
        parts = ["".join(rng.choice(letters) for _ in range(rng.randint(1, 4))) for _ in range(60)]
        vocabulary = dict.fromkeys(SPECIALS + [rng.choice(["", "##"]) + part for part in parts] + [*"abe,力"])
        lowercase, limit = trial % 2 == 0, rng.choice([3, 8, 100])
        tokenizer = make(vocabulary, lowercase=lowercase, max_word_length=limit)
        texts = [random_text(rng, "abcdéABCDÉ  ,.力", 30) for _ in range(20)]
        for text, pieces in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert tokenizer.tokens(pieces.ids) == oracle(vocabulary, text, lowercase, limit), (text, vocabulary)
            longer += bool(tokenizer.continues_word[pieces.ids].any())
    assert longer > 50  # there were words of several pieces


# What holds for every text.


def characters_of(texts):
    found = {}
    for text in texts:
        for character in "".join(c.lower() for c in text):
            for c in unicodedata.normalize("NFD", character):
                if c.strip() and unicodedata.category(c) not in ("Mn", "Cc", "Cf") and c not in "\ufffd":
                    found[c] = found[f"##{c}"] = None
    return found


def normalized(text):
    decomposed = unicodedata.normalize("NFD", "".join(c.lower() for c in text))
    return "".join(c for c in decomposed if unicodedata.category(c) not in ("Mn", "Cc", "Cf") and c != "\ufffd")


def test_random_unicode(make):
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(1000)]
    tokenizer = make(dict.fromkeys([*SPECIALS, *characters_of([ALPHABET])]))
    batch = tokenizer.encode_batch(texts)
    seen = 0
    for text, pieces in zip(texts, batch, strict=True):
        spelled = {}  # several pieces of one character, as of 한, have the same span
        for span, token in zip(map(tuple, pieces.offsets), tokenizer.tokens(pieces.ids), strict=True):
            assert token != "[UNK]"
            spelled[span] = spelled.get(span, "") + token.removeprefix("##")
        for (start, end), token in spelled.items():
            assert normalized(text[start:end]) == token, (text, token)
        seen += len(pieces.ids)
        spans = np.array(list(spelled)).reshape(-1, 2)
        assert (spans[1:, 0] >= spans[:-1, 1]).all()
        steps = np.diff(pieces.words)
        assert set(steps) <= {0, 1}
        assert (steps == 0).tolist() == tokenizer.continues_word[pieces.ids][1:].tolist()
        assert pieces.ids.dtype == pieces.offsets.dtype == pieces.words.dtype == np.int32
    assert seen > 5000
    for text, pieces in zip(texts[:100], batch, strict=False):
        for alone, together in zip(tokenizer.encode(text), pieces, strict=True):
            np.testing.assert_array_equal(alone, together)


def test_words_given(make):
    """Words give what their string gives, and what the library gives for words; offsets lie in the joined string."""
    rng = random.Random(2)
    alphabet = "".join(c for c in ALPHABET if not c.isspace())
    tokenizer = make(dict.fromkeys([*SPECIALS, *list(characters_of([ALPHABET]))[::2]]))
    lists = [[random_text(rng, alphabet, 6) for _ in range(rng.randrange(8))] for _ in range(300)]
    lists[0] = ["", "\u200e", "a[MASK]b", "", "don't", "New York", "\x00"]
    joined = [" ".join(words) for words in lists]
    expected = tokenizer._tokenizer.encode_batch(lists, is_pretokenized=True, add_special_tokens=False)
    for words, pieces, text, whole, library in zip(
        lists, tokenizer.encode_batch(lists), joined, tokenizer.encode_batch(joined), expected, strict=True
    ):
        np.testing.assert_array_equal(pieces.ids, whole.ids)
        np.testing.assert_array_equal(pieces.offsets, whole.offsets)
        assert pieces.words.tolist() == library.word_ids
        assert pieces.ids.tolist() == library.ids
        starts = np.cumsum([0] + [len(word) + 1 for word in words])
        for word, (start, end) in zip(pieces.words, pieces.offsets, strict=True):
            assert text[start:end] == words[word][start - starts[word] : end - starts[word]]


def test_words_without_pieces_keep_the_numbers(make):
    pieces = make(TOY).encode(["", "wanted", "\u200e", "unwanted", "", "a,b", "\x00"])
    assert pieces.words.tolist() == [1, 1, 3, 3, 3, 5, 5, 5]
    assert pieces.offsets[-1].tolist() == [22, 23]


def test_words_and_strings_in_one_batch(make):
    tokenizer = make(TOY)
    texts = ["a b", ["a", "b"], "", [], [""], ("wanted", "a")]
    assert [pieces.words.tolist() for pieces in tokenizer.encode_batch(texts)] == [
        [0, 1],
        [0, 1],
        [],
        [],
        [],
        [0, 0, 1],
    ]
    assert tokenizer.encode("").offsets.shape == (0, 2)
    assert tokenizer.encode_batch([]) == []


# Special tokens.


def test_special_tokens_stay_whole(make):
    tokenizer = make([*TOY, "[", "]", "mask", "MASK"])
    pieces = tokenizer.encode("a[MASK]b [CLS], [mask]")
    assert tokenizer.tokens(pieces.ids) == ["a", "[MASK]", "b", "[CLS]", ",", "[", "mask", "]"]
    assert pieces.words.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert pieces.offsets[1].tolist() == [1, 7]
    assert make(TOY).encode(["a[MASK]", "b"]).words.tolist() == [0, 0, 1]


def test_specials(make):
    assert make(TOY).specials == (0, 1, 2, 3, 4)
    toy = make(["a", "[CLS]", "[UNK]", "[SEP]"])
    assert split(toy, "a c [MASK]")[:2] == ["a", "[UNK]"]
    assert toy.vocab_size == 4  # the library would add the missing ones
    with pytest.raises(InputError, match=r"vocab.txt: found no pad token, expected a piece \[PAD\]"):
        _ = toy.specials


def test_continues_word(make):
    assert make(TOY).continues_word.tolist() == [token.startswith("##") for token in TOY]


def test_long_words(make):
    tokenizer = make(TOY, max_word_length=100)
    assert len(tokenizer.encode("a" + "b" * 99).ids) == 100
    assert split(tokenizer, "a" + "b" * 100) == ["[UNK]"]


def test_lowercase_from_the_vocabulary(make, data):
    assert make(TOY, lowercase=None).lowercase is True
    assert make([*TOY, "The"], lowercase=None).lowercase is False
    assert WordPiece(data / "vocab" / "bert_base_cased" / "vocab.txt", lowercase=None).lowercase is False
    assert WordPiece(data / "vocab" / "bert_base_uncased" / "vocab.txt", lowercase=None).lowercase is True


# Bad input.


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], r"texts\[1\]: found None, expected a string or a list of words"),
        (["a", b"a"], r"texts\[1\]: found bytes \(decode them first\), expected a string"),
        (["a", 3], r"texts\[1\]: found int 3, expected a string"),
        (["a", "b\ud800"], r"texts\[1\]: found the lone surrogate '\\ud800' at character 1, expected text"),
        (["a", ["b", "\udfff"]], r"texts\[1\]\[1\]: found the lone surrogate"),
        ([["a", None]], r"texts\[0\]\[1\]: found None, expected a string"),
        ([["a", ["b"]]], r"texts\[0\]\[1\]: found list \['b'\], expected a string"),
        ("abc", r"texts: found str 'abc', expected a list of texts"),
        (None, r"texts: found None, expected a list of texts"),
    ],
)
def test_bad_texts(make, texts, message):
    with pytest.raises(InputError, match=message):
        make(TOY).encode_batch(texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"vocab.txt: found an empty file \(line 1\)"),
        (b"\n", r"vocab.txt: found an empty file"),
        (b"[UNK]\na\nb\na\n", r"vocab.txt, line 4: found 'a' again, first on line 2"),
        (b"[UNK]\n\na\n", r"vocab.txt, line 2: found a blank line, expected a piece"),
        (b"a\nb\n", r"vocab.txt: found no unk token, expected a piece \[UNK\]"),
        (b"[UNK]\n\xff\n", r"vocab.txt: found a byte that is not UTF-8 at 6"),
    ],
)
def test_bad_vocabularies(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        WordPiece(path)


def test_bad_arguments(make, tmp_path):
    with pytest.raises(InputError, match=r"no.txt: cannot be read \(No such file or directory\), expected a WordPiece"):
        WordPiece(tmp_path / "no.txt")
    with pytest.raises(InputError, match="max_word_length: found 0, expected at least 1"):
        make(TOY, max_word_length=0)
    with pytest.raises(InputError, match=r"ids\[1\]: found 17, expected 0 to 16"):
        make(TOY).tokens([0, 17])
    with pytest.raises(InputError, match=r"ids\[0\]: found -1"):
        make(TOY).tokens([-1])
    with pytest.raises(InputError, match=r"found no piece 'naiv' \(did you mean 'naive'\?\)"):
        make(TOY).token_id("naiv")


def test_line_ends(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("\ufeff[UNK]\r\na\u2028\r\nb".encode())
    tokenizer = WordPiece(path)
    assert [tokenizer.token_id(token) for token in ("[UNK]", "a\u2028", "b")] == [0, 1, 2]


# Files.


@pytest.mark.parametrize(
    "options", [{}, {"lowercase": False, "strip_accents": True}, {"split_cjk": False, "max_word_length": 5}]
)
def test_save_and_pickle(make, tmp_path, options):
    tokenizer = make(TOY, **options)
    tokenizer.save(tmp_path / "saved" / "here")
    text = "Unwantéd naïve 力力 running [MASK] want"
    for again in (load_tokenizer(tmp_path / "saved" / "here"), pickle.loads(pickle.dumps(tokenizer))):
        assert again.tokens(range(len(TOY))) == TOY
        for name in ("lowercase", "strip_accents", "split_cjk", "max_word_length"):
            assert getattr(again, name) == getattr(tokenizer, name)
        for a, b in zip(again.encode(text), tokenizer.encode(text), strict=True):
            np.testing.assert_array_equal(a, b)
    config = json.loads((tmp_path / "saved" / "here" / "tokenizer_config.json").read_text())
    assert config["do_lower_case"] is options.get("lowercase", True)
    assert config["tokenize_chinese_chars"] is options.get("split_cjk", True)
    assert config["strip_accents"] is options.get("strip_accents")
    assert (config["unk_token"], config["mask_token"]) == ("[UNK]", "[MASK]")


def test_encoding_changes_nothing(make):
    tokenizer = make(TOY)
    before = tokenizer._tokenizer.to_str()
    tokenizer.encode_batch(["a [MASK] x", ["y"]])
    assert tokenizer._tokenizer.to_str() == before
