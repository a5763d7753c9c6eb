"""Two affine maps with an activation between (Vaswani et al. 2017, equation 2), gated or not (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ctx_jax.kernels import hopper_gelu
from ctx_jax.nn.linear import Linear, affine


def _distribution(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Φ(x), the normal distribution's."""
    return 0.5 * (1.0 + jax.lax.erf(x * jnp.float32(0.5**0.5)))


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact x Φ(x) (Hendrycks and Gimpel 2016), computed in float32, in x's type.

    Written with erf as the originals have it: `jax.nn.gelu` takes erfc, which costs three times as much on the CPU, and
    rounds every step to x's type. The backward pass computes the derivative Φ(x) + x φ(x) from x, which is all that is
    kept; JAX would keep every step, in float32.
    """
    values = x.astype(jnp.float32)
    return (values * _distribution(values)).astype(x.dtype)


def _gelu_backward(x: Float[Array, "*shape"], cotangent: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"]]:
    with jax.named_scope("activation"):
        values = x.astype(jnp.float32)
        density = jnp.exp(-0.5 * jnp.square(values)) * jnp.float32((2 * jnp.pi) ** -0.5)
        slope = _distribution(values) + values * density
        return ((slope * cotangent.astype(jnp.float32)).astype(x.dtype),)


def _gelu_forward(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    # Else XLA carries x on in float32, as the product before it has it, and writes both.
    x = jax.lax.optimization_barrier(x)
    return gelu(x), x


gelu.defvjp(_gelu_forward, _gelu_backward)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jax.nn.tanh,
}
"""By name. `gelu_tanh` approximates `gelu` with tanh (Hendrycks and Gimpel 2016)."""


def _hopper_takes(x: Float[Array, "*batch K"], linear: Linear) -> bool:
    """Whether the program may be for a Hopper GPU, whose kernel makes the product and its GELU at once."""
    return x.ndim == 3 and not linear.turned and hopper_gelu.fits(x.shape, linear.bias[...].size, x.dtype)


@jax.custom_vjp
def _gelu_of_product(
    x: Float[Array, "B T K"], kernel: Float[Array, "K M"], bias: Float[Array, "M"]
) -> Float[Array, "B T M"]:
    """`gelu` of an affine map; not as one kernel where a gradient wants what the GELU is of."""
    return jax.lax.platform_dependent(x, kernel, bias, cuda=hopper_gelu.forward, default=_plainly)


def _plainly(x: Array, kernel: Array, bias: Array) -> Array:
    return gelu(affine(x, kernel, bias))


_gelu_of_product.defvjp(partial(jax.vjp, _plainly), lambda pull, cotangent: pull(cotangent))


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
            if self.activation == "gelu" and _hopper_takes(x, self.up):
                return self.down(_gelu_of_product(x, self.up.kernel[...], self.up.bias[...]))
            return self.down(activation(self.up(x)))
        both = self.gated_up(x)
        return self.down(activation(both[..., 0, :]) * both[..., 1, :])
