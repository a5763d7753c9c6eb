"""A trained ELMo in use: words in, vectors out.

The character CNN sees each distinct word once, and remembers it; the LSTMs see rows that several texts fill.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ctx_jax.arrays import Representations
from ctx_jax.compilation import float32_means_float32
from ctx_jax.encoder.base import Ask, Encoder, Text
from ctx_jax.encoder.repair import Affine, apply_on_host, apply_to_layers
from ctx_jax.errors import InputError
from ctx_jax.interop.pretrained import Pooling, Repair
from ctx_jax.interop.programs.forward import Layers
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.models.elmo import ElmoConfig, ElmoState
from ctx_jax.nn.parameters import Params
from ctx_jax.packing import pack
from ctx_jax.text.characters import BEGIN, END, Characters
from ctx_jax.text.tokenizer import Tokenizer
from ctx_jax.text.vocabulary import check_text
from ctx_jax.text.words import split_words

NEW_WORDS_AT_ONCE = 512
"""Words that the character CNN sees at once, at most."""

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
        super().__init__(config, params, tokenizer, pooling, jax.local_devices()[:1])
        self._characters = Characters(config.max_characters)
        self._known: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()  # what is known changes
        bound, exact = bound_model(config), float32_means_float32(config.dtype)

        @jax.jit
        @exact
        def words(params: Params, char_ids: Int[Array, "N C"]) -> Float[Array, "N P"]:
            return bound(params).encoder.words(char_ids, config.dtype)

        @partial(jax.jit, static_argnames="chosen")
        @exact
        def contextualise(
            params: Params,
            rows: _Rows,
            state: ElmoState | None,
            chosen: tuple[int, ...],
            repair: Affine | None = None,
        ):
            last_alone = chosen == (config.num_layers,)
            found, state = bound(params).encoder.contextualise(
                rows.vectors, rows.lengths, state, begins=rows.begins, all_layers=not last_alone
            )
            if last_alone:
                layers = found.last[None]
            elif chosen == tuple(range(config.num_layers + 1)):
                layers = found.layers
            else:
                layers = jnp.stack([found.layers[layer] for layer in chosen])
            return layers if repair is None else apply_to_layers(repair, layers.astype(jnp.float32)), state

        self._words, self._contextualise = words, contextualise

    @property
    def width(self) -> int:
        """D: both directions."""
        return 2 * self.config.projection_dim

    def lengths(self, texts: Sequence[Text]) -> Int[np.ndarray, "N"]:
        """Words of each text, and its two ends."""
        return np.array([len(words) + 2 for words in _texts_of_words(texts)])

    def encode_on(
        self,
        sentences: Sequence[Text],
        state: ElmoState | None = None,
        *,
        layers: Layers = "all",
        repair: str | Repair | None = None,
    ) -> tuple[Representations, ElmoState]:
        """Vectors of the next sentence of each of several texts, and the state to go on with.

        Args:
          sentences: one for each text, in the same order every time.
          state: as the call before returned it; None at the beginning of the texts.
          layers: as in `encode`, like repair.
          repair: see there.
        """
        ask = self._ask(layers, None, repair=repair)
        texts = _texts_of_words(sentences)
        if state is not None and (found := state.forward[0].cell.shape[0]) != len(texts):
            raise InputError(f"sentences: found {len(texts)}, expected {found}, as many as the state is of")
        with self._lock:
            self._learn(word for words in texts for word in words)
            found = self._empty(texts, ask)
            length = _bucket(max(map(len, texts)) + 2)
            state = self._read(texts, [[text] for text in range(len(texts))], len(texts), length, state, ask, found)
        return self._representations(texts, found, ask), state

    def _prepare(self, texts: Sequence[Text], ask: Ask) -> list[list[str]]:
        del ask  # no text is too long
        return _texts_of_words(texts)

    def _encode(self, prepared: list[list[str]], ask: Ask, done: Callable[[int], object]) -> Representations:
        with self._lock:
            self._learn(word for words in prepared for word in words)
            layers = self._empty(prepared, ask)
            length = _bucket(max(map(len, prepared)) + 2)
            rows_at_once = max(ask.batch_tokens // length, 1)
            rows_at_once = 1 << (rows_at_once.bit_length() - 1)
            lengths = np.array([len(words) + 2 for words in prepared])
            longest_first = np.argsort(-lengths, kind="stable")
            starts, order = pack(lengths[longest_first], length, per_row=length)
            rows = [longest_first[order[a:b]] for a, b in pairwise(starts)]
            for begin in range(0, len(rows), rows_at_once):
                some = rows[begin : begin + rows_at_once]
                self._read(prepared, some, _power_of_two(len(some), rows_at_once), length, None, ask, layers)
                done(sum(map(len, some)))
        return self._representations(prepared, layers, ask)

    def _pooled(self, prepared: list[list[str]], ask: Ask, done: Callable[[int], object]) -> np.ndarray:
        found = self._encode(prepared, ask._replace(layers=list(ask.chosen), repair=None, width=self.width), done)
        pooled = np.stack([found.sentences(ask.pool, layer=layer) for layer in ask.chosen])
        return pooled if ask.repair is None else apply_on_host(ask.repair, pooled)

    def forget(self) -> None:
        """Forgets the words that it knows: the next texts go through the character CNN again."""
        with self._lock:
            self._known.clear()

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
            self._known.update(zip(some, np.asarray(self._words(self._weights(), ids)), strict=False))

    def _read(
        self,
        texts: Sequence[Sequence[str]],
        rows: Sequence[Sequence[int]],
        count: int,
        length: int,
        state: ElmoState | None,
        ask: Ask,
        layers: Float[np.ndarray, "K N T D"],
    ) -> ElmoState:
        """Runs the LSTMs over rows of texts, by number, and writes the vectors that were asked for into `layers`."""
        batch = self._rows([[texts[text] for text in row] for row in rows], count, length)
        found, state = self._contextualise(self._weights(), batch, state, ask.chosen, ask.repair)
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

    def _empty(self, texts: Sequence[Sequence[str]], ask: Ask) -> Float[np.ndarray, "K B T D"]:
        return np.zeros((len(ask.chosen), len(texts), max(map(len, texts)), ask.width), np.float32)

    def _representations(self, texts: Sequence[Sequence[str]], layers: np.ndarray, ask: Ask) -> Representations:
        lengths = np.array([len(words) for words in texts])
        place = np.arange(layers.shape[2])
        mask = place[None, :] < lengths[:, None]
        last = layers[ask.chosen.index(self.config.num_layers)] if self.config.num_layers in ask.chosen else None
        return Representations(
            last,
            None if ask.layers == "last" else layers,
            mask,
            tokens=tuple(map(tuple, texts)),
            word_ids=np.where(mask, place[None, :], -1),
            num_words=tuple(lengths.tolist()),
            texts=tuple(range(len(texts))),
            first_words=(0,) * len(texts),
            numbers=None if ask.layers in ("all", "last") else ask.chosen,
        )


def _texts_of_words(texts: Sequence[Text]) -> list[list[str]]:
    if not texts:
        raise InputError("texts: found none, expected at least one")
    rows = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            rows.append(split_words(check_text(text, f"texts[{number}]")))
            continue
        if not isinstance(text, Sequence) or isinstance(text, bytes) or not all(isinstance(w, str) for w in text):
            raise InputError(f"texts[{number}]: found {text!r:.40}, expected a string or a list of words")
        rows.append([check_text(word, f"texts[{number}][{place}]") for place, word in enumerate(text)])
    return rows


def _bucket(length: int) -> int:
    """The length that is compiled for: two an octave, so that a new text seldom means a new compilation."""
    bucket = 8
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


def _power_of_two(count: int, most: int) -> int:
    return min(1 << (count - 1).bit_length(), most)
