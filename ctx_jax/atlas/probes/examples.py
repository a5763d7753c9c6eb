"""What probes learn from: examples in pieces, and how their vectors are shifted and scaled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_CACHED_ROWS = 128


class Examples(NamedTuple):
    """Some of a task's examples.

    Attributes:
      features: tree of arrays [L, P, …]: a layer lies together, as its probes read it.
      targets: tree of arrays [P, …].
      weights: 1, or 0 at places that nothing fills.
    """

    features: Any
    targets: Any
    weights: Float[Array, "P"]


class Source(Protocol):
    """Where examples come from, in pieces of few shapes, so that few programs serve them all."""

    def __len__(self) -> int:
        """Examples, what fills the last piece up not counted."""

    def counts(self) -> list[int]:
        """Examples of each piece."""

    def pieces(self, rng: np.random.Generator | None = None) -> Iterator[Examples]:
        """All examples; with `rng` in pieces that are drawn anew."""


class Pieces:
    """A source's pieces. One that is a single one is read once: its steps have an order of their own."""

    def __init__(self, source: Source):
        self.counts = source.counts
        self._source = source
        self._single = next(iter(source.pieces())) if len(source.counts()) == 1 else None

    def __len__(self) -> int:
        return len(self._source)

    def place(self) -> None:
        """The single one is on the device from now on; else it is NumPy's, of which some layers are no copy."""
        self._single = jax.device_put(self._single)

    def pieces(self, rng: np.random.Generator | None = None) -> Iterator[Examples]:
        """As the source's."""
        return self._source.pieces(rng) if self._single is None else iter([self._single])


def standardisation(source: Source) -> tuple[Any, Any]:
    """Mean and one over the deviation of each layer's features, over all examples: leaves [L, …, D].

    Of features with more axes between the layer's and the last all but the last are taken together, and what is zero
    throughout, padding, is left out.
    """
    sums: Any = None
    for piece in source.pieces():
        found = jax.tree.map(_moments, piece.features)
        sums = found if sums is None else jax.tree.map(lambda a, b: a + b, sums, found)

    def mean(leaf: np.ndarray) -> np.ndarray:
        return leaf[:, 1 : (leaf.shape[1] + 1) // 2] / np.maximum(leaf[:, :1], 1)

    def scale(leaf: np.ndarray) -> Array:
        squares = leaf[:, (leaf.shape[1] + 1) // 2 :] / np.maximum(leaf[:, :1], 1)
        deviation = np.sqrt(np.maximum(squares - mean(leaf) ** 2, 0))
        # A dimension that says nothing stays so.
        used = deviation > 1e-6 * np.sqrt(squares.max(initial=0))
        return jnp.asarray(np.where(used, 1 / np.where(used, deviation, 1), 0), jnp.float32)

    return jax.tree.map(lambda leaf: jnp.asarray(mean(leaf), jnp.float32), sums), jax.tree.map(scale, sums)


def _moments(leaf: np.ndarray) -> np.ndarray:
    """[L, 1 + 2D]: count, sum, sum of squares, in float64."""
    width = leaf.shape[-1]
    result = np.zeros((len(leaf), 1 + 2 * width))

    def of_layer(layer: np.ndarray, row: np.ndarray) -> None:
        present, sums, squares = np.split(row, (1, 1 + width))
        rows = layer.reshape(-1, width)
        # What is in the caches is not written to memory as float64.
        for begin in range(0, len(rows), _CACHED_ROWS):
            some = rows[begin : begin + _CACHED_ROWS].astype(np.float64)
            present += some.any(1).sum()
            sums += some.sum(0)
            squares += np.einsum("nd,nd->d", some, some)

    with ThreadPoolExecutor(min(len(leaf), os.cpu_count() or 1)) as pool:
        list(pool.map(of_layer, leaf, result))
    return result


def standardised(x: Array, mean: Array, scale: Array) -> Array:
    """One layer's features [B, …, D] as float32; zeros, padding, stay zeros."""
    x = x.astype(jnp.float32)
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    shifted = (x - mean.reshape(shape)) * scale.reshape(shape)
    return shifted if x.ndim == 2 else jnp.where((x != 0).any(-1, keepdims=True), shifted, 0.0)
