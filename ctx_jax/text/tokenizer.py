"""What every tokenizer of the project can do, and the pieces it gives."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Specials(NamedTuple):
    """Ids of the five special tokens; the names are BERT's, whatever the vocabulary calls them."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


class Pieces(NamedTuple):
    """The sub-words of one text, without special tokens around them.

    Attributes:
      ids: int32 [N].
      offsets: int32 [N, 2], first and one past the last character of each piece in the text that was given
        (Python's characters, not bytes); for a list of words, within the words joined by single spaces.
      words: int32 [N], index of the word that each piece belongs to. For a list of words the index in that list,
        for a string that of the tokenizer's own words. Never decreasing.
    """

    ids: np.ndarray
    offsets: np.ndarray
    words: np.ndarray


class Tokenizer(Protocol):
    """Text to ids and back. Imports no JAX and holds no state that a call changes."""

    specials: Specials
    vocab_size: int
    continues_word: np.ndarray
    """bool [V]: the piece continues a word (`##ing` in BERT's vocabulary, no leading `▁` in SentencePiece's)."""

    def encode_batch(self, texts: Sequence[str | Sequence[str]]) -> list[Pieces]:
        """Splits each text, a string or a list of words, into pieces; special tokens written in it are kept whole."""

    def encode(self, text: str | Sequence[str]) -> Pieces:
        """Splits one text."""

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The pieces as the vocabulary spells them."""

    def token_id(self, token: str) -> int:
        """The id of a piece as the vocabulary spells it. Raises InputError when the vocabulary does not have it."""

    def save(self, folder: pathlib.Path) -> None:
        """Writes the files from which `load_tokenizer(folder)` makes the same tokenizer."""
