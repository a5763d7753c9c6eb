"""A trained ELMo in use: words in, vectors out.

The character CNN sees each distinct word once, and remembers it; the LSTMs see rows that several texts fill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ctx_jax.arrays import Representations
from ctx_jax.encoder.base import Encoder, Text
from ctx_jax.errors import InputError
from ctx_jax.interop.pretrained import Pooling
from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining, ElmoState
from ctx_jax.nn.parameters import Bound, Params
from ctx_jax.packing import pack
from ctx_jax.text.characters import BEGIN, END, Characters
from ctx_jax.text.tokenizer import Tokenizer
from ctx_jax.text.words import split_words

NEW_WORDS_AT_ONCE = 512
"""Words that the character CNN sees at once, at most."""

WORDS_AT_ONCE = 16_384
"""Words that the LSTMs see at once, unless one text has more: the original's three layers of them are 200 MB."""

WORDS_REMEMBERED = 100_000
"""Words whose vectors are kept between calls; the oldest make room."""


class _Rows(NamedTuple):
    """What the LSTMs read: vectors of words, how many a row has, and where a further text begins in it."""

    vectors: Float[Array, "B T P"]
    lengths: Int[Array, "B"]
    begins: Bool[Array, "B T"]


class ElmoEncoder(Encoder):
    """An ELMo with its weights. It needs no vocabulary: it reads characters."""

    def __init__(
        self,
        config: ElmoConfig,
        params: Params,
        tokenizer: Tokenizer | None = None,
        pooling: Pooling | None = None,
    ):
        super().__init__(config, params, tokenizer, pooling)
        self._characters = Characters(config.max_characters)
        self._known: dict[str, np.ndarray] = {}
        bound = Bound(lambda rngs: ElmoForPreTraining(config, rngs=rngs))

        @jax.jit
        def words(params: Params, char_ids: Int[Array, "N C"]) -> Float[Array, "N P"]:
            return bound(params).encoder.words(char_ids, config.dtype)

        @partial(jax.jit, static_argnames="all_layers")
        def contextualise(params: Params, rows: _Rows, state: ElmoState | None, all_layers: bool):
            found, state = bound(params).encoder.contextualise(
                rows.vectors, rows.lengths, state, begins=rows.begins, all_layers=all_layers
            )
            return found.last[None] if found.layers is None else found.layers, state

        self._words, self._contextualise = words, contextualise

    def encode(
        self,
        texts: Text | Sequence[Text],
        *,
        all_layers: bool = True,
        batch_size: int = 32,
        on_too_long: Literal["error", "truncate", "split"] = "error",
        stride: int = 0,
    ) -> Representations:
        """Vectors of texts. Each begins anew: it has the same vectors whatever was encoded before or beside it.

        Args:
          texts: strings, which are split at white space and punctuation, or lists of words.
          all_layers: keep every layer, 0 being the word's vector twice; False keeps the last.
          batch_size: rows at once, at most; a row holds as many texts as it has room for.
          on_too_long: no text is too long for an ELMo.
          stride: likewise.

        Returns:
          float32 arrays on the host, a place for each word, zero behind a text's last one. `tokens` are the words.

        Raises:
          InputError: a text is no string and no list of strings, or there is none.
        """
        del on_too_long, stride
        texts = _texts_of_words(texts)
        self._learn(word for words in texts for word in words)
        layers = self._empty(texts, all_layers)
        length = _bucket(max(map(len, texts)) + 2)
        rows_at_once = min(batch_size, max(WORDS_AT_ONCE // length, 1))
        lengths = np.array([len(words) + 2 for words in texts])
        longest_first = np.argsort(-lengths, kind="stable")
        starts, order = pack(lengths[longest_first], length, per_row=length)
        rows = [longest_first[order[a:b]] for a, b in pairwise(starts)]
        for begin in range(0, len(rows), rows_at_once):
            some = rows[begin : begin + rows_at_once]
            self._read(texts, some, _power_of_two(len(some), rows_at_once), length, None, layers)
        return _representations(texts, layers, all_layers)

    def encode_on(
        self, sentences: Sequence[Text], state: ElmoState | None = None, *, all_layers: bool = True
    ) -> tuple[Representations, ElmoState]:
        """Vectors of the next sentence of each of several texts, and the state to go on with.

        Args:
          sentences: one for each text, in the same order every time.
          state: as the call before returned it; None at the beginning of the texts.
          all_layers: as in `encode`.
        """
        texts = _texts_of_words(sentences)
        if state is not None and (found := state.forward[0].cell.shape[0]) != len(texts):
            raise InputError(f"sentences: found {len(texts)}, expected {found}, as many as the state is of")
        self._learn(word for words in texts for word in words)
        layers = self._empty(texts, all_layers)
        length = _bucket(max(map(len, texts)) + 2)
        state = self._read(texts, [[text] for text in range(len(texts))], len(texts), length, state, layers)
        return _representations(texts, layers, all_layers), state

    def _learn(self, words: Iterator[str]) -> None:
        """Runs the character CNN over the words that are not known yet."""
        wanted = dict.fromkeys([BEGIN, END, *words])
        # What this call needs stays; of the rest the oldest make room.
        spare = len(self._known.keys() | wanted.keys()) - WORDS_REMEMBERED
        for word in [word for word in self._known if word not in wanted][: max(spare, 0)]:
            del self._known[word]
        new = [word for word in wanted if word not in self._known]
        for begin in range(0, len(new), NEW_WORDS_AT_ONCE):
            some = new[begin : begin + NEW_WORDS_AT_ONCE]
            ids = np.zeros((_power_of_two(len(some), NEW_WORDS_AT_ONCE), self.config.max_characters), np.int16)
            ids[: len(some)] = [self._characters.word(word) for word in some]
            self._known.update(zip(some, np.asarray(self._words(self.params, ids)), strict=False))

    def _read(
        self,
        texts: Sequence[Sequence[str]],
        rows: Sequence[Sequence[int]],
        count: int,
        length: int,
        state: ElmoState | None,
        layers: Float[np.ndarray, "L N T D"],
    ) -> ElmoState:
        """Runs the LSTMs over rows of texts, by number, and writes their vectors into `layers`, all or the last."""
        batch = self._rows([[texts[text] for text in row] for row in rows], count, length)
        found, state = self._contextualise(self.params, batch, state, len(layers) > 1)
        found = np.asarray(found)
        for row, members in enumerate(rows):
            place = 1
            for text in members:
                words = len(texts[text])
                layers[:, text, :words] = found[:, row, place : place + words]
                place += words + 2
        return state

    def _rows(self, rows: Sequence[Sequence[Sequence[str]]], count: int, length: int) -> _Rows:
        """Texts end to end, each with `<S>` and `</S>` around it, in rows, and then rows without any."""
        begin, end = self._known[BEGIN], self._known[END]
        vectors = np.zeros((count, length, self.config.projection_dim), begin.dtype)
        lengths, begins = np.zeros(count, np.int32), np.zeros((count, length), bool)
        for row, texts in enumerate(rows):
            for words in texts:
                place = slice(lengths[row], lengths[row] + len(words) + 2)
                vectors[row, place] = [begin, *(self._known[word] for word in words), end]
                # A row's first text may go on.
                begins[row, place.start] = place.start > 0
                lengths[row] = place.stop
        return _Rows(vectors, lengths, begins)

    def _empty(self, texts: Sequence[Sequence[str]], all_layers: bool) -> Float[np.ndarray, "L B T D"]:
        depth = self.config.num_layers + 1 if all_layers else 1
        return np.zeros((depth, len(texts), max(map(len, texts)), 2 * self.config.projection_dim), np.float32)


def _texts_of_words(texts: Text | Sequence[Text]) -> list[list[str]]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise InputError("texts: found none, expected at least one")
    rows = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            rows.append(split_words(text))
            continue
        if not isinstance(text, Sequence) or isinstance(text, bytes) or not all(isinstance(w, str) for w in text):
            raise InputError(f"texts[{number}]: found {text!r:.40}, expected a string or a list of words")
        rows.append(list(text))
    return rows


def _representations(texts: Sequence[Sequence[str]], layers: np.ndarray, all_layers: bool) -> Representations:
    lengths = np.array([len(words) for words in texts])
    place = np.arange(layers.shape[2])
    mask = place[None, :] < lengths[:, None]
    return Representations(
        layers[-1],
        layers if all_layers else None,
        mask,
        tokens=tuple(map(tuple, texts)),
        word_ids=np.where(mask, place[None, :], -1),
        num_words=tuple(lengths.tolist()),
        texts=tuple(range(len(texts))),
    )


def _bucket(length: int) -> int:
    """The length that is compiled for: two an octave, so that a new text seldom means a new compilation."""
    bucket = 8
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


def _power_of_two(count: int, most: int) -> int:
    return min(1 << (count - 1).bit_length(), most)
