"""Two affine maps with an activation between (Vaswani et al. 2017, equation 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from ctx_jax.nn.linear import Linear

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""By name. `gelu` is x Φ(x) exactly, `gelu_tanh` the approximation of Hendrycks and Gimpel (2016) with tanh."""


class FeedForward(nnx.Module):
    """y = activation(x W₁ + b₁) W₂ + b₂."""

    def __init__(self, width: int, intermediate: int, *, activation: str, stddev: float, rngs: nnx.Rngs):
        self.activation = activation
        self.up = Linear(width, intermediate, stddev=stddev, rngs=rngs)
        self.down = Linear(intermediate, width, stddev=stddev, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Applies both maps to the last axis."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))
