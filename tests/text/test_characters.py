"""Words as ELMo's byte ids: published cases, and words that UTF-8 makes awkward."""

import json

import numpy as np
import pytest

from ctx_jax.errors import InputError
from ctx_jax.text.characters import (
    BEGIN_SENTENCE,
    BEGIN_WORD,
    END_SENTENCE,
    END_WORD,
    NUM_CHARACTERS,
    PADDING,
    Characters,
)


@pytest.fixture(scope="module")
def published(reference):
    return json.loads((reference / "elmo_bilmtf" / "published_cases.json").read_text())


def row(*body, size=50):
    """bilm-tf's numbers, which are one lower: 258 begins a word, 259 ends it, 260 pads."""
    return np.array([258, *body, 259] + [260] * (size - len(body) - 2)) + 1


def test_marks_are_one_higher_than_bilm_tfs():
    assert (BEGIN_SENTENCE, END_SENTENCE, BEGIN_WORD, END_WORD, PADDING) == (257, 258, 259, 260, 261)
    assert NUM_CHARACTERS == 1 + 256 + 5


def test_published_words(published):
    cases = published["char_ids"]
    characters = Characters(cases["max_word_length"])
    assert len(cases["cases"]) == 5
    for word, expected in cases["cases"]:
        np.testing.assert_array_equal(characters.word(word), np.array(expected) + 1, err_msg=word)


def test_published_batch(published):
    ids, lengths = Characters().batch(published["batcher"]["sentences"])
    np.testing.assert_array_equal(ids, published["batcher"]["expected"])
    np.testing.assert_array_equal(lengths, [5, 4])
    assert (ids.dtype, lengths.dtype) == (np.int16, np.int32)


@pytest.mark.parametrize(
    ("word", "body"),
    [
        ("", []),
        ("a", [97]),
        ("The", [84, 104, 101]),
        ("\x00\x7f", [0, 127]),
        (" ", [32]),
        ("é", [195, 169]),
        ("力", [229, 138, 155]),
        ("😀", [240, 159, 152, 128]),
        ("👩‍🚀", [240, 159, 145, 169, 226, 128, 141, 240, 159, 154, 128]),
        ("\U0010ffff", [244, 143, 191, 191]),
        ("\ud83d", []),
        ("a\ud800b\udfff", [97, 98]),
        ("<S>", [256]),
        ("</S>", [257]),
        ("<s>", [60, 115, 62]),
        ("<S>x", [60, 83, 62, 120]),
        ("<UNK>", [60, 85, 78, 75, 62]),
    ],
)
def test_words(word, body):
    characters = Characters()
    np.testing.assert_array_equal(characters.word(word), row(*body))
    # Also when it was met before.
    np.testing.assert_array_equal(characters.word(word), row(*body))


@pytest.mark.parametrize("length", [46, 47, 48, 49, 50, 100])
def test_a_spelling_has_48_bytes_at_most(length):
    np.testing.assert_array_equal(Characters().word("x" * length), row(*[120] * min(length, 48)))


def test_a_spelling_is_cut_in_the_middle_of_a_character():
    whole = Characters().word("a" * 45 + "😀")
    assert whole[46:50].tolist() == [241, 160, 153, END_WORD]
    np.testing.assert_array_equal(Characters(5).word("力力"), np.array([258, 229, 138, 155, 259]) + 1)
    np.testing.assert_array_equal(Characters(4).word("力"), np.array([258, 229, 138, 259]) + 1)
    np.testing.assert_array_equal(Characters(3).word("力"), np.array([258, 229, 259]) + 1)
    np.testing.assert_array_equal(Characters(3).word("</S>"), np.array([258, 257, 259]) + 1)


def test_every_character_of_unicode_by_its_bytes():
    """A step that meets all planes; each alone and all as a sentence."""
    words = [chr(code) for code in range(0, 0x110000, 977)]
    ids = Characters(6).sentence(words)
    for word, found in zip(words, ids[1:-1], strict=True):
        np.testing.assert_array_equal(found, row(*word.encode("utf-8", "ignore"), size=6))
    assert ids.min() == 1
    assert ids.max() == PADDING


def test_a_sentence_stands_between_its_ends():
    ids = Characters(6).sentence(["a", "</S>", ""])
    expected = [row(256, size=6), row(97, size=6), row(257, size=6), row(size=6), row(257, size=6)]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(Characters(6).sentence([]), [row(256, size=6), row(257, size=6)])
    np.testing.assert_array_equal(Characters(6).sentence(("a", "</S>", "")), expected)


def test_a_batch_is_its_sentences_and_zeros():
    characters = Characters(8)
    sentences = [["one"], [], ["some", "longer", "text", "😀"], ["one", "two"]]
    ids, lengths = characters.batch(sentences)
    assert ids.shape == (4, 6, 8)
    assert lengths.tolist() == [3, 2, 6, 4]
    for found, words, length in zip(ids, sentences, lengths, strict=True):
        np.testing.assert_array_equal(found[:length], characters.sentence(words))
        assert (found[:length] > 0).all()
        assert not found[length:].any()


def test_what_is_handed_out_cannot_be_spoilt():
    """Rows of words are remembered: nobody may write into them, and batches are copies."""
    characters = Characters(8)
    with pytest.raises(ValueError, match="read-only"):
        characters.word("one")[0] = 7
    ids, _ = characters.batch([["one"]])
    ids[:] = 7
    np.testing.assert_array_equal(characters.word("one"), row(*b"one", size=8))
    np.testing.assert_array_equal(characters.word("<S>"), row(256, size=8))


@pytest.mark.parametrize("size", [2, 0, -1])
def test_too_few_characters_are_refused(size):
    with pytest.raises(InputError, match=f"max_characters is {size}, expected at least 3"):
        Characters(size)


def test_what_is_not_a_word_or_sentence_is_refused():
    characters = Characters()
    with pytest.raises(InputError, match="found the string 'a sentence', expected a list of words"):
        characters.sentence("a sentence")
    with pytest.raises(InputError, match="found the string 'a sentence', expected a list of words"):
        characters.batch(["a sentence"])
    with pytest.raises(InputError, match="sentences: found none"):
        characters.batch([])
    with pytest.raises(InputError, match="word: found int, expected a string"):
        characters.sentence(["a", 7])
    with pytest.raises(InputError, match="word: found bytes, expected a string"):
        characters.word(b"a")
    with pytest.raises(InputError, match="word: found NoneType, expected a string"):
        characters.batch([["a"], [None]])
