"""A trained BERT in use: sub-words in, vectors out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ctx_jax.arrays import Representations
from ctx_jax.encoder.base import Candidate, Encoder, Text
from ctx_jax.errors import InputError
from ctx_jax.interop.pretrained import Pooling
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.nn.parameters import Bound, Params
from ctx_jax.text.inputs import Inputs, model_inputs
from ctx_jax.text.tokenizer import Tokenizer


class BertEncoder(Encoder):
    """A BERT with its weights and its tokenizer.

    Attributes:
      config: sizes.
      tokenizer: None when the folder holds none; ids can still be encoded.
      params: nested dict of arrays.
    """

    def __init__(
        self,
        config: BertConfig,
        params: Params,
        tokenizer: Tokenizer | None = None,
        pooling: Pooling | None = None,
    ):
        super().__init__(config, params, tokenizer, pooling)
        bound = Bound(lambda rngs: BertWithHeads(config, rngs=rngs))

        @partial(jax.jit, static_argnames="all_layers")
        def forward(params: Params, input_ids: Array, token_types: Array, segments: Array, all_layers: bool):
            encoder = bound(params).encoder
            last, layers, mask, *_ = encoder(input_ids, token_types, segments, all_layers=all_layers)
            return last.astype(jnp.float32), None if layers is None else layers.astype(jnp.float32), mask

        @jax.jit
        def predict(params: Params, input_ids: Array, segments: Array, at: Array):
            model = bound(params)
            vectors = model.encoder(input_ids, segment_ids=segments).last
            return jax.nn.softmax(model.masked_lm_logits(vectors[0, at]))

        @partial(jax.jit, static_argnames="head")
        def logits(params: Params, input_ids: Array, token_types: Array, segments: Array, head: str):
            model = bound(params)
            return model.logits(head, model.encoder(input_ids, token_types, segments).last)

        self._forward, self._predict, self._logits = forward, predict, logits

    def encode(
        self,
        texts: Text | Sequence[Text],
        *,
        all_layers: bool = True,
        batch_size: int = 32,
        on_too_long: Literal["error", "truncate", "split"] = "error",
        stride: int = 0,
    ) -> Representations:
        """Vectors of texts.

        Args:
          texts: strings, or lists of words; a single string is a list of one.
          all_layers: keep every layer; False keeps the last.
          batch_size: texts at once.
          on_too_long: a text longer than the model takes is an error, or is truncated, or split into several rows that
            overlap by `stride` tokens.
          stride: see above.

        Returns:
          float32 arrays on the host, as long as the longest row, zero at padding.

        Raises:
          InputError: a text is too long, or no text, or there is no tokenizer.
        """
        tokenizer = self._tokenizer()
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise InputError("texts: found none, expected at least one")
        rows = model_inputs(tokenizer, texts, max_length=self.config.max_length, on_too_long=on_too_long, stride=stride)
        length = max(len(row.input_ids) for row in rows)
        encoded = self._run(
            _padded([row.input_ids for row in rows], length, tokenizer.specials.pad),
            _padded([row.token_type_ids for row in rows], length, 0),
            _padded([np.ones(len(row.input_ids), np.int32) for row in rows], length, 0),
            all_layers,
            batch_size,
        )
        word_ids = [_own_words(row) for row in rows]
        counts = [
            len(texts[row.text]) if not isinstance(texts[row.text], str) and row.start == 0 else int(ids.max()) + 1
            for row, ids in zip(rows, word_ids, strict=True)
        ]
        return encoded._replace(
            tokens=tuple(tuple(tokenizer.tokens(row.input_ids)) for row in rows),
            word_ids=_padded(word_ids, length, -1),
            num_words=tuple(counts),
            texts=tuple(row.text for row in rows),
        )

    def encode_ids(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        *,
        all_layers: bool = True,
        batch_size: int = 32,
    ) -> Representations:
        """Vectors of rows of ids, special tokens included; 0 in `attention_mask` is padding.

        Raises:
          InputError: shapes differ, rows are too long, or an id is not in the vocabulary.
        """
        ids, mask, types = self._checked(input_ids, attention_mask, token_type_ids)
        return self._run(ids, types, mask, all_layers, batch_size)

    def logits(
        self,
        head: str,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
    ) -> Float[np.ndarray, "B ..."]:
        """What one of `config.all_heads` says of rows of ids, in shapes as `BertWithHeads.logits` has them.

        Raises:
          InputError: the model has no such head, or as `encode_ids`.
        """
        if head not in self.config.all_heads:
            has = ", ".join(self.config.all_heads) or "none"
            raise InputError(f"head: found {head!r}, expected one of the model's: {has}")
        ids, mask, types = self._checked(input_ids, attention_mask, token_type_ids)
        return np.asarray(self._logits(self.params, ids, types, mask, head))

    def _checked(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None,
        token_type_ids: Int[Array, "B T"] | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
            raise InputError(f"input_ids: found {ids.dtype} {list(ids.shape)}, expected integers [B, T], not empty")
        config = self.config
        if ids.shape[1] > config.max_length:
            raise InputError(f"input_ids: rows of {ids.shape[1]}, the model takes {config.max_length}")
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        types = np.zeros_like(ids) if token_type_ids is None else np.asarray(token_type_ids)
        for name, value, limit in (
            ("input_ids", ids, config.vocab_size),
            ("attention_mask", mask, 2),
            ("token_type_ids", types, max(config.type_vocab_size, 1)),
        ):
            if value.shape != ids.shape:
                raise InputError(f"{name}: found shape {list(value.shape)}, expected {list(ids.shape)}")
            if value.min() < 0 or value.max() >= limit:
                raise InputError(f"{name}: found {value.min()} to {value.max()}, expected 0 to {limit - 1}")
        return ids.astype(np.int32), mask.astype(np.int32), types.astype(np.int32)

    def fill_mask(self, text: str, *, top: int = 5) -> list[list[Candidate]]:
        """The likeliest tokens for each [MASK] of a text, with their probabilities.

        Raises:
          InputError: the text has no mask token, or is too long, or the model has no masked-LM head.
        """
        if "masked_lm" not in self.config.all_heads:
            raise InputError(f"fill_mask: found heads {self.config.all_heads}, expected masked_lm among them")
        tokenizer = self._tokenizer()
        (row,) = model_inputs(tokenizer, [text], max_length=self.config.max_length)
        at = np.flatnonzero(row.input_ids == tokenizer.specials.mask)
        if not len(at):
            mask = tokenizer.tokens([tokenizer.specials.mask])[0]
            raise InputError(f"text: found no {mask} in {text[:60]!r}, expected at least one")
        length = self._bucket(len(row.input_ids))
        ids = _padded([row.input_ids], length, tokenizer.specials.pad)
        segments = _padded([np.ones(len(row.input_ids), np.int32)], length, 0)
        result = []
        for probabilities in np.asarray(self._predict(self.params, ids, segments, at)):
            best = np.argsort(-probabilities, kind="stable")[:top]
            names = tokenizer.tokens(best)
            result.append([Candidate(name, float(probabilities[i])) for name, i in zip(names, best, strict=True)])
        return result

    def _bucket(self, length: int) -> int:
        """The length that is compiled for: a few, so that a new text seldom means a new compilation."""
        bucket = 16
        while bucket < length:
            bucket *= 2
        return min(bucket, self.config.max_length)

    def _run(
        self, ids: np.ndarray, types: np.ndarray, segments: np.ndarray, all_layers: bool, batch_size: int
    ) -> Representations:
        count, length = ids.shape
        depth, width = self.config.num_layers + 1, self.config.hidden_size
        last = np.zeros((count, length, width), np.float32)
        layers = np.zeros((depth, count, length, width), np.float32) if all_layers else None
        for rows in _by_length(segments, batch_size):
            longest = int(segments[rows].shape[1] - segments[rows][:, ::-1].argmax(1).min())
            shape = (_power_of_two(len(rows), batch_size), self._bucket(longest))
            padded = [_pad_to(x[rows, :longest], shape) for x in (ids, types, segments)]
            found, all_found, _ = jax.device_get(self._forward(self.params, *padded, all_layers))
            # Zeros at padding, so that nothing there depends on the neighbours' lengths.
            inside = segments[rows, :longest, None] > 0
            last[rows, :longest] = np.where(inside, found[: len(rows), :longest], 0)
            if layers is not None:
                layers[:, rows, :longest] = np.where(inside, all_found[:, : len(rows), :longest], 0)
        return Representations(last, layers, segments > 0)


def _by_length(segments: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Rows of like length together."""
    order = np.argsort(-segments.sum(1), kind="stable")
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def _power_of_two(count: int, most: int) -> int:
    return min(1 << (count - 1).bit_length(), most)


def _pad_to(x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.pad(x, ((0, shape[0] - x.shape[0]), (0, max(shape[1] - x.shape[1], 0))))


def _padded(rows: Sequence[np.ndarray], length: int, fill: int) -> Int[np.ndarray, "B T"]:
    result = np.full((len(rows), length), fill, np.int32)
    for place, row in zip(result, rows, strict=True):
        place[: len(row)] = row
    return result


def _own_words(row: Inputs) -> np.ndarray:
    """Word indices of a row; in a later row of a split text counted from that row's first word."""
    words = row.words
    first = words[words >= 0].min() if row.start and (words >= 0).any() else 0
    return np.where(words >= 0, words - first, -1)
