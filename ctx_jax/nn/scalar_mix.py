"""Layers mixed by learnt weights (Peters et al. 2018, equation 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from ctx_jax.errors import InputError


class ScalarMix(nnx.Module):
    """γ Σ softmax(s)ₗ hₗ. Several mixes on one encoder are several of these.

    Attributes:
      weights: s, float32 [L].
      gamma: γ, float32 [].
    """

    def __init__(self, num_layers: int, *, layer_norm: bool = False, dropout_rate: float = 0.0):
        """A mix that begins as the mean.

        Args:
          num_layers: L, layer 0 counted.
          layer_norm: normalise each layer first, by one mean and one variance over all tokens and values of the batch
            (bilm-tf, elmo.py, `do_layer_norm`).
          dropout_rate: in training, the probability with which a layer is left out of a mix.
        """
        self.weights = nnx.Param(jnp.zeros(num_layers))
        self.gamma = nnx.Param(jnp.ones(()))
        self.layer_norm = layer_norm
        self.dropout_rate = dropout_rate

    @jax.named_scope("mix")
    def __call__(
        self,
        layers: Float[Array, "L B T D"],
        mask: Bool[Array, "B T"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Mixes.

        Args:
          layers: of an encoder, in any type; the sum is float32.
          mask: True at tokens; `layer_norm` needs it, and nothing else looks at it.
          key: switches layer dropout on. With all layers dropped the softmax is even, as with none.
        """
        layers = layers.astype(jnp.float32)
        if self.layer_norm:
            if mask is None:
                raise InputError(
                    "mask: found None, expected the tokens' mask: layer_norm takes their mean and variance"
                )
            layers = _normalised(layers, mask)
        weights = self.weights[...]
        if key is not None and self.dropout_rate:
            dropped = jax.random.bernoulli(key, self.dropout_rate, weights.shape)
            weights = jnp.where(dropped, -1e20, weights)
        # Not an einsum: matrix units would round its float32 operands.
        return self.gamma[...] * (jax.nn.softmax(weights).reshape(-1, 1, 1, 1) * layers).sum(0)

    def penalty(self, coefficient: float) -> Float[Array, ""]:
        """A pull of coefficient · ‖s‖², towards the mean (bilm-tf, elmo.py, `l2_coef`)."""
        return coefficient * jnp.square(self.weights[...]).sum()


def _normalised(layers: Float[Array, "L B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "L B T D"]:
    """(h - mean) / √(variance + 1e-12), both over every value at a token."""
    inside = mask[None, :, :, None].astype(jnp.float32)
    count = inside.sum() * layers.shape[-1]
    mean = (layers * inside).sum((1, 2, 3), keepdims=True) / count
    variance = jnp.square((layers - mean) * inside).sum((1, 2, 3), keepdims=True) / count
    return (layers - mean) * jax.lax.rsqrt(variance + 1e-12)
