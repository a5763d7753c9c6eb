"""Repairs of a layer's space: affine maps, fitted on a sample of its vectors, that make cosines say more."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ctx_jax.encoder.vectors import moments
from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.interop.files.npz_file import read_npz, write_npz

FILE = "repairs.npz"
"""Its name beside a model."""

KINDS = ("centre", "all-but-the-top", "whiten", "zca")
# Eigenvalues below this share of the largest are rounding of float32 vectors; 1 / √λ would make them the loudest.
_RANK = 1e-10


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mean", "matrix"], meta_fields=["kind"])
@dataclass(frozen=True)
class Repair:
    """x ↦ (x - mean) @ matrix; a tree of two arrays for JAX.

    Attributes:
      kind: one of `KINDS`.
      mean: float32.
      matrix: float32; None is the identity.
    """

    kind: str
    mean: Float[Array, "D"]
    matrix: Float[Array, "D K"] | None


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


def apply(repair: Repair, x: Float[Array, "*batch D"]) -> Float[Array, "*batch K"]:
    """The repaired vectors, computed in float32, in x's type; within jit or without, for padding as for words."""
    centred = x.astype(jnp.float32) - jnp.broadcast_to(repair.mean, x.shape)
    if repair.matrix is None:
        return centred.astype(x.dtype)
    # Whitening makes small differences large: those that TPUs and GPUs round away by default, too.
    return jnp.matmul(centred, repair.matrix, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)


def save_repairs(path: str | os.PathLike[str], repairs: Mapping[int, Repair]) -> None:
    """Writes arrays `12/zca/mean` and `12/zca/matrix`: layer, kind, field.

    Raises:
      InputError: the path cannot be written.
    """
    arrays = {}
    for layer, repair in sorted(repairs.items()):
        arrays[f"{layer}/{repair.kind}/mean"] = np.asarray(repair.mean)
        if repair.matrix is not None:
            arrays[f"{layer}/{repair.kind}/matrix"] = np.asarray(repair.matrix)
    write_npz(path, arrays)


def load_repairs(path: str | os.PathLike[str], width: int) -> dict[int, Repair]:
    """What `save_repairs` wrote, by layer.

    Args:
      path: of the file.
      width: D of the vectors that are to be repaired.

    Raises:
      InputError: it is no such file, or its repairs are of other vectors.
    """
    path, fields = pathlib.Path(path), {}
    for name, tensor in read_npz(path).items():
        layer, _, rest = name.partition("/")
        kind, _, field = rest.partition("/")
        where = f"{path}: array {name!r}"
        if not (layer.isdecimal() and layer.isascii()) or field not in ("mean", "matrix"):
            raise InputError(f"{where}: expected a name like 12/zca/mean or 12/zca/matrix")
        if kind not in KINDS:
            raise InputError(f"{where}: found kind {kind!r}, expected {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
        axes = 1 if field == "mean" else 2
        if len(tensor.shape) != axes or tensor.shape[0] != width or 0 in tensor.shape:
            expected = f"[{width}]" if field == "mean" else f"[{width}, K] with K at least 1"
            raise InputError(f"{where}: found shape {list(tensor.shape)}, expected {expected}")
        if tensor.dtype != np.float32:
            raise InputError(f"{where}: found {tensor.dtype}, expected float32")
        values = np.array(tensor.read())
        if not np.isfinite(values).all():
            raise InputError(f"{where}: found NaN or infinity, expected finite numbers")
        fields.setdefault(int(layer), {}).setdefault(kind, {})[field] = values
    return {layer: _one(f"{path}: layer {layer}", kinds) for layer, kinds in fields.items()}


def _one(where: str, kinds: dict[str, dict[str, np.ndarray]]) -> Repair:
    if len(kinds) > 1:
        raise InputError(f"{where}: found {' and '.join(sorted(kinds))}, expected one kind")
    ((kind, fields),) = kinds.items()
    expected = {"mean"} if kind == "centre" else {"mean", "matrix"}
    if set(fields) != expected:
        raise InputError(f"{where}: {kind}: found {', '.join(sorted(fields))}, expected {', '.join(sorted(expected))}")
    return Repair(kind, fields["mean"], fields.get("matrix"))


def _rank(values: Float[np.ndarray, "D"]) -> int:
    """How many directions vectors with this spectrum spread in."""
    return int((values > _RANK * values[0]).sum())


def _repair(kind: str, mean: np.ndarray, matrix: np.ndarray | None) -> Repair:
    return Repair(kind, mean.astype(np.float32), None if matrix is None else matrix.astype(np.float32))
