"""BERT (Devlin et al. 2019), post-LayerNorm transformer encoder, as google-research/bert's modeling.py computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ctx_jax.arrays import Representations
from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.models.heads import MaskedLMHead, Pooler
from ctx_jax.nn.attention import SelfAttention, attention_mask
from ctx_jax.nn.dropout import dropout, fold
from ctx_jax.nn.embedding import Embedding
from ctx_jax.nn.feed_forward import ACTIVATIONS, FeedForward
from ctx_jax.nn.linear import Linear
from ctx_jax.nn.norm import LayerNorm
from ctx_jax.nn.stack import Remat, build_layers, run_layers


@dataclass(frozen=True)
class BertConfig:
    """Sizes and choices of a BERT, by the names of Hugging Face's config.json; the defaults are BERT-base, uncased."""

    vocab_size: int = 30522
    """V, special tokens included."""
    hidden_size: int = 768
    """D, the width."""
    num_layers: int = 12
    """L."""
    num_heads: int = 12
    """H; divides the width."""
    intermediate_size: int = 3072
    """Width inside the feed-forward."""
    max_position_embeddings: int = 512
    """The longest row."""
    type_vocab_size: int = 2
    """Token types: A and B."""
    activation: str = "gelu"
    """`gelu` (exact), `gelu_tanh`, `relu` or `silu`."""
    gated: bool = False
    """Feed-forward with a gate (Shazeer 2020): three matrices instead of two."""
    attention_window: int | None = None
    """How far away a token sees; None is the whole example. Not BERT's, but a way to save FLOPs on long rows."""
    hidden_dropout: float = 0.1
    """Of the embeddings and of what attention and feed-forward add."""
    attention_dropout: float = 0.1
    """Of the attention weights."""
    layer_norm_eps: float = 1e-12
    """Added to the variance."""
    initializer_range: float = 0.02
    """Standard deviation of the weights at the start, before they are cut at two of it."""
    pooler: bool = True
    """Dense and tanh over `[CLS]`, which next-sentence prediction reads."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters stay float32."""
    remat: Remat = "none"
    """What the backward pass computes again: `none`, all but the matrix products (`dots`), or `all`."""
    unroll: bool = False
    """Write the layers out instead of scanning over them."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise InputError(f"BertConfig.{name} is {getattr(self, name)}, expected at least 1")
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"BertConfig.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"BertConfig.activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}"
                + did_you_mean(self.activation, ACTIVATIONS)
            )
        if self.attention_window is not None and self.attention_window < 1:
            raise InputError(f"BertConfig.attention_window is {self.attention_window}, expected at least 1, or None")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"BertConfig.{name} is {getattr(self, name)}, expected at least 0 and below 1")


class BertEmbeddings(nnx.Module):
    """LayerNorm(token + position + type): the three tables learnt, all of width D."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        make = lambda count: Embedding(count, config.hidden_size, stddev=config.initializer_range, rngs=rngs)
        self.token = make(config.vocab_size)
        self.position = make(config.max_position_embeddings)
        self.type = make(config.type_vocab_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(
        self, input_ids: Int[Array, "B T"], token_type_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Sums the three vectors of each token and normalises, in float32."""
        return self.norm(self.token(input_ids) + self.position(positions) + self.type(token_type_ids))


class BertLayer(nnx.Module):
    """x ← LayerNorm(x + attention(x)); x ← LayerNorm(x + feed_forward(x))."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width, stddev = config.hidden_size, config.initializer_range
        self.dropout_rate = config.hidden_dropout
        self.attention = SelfAttention(
            width, config.num_heads, dropout_rate=config.attention_dropout, stddev=stddev, rngs=rngs
        )
        self.attention_norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(
            width,
            config.intermediate_size,
            activation=config.activation,
            gated=config.gated,
            stddev=stddev,
            rngs=rngs,
        )
        self.feed_forward_norm = LayerNorm(width, eps=config.layer_norm_eps)

    def __call__(
        self, x: Float[Array, "B T D"], mask: Array, keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B T D"]:
        """One layer; `keys` are the rows' dropout keys, None outside training."""
        attended = self.attention(x, mask, fold(keys, 0))
        x = self.attention_norm(x + dropout(attended, self.dropout_rate, fold(keys, 1)))
        fed = self.feed_forward(x)
        return self.feed_forward_norm(x + dropout(fed, self.dropout_rate, fold(keys, 2)))


class Bert(nnx.Module):
    """The encoder: embeddings, L layers and, when configured, the pooler."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = BertEmbeddings(config, rngs=rngs)
        self.layers = build_layers(lambda rngs: BertLayer(config, rngs=rngs), config.num_layers, rngs)
        self.pooler = Pooler(config.hidden_size, stddev=config.initializer_range, rngs=rngs) if config.pooler else None

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        token_type_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        dropout_keys: Key[Array, "B"] | None = None,
        all_layers: bool = False,
    ) -> Representations:
        """Encodes rows.

        Args:
          input_ids: token ids.
          token_type_ids: 0 or 1; all 0 when None.
          segment_ids: the example of its row that a token belongs to, 0 at padding; all one example when None.
            An attention mask of zeros and ones is one: a row with a single example.
          positions: position within the example; 0 … T-1 when None.
          dropout_keys: a key for each row switches dropout on.
          all_layers: fill `Representations.layers`: 0 is the output of the embeddings' LayerNorm, l of layer l.

        Returns:
          `last` and `layers` in the computation's type.
        """
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        if segment_ids is None:
            segment_ids = jnp.ones_like(input_ids)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1])[None, :], input_ids.shape)
        config = self.config
        x = self.embeddings(input_ids, token_type_ids, positions).astype(config.dtype)
        x = dropout(x, config.hidden_dropout, fold(dropout_keys, config.num_layers))
        mask = attention_mask(segment_ids, config.attention_window)
        last, layers = run_layers(
            self.layers,
            lambda layer, x, index: layer(x, mask, fold(dropout_keys, index)),
            x,
            all_layers=all_layers,
            remat=config.remat,
            unroll=config.unroll,
        )
        return Representations(last, layers, segment_ids > 0)


class BertForPreTraining(nnx.Module):
    """BERT with its masked-LM head and, where the encoder has a pooler, the next-sentence classifier.

    Attributes:
      encoder: Bert.
      masked_lm: MaskedLMHead; its output table is the encoder's token table.
      next_sentence: Linear D → 2 on the pooled `[CLS]`: 0 is next, 1 is random (the original's labels); or None.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width, stddev = config.hidden_size, config.initializer_range
        self.encoder = Bert(config, rngs=rngs)
        self.masked_lm = MaskedLMHead(
            width,
            config.vocab_size,
            activation=config.activation,
            eps=config.layer_norm_eps,
            stddev=stddev,
            rngs=rngs,
        )
        self.next_sentence = Linear(width, 2, stddev=stddev, rngs=rngs) if config.pooler else None

    def masked_lm_logits(self, vectors: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """float32 logits over the vocabulary for vectors taken at the predicted positions."""
        return self.masked_lm(vectors, self.encoder.embeddings.token.table[...])

    def next_sentence_logits(self, cls: Float[Array, "N D"]) -> Float[Array, "N 2"]:
        """float32 logits of (next, random) for vectors taken at `[CLS]`. Needs `config.pooler`."""
        return self.next_sentence(self.encoder.pooler(cls)).astype(jnp.float32)
