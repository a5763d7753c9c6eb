"""A trained BERT in use: sub-words in, vectors out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ctx_jax.arrays import Representations
from ctx_jax.compilation import float32_means_float32, options_for
from ctx_jax.encoder.base import Ask, Candidate, Encoder, Pool, Text, progress
from ctx_jax.encoder.batches import (
    BATCH_TOKENS,
    CPU_BATCH_TOKENS,
    SHARED_LENGTH,
    Batch,
    compiled_shapes,
    padded_length,
    plan_batches,
    slots_per_row,
)
from ctx_jax.encoder.layout import for_processor, from_processor
from ctx_jax.encoder.pooling import read_out
from ctx_jax.encoder.repair import Affine
from ctx_jax.errors import InputError
from ctx_jax.interop.pretrained import Pooling, Repair
from ctx_jax.interop.programs.forward import Layers
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.nn.parameters import Params
from ctx_jax.text.inputs import Inputs, model_ids, model_inputs
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
        devices = jax.local_devices()
        # Elsewhere copies are fast, and a loop compiles faster than layers one by one.
        self._by_layer = devices[0].platform == "cpu"
        at_once = CPU_BATCH_TOKENS if self._by_layer else BATCH_TOKENS
        super().__init__(config, params, tokenizer, pooling, devices, at_once)
        whole = bound_model(dataclasses.replace(config, unroll=True) if self._by_layer else config)
        self._turned = config.dtype == "bfloat16"

        def bound(params: Params) -> BertWithHeads:
            return from_processor(whole, params, turned=self._turned) if self._by_layer else whole(params)

        jit = partial(jax.jit, compiler_options=options_for(devices[0]))
        exact = float32_means_float32(config.dtype)

        @partial(jit, static_argnames=("slots", "chosen", "pool"))
        @exact
        def forward(
            params: Params, rows: _Rows, slots: int, chosen: tuple[int, ...], pool: Pool | None, repair: Affine | None
        ) -> Float[Array, "K B ... D"]:
            last_alone = chosen == (config.num_layers,)
            found = bound(params).encoder(*rows, all_layers=not last_alone)
            if last_alone:
                layers = found.last[None]
            elif chosen == tuple(range(config.num_layers + 1)):
                layers = found.layers
            else:
                layers = jnp.stack([found.layers[layer] for layer in chosen])
            return read_out(layers.astype(jnp.float32), rows.segments, slots, pool, repair)

        @jit
        @exact
        def predict(params: Params, input_ids: Array, segments: Array, at: Array):
            model = bound(params)
            vectors = model.encoder(input_ids, segment_ids=segments).last
            return jax.nn.softmax(model.masked_lm_logits(vectors[0, at]))

        @partial(jit, static_argnames="head")
        @exact
        def logits(params: Params, input_ids: Array, token_types: Array, segments: Array, head: str):
            model = bound(params)
            return model.logits(head, model.encoder(input_ids, token_types, segments).last)

        self._forward, self._predict, self._logits = forward, predict, logits

    @property
    def width(self) -> int:
        """D, the hidden size."""
        return self.config.hidden_size

    def lengths(self, texts: Sequence[Text]) -> Int[np.ndarray, "N"]:
        """Sub-words of each text, special ones counted."""
        rows = model_inputs(self._tokenizer(), texts, max_length=self.config.max_length, on_too_long="split")
        sizes = [len(row.input_ids) for row in rows]
        return np.bincount([row.text for row in rows], sizes, len(texts)).astype(np.int64)

    def warm_up(
        self,
        max_length: int | None = None,
        *,
        layers: Layers | None = None,
        pool: Pool | None = None,
        repair: str | Repair | None = None,
        batch_tokens: int | None = None,
        show_progress: bool = False,
    ) -> int:
        """Compiles all that `encode` with these arguments can ever need, and returns how many shapes that is.

        Args:
          max_length: of the texts, special tokens counted; None is what the model takes.
          layers: as in `encode`, like the others.
          pool: see there.
          repair: see there; another one of the same shape needs nothing more.
          batch_tokens: see there.
          show_progress: see there.
        """
        ask = self._ask(layers, pool, batch_tokens, repair=repair)
        longest = self.config.max_length if max_length is None else min(max_length, self.config.max_length)
        shapes = compiled_shapes(self.config.max_length, ask.batch_tokens, self.mesh.size)
        # Texts share rows of up to twice their length.
        most = padded_length(min(max(2 * longest, SHARED_LENGTH), self.config.max_length), self.config.max_length)
        shapes = [shape for shape in shapes if shape[1] <= most]
        with progress(len(shapes), show_progress) as done:
            for shape in shapes:
                zeros = np.zeros(shape, np.int32)
                slots = slots_per_row(shape[1])
                rows = self._place(_Rows(*[zeros] * len(_Rows._fields)))
                self._run(rows, slots, ask).block_until_ready()
                done(1)
        return len(shapes)

    def compiled(
        self,
        rows: int,
        length: int,
        *,
        layers: Layers | None = None,
        pool: Pool | None = None,
        repair: str | Repair | None = None,
    ) -> Callable[..., Float[np.ndarray, "..."]]:
        """A function of one shape, for whoever serves: compiled here, a call traces and compiles nothing.

        It takes `input_ids`, `attention_mask` (None: no padding) and `token_type_ids` (None: all 0), integers
        [rows, length] each, of which it checks nothing but that, and keeps the weights and the repair that the encoder
        has now.

        Args:
          rows: B.
          length: T, special tokens included.
          layers: as in `encode`, like pool and repair.
          pool: see there.
          repair: see there.

        Returns:
          The function. It gives float32 on the host: [B, T, D], or with `pool` [B, D]; [K, …] of these where `layers`
          is "all" or a list.

        Raises:
          InputError: no such shape, layer, pooling or repair; the function raises it for arrays of another shape.
        """
        function, (params, inputs, *static, affine) = self.forward(
            rows, length, layers=layers, pool=pool, repair=repair
        )
        program, zeros = function.lower(params, inputs, *static, affine).compile(), inputs.input_ids
        ask = self._ask(layers, pool)

        def checked(name: str, value: Int[Array, "B T"]) -> Int[np.ndarray, "B T"]:
            value = np.asarray(value)
            if value.shape != zeros.shape or value.dtype.kind not in "iub":
                found = f"{name}: found {value.dtype} {list(value.shape)}"
                raise InputError(f"{found}, expected integers {list(zeros.shape)}")
            return value.astype(np.int32, copy=False)

        def run(
            input_ids: Int[Array, "B T"],
            attention_mask: Int[Array, "B T"] | None = None,
            token_type_ids: Int[Array, "B T"] | None = None,
        ) -> Float[np.ndarray, "..."]:
            ids = checked("input_ids", input_ids)
            mask = zeros + 1 if attention_mask is None else checked("attention_mask", attention_mask)
            types = zeros if token_type_ids is None else checked("token_type_ids", token_type_ids)
            found = np.asarray(program(params, _Rows(ids, types, mask, None), affine))
            found = found if ask.pool is None else found[:, :, 0]
            return found[0] if ask.single else found

        return run

    def forward(
        self,
        rows: int,
        length: int,
        *,
        layers: Layers | None = None,
        pool: Pool | None = None,
        repair: str | Repair | None = None,
    ) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
        """What `compiled` compiles: a jitted function, and the arguments of a call with rows of one text each.

        Arguments and errors are those of `compiled`; the ids are zeros. The function gives [K, B, T, D], or with `pool`
        [K, B, 1, D], on the first device.
        """
        ask = self._ask(layers, pool, repair=repair)
        if rows < 1 or not 1 <= length <= self.config.max_length:
            found = f"rows, length: found {rows}, {length}"
            raise InputError(f"{found}, expected at least 1 row of 1 to {self.config.max_length} tokens")
        zeros = np.zeros((rows, length), np.int32)
        params, repair = jax.device_put((self._weights(), ask.repair), self.mesh.devices[0])
        return self._forward, (params, _Rows(zeros, zeros, zeros + 1, None), 1, ask.chosen, ask.pool, repair)

    def encode_ids(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        token_type_ids: Int[Array, "B T"] | None = None,
        *,
        layers: Layers = "all",
        repair: str | Repair | None = None,
        batch_tokens: int | None = None,
    ) -> Representations:
        """Vectors of rows of ids, special tokens included; 0 in `attention_mask` is padding.

        Raises:
          InputError: shapes differ, rows are too long, an id is not in the vocabulary, or there is no such layer.
        """
        ids, mask, types = self._checked(input_ids, attention_mask, token_type_ids)
        ends = mask.shape[1] - mask[:, ::-1].argmax(1)
        rows = [_Row(*(x[row, :end] for x in (ids, types, mask > 0))) for row, end in enumerate(ends)]
        ask = self._ask(layers, None, batch_tokens, repair=repair)
        return self._tokens(rows, ids.shape[1], ask, lambda count: None)

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
        return np.asarray(self._logits(self._weights(), ids, types, mask, head))

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
        length = padded_length(len(row.input_ids), self.config.max_length)
        ids = _padded([row.input_ids], length, tokenizer.specials.pad)
        segments = _padded([np.ones(len(row.input_ids), np.int32)], length, 0)
        result = []
        for probabilities in np.asarray(self._predict(self._weights(), ids, segments, at)):
            best = np.argsort(-probabilities, kind="stable")[:top]
            names = tokenizer.tokens(best)
            result.append([Candidate(name, float(probabilities[i])) for name, i in zip(names, best, strict=True)])
        return result

    def _prepare(self, texts: Sequence[Text], ask: Ask) -> _Prepared | list[_Row]:
        """Rows, and where every token is wanted what they come from."""
        if ask.pool is not None:
            options = {"max_length": self.config.max_length, "on_too_long": ask.on_too_long}
            return self._rows(model_ids(self._tokenizer(), texts, **options))
        inputs = model_inputs(
            self._tokenizer(),
            texts,
            max_length=self.config.max_length,
            on_too_long=ask.on_too_long,
            stride=ask.stride,
        )
        return _Prepared(texts, inputs)

    def _encode(self, prepared: _Prepared, ask: Ask, done: Callable[[int], object]) -> Representations:
        texts, rows = prepared
        length = max(len(row.input_ids) for row in rows)
        encoded = self._tokens(self._rows([row.input_ids for row in rows]), length, ask, done)
        first_words = tuple(map(_first_word, rows))
        word_ids = [
            np.where(row.words >= 0, row.words - first, -1) for row, first in zip(rows, first_words, strict=True)
        ]
        counts = [
            len(texts[row.text]) if not isinstance(texts[row.text], str) and row.start == 0 else int(ids.max()) + 1
            for row, ids in zip(rows, word_ids, strict=True)
        ]
        return encoded._replace(
            tokens=tuple(tuple(self.tokenizer.tokens(row.input_ids)) for row in rows),
            word_ids=_padded(word_ids, length, -1),
            num_words=tuple(counts),
            texts=tuple(row.text for row in rows),
            first_words=first_words,
        )

    def _rows(self, ids: Sequence[np.ndarray]) -> list[_Row]:
        """Of single texts, without padding."""
        types, present = np.zeros(self.config.max_length, np.int32), np.ones(self.config.max_length, bool)
        return [_Row(row, types[: len(row)], present[: len(row)]) for row in ids]

    def _pooled(self, prepared: list[_Row], ask: Ask, done: Callable[[int], object]) -> Float[np.ndarray, "K B D"]:
        found = np.empty((len(ask.chosen), len(prepared), ask.width), np.float32)
        for batch, vectors in self._batches(prepared, ask):
            found[:, batch.texts] = vectors[:, batch.rows, batch.slots]
            done(len(batch.texts))
        return found

    def _tokens(self, rows: Sequence[_Row], length: int, ask: Ask, done: Callable[[int], object]) -> Representations:
        layers = np.zeros((len(ask.chosen), len(rows), length, ask.width), np.float32)
        for batch, vectors in self._batches(rows, ask):
            for text, row, start in zip(batch.texts, batch.rows, batch.starts, strict=True):
                size = len(rows[text].input_ids)
                layers[:, text, :size] = vectors[:, row, start : start + size]
            done(len(batch.texts))
        mask = _padded([row.present for row in rows], length, 0) > 0
        if ask.layers == "last":
            return Representations(layers[0], None, mask)
        numbers = None if ask.layers == "all" else ask.chosen
        last = layers[ask.chosen.index(self.config.num_layers)] if self.config.num_layers in ask.chosen else None
        return Representations(last, layers, mask, numbers=numbers)

    def _batches(self, rows: Sequence[_Row], ask: Ask) -> Iterator[tuple[Batch, Float[np.ndarray, "K B ... D"]]]:
        """Each batch and its vectors; one is computed while the caller has the one before."""
        waiting: deque[tuple[Batch, Array]] = deque()
        lengths = [len(row.input_ids) for row in rows]
        config = self.config
        for batch in plan_batches(lengths, config.max_length, ask.batch_tokens, self.mesh.size, config.hidden_size):
            arrays = _Rows(*(np.zeros(batch.shape, np.int32) for _ in _Rows._fields))
            ids, types, present = (
                np.concatenate(field) for field in zip(*(rows[text] for text in batch.texts), strict=True)
            )
            sizes = np.array([lengths[text] for text in batch.texts])
            each = lambda values, sizes=sizes: np.repeat(values, sizes)
            positions = np.arange(len(ids)) - each(np.cumsum(sizes) - sizes)
            at = each(batch.rows), each(batch.starts) + positions
            arrays.input_ids[at], arrays.token_types[at], arrays.positions[at] = ids, types, positions
            arrays.segments[at] = present * each(batch.slots + 1)
            slots = slots_per_row(batch.shape[1])
            vectors = self._run(self._place(arrays), slots, ask)
            waiting.append((batch, vectors))
            if len(waiting) > 1:
                batch, vectors = waiting.popleft()
                yield batch, np.asarray(vectors)
        for batch, vectors in waiting:
            yield batch, np.asarray(vectors)

    def _run(self, rows: _Rows, slots: int, ask: Ask) -> Float[Array, "K B ... D"]:
        weights = self._weights()
        # Kernels, which XLA cannot divide, must be told among whom.
        with jax.set_mesh(self.mesh) if self.mesh.size > 1 else contextlib.nullcontext():
            return self._forward(weights, rows, slots, ask.chosen, ask.pool, ask.repair)

    def _laid_out(self, params: Params) -> Params:
        return for_processor(params, turned=self._turned) if self._by_layer else params

    def _place(self, rows: _Rows) -> _Rows:
        """Rows on the devices, as many on each."""
        return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec("data")))


class _Prepared(NamedTuple):
    """Texts, and what the tokenizer made of them."""

    texts: Sequence[Text]
    rows: list[Inputs]


class _Row(NamedTuple):
    """What the model reads of a text; `present` is False at padding within."""

    input_ids: np.ndarray
    token_types: np.ndarray
    present: np.ndarray


class _Rows(NamedTuple):
    """What the model reads of a batch; segments count the texts of a row from 1; without positions they are 0 … T-1."""

    input_ids: Int[Array, "B T"]
    token_types: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"] | None


def _padded(rows: Sequence[np.ndarray], length: int, fill: int) -> Int[np.ndarray, "B T"]:
    result = np.full((len(rows), length), fill, np.int32)
    for place, row in zip(result, rows, strict=True):
        place[: len(row)] = row
    return result


def _first_word(row: Inputs) -> int:
    """The word from which a row counts: in a later row of a split text its own first."""
    words = row.words[row.words >= 0]
    return int(words.min()) if row.start and len(words) else 0
