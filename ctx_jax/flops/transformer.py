"""What BERT costs, by formula. Per layer and row of T tokens, width D, H heads, feed-forward width F:

    query, key, value   3 · 2·T·D·D      scores    2·T·T·D      feed-forward   2 · 2·T·D·F   (gated 3 · 2·T·D·F)
    output projection       2·T·D·D      context   2·T·T·D

in matrix products, and the rest as parts.py derives it. Local attention of window W scores 3·W keys a query instead of
T, in whole blocks. A masked-LM head costs 2·D·D + 2·D·V a prediction, a pooler
2·D·D an example, the next-sentence classifier 2·D·2. Embeddings of width E before a projection cost 2·T·E·D, and the
head then 2·D·E + 2·E·V. Layers that share their parameters cost what others do.

Computed again in the backward pass: the scores, always, for nothing of the size T·T is kept; and with `remat="all"`
every product of every layer (LayerNorm's gradient needs the sums, and so the last product too).
"""

from __future__ import annotations

from ctx_jax.flops.parts import (
    ACTIVATION_FLOPS,
    PARAMETER_BYTES,
    Cost,
    Part,
    affine,
    elementwise,
    layer_norm,
    merge,
    softmax,
    table,
    times,
)
from ctx_jax.models.bert import BertConfig
from ctx_jax.nn.attention import is_blocked

BYTES = {"float32": 4, "bfloat16": 2}
"""Of a value, by the type of the computation."""


def bert_cost(
    config: BertConfig,
    *,
    rows: int,
    length: int,
    predictions: int = 0,
    examples: int = 0,
    next_sentence: bool = False,
    masked_lm: bool = False,
) -> Cost:
    """A forward pass by part.

    Args:
      config: sizes.
      rows: B.
      length: T.
      predictions: P of a row, slots of the masked-LM head.
      examples: S of a row, `[CLS]` vectors that are pooled.
      next_sentence: with the classifier on the pooled vectors.
      masked_lm: with the masked-LM head, even where it predicts nothing: its parameters are there.
    """
    size = BYTES[config.dtype]
    vectors, width, layers = rows * length, config.hidden_size, config.num_layers
    keys, queries = _scored(config, length)
    pairs = rows * queries * keys
    product = 2 * pairs * width  # of scores, or of context
    again = 3 * product if config.remat == "all" else product
    per_layer = [
        merge(
            "attention projections",
            [
                affine(vectors, width, 3 * width, size=size),
                elementwise(3 * vectors * width),  # the scores' factor
                affine(vectors, width, width, size=size),
            ],
            again=config.remat == "all",
        ),
        merge(
            "attention scores",
            [
                Part("", 2 * product, bytes_moved=4 * size * vectors * width, again_flops=again),
                elementwise(pairs * config.num_heads),  # the mask
            ],
        ),
        softmax(rows * queries * config.num_heads, keys),
        merge("feed-forward", _feed_forward(config, vectors, size), again=config.remat == "all"),
        merge("norms and residuals", [times(layer_norm(vectors, width), 2), elementwise(2 * vectors * width)]),
    ]
    if config.shared_layers:
        stacked = [times(part, layers)._replace(parameters=part.parameters) for part in per_layer]
    else:
        stacked = [times(part, layers) for part in per_layer]
    parts = [merge("embeddings", _embeddings(config, vectors, size)), *stacked]
    if config.pooler:
        pooled = rows * examples
        parts.append(merge("pooler", [affine(pooled, width, width, size=size), elementwise(pooled * width)]))
    if masked_lm:
        parts.append(merge("masked-LM head", _masked_lm(config, rows * predictions, size)))
    if next_sentence:
        parts.append(merge("next sentence", [affine(rows * examples, width, 2, size=size)]))
    return Cost(rows, length, tuple(parts))


def _embeddings(config: BertConfig, vectors: int, size: int) -> list[Part]:
    width, counts = config.embedding_width, [config.vocab_size, config.max_position_embeddings]
    if config.type_vocab_size:
        counts.append(config.type_vocab_size)
    parts = [table(vectors, count, width) for count in counts]
    parts += [elementwise((len(counts) - 1) * vectors * width), layer_norm(vectors, width)]
    if config.embedding_size:
        parts.append(affine(vectors, width, config.hidden_size, size=size))
    return parts


def _scored(config: BertConfig, length: int) -> tuple[int, int]:
    """(keys a query is scored with, queries of a row): local attention fills the last block up."""
    window = config.attention_window
    if not is_blocked(length, window):
        return length, length
    return 3 * window, -(-length // window) * window


def _feed_forward(config: BertConfig, vectors: int, size: int) -> list[Part]:
    width, inner = config.hidden_size, config.intermediate_size
    gate = [elementwise(vectors * inner)] if config.gated else []
    return [
        affine(vectors, width, (1 + config.gated) * inner, size=size),
        elementwise(vectors * inner, ACTIVATION_FLOPS[config.activation]),
        *gate,
        affine(vectors, inner, width, size=size),
    ]


def _masked_lm(config: BertConfig, predictions: int, size: int) -> list[Part]:
    """Dense, activation, LayerNorm, and the product with the token table, which belongs to the embeddings if tied."""
    width, vocabulary = config.embedding_width, config.vocab_size
    logits_bytes, table_bytes = 4 * predictions * vocabulary, PARAMETER_BYTES * vocabulary * width
    return [
        affine(predictions, config.hidden_size, width, size=size),
        elementwise(predictions * width, ACTIVATION_FLOPS[config.activation]),
        layer_norm(predictions, width),
        Part(
            "logits",
            matrix_flops=2 * predictions * width * vocabulary,
            other_flops=predictions * vocabulary,
            parameters=vocabulary + (0 if config.tied_head else vocabulary * width),
            bytes_moved=size * predictions * width + logits_bytes + table_bytes,
        ),
    ]
