"""BERT (Devlin et al. 2019), post-LayerNorm transformer encoder, as google-research/bert's modeling.py computes it.

Its kin are the same encoder with other choices: RoBERTa (Liu et al. 2019), ELECTRA (Clark et al. 2020), DistilBERT
(Sanh et al. 2019), ALBERT (Lan et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ctx_jax.arrays import Representations
from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.models.heads import Classifier, MaskedLMHead, Pooler
from ctx_jax.nn.attention import Mask, SelfAttention, attention_mask
from ctx_jax.nn.dropout import dropout, fold
from ctx_jax.nn.embedding import Embedding
from ctx_jax.nn.feed_forward import ACTIVATIONS, FeedForward
from ctx_jax.nn.linear import Linear
from ctx_jax.nn.norm import LayerNorm
from ctx_jax.nn.stack import Remat, build_layers, run_layers

HEADS = (
    "masked_lm",
    "next_sentence",
    "replaced_token",
    "token_classifier",
    "sequence_classifier",
    "span_classifier",
)
"""What may stand on the encoder, see `BertWithHeads`."""


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
    """Rows of the position table."""
    position_offset: int = 0
    """The row of the first position; RoBERTa has 2 rows before it."""
    type_vocab_size: int = 2
    """Token types: A and B; 0 is an encoder without (DistilBERT)."""
    embedding_size: int | None = None
    """E, the width of the embeddings, where a projection to D follows (ELECTRA, ALBERT); None is D."""
    shared_layers: bool = False
    """The L layers have the parameters of one (ALBERT)."""
    activation: str = "gelu"
    """`gelu` (exact), `gelu_tanh`, `relu`, `silu` or `tanh`."""
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
    heads: tuple[str, ...] | None = None
    """Names of HEADS; None is what BERT is pre-trained with: masked_lm and, where there is a pooler, next_sentence."""
    tied_head: bool = True
    """The masked-LM head's table is that of the tokens."""
    labels: tuple[str, ...] = ()
    """Names of the labels of token_classifier and sequence_classifier."""
    classifier_activation: str | None = None
    """Of a dense layer inside sequence_classifier; None is a classifier without one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters stay float32."""
    remat: Remat = "none"
    """What the backward pass computes again: `none`, all but the matrix products (`dots`), or `all`."""
    unroll: bool = False
    """Write the layers out instead of scanning over them."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size"), 1)
        least |= {"type_vocab_size": 0, "position_offset": 0, "max_position_embeddings": self.position_offset + 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"BertConfig.{name} is {getattr(self, name)}, expected at least {bound}")
        if self.embedding_size is not None and self.embedding_size < 1:
            raise InputError(f"BertConfig.embedding_size is {self.embedding_size}, expected at least 1, or None")
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"BertConfig.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        for name, none in (("activation", ()), ("classifier_activation", (None,))):
            found = getattr(self, name)
            if found not in (*ACTIVATIONS, *none):
                raise InputError(
                    f"BertConfig.{name} is {found!r}, expected one of {', '.join(ACTIVATIONS)}"
                    + did_you_mean(str(found), ACTIVATIONS)
                )
        if self.attention_window is not None and self.attention_window < 1:
            raise InputError(f"BertConfig.attention_window is {self.attention_window}, expected at least 1, or None")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"BertConfig.{name} is {getattr(self, name)}, expected at least 0 and below 1")
        self._check_heads()

    def _check_heads(self) -> None:
        # JSON has lists.
        object.__setattr__(self, "labels", tuple(self.labels))
        if self.heads is not None:
            object.__setattr__(self, "heads", tuple(self.heads))
        for name in self.all_heads:
            if name not in HEADS:
                near = did_you_mean(name, HEADS)
                raise InputError(f"BertConfig.heads: found {name!r}, expected some of {', '.join(HEADS)}{near}")
            if name == "next_sentence" and not self.pooler:
                raise InputError("BertConfig.heads: found next_sentence and no pooler, which it reads")
            if name in ("token_classifier", "sequence_classifier") and not self.labels:
                raise InputError(f"BertConfig.heads: found {name} and no labels, expected their names")

    @property
    def all_heads(self) -> tuple[str, ...]:
        """The heads, those of pre-training where none are named."""
        if self.heads is not None:
            return self.heads
        return ("masked_lm", "next_sentence") if self.pooler else ("masked_lm",)

    @property
    def embedding_width(self) -> int:
        """E."""
        return self.embedding_size or self.hidden_size

    @property
    def max_length(self) -> int:
        """Tokens of the longest row, special ones counted."""
        return self.max_position_embeddings - self.position_offset


class BertEmbeddings(nnx.Module):
    """LayerNorm(token + position + type): the tables learnt, all of width E."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width = config.embedding_width
        make = lambda count: Embedding(count, width, stddev=config.initializer_range, rngs=rngs)
        self.offset = config.position_offset
        self.token = make(config.vocab_size)
        self.position = make(config.max_position_embeddings)
        self.type = make(config.type_vocab_size) if config.type_vocab_size else None
        self.norm = LayerNorm(width, eps=config.layer_norm_eps)

    @jax.named_scope("input")
    def __call__(
        self, input_ids: Int[Array, "B T"], token_type_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T E"]:
        """Sums the vectors of each token and normalises, in float32."""
        x = self.token(input_ids) + self.position(positions + self.offset if self.offset else positions)
        return self.norm(x if self.type is None else x + self.type(token_type_ids))


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
        self, x: Float[Array, "B T D"], mask: Mask, keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B T D"]:
        """One layer; `keys` are the rows' dropout keys, None outside training."""
        attended = self.attention(x, mask, fold(keys, 0))
        x = self.attention_norm.after(x, attended, self.dropout_rate, fold(keys, 1))
        fed = self.feed_forward(x)
        return self.feed_forward_norm.after(x, fed, self.dropout_rate, fold(keys, 2))


class Bert(nnx.Module):
    """The encoder: embeddings, L layers and, when configured, the pooler.

    Attributes:
      embeddings: BertEmbeddings.
      embedding_projection: Linear E → D, or None where they are the same.
      layers: BertLayer with a leading layer axis, of length 1 where layers are shared.
      pooler: Pooler, or None.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width, stddev = config.hidden_size, config.initializer_range
        self.config = config
        self.embeddings = BertEmbeddings(config, rngs=rngs)
        self.embedding_projection = (
            Linear(config.embedding_size, width, stddev=stddev, rngs=rngs) if config.embedding_size else None
        )
        stored = 1 if config.shared_layers else config.num_layers
        self.layers = build_layers(lambda rngs: BertLayer(config, rngs=rngs), stored, rngs)
        self.pooler = Pooler(width, stddev=stddev, rngs=rngs) if config.pooler else None

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
          all_layers: fill `Representations.layers`: 0 is what enters the first layer, l the output of layer l.

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
        if self.embedding_projection is not None:
            x = self.embedding_projection(x)
        mask = attention_mask(segment_ids, config.attention_window)
        last, layers = run_layers(
            self.layers,
            lambda layer, x, index: layer(x, mask.of_layer(index), fold(dropout_keys, index)),
            x,
            count=config.num_layers,
            all_layers=all_layers,
            remat=config.remat,
            unroll=config.unroll,
        )
        return Representations(last, layers, segment_ids > 0)


class BertWithHeads(nnx.Module):
    """BERT with the heads that its configuration names; by default those of pre-training. The others are None.

    Attributes:
      encoder: Bert.
      masked_lm: MaskedLMHead; its output table is the encoder's token table, or its own.
      next_sentence: Linear D → 2 on the pooled `[CLS]`: 0 is next, 1 is random (the original's labels).
      replaced_token: Classifier of one label: was the token replaced (ELECTRA's discriminator)?
      token_classifier: Classifier of each token.
      sequence_classifier: Classifier of the pooled `[CLS]`, or of the `[CLS]` where there is no pooler.
      span_classifier: Classifier of two labels: does the answer begin, does it end here?
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width, stddev = config.hidden_size, config.initializer_range
        self.encoder = Bert(config, rngs=rngs)
        make = {
            "masked_lm": lambda: MaskedLMHead(
                width,
                config.vocab_size,
                config.embedding_width,
                activation=config.activation,
                eps=config.layer_norm_eps,
                tied=config.tied_head,
                stddev=stddev,
                rngs=rngs,
            ),
            "next_sentence": lambda: Linear(width, 2, stddev=stddev, rngs=rngs),
            "replaced_token": lambda: classifier(1, config.activation),
            "token_classifier": lambda: classifier(len(config.labels)),
            "sequence_classifier": lambda: classifier(len(config.labels), config.classifier_activation),
            "span_classifier": lambda: classifier(2),
        }
        classifier = lambda labels, activation=None: Classifier(
            width, labels, activation=activation, stddev=stddev, rngs=rngs
        )
        for name in HEADS:
            setattr(self, name, make[name]() if name in config.all_heads else None)

    def masked_lm_logits(self, vectors: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """float32 logits over the vocabulary for vectors taken at the predicted positions."""
        return self.masked_lm(vectors, self.encoder.embeddings.token.table[...])

    @jax.named_scope("head")
    def next_sentence_logits(self, cls: Float[Array, "N D"]) -> Float[Array, "N 2"]:
        """float32 logits of (next, random) for vectors taken at `[CLS]`."""
        return self.next_sentence(self.pooled(cls)).astype(jnp.float32)

    def pooled(self, cls: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """What a classifier of whole texts reads of vectors taken at `[CLS]`."""
        return cls if self.encoder.pooler is None else self.encoder.pooler(cls)

    def logits(self, head: str, last: Float[Array, "B T D"]) -> Float[Array, "B ..."]:
        """float32 logits of a head for the last layer of rows with one text each.

        Returns:
          [B, T, V] of masked_lm, [B, 2] of next_sentence, [B, T] of replaced_token, [B, T, labels] of token_classifier,
          [B, labels] of sequence_classifier, [B, T, 2] of span_classifier.
        """
        rows = last.reshape(-1, last.shape[-1])
        if head == "masked_lm":
            return self.masked_lm_logits(rows).reshape(*last.shape[:-1], self.encoder.config.vocab_size)
        if head == "next_sentence":
            return self.next_sentence_logits(last[:, 0])
        if head == "sequence_classifier":
            return self.sequence_classifier(self.pooled(last[:, 0]))
        found = getattr(self, head)(last)
        return found[..., 0] if head == "replaced_token" else found
