"""Two-way tables: which of another library's tensors, lying how, make up each leaf of our parameters.

A part gives the view of our leaf that lies as theirs does. Reading fills the views, writing copies them out: there is
one table, and no way back that could differ from the way there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.files.tensors import StoredTensor, Tensors, copy_out
from ctx_jax.nn.parameters import Params, flat_paths, nested

_ALIGNMENT = 64
"""JAX takes over arrays of the processor's memory that begin at a multiple of so many bytes, and copies others."""


class Part(NamedTuple):
    """One of their tensors, or some of its rows.

    Attributes:
      theirs: its name.
      view: of our leaf, as theirs lies.
      rows: the first row of theirs, one past the last, and how many theirs has.
    """

    theirs: str
    view: Callable[[np.ndarray], np.ndarray]
    rows: tuple[int, int, int] | None = None


class Entry(NamedTuple):
    """One leaf of our parameters.

    Attributes:
      ours: its path.
      parts: what it is made of; together their views are all of it.
    """

    ours: str
    parts: tuple[Part, ...]


def whole(leaf: np.ndarray) -> np.ndarray:
    """Theirs lies as ours."""
    return leaf


def transposed(leaf: np.ndarray) -> np.ndarray:
    """A matrix whose outputs come first, as PyTorch keeps them."""
    return leaf.T


def read_params(entries: Iterable[Entry], tensors: Tensors, shapes: Params, where: str) -> Params:
    """Our parameters from their tensors, in float32, leaf after leaf.

    Args:
      entries: a table.
      tensors: of a file; all of them belong to the table.
      shapes: of our parameters.
      where: the file, for messages.

    Raises:
      InputError: a tensor is missing or superfluous, has another shape, or holds no floating-point numbers.
    """
    expected, found, used = flat_paths(shapes), {}, set()
    for entry in entries:
        leaf = _aligned(expected[entry.ours].shape)
        for part in entry.parts:
            used.add(part.theirs)
            _fill(part, leaf, tensors, where)
        found[entry.ours] = jax.device_put(leaf)
    extra = [name for name in tensors if name not in used]
    if extra:
        listed = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise InputError(f"{where}: found tensors that the model does not have: {listed}; expected none")
    if found.keys() != expected.keys():
        raise AssertionError(f"the table lacks {sorted(expected.keys() ^ found.keys())}")
    return nested(found)


def write_params(entries: Iterable[Entry], params: Params) -> dict[str, np.ndarray]:
    """Their tensors from our parameters: the table backwards. Views of our leaves where the types allow it."""
    leaves, tensors = flat_paths(params), {}
    pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
    for entry in entries:
        leaf = np.asarray(leaves[entry.ours])
        for part in entry.parts:
            if part.rows is None:
                tensors[part.theirs] = part.view(leaf)
            else:
                pieces.setdefault(part.theirs, []).append((part.rows[0], part.view(leaf)))
    for name, found in pieces.items():
        tensors[name] = np.concatenate([piece for _, piece in sorted(found, key=lambda pair: pair[0])])
    return tensors


def _fill(part: Part, leaf: np.ndarray, tensors: Tensors, where: str) -> None:
    out = part.view(leaf)
    stored = tensors.get(part.theirs)
    if stored is None:
        raise InputError(f"{where}: found no tensor {part.theirs}, expected one of {list(out.shape)}")
    if not np.issubdtype(stored.dtype, np.floating) and stored.dtype.name != "bfloat16":
        raise InputError(f"{where}: tensor {part.theirs}: found {stored.dtype}, expected floating-point numbers")
    begin, end, count = part.rows or (0, 0, 0)
    expected = (count, *out.shape[1:]) if part.rows else out.shape
    if stored.shape != expected:
        raise InputError(f"{where}: tensor {part.theirs}: found {list(stored.shape)}, expected {list(expected)}")
    if part.rows:
        stored = StoredTensor(out.shape, stored.dtype, lambda read=stored.read: read()[begin:end])
    copy_out(stored, out)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * 4
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -buffer.ctypes.data % _ALIGNMENT
    return buffer[begin : begin + size].view(np.float32).reshape(shape)
