"""Every architecture by one interface: its cost by formula, and the very function to count on.

A twin is the same model with its loops written out, for XLA, which counts a loop's body once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ctx_jax.compilation import float32_means_float32
from ctx_jax.flops.elmo import elmo_cost
from ctx_jax.flops.jaxpr import Count, count_jaxpr
from ctx_jax.flops.parts import Cost
from ctx_jax.flops.transformer import bert_cost
from ctx_jax.flops.xla import erfc_flops, xla_flops
from ctx_jax.models.bert import Bert, BertConfig
from ctx_jax.models.elmo import Elmo, ElmoConfig
from ctx_jax.nn.parameters import Bound

EncoderConfig = BertConfig | ElmoConfig


def encoder_cost(config: EncoderConfig, *, rows: int = 1, length: int) -> Cost:
    """The encoder's forward pass by formula, without the heads that pre-training puts on it."""
    if isinstance(config, ElmoConfig):
        return elmo_cost(config, rows=rows, length=length)
    return bert_cost(config, rows=rows, length=length)


def longest(config: EncoderConfig) -> int | None:
    """The longest row that the encoder takes; None if it takes any."""
    return None if isinstance(config, ElmoConfig) else config.max_length


def unit(config: EncoderConfig) -> str:
    """What a row is made of."""
    return "words" if isinstance(config, ElmoConfig) else "tokens"


def describe(config: EncoderConfig) -> str:
    """Sizes in one line."""
    if isinstance(config, ElmoConfig):
        sizes = f"{config.lstm_dim}/{config.projection_dim}"
        return f"ELMo, {config.num_layers} LSTMs {sizes} a direction, {config.num_highway} highway layers"
    return (
        f"BERT {config.num_layers} × {config.hidden_size}, {config.num_heads} heads,"
        f" {'gated ' if config.gated else ''}feed-forward {config.intermediate_size}"
        + (f", attention to {config.attention_window} tokens either side" if config.attention_window else "")
    )


def encoder_function(config: EncoderConfig, *, rows: int, length: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The encoder's forward pass as a function, and the shapes of its arguments."""
    bound, exact = _bound(config), float32_means_float32(config.dtype)
    if isinstance(config, ElmoConfig):
        ids = jax.ShapeDtypeStruct((rows, length, config.max_characters), jnp.int16)
        return exact(lambda params, char_ids: bound(params)(char_ids, all_layers=False)[0].last), (bound.shapes, ids)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return exact(lambda params, input_ids: bound(params)(input_ids).last), (bound.shapes, ids)


@functools.cache
def _bound(config: EncoderConfig) -> Bound:
    module = Elmo if isinstance(config, ElmoConfig) else Bert
    return Bound(lambda rngs: module(config, rngs=rngs))


class ThreeCounts(NamedTuple):
    """One forward pass counted three ways, in FLOP.

    Attributes:
      formula: by part.
      walk: of the jaxpr.
      xla: of XLA's cost analysis of the twin.
      xla_erf: the part of it that erf, written out as a polynomial, has over the one operation of the other two.
    """

    formula: Cost
    walk: Count
    xla: int
    xla_erf: int

    @property
    def agree(self) -> bool:
        """Formula and walk to the last FLOP, XLA within 2 %, erf counted alike."""
        formula = self.formula.matrix_flops + self.formula.other_flops
        exact = self.formula.matrix_flops == self.walk.matrix and formula == self.walk.flops
        return exact and abs((self.xla - self.xla_erf) / self.walk.flops - 1) < 0.02


def count_encoder(config: EncoderConfig, *, rows: int = 1, length: int) -> ThreeCounts:
    """Counts the encoder's forward pass by formula, by walking its jaxpr, and by XLA on a twin. Nothing is compiled."""
    twin = replace(config, unroll=True)
    # One trace serves both: in a jaxpr a loop to be written out is still a loop.
    traced = _traced(twin, rows, length)
    walk = count_jaxpr(traced.jaxpr)
    if isinstance(config, ElmoConfig):
        # Every word costs ELMo the same, and so what the second adds stands for each that follows.
        one, two = (_elmo_xla(twin, rows, words) for words in (1, 2))
        xla = one + (two - one) * (length - 1)
    else:
        xla = xla_flops(traced)
    erf = walk.by_primitive.get("erfc", 0) * (erfc_flops(config.dtype) - 1)
    return ThreeCounts(encoder_cost(config, rows=rows, length=length), walk, xla, erf)


def _traced(config: EncoderConfig, rows: int, length: int) -> jax.stages.Traced:
    function, args = encoder_function(config, rows=rows, length=length)
    return jax.jit(function).trace(*args)


@functools.cache
def _elmo_xla(twin: ElmoConfig, rows: int, words: int) -> int:
    return xla_flops(_traced(twin, rows, words))
