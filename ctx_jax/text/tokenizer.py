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


class Layout(NamedTuple):
    """How one text or two stand among special tokens: cls first sep, and for two sep… second sep behind it.

    Attributes:
      separators: how many separators stand between the first text and the second; RoBERTa has 2.
      second_type: token type of the second text and the separator behind it; RoBERTa has 0.
    """

    separators: int = 1
    second_type: int = 1


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
    layout: Layout
    vocab_size: int
    continues_word: np.ndarray
    """bool [V]: the piece continues a word (`##ing` in BERT's vocabulary, no leading `▁` or `Ġ` in others)."""

    def encode_batch(self, texts: Sequence[str | Sequence[str]]) -> list[Pieces]:
        """Splits each text, a string or a list of words, into pieces; special tokens written in it are kept whole."""

    def encode(self, text: str | Sequence[str]) -> Pieces:
        """Splits one text."""

    def ids_batch(self, texts: Sequence[str | Sequence[str]]) -> list[np.ndarray]:
        """The ids of each text's pieces alone, int32 [N], which may be had sooner."""

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The pieces as the vocabulary spells them."""

    def token_id(self, token: str) -> int:
        """The id of a piece as the vocabulary spells it. Raises InputError when the vocabulary does not have it."""

    def save(self, folder: pathlib.Path) -> None:
        """Writes the files from which `load_tokenizer(folder)` makes the same tokenizer."""
