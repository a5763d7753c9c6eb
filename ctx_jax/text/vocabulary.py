"""What tokenizers with a fixed vocabulary share: checking texts, words given beforehand, looking pieces up."""

from __future__ import annotations

import abc
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.text.tokenizer import Layout, Pieces, Specials


class EncodedStrings(NamedTuple):
    """The pieces of S strings, one string after the other; flat, because numpy is slow on many short arrays.

    Attributes:
      counts: [S], pieces of each string.
      ids: [N].
      offsets: [N, 2], characters in the piece's own string.
      words: [N], the tokenizer's own words, from 0 in each string.
    """

    counts: np.ndarray
    ids: np.ndarray
    offsets: np.ndarray
    words: np.ndarray


class VocabularyTokenizer(abc.ABC):
    """The `Tokenizer` protocol but for `continues_word`, `save` and the splitting of plain strings."""

    continues_word: np.ndarray
    layout = Layout()

    def __init__(self, path: pathlib.Path, tokens: Sequence[str], spellings: Mapping[str, tuple[str, ...]]):
        """Keeps the vocabulary.

        Args:
          path: its file, for messages.
          tokens: the pieces in the order of their ids.
          spellings: for each field of `Specials` the names that the token goes by; the first one found counts.
        """
        self.path = path
        self._tokens = list(tokens)
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        self._spellings = spellings

    @property
    def vocab_size(self) -> int:
        """Number of pieces, special tokens included."""
        return len(self._tokens)

    @functools.cached_property
    def specials(self) -> Specials:
        """Ids of the five special tokens.

        They are looked up on first use, as a vocabulary without some of them still splits texts.

        Raises:
          InputError: the vocabulary lacks one of them.
        """
        return Specials(**{field: self._special_id(field) for field in Specials._fields})

    def _special_id(self, field: str) -> int:
        name = self.special_names().get(f"{field}_token")
        if name is None:
            expected = " or ".join(self._spellings[field])
            raise InputError(f"{self.path}: found no {field} token, expected a piece {expected}")
        return self._ids[name]

    def encode(self, text: str | Sequence[str]) -> Pieces:
        """Splits one text, a string or a list of words. Raises InputError where it is neither."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | Sequence[str]]) -> list[Pieces]:
        """Splits each text, a string or a list of words, into pieces; special tokens in a text are kept whole.

        The words of a list are split each by itself; a word without any piece (empty, control characters) has none.

        Raises:
          InputError: a text is no string and no list of strings, or cannot be written as UTF-8.
        """
        strings, text_of, word_of, start_of = flatten(texts)
        counts, ids, offsets, words = self._encode_words(strings, word_of > 0)
        given = np.repeat(word_of, counts)
        words = np.where(given >= 0, given, words).astype(np.int32)
        offsets = (offsets + np.repeat(start_of, counts)[:, None]).astype(np.int32)
        ids = ids.astype(np.int32)
        per_text = np.bincount(np.repeat(text_of, counts), minlength=len(texts))
        ends = np.cumsum(per_text)
        return [
            Pieces(ids[a:b], offsets[a:b], words[a:b]) for a, b in zip((ends - per_text).tolist(), ends, strict=True)
        ]

    def ids_batch(self, texts: Sequence[str | Sequence[str]]) -> list[np.ndarray]:
        """The ids alone of what `encode_batch` gives."""
        return [pieces.ids for pieces in self.encode_batch(texts)]

    def _encode_words(self, strings: list[str], follows: np.ndarray) -> EncodedStrings:
        """Splits strings, of which some, `follows` [S], are words of a list and not its first."""
        return self._encode_strings(strings)

    @abc.abstractmethod
    def _encode_strings(self, strings: list[str]) -> EncodedStrings:
        """Splits strings that are known to be valid."""

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The pieces as the vocabulary spells them. Raises InputError for an id outside 0 … vocab_size − 1."""
        ids = [int(index) for index in ids]
        for position, index in enumerate(ids):
            if not 0 <= index < len(self._tokens):
                raise InputError(f"ids[{position}]: found {index}, expected 0 to {len(self._tokens) - 1} ({self.path})")
        return [self._tokens[index] for index in ids]

    def token_id(self, token: str) -> int:
        """The id of a piece as the vocabulary spells it. Raises InputError when the vocabulary does not have it."""
        if token not in self._ids:
            raise InputError(f"{self.path}: found no piece {token!r}{did_you_mean(str(token), self._tokens)}")
        return self._ids[token]

    def special_names(self) -> dict[str, str]:
        """HF's `unk_token`, `cls_token` … for those special tokens that the vocabulary has."""
        found = {field: [s for s in self._spellings[field] if s in self._ids] for field in Specials._fields}
        return {f"{field}_token": names[0] for field, names in found.items() if names}


def read_file(path: pathlib.Path, kind: str) -> bytes:
    """The bytes of a file. Raises InputError where there is no such file; `kind` says what was expected."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected {kind}") from error


def read_json(path: pathlib.Path, kind: str = "a JSON object") -> dict[str, object]:
    """The object that a file holds. Raises InputError where there is none; `kind` says what was expected."""
    try:
        values = json.loads(read_file(path, kind))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: found no JSON ({error}), expected {kind}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: found {type(values).__name__}, expected {kind}")
    return values


def check_text(text: object, name: str) -> str:
    """The text, if it is a string that can be written as UTF-8. Raises InputError otherwise; `name` says which text."""
    if not isinstance(text, str):
        raise InputError(f"{name}: found {_described(text)}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: found the lone surrogate {text[error.start]!r} at character {error.start}, expected text that "
            "can be written as UTF-8"
        ) from error
    return text


def write_config(folder: pathlib.Path, config: Mapping[str, object]) -> None:
    """Writes `tokenizer_config.json`, as Hugging Face's tokenizers read it."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def has_capitals(tokens: Iterable[str]) -> bool:
    """Does any piece but those in brackets, [UNK] or <unk>, hold a capital letter?"""
    return any(token != token.lower() for token in tokens if (token[:1], token[-1:]) not in (("[", "]"), ("<", ">")))


def flatten(texts: Sequence[str | Sequence[str]]) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """All strings to split; for each its text, its index among the words given (−1: no words), its first character."""
    if not _is_list(texts):
        raise InputError(f"texts: found {_described(texts)}, expected a list of texts (`encode` takes a single one)")
    strings: list[str] = []
    origin: list[tuple[int, int, int]] = []
    for index, text in enumerate(texts):
        if isinstance(text, str):
            strings.append(check_text(text, f"texts[{index}]"))
            origin.append((index, -1, 0))
        elif _is_list(text):
            start = 0
            for position, word in enumerate(text):
                strings.append(check_text(word, f"texts[{index}][{position}]"))
                origin.append((index, position, start))
                start += len(word) + 1
        else:
            raise InputError(f"texts[{index}]: found {_described(text)}, expected a string or a list of words")
    text_of, word_of, start_of = np.array(origin, np.int64).reshape(-1, 3).T
    return strings, text_of, word_of, start_of


def _is_list(value: object) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes, bytearray))


def _described(value: object) -> str:
    if isinstance(value, bytes):
        return "bytes (decode them first)"
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}"
