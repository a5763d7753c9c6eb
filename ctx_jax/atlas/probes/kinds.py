"""Probes that label a span or a pair of spans: linear (Liu et al. 2019), MLP, and edge probes (Tenney et al. 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ctx_jax.nn.parameters import Params

Spans = tuple[Array, ...]
"""Vectors of the first spans, and of the second where there are any: [B, D]; for an edge probe of words, [B, W, D]."""


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


@dataclass(frozen=True)
class Edge(Linear):
    """The edge probe of Tenney et al. (2019, section 3.1): a projection of each word, attention over the words of a
    span, a hidden layer, and a sigmoid for each label.

    As jiant's `EdgeClassifierModule` has it (a projection and an attention for each of two spans, tanh and layer
    normalisation in the classifier), but without dropout: epochs are chosen on held-out examples. The projection is
    linear, so the mean over the span is taken before it, where a word costs D products and not 256 · D.

    Attributes:
      projected: width of a span's vector.
      hidden: of the classifier.
    """

    projected: int = 256
    hidden: int = 256

    def init(self, key: Key[Array, ""]) -> Params:
        """Variance of 1 for what is linear, attention that begins as the mean."""
        keys = jax.random.split(key, 3)
        inputs = self.spans * self.projected
        scaled = lambda key, *shape: jax.random.normal(key, shape) / math.sqrt(shape[-1])
        return {
            "attention": jnp.zeros((self.spans, self.projected)),
            "projection": scaled(keys[0], self.spans, self.projected, self.width),
            "projection_bias": jnp.zeros((self.spans, self.projected)),
            "hidden": scaled(keys[1], self.hidden, inputs),
            "hidden_bias": jnp.zeros(self.hidden),
            "norm": jnp.ones(self.hidden),
            "norm_bias": jnp.zeros(self.hidden),
            "kernel": scaled(keys[2], self.classes, self.hidden) * 0.1,
            "bias": jnp.zeros(self.classes),
        }

    def logits(self, params: Params, spans: Spans) -> Float[Array, "B K"]:
        """Of each class."""
        pooled = []
        for number, words in enumerate(spans):
            projection, bias = params["projection"][number], params["projection_bias"][number]
            mean = attend(words, params["attention"][number] @ projection)
            pooled.append(mean @ projection.T + bias[None])
        hidden = jnp.tanh(jnp.concatenate(pooled, -1) @ params["hidden"].T + params["hidden_bias"][None])
        centred = hidden - hidden.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        normed = normed * params["norm"][None] + params["norm_bias"][None]
        return normed @ params["kernel"].T + params["bias"][None]

    def losses(self, params: Params, features: Spans, targets: Int[Array, "B"]) -> Float[Array, "B"]:
        """Binary cross-entropies of all labels, in nats."""
        logits = self.logits(params, features)
        right = jax.nn.one_hot(targets, self.classes)
        return (jax.nn.softplus(logits) - logits * right).sum(-1)

    def predict(self, params: Params, features: Spans) -> Bool[Array, "B K"]:
        """Which labels are likelier than not."""
        return self.logits(params, features) > 0


def attend(words: Float[Array, "B W D"], query: Float[Array, "D"]) -> Float[Array, "B D"]:
    """Σ softmax(words · query) words over each span; words that are zero throughout are none."""
    present = (words != 0).any(-1)
    scores = jnp.where(present, jnp.einsum("bwd,d->bw", words, query), -jnp.inf)
    # Of a span without words, padding, the softmax would be 0 / 0.
    scores = jnp.where(present.any(-1, keepdims=True), scores, 0.0)
    return jnp.einsum("bw,bwd->bd", jax.nn.softmax(scores, axis=-1), words)
