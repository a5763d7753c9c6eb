"""Two affine maps with an activation between (Vaswani et al. 2017, equation 2), gated or not (Shazeer 2020)."""

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
    "tanh": jax.nn.tanh,
}
"""By name. `gelu` is x Φ(x) exactly, `gelu_tanh` the approximation of Hendrycks and Gimpel (2016) with tanh."""


class FeedForward(nnx.Module):
    """y = activation(x W₁ + b₁) W₂ + b₂; gated, y = (activation(x W₁ + b₁) · (x V + c)) W₂ + b₂.

    Attributes:
      up: Linear D → F, or None when gated.
      gated_up: Linear D → [2, F], W₁ and V in one product; or None.
      down: Linear F → D.
    """

    def __init__(
        self, width: int, intermediate: int, *, activation: str, stddev: float, rngs: nnx.Rngs, gated: bool = False
    ):
        self.activation = activation
        self.up = None if gated else Linear(width, intermediate, stddev=stddev, rngs=rngs)
        self.gated_up = Linear(width, (2, intermediate), stddev=stddev, rngs=rngs) if gated else None
        self.down = Linear(intermediate, width, stddev=stddev, rngs=rngs)

    @jax.named_scope("feed-forward")
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Applies both maps to the last axis."""
        activation = jax.named_scope("activation")(ACTIVATIONS[self.activation])
        if self.gated_up is None:
            return self.down(activation(self.up(x)))
        both = self.gated_up(x)
        return self.down(activation(both[..., 0, :]) * both[..., 1, :])
