"""Repairs of a layer's space: affine maps, fitted on a sample of its vectors, that make cosines say more."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ctx_jax.encoder.vectors import moments
from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.interop.pretrained import KINDS, Repair, Repairs

# Eigenvalues below this share of the largest are rounding of float32 vectors; 1 / √λ would make them the loudest.
_RANK = 1e-10


def centre(vectors: Float[np.ndarray, "N D"]) -> Repair:
    """Takes the mean away.

    Raises:
      InputError: no vectors, or some that are not finite; like all the others.
    """
    return _repair("centre", moments(vectors).mean, None)


def all_but_the_top(vectors: Float[np.ndarray, "N D"], d: int | None = None) -> Repair:
    """Takes away the mean and what lies along the first d principal components (Mu and Viswanath 2018, algorithm 1).

    Args:
      vectors: to fit on.
      d: how many; the paper's rule of thumb, D / 100 rounded, at least 1, where None.

    Raises:
      InputError: d is not below the number of directions that the vectors spread in.
    """
    found, width = moments(vectors), vectors.shape[1]
    values, axes = found.principal()
    d = max(round(width / 100), 1) if d is None else d
    spread = _rank(values)
    if not 1 <= d < spread:
        raise InputError(f"d: found {d}, expected 1 or more and fewer than the {spread} directions of the vectors")
    top = axes[:, :d]
    return _repair("all-but-the-top", found.mean, np.eye(width) - top @ top.T)


def whiten(vectors: Float[np.ndarray, "N D"], k: int | None = None) -> Repair:
    """The first k principal components, each with variance 1 (Su et al. 2021, algorithm 1).

    Args:
      vectors: to fit on.
      k: dimensions that are kept; as many as the vectors spread in where None.

    Raises:
      InputError: the vectors spread in fewer directions than k, or in none.
    """
    found = moments(vectors)
    values, axes = found.principal()
    spread = _rank(values)
    k = spread if k is None else k
    if not 1 <= k <= spread:
        raise InputError(f"k: found {k}, expected 1 or more and at most the {spread} directions of the vectors")
    return _repair("whiten", found.mean, axes[:, :k] / np.sqrt(values[:k]))


def zca(vectors: Float[np.ndarray, "N D"], eps: float = 1e-5) -> Repair:
    """Whitening that turns nothing: covariance ^ -1/2 (Bell and Sejnowski 1997).

    Args:
      vectors: to fit on.
      eps: of the largest eigenvalue, added to all, so that directions in which nothing happens stay quiet.

    Raises:
      InputError: eps is not above 0, or all vectors are the same.
    """
    if not eps > 0:
        raise InputError(f"eps: found {eps}, expected a number above 0")
    found = moments(vectors)
    values, axes = found.principal()
    if values[0] == 0:
        raise InputError("vectors: found all the same, expected some that differ")
    return _repair("zca", found.mean, axes / np.sqrt(values + eps * values[0]) @ axes.T)


FITS: dict[str, Callable[..., Repair]] = dict(zip(KINDS, (centre, all_but_the_top, whiten, zca), strict=True))
"""By kind."""


def chosen_fits(kinds: str | Sequence[str], k: int | None = None) -> dict[str, Callable[[np.ndarray], Repair]]:
    """Functions of vectors alone, by kind; k is that of `whiten`.

    Raises:
      InputError: there is no such kind.
    """
    kinds = [kinds] if isinstance(kinds, str) else kinds
    for kind in kinds:
        if kind not in FITS:
            raise InputError(f"kinds: found {kind!r}, expected {', '.join(FITS)}{did_you_mean(str(kind), FITS)}")
    return {kind: functools.partial(whiten, k=k) if kind == "whiten" else FITS[kind] for kind in kinds}


class Affine(NamedTuple):
    """Repairs of K layers as one argument of a compiled function, which knows nothing of kinds.

    Attributes:
      mean: of each layer, float32.
      matrix: of each layer, float32; None is the identity.
    """

    mean: Float[Array, "K D"]
    matrix: Float[Array, "K D M"] | None


def apply(repair: Repair | Affine, x: Float[Array, "*batch D"]) -> Float[Array, "*batch M"]:
    """The repaired vectors, computed in float32, in x's type; within jit or without, for padding as for words."""
    centred = x.astype(jnp.float32) - jnp.broadcast_to(repair.mean, x.shape)
    if repair.matrix is None:
        return centred.astype(x.dtype)
    # Whitening makes small differences large: those that TPUs and GPUs round away by default, too.
    return jnp.matmul(centred, repair.matrix, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)


