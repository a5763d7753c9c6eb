"""What stands on an encoder: pooler, masked-LM head, next-sentence classifier."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ctx_jax.nn.feed_forward import ACTIVATIONS
from ctx_jax.nn.linear import Linear, matmul
from ctx_jax.nn.norm import LayerNorm


class Pooler(nnx.Module):
    """tanh(W h + b) of the vector at `[CLS]` (google-research/bert modeling.py, "pooler")."""

    def __init__(self, width: int, *, stddev: float, rngs: nnx.Rngs):
        self.dense = Linear(width, width, stddev=stddev, rngs=rngs)

    def __call__(self, cls: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Pools vectors that were already taken at `[CLS]`."""
        return jnp.tanh(self.dense(cls))


class MaskedLMHead(nnx.Module):
    """Dense, activation, LayerNorm, product with the tied token table (run_pretraining.py, get_masked_lm_output)."""

    def __init__(self, width: int, vocab_size: int, *, activation: str, eps: float, stddev: float, rngs: nnx.Rngs):
        self.activation = activation
        self.dense = Linear(width, width, stddev=stddev, rngs=rngs)
        self.norm = LayerNorm(width, eps=eps)
        self.bias = nnx.Param(jnp.zeros(vocab_size))

    def __call__(self, vectors: Float[Array, "N D"], table: Float[Array, "V D"]) -> Float[Array, "N V"]:
        """Logits in float32 of the vectors given: take the predicted positions first, not the whole row."""
        hidden = self.norm(ACTIVATIONS[self.activation](self.dense(vectors)))
        return matmul(hidden, table.T) + self.bias[...].reshape(1, -1)
