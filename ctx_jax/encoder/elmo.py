"""A trained ELMo in use: words in, vectors out.

The character CNN sees each distinct word once, and remembers it; the LSTMs see rows of like length together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ctx_jax.arrays import Representations
from ctx_jax.encoder.base import Encoder, Text
from ctx_jax.errors import InputError
from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining, ElmoState, without_ends
from ctx_jax.nn.parameters import Bound, Params
from ctx_jax.text.characters import BEGIN, END, Characters
from ctx_jax.text.tokenizer import Tokenizer
from ctx_jax.text.words import split_words

WORDS_AT_ONCE = 512
"""Words that the character CNN sees at once, at most."""

WORDS_REMEMBERED = 100_000
"""Words whose vectors are kept between calls; the oldest make room."""


class ElmoEncoder(Encoder):
    """An ELMo with its weights. It needs no vocabulary: it reads characters."""

    def __init__(self, config: ElmoConfig, params: Params, tokenizer: Tokenizer | None = None):
        super().__init__(config, params, tokenizer)
        self._characters = Characters(config.max_characters)
        self._known: dict[str, np.ndarray] = {}
        bound = Bound(lambda rngs: ElmoForPreTraining(config, rngs=rngs))

        @jax.jit
        def words(params: Params, char_ids: Int[Array, "N C"]) -> Float[Array, "N P"]:
            return bound(params).encoder.words(char_ids, config.dtype)

        @partial(jax.jit, static_argnames="all_layers")
        def contextualise(params: Params, vectors: Array, lengths: Array, state: ElmoState | None, all_layers: bool):
            encoder = bound(params).encoder
            found, state = encoder.contextualise(vectors, lengths, state, all_layers=all_layers)
            last, layers, mask, *_ = without_ends(found)
            return last.astype(jnp.float32), None if layers is None else layers.astype(jnp.float32), mask, state

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
          batch_size: texts at once.
          on_too_long: no text is too long for an ELMo.
          stride: likewise.

        Returns:
          float32 arrays on the host, a place for each word, zero behind a text's last one. `tokens` are the words.

        Raises:
          InputError: a text is no string and no list of strings, or there is none.
        """
        del on_too_long, stride
        rows = _rows_of_words(texts)
        longest = max(map(len, rows), default=0)
        width, depth = 2 * self.config.projection_dim, self.config.num_layers + 1
        last = np.zeros((len(rows), longest, width), np.float32)
        layers = np.zeros((depth, len(rows), longest, width), np.float32) if all_layers else None
        self._learn(word for row in rows for word in row)
        for some in _by_length(rows, batch_size):
            length = _bucket(max(len(rows[r]) for r in some) + 2)
            vectors, lengths = self._padded([rows[r] for r in some], _power_of_two(len(some), batch_size), length)
            found, all_found, *_ = self._contextualise(self.params, vectors, lengths, None, all_layers)
            place = slice(0, min(length - 2, longest))
            last[some, place] = np.asarray(found)[: len(some), place]
            if layers is not None:
                layers[:, some, place] = np.asarray(all_found)[:, : len(some), place]
        return _representations(rows, last, layers)

    def encode_on(
        self, sentences: Sequence[Text], state: ElmoState | None = None, *, all_layers: bool = True
    ) -> tuple[Representations, ElmoState]:
        """Vectors of the next sentence of each of several texts, and the state to go on with.

        Args:
          sentences: one for each text, in the same order every time.
          state: as the call before returned it; None at the beginning of the texts.
          all_layers: as in `encode`.
        """
        rows = _rows_of_words(sentences)
        if state is not None and (found := state.forward[0].cell.shape[0]) != len(rows):
            raise InputError(f"sentences: found {len(rows)}, expected {found}, as many as the state is of")
        self._learn(word for row in rows for word in row)
        longest = max(map(len, rows), default=0)
        vectors, lengths = self._padded(rows, len(rows), _bucket(longest + 2))
        last, layers, _, state = self._contextualise(self.params, vectors, lengths, state, all_layers)
        layers = np.asarray(layers)[:, :, :longest] if all_layers else None
        return _representations(rows, np.asarray(last)[:, :longest], layers), state

    def _learn(self, words: Iterator[str]) -> None:
        """Runs the character CNN over the words that are not known yet."""
        wanted = dict.fromkeys([BEGIN, END, *words])
        # What this call needs stays; of the rest the oldest make room.
        spare = len(self._known.keys() | wanted.keys()) - WORDS_REMEMBERED
        for word in [word for word in self._known if word not in wanted][: max(spare, 0)]:
            del self._known[word]
        new = [word for word in wanted if word not in self._known]
        for begin in range(0, len(new), WORDS_AT_ONCE):
            some = new[begin : begin + WORDS_AT_ONCE]
            ids = np.zeros((_power_of_two(len(some), WORDS_AT_ONCE), self.config.max_characters), np.int16)
            ids[: len(some)] = [self._characters.word(word) for word in some]
            self._known.update(zip(some, np.asarray(self._words(self.params, ids)), strict=False))

    def _padded(
        self, rows: Sequence[Sequence[str]], count: int, length: int
    ) -> tuple[Float[np.ndarray, "B T P"], Int[np.ndarray, "B"]]:
        """Word vectors of rows with `<S>` and `</S>` around them, and their lengths."""
        begin, end = self._known[BEGIN], self._known[END]
        vectors = np.zeros((count, length, self.config.projection_dim), begin.dtype)
        lengths = np.zeros(count, np.int32)
        for place, (row, words) in enumerate(zip(vectors, rows, strict=False)):
            lengths[place] = len(words) + 2
            row[: len(words) + 2] = [begin, *(self._known[word] for word in words), end]
        return vectors, lengths


def _rows_of_words(texts: Text | Sequence[Text]) -> list[list[str]]:
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


def _representations(rows: Sequence[Sequence[str]], last: np.ndarray, layers: np.ndarray | None) -> Representations:
    lengths = np.array([len(row) for row in rows])
    place = np.arange(last.shape[1])
    mask = place[None, :] < lengths[:, None]
    return Representations(
        last,
        layers,
        mask,
        tokens=tuple(map(tuple, rows)),
        word_ids=np.where(mask, place[None, :], -1),
        num_words=tuple(lengths.tolist()),
        texts=tuple(range(len(rows))),
    )


def _by_length(rows: Sequence[Sequence[str]], batch_size: int) -> Iterator[np.ndarray]:
    """Rows of like length together."""
    order = np.argsort([-len(row) for row in rows], kind="stable")
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def _bucket(length: int) -> int:
    """The length that is compiled for: two an octave, so that a new text seldom means a new compilation."""
    bucket = 8
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


def _power_of_two(count: int, most: int) -> int:
    return min(1 << (count - 1).bit_length(), most)
