"""Probes that label a span or a pair of spans: linear (Liu et al. 2019), and with a hidden layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ctx_jax.nn.parameters import Params

Spans = tuple[Array, ...]
"""Vectors of the first spans [B, D], and of the second where there are any."""


def pair_vector(spans: Spans) -> Float[Array, "B F"]:
    """One span's vector, or [a; b; a ⊙ b] of two (Liu et al. 2019, appendix B)."""
    if len(spans) == 1:
        return spans[0]
    first, second = spans
    return jnp.concatenate([first, second, first * second], axis=-1)


def cross_entropy(logits: Float[Array, "B K"], labels: Int[Array, "B"]) -> Float[Array, "B"]:
    """In nats."""
    # Not looked up: the gradient would be a scatter, which a processor does an element at a time.
    at = (logits * jax.nn.one_hot(labels, logits.shape[-1])).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - at


@dataclass(frozen=True)
class Linear:
    """A softmax of one product.

    Attributes:
      width: D.
      classes: K.
      spans: 1 or 2.
    """

    width: int
    classes: int
    spans: int = 1

    @property
    def inputs(self) -> int:
        """F."""
        return self.width if self.spans == 1 else 3 * self.width

    def init(self, key: Key[Array, ""]) -> Params:
        """Small random weights."""
        # Outputs first: a processor multiplies by the transpose twice as fast.
        kernel = jax.random.normal(key, (self.classes, self.inputs)) * 0.01
        return {"kernel": kernel, "bias": jnp.zeros(self.classes)}

    def logits(self, params: Params, spans: Spans) -> Float[Array, "B K"]:
        """Of each class."""
        return pair_vector(spans) @ params["kernel"].T + params["bias"][None]

    def losses(self, params: Params, features: Spans, targets: Int[Array, "B"]) -> Float[Array, "B"]:
        """Cross-entropy, in nats."""
        return cross_entropy(self.logits(params, features), targets)

    def predict(self, params: Params, features: Spans) -> Int[Array, "B"]:
        """The likeliest class."""
        return self.logits(params, features).argmax(-1)


@dataclass(frozen=True)
class MLP(Linear):
    """One hidden layer with ReLU (Hewitt and Liang 2019, section 4.1: MLP-1).

    Attributes:
      hidden: its width.
    """

    hidden: int = 128

    def init(self, key: Key[Array, ""]) -> Params:
        """He's for what ReLU follows."""
        first, second = jax.random.split(key)
        return {
            "hidden": jax.random.normal(first, (self.hidden, self.inputs)) * math.sqrt(2 / self.inputs),
            "hidden_bias": jnp.zeros(self.hidden),
            "kernel": jax.random.normal(second, (self.classes, self.hidden)) * math.sqrt(1 / self.hidden),
            "bias": jnp.zeros(self.classes),
        }

    def logits(self, params: Params, spans: Spans) -> Float[Array, "B K"]:
        """Of each class."""
        hidden = jax.nn.relu(pair_vector(spans) @ params["hidden"].T + params["hidden_bias"][None])
        return hidden @ params["kernel"].T + params["bias"][None]