def apply_to_layers(affine: Affine, layers: Float[Array, "K *batch D"]) -> Float[Array, "K *batch M"]:
    """`apply` to each layer with its own."""
    return jax.vmap(apply)(affine, layers)


def apply_on_host(affine: Affine, layers: Float[np.ndarray, "K N D"]) -> Float[np.ndarray, "K N M"]:
    """What `apply_to_layers` gives, for vectors that are there already, in any number: nothing is compiled."""
    centred = layers - np.asarray(affine.mean)[:, None]
    return centred if affine.matrix is None else centred @ np.asarray(affine.matrix)


def stacked(repairs: Sequence[Repair]) -> Affine:
    """Repairs of vectors of one width, to vectors of one width, on the host."""
    mean = np.stack([np.asarray(repair.mean, np.float32) for repair in repairs])
    if all(repair.matrix is None for repair in repairs):
        return Affine(mean, None)
    identity = np.eye(mean.shape[1], dtype=np.float32)
    matrices = [identity if repair.matrix is None else np.asarray(repair.matrix, np.float32) for repair in repairs]
    return Affine(mean, np.stack(matrices))


def find_repairs(repair: Any, repairs: Repairs, layers: Sequence[int], width: int) -> tuple[Repair, ...]:
    """A repair for each layer.

    Args:
      repair: a kind; or a Repair, for a single layer.
      repairs: those that there are.
      layers: numbers from 0.
      width: D of the vectors.

    Raises:
      InputError: there is no such kind, a layer has none of it, or repaired vectors would differ in width.
    """
    if isinstance(repair, Repair):
        if len(layers) != 1:
            raise InputError(f"repair: found one for {len(layers)} layers, expected a kind, or layers='last', say")
        found = (repair,)
    elif isinstance(repair, str) and repair in KINDS:
        for layer in layers:
            has = repairs.get(layer, {})
            if repair not in has:
                names = ", ".join(has) or "none; fit_repairs makes some"
                raise InputError(f"repair: layer {layer} has no {repair!r}, expected one that it has: {names}")
        found = tuple(repairs[layer][repair] for layer in layers)
    else:
        near = did_you_mean(str(repair), KINDS)
        raise InputError(f"repair: found {repair!r:.40}, expected {', '.join(KINDS)} or a Repair{near}")
    widths = {}
    for layer, one in zip(layers, found, strict=True):
        shapes = [np.shape(one.mean), (width, 0) if one.matrix is None else np.shape(one.matrix)]
        if shapes[0] != (width,) or len(shapes[1]) != 2 or shapes[1][0] != width:
            raise InputError(f"repair: layer {layer}: found shapes {shapes}, expected [{width}] and [{width}, K]")
        widths.setdefault(shapes[1][1] or width, layer)
    if len(widths) > 1:
        listed = ", ".join(f"{size} (layer {layer})" for size, layer in widths.items())
        raise InputError(f"repair: {repair!r} gives vectors of different widths: {listed}, expected one; fit with k")
    return found


def _rank(values: Float[np.ndarray, "D"]) -> int:
    """How many directions vectors with this spectrum spread in."""
    return int((values > _RANK * values[0]).sum())


def _repair(kind: str, mean: np.ndarray, matrix: np.ndarray | None) -> Repair:
    return Repair(kind, mean.astype(np.float32), None if matrix is None else matrix.astype(np.float32))
