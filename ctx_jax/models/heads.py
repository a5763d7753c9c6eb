"""What stands on an encoder: pooler, masked-LM head, a language model's output layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ctx_jax.nn.feed_forward import ACTIVATIONS
from ctx_jax.nn.linear import Linear, matmul, truncated_normal
from ctx_jax.nn.norm import LayerNorm


class Pooler(nnx.Module):
    """tanh(W h + b) of the vector at `[CLS]` (google-research/bert modeling.py, "pooler")."""

    def __init__(self, width: int, *, stddev: float, rngs: nnx.Rngs):
        self.dense = Linear(width, width, stddev=stddev, rngs=rngs)

    @jax.named_scope("pooling")
    def __call__(self, cls: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Pools vectors that were already taken at `[CLS]`."""
        return jnp.tanh(self.dense(cls))


class MaskedLMHead(nnx.Module):
    """Dense, activation, LayerNorm, product with the token table (run_pretraining.py, get_masked_lm_output).

    Attributes:
      dense: Linear D → E.
      norm: LayerNorm.
      table: float32 [V, E], or None where the head is tied to the token table.
      bias: float32 [V].
    """

    def __init__(
        self,
        width: int,
        vocab_size: int,
        embedding_width: int,
        *,
        activation: str,
        eps: float,
        tied: bool,
        stddev: float,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.dense = Linear(width, embedding_width, stddev=stddev, rngs=rngs)
        self.norm = LayerNorm(embedding_width, eps=eps)
        self.table = None if tied else nnx.Param(truncated_normal(rngs, (vocab_size, embedding_width), stddev))
        self.bias = nnx.Param(jnp.zeros(vocab_size))

    @jax.named_scope("head")
    def __call__(self, vectors: Float[Array, "N D"], token_table: Float[Array, "V E"]) -> Float[Array, "N V"]:
        """Logits in float32 of the vectors given: take the predicted positions first, not the whole row."""
        hidden = self.norm(ACTIVATIONS[self.activation](self.dense(vectors)))
        table = token_table if self.table is None else self.table[...]
        return matmul(hidden, table.T) + self.bias[...].reshape(1, -1)


class Classifier(nnx.Module):
    """Logits of labels: a linear map, after a dense layer where its activation is named.

    Attributes:
      dense: Linear D → D, or None.
      out: Linear D → labels.
    """

    def __init__(self, width: int, labels: int, *, activation: str | None, stddev: float, rngs: nnx.Rngs):
        self.activation = activation
        self.dense = Linear(width, width, stddev=stddev, rngs=rngs) if activation else None
        self.out = Linear(width, labels, stddev=stddev, rngs=rngs)

    @jax.named_scope("head")
    def __call__(self, vectors: Float[Array, "*batch D"]) -> Float[Array, "*batch labels"]:
        """float32 logits."""
        if self.dense is not None:
            vectors = ACTIVATIONS[self.activation](self.dense(vectors))
        return self.out(vectors).astype(jnp.float32)


class OutputTable(nnx.Module):
    """An output vector and a bias for each word of a language model's vocabulary (bilm-tf, model.py, "softmax").

    Attributes:
      table: float32 [V, P].
      bias: float32 [V].
    """

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(truncated_normal(rngs, (vocab_size, width), width**-0.5))
        self.bias = nnx.Param(jnp.zeros(vocab_size))
