"""Whole words: how texts are split into them, and vocabularies of them, most frequent first.

ELMo reads a word's characters and predicts the word itself, so that what it needs of a vocabulary is the order of the
words by frequency (bilm-tf's vocabulary files) and a place for every word that occurs.
"""

from __future__ import annotations

import collections
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.text.tokenizer import Pieces
from ctx_jax.text.vocabulary import EncodedStrings, VocabularyTokenizer, check_text, read_file, write_config

FILE = "words.txt"
END, BEGIN, UNKNOWN = "</S>", "<S>", "<UNK>"
"""The first three words of a file, in bilm-tf's order."""

# The three marks, and letters and digits with apostrophes, hyphens and points inside ("don't", "twenty-one", "3.14",
# "U.S"); any other character that is no white space stands alone, but for a run of underscores.
_WORD = re.compile(rf"{END}|{BEGIN}|{UNKNOWN}|" + r"[^\W_]+(?:['’.\-][^\W_]+)*|[^\w\s]|_+")

MOST_COUNTED = 8_000_000
"""Words that are counted at once; beyond it those seen once are forgotten."""


def split_words(text: str) -> list[str]:
    """Words of a running text, punctuation apart; `</S>`, `<S>` and `<UNK>` are kept whole."""
    return _WORD.findall(text)


class Words(VocabularyTokenizer):
    """A vocabulary of words: a text is split at white space and punctuation, and a list of words is taken as it is.

    Case is kept. `[CLS]` and `[SEP]` are `<S>` and `</S>`; there is no mask.
    """

    def __init__(self, path: str | pathlib.Path):
        """Reads a vocabulary.

        Args:
          path: UTF-8, a word a line, most frequent first, after `</S>`, `<S>` and `<UNK>`.

        Raises:
          InputError: there is no such file, it is not UTF-8, the first three lines are others, or a line is blank,
            repeated or holds white space.
        """
        path = pathlib.Path(path)
        unknown = (UNKNOWN,)
        super().__init__(
            path,
            _read_words(path),
            {"pad": unknown, "unk": unknown, "cls": (BEGIN,), "sep": (END,), "mask": unknown},
        )
        self.continues_word = np.zeros(self.vocab_size, bool)

    def encode_batch(self, texts: Sequence[str | Sequence[str]]) -> list[Pieces]:
        """Words of each text. Those of a list are whole words, and an empty one has no piece."""
        found = super().encode_batch(texts)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                found[number] = self._given(text)
        return found

    def _given(self, words: Sequence[str]) -> Pieces:
        unknown = self._ids[UNKNOWN]
        lengths = np.array([len(word) for word in words], np.int64)
        starts = np.cumsum(np.append(0, lengths + 1))[:-1]
        kept = np.flatnonzero(lengths > 0)
        ids = np.array([self._ids.get(words[at], unknown) for at in kept], np.int32)
        offsets = np.stack([starts[kept], starts[kept] + lengths[kept]], axis=1).astype(np.int32)
        return Pieces(ids, offsets.reshape(-1, 2), kept.astype(np.int32))

    def _encode_strings(self, strings: list[str]) -> EncodedStrings:
        unknown = self._ids[UNKNOWN]
        counts, ids, offsets, words = [], [], [], []
        for text in strings:
            matches = list(_WORD.finditer(text))
            counts.append(len(matches))
            ids += [self._ids.get(match.group(), unknown) for match in matches]
            offsets += [match.span() for match in matches]
            words += range(len(matches))
        return EncodedStrings(
            np.array(counts, np.int64),
            np.array(ids, np.int32),
            np.array(offsets, np.int32).reshape(-1, 2),
            np.array(words, np.int32),
        )

    def spellings(self) -> list[str]:
        """The words in the order of their ids."""
        return list(self._tokens)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes `words.txt` and `tokenizer_config.json`."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_bytes("".join(f"{word}\n" for word in self._tokens).encode())
        write_config(folder, {"tokenizer_class": "Words", "do_lower_case": False, **self.special_names()})


def _read_words(path: pathlib.Path) -> list[str]:
    try:
        text = read_file(path, f"a vocabulary of words ({FILE})").decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found a byte that is not UTF-8 at {error.start}, expected a {FILE}") from error
    words = text.removesuffix("\n").split("\n")
    if words[:3] != [END, BEGIN, UNKNOWN]:
        raise InputError(f"{path}: found {words[:3]} on lines 1 to 3, expected {END}, {BEGIN} and {UNKNOWN}")
    seen: set[str] = set()
    for number, word in enumerate(words, start=1):
        if not word or word.split() != [word]:
            raise InputError(f"{path}, line {number}: found {word!r}, expected a word without white space")
        if word in seen:
            raise InputError(f"{path}, line {number}: found {word!r} again")
        seen.add(word)
    return words


def train_words(texts: Iterable[str], most: int, folder: str | pathlib.Path) -> Words:
    """Counts the words of texts and saves the most frequent in a folder; of equally frequent ones the first seen.

    Args:
      texts: read once, one at a time.
      most: words at most, `</S>`, `<S>` and `<UNK>` included.
      folder: for `words.txt` and `tokenizer_config.json`.

    Raises:
      InputError: `most` leaves no room for a word, a text is no valid string, or there is no word.
    """
    if most < 4:
        raise InputError(f"train_words: found {most}, expected at least 4: three marks and a word")
    counts: collections.Counter[str] = collections.Counter()
    for number, text in enumerate(texts):
        counts.update(split_words(check_text(text, f"texts[{number}]")))
        if len(counts) > MOST_COUNTED:
            counts = collections.Counter({word: count for word, count in counts.items() if count > 1})
    for mark in (END, BEGIN, UNKNOWN):
        counts.pop(mark, None)
    if not counts:
        raise InputError("train_words: found no word in the texts")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = [END, BEGIN, UNKNOWN, *(word for word, _ in counts.most_common(most - 3))]
    (folder / FILE).write_bytes("".join(f"{word}\n" for word in words).encode())
    tokenizer = Words(folder / FILE)
    tokenizer.save(folder)
    return tokenizer
