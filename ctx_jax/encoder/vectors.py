"""Many vectors at a time, or block by block: lengths, means and covariances, in float64, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ctx_jax.errors import InputError

_BLOCK = 2**22  # values of a block, 32 MiB in float64, and of the inner products of two
# Vectors that spread less than 1e-5 of their length are one point: float32 and its sums are no closer than that.
_ONE_POINT = 1e-10


class Moments(NamedTuple):
    """The first two moments of a set of vectors.

    Attributes:
      mean: of each dimension.
      covariance: about the mean, divided by the number of vectors.
    """

    mean: Float[np.ndarray, "D"]
    covariance: Float[np.ndarray, "D D"]

    def spectrum(self) -> Float[np.ndarray, "D"]:
        """Eigenvalues of the covariance, the largest first, none below 0; all 0 where the vectors are one point."""
        return self.principal()[0]

    def principal(self) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D D"]]:
        """Eigenvalues, the largest first, and eigenvectors in columns, each with its largest entry positive."""
        if one_point(np.trace(self.covariance), np.square(self.mean).sum()):
            return np.zeros(len(self.mean)), np.eye(len(self.mean))
        values, axes = np.linalg.eigh(self.covariance)
        return np.maximum(values[::-1], 0.0), oriented(axes[:, ::-1])


def one_point(spread: float, square: float) -> bool:
    """Whether vectors are the same but for rounding: mean square distance from the mean, and square of the mean."""
    return bool(spread <= _ONE_POINT * (spread + square))


def oriented(axes: Float[np.ndarray, "D K"]) -> Float[np.ndarray, "D K"]:
    """Columns whose signs are free, with their entry of the largest magnitude positive."""
    largest = np.take_along_axis(axes, np.abs(axes).argmax(0, keepdims=True), 0)
    return axes * np.where(largest < 0, -1.0, 1.0)


def blocks(
    vectors: Float[np.ndarray, "N D"], rows: Int[np.ndarray, "M"] | None = None
) -> Iterator[Float[np.ndarray, "B D"]]:
    """The vectors, or some rows of them, in float64, in blocks that are not to be written to."""
    step, count = block_rows(vectors.shape[1]), len(vectors) if rows is None else len(rows)
    for start in range(0, count, step):
        chosen = slice(start, start + step) if rows is None else rows[start : start + step]
        yield np.asarray(vectors[chosen], np.float64)


def block_rows(width: int) -> int:
    """How many vectors a block holds."""
    return max(min(_BLOCK // max(width, 1), math.isqrt(_BLOCK)), 1)


def unit(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Vectors of length 1; zero vectors, which have no direction, stay zero: their cosine with everything is 0."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)


def moments(vectors: Float[np.ndarray, "N D"]) -> Moments:
    """Mean and covariance, in two passes, as one would lose half the digits where the mean is far from 0.

    Args:
      vectors: of any float type, mapped from a file perhaps; read twice, a block at a time.

    Raises:
      InputError: there is no vector, or one holds NaN or infinity.
    """
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise InputError(f"vectors: found shape {list(vectors.shape)}, expected [N, D] with at least one vector")
    mean = sum(block.sum(0) for block in blocks(vectors)) / len(vectors)
    if not np.isfinite(mean).all():
        raise InputError("vectors: found NaN or infinity, expected finite numbers")
    covariance = np.zeros((len(mean), len(mean)))
    for block in blocks(vectors):
        centred = block - mean
        covariance += centred.T @ centred
    return Moments(mean, covariance / len(vectors))
