"""Words as the bytes that ELMo reads (bilm-tf, bilm/data.py: UnicodeCharsVocabulary and Batcher).

A word is a row of C ids: begin-of-word, the bytes of its UTF-8 spelling, end-of-word, and padding. All ids are one
higher than bilm-tf's own, so that 0 can stand for a word that is not there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from ctx_jax.errors import InputError

# Shifted by one: bytes are 1 to 256.
BEGIN_SENTENCE, END_SENTENCE, BEGIN_WORD, END_WORD, PADDING = 257, 258, 259, 260, 261
NUM_CHARACTERS = 262
"""Ids from 0 to 261; published options.json files say 261 and mean these."""
BEGIN, END = "<S>", "</S>"


class Characters:
    """Words to ids; holds no state but a memory of words it has met.

    Attributes:
      max_characters: C; a word's spelling is cut at C - 2 bytes, in the middle of a character if need be.
    """

    def __init__(self, max_characters: int = 50):
        if max_characters < 3:
            raise InputError(f"max_characters is {max_characters}, expected at least 3: two marks and a byte")
        self.max_characters = max_characters
        self._known: dict[str, Int[np.ndarray, "C"]] = {}
        for name, mark in ((BEGIN, BEGIN_SENTENCE), (END, END_SENTENCE)):
            self._known[name] = self._row([mark])

    def _row(self, body: Sequence[int]) -> Int[np.ndarray, "C"]:
        row = np.full(self.max_characters, PADDING, np.int16)
        row[: len(body) + 2] = [BEGIN_WORD, *body, END_WORD]
        row.flags.writeable = False
        return row

    def word(self, word: str) -> Int[np.ndarray, "C"]:
        """Ids of one word, int16. `<S>` and `</S>` are the ends of a sentence; lone surrogates are left out."""
        row = self._known.get(word)
        if row is None:
            if not isinstance(word, str):
                raise InputError(f"word: found {type(word).__name__}, expected a string")
            spelling = word.encode("utf-8", "ignore")[: self.max_characters - 2]
            row = self._row([byte + 1 for byte in spelling])
            if len(self._known) < 1_000_000:
                self._known[word] = row
        return row

    def sentence(self, words: Sequence[str]) -> Int[np.ndarray, "T C"]:
        """Ids of a sentence with `<S>` before it and `</S>` after it: T is two more than the words."""
        if isinstance(words, str):
            raise InputError(f"sentence: found the string {words[:40]!r}, expected a list of words")
        return np.stack([self.word(word) for word in (BEGIN, *words, END)])

    def batch(self, sentences: Sequence[Sequence[str]]) -> tuple[Int[np.ndarray, "B T C"], Int[np.ndarray, "B"]]:
        """Sentences as one array, int16, 0 where a row has no more words; and the rows' lengths with both marks.

        Raises:
          InputError: there is no sentence, or one is not a list of strings.
        """
        if not sentences:
            raise InputError("sentences: found none, expected at least one")
        rows = [self.sentence(words) for words in sentences]
        lengths = np.array([len(row) for row in rows], np.int32)
        ids = np.zeros((len(rows), int(lengths.max()), self.max_characters), np.int16)
        for place, row in zip(ids, rows, strict=True):
            place[: len(row)] = row
        return ids, lengths
