"""Words from characters: convolutions, maximum over the word, highway, projection (Kim et al. 2016, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ctx_jax.nn.linear import Linear, matmul

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "tanh": jnp.tanh}


def _convolve(vectors: Float[Array, "N C E"], kernel: Float[Array, "W E F"]) -> Float[Array, "N S F"]:
    # As an image of height 1: of XLA's convolutions on the CPU this one takes 0.6 of the time of the plain one.
    dimensions = ("NHWC", "HWIO", "NHWC")
    convolved = jax.lax.conv_general_dilated(
        vectors[:, None], kernel[None], (1, 1), "VALID", dimension_numbers=dimensions
    )
    return convolved[:, 0]


@jax.custom_vjp
def _convolve_and_pool(vectors: Float[Array, "N C E"], kernel: Float[Array, "W E F"]) -> Float[Array, "N F"]:
    """Each filter's largest value over the places of a word.

    With a backward pass as two plain products over windows: XLA's own gradients of a convolution take five times as
    long on the CPU.
    """
    return _convolve(vectors, kernel).max(1)


def _pool_forward(vectors: Array, kernel: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    convolved = _convolve(vectors, kernel)
    largest = convolved.max(1)
    return largest, (vectors, kernel, convolved == largest[:, None])


def _pool_backward(residuals: tuple[Array, Array, Array], dy: Float[Array, "N F"]) -> tuple[Array, Array]:
    vectors, kernel, chosen = residuals
    rows, _, size = vectors.shape
    width, _, filters = kernel.shape
    places = vectors.shape[1] - width + 1
    # Of several equal places each has its share: paddings are alike.
    share = (dy.astype(jnp.float32) / chosen.sum(1, dtype=jnp.int32).astype(jnp.float32)).astype(dy.dtype)
    dconvolved = jnp.where(chosen, share[:, None], jnp.zeros((), dy.dtype)).reshape(rows * places, filters)
    windows = jnp.concatenate([vectors[:, w : w + places] for w in range(width)], axis=2)
    dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    dkernel = dot(windows.reshape(rows * places, -1), dconvolved, (((0,), (0,)), ((), ())))
    dwindows = dot(dconvolved, kernel.reshape(-1, filters), (((1,), (1,)), ((), ()))).reshape(rows, places, width, size)
    padded = [jnp.pad(dwindows[:, :, w], ((0, 0), (w, width - 1 - w), (0, 0))) for w in range(width)]
    return sum(padded[1:], padded[0]).astype(vectors.dtype), dkernel.reshape(kernel.shape).astype(kernel.dtype)


_convolve_and_pool.defvjp(_pool_forward, _pool_backward)


class CharCNN(nnx.Module):
    """A vector for each word, as bilm-tf computes it (bilm/model.py, _build_word_char_embeddings).

    Attributes:
      table: float32 [A - 1, E]; the character with the id 0, which absent words are made of, is the zero vector.
      kernels: a float32 [W, E, F] for each filter, W characters wide.
      biases: a float32 [F] for each filter.
      highway: Linear F → [2, F] a layer: transform and carry.
      projection: Linear F → P.
    """

    def __init__(
        self,
        *,
        num_characters: int,
        character_dim: int,
        filters: Sequence[tuple[int, int]],
        num_highway: int,
        projection_dim: int,
        activation: str,
        rngs: nnx.Rngs,
    ):
        uniform = lambda shape, limit: jax.random.uniform(rngs.params(), shape, minval=-limit, maxval=limit)
        self.activation = activation
        self.table = nnx.Param(uniform((num_characters - 1, character_dim), 1.0))
        # bilm-tf: uniform in ±0.05 for relu, normal of √(1 / (W · E)) for tanh.
        scale = {w: 0.05 if activation == "relu" else (1 / (w * character_dim)) ** 0.5 for w, _ in filters}
        normal = lambda shape, stddev: jax.random.normal(rngs.params(), shape) * stddev
        draw = uniform if activation == "relu" else normal
        self.kernels = nnx.List([nnx.Param(draw((w, character_dim, n), scale[w])) for w, n in filters])
        self.biases = nnx.List([nnx.Param(jnp.zeros(n)) for _, n in filters])
        width = sum(n for _, n in filters)
        stddev = width**-0.5
        self.highway = nnx.List([Linear(width, (2, width), stddev=stddev, rngs=rngs) for _ in range(num_highway)])
        for layer in self.highway:
            # The carry gate begins at σ(-2): mostly the transform's complement, x itself, passes.
            layer.bias[...] = jnp.stack([jnp.zeros(width), jnp.full(width, -2.0)])
        self.projection = Linear(width, projection_dim, stddev=stddev, rngs=rngs)

    def __call__(self, char_ids: Int[Array, "N C"], dtype: jnp.dtype = jnp.float32) -> Float[Array, "N P"]:
        """Vectors of words in the computation's type."""
        x = self.convolve(char_ids, dtype)
        for layer in self.highway:
            with jax.named_scope("highway"):
                both = matmul(x, layer.kernel[...].reshape(x.shape[1], -1)) + layer.bias[...].reshape(1, -1)
                transform, carry = jnp.split(both, 2, axis=1)
                # "carry" is the gate of the transform: y = g · relu(…) + (1 - g) · x.
                gate, own = jax.nn.sigmoid(carry), x.astype(jnp.float32)
                x = (gate * jax.nn.relu(transform) + (1.0 - gate) * own).astype(dtype)
        with jax.named_scope("projections"):
            return self.projection(x)

    @jax.named_scope("characters")
    def convolve(self, char_ids: Int[Array, "N C"], dtype: jnp.dtype = jnp.float32) -> Float[Array, "N F"]:
        """Each filter's largest value over the word, then the activation. Padding is convolved like any character."""
        table = jnp.concatenate([jnp.zeros((1, self.table.shape[1])), self.table[...]]).astype(dtype)
        # An id outside the table gives NaN, so that it cannot pass unseen.
        vectors = table.at[char_ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        found = []
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            largest = _convolve_and_pool(vectors, kernel[...].astype(dtype))
            # The bias is the same everywhere: adding it after the maximum gives the same, for less.
            found.append(largest.astype(jnp.float32) + bias[...].reshape(1, -1))
        return ACTIVATIONS[self.activation](jnp.concatenate(found, axis=1)).astype(dtype)
