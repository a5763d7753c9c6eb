"""How work is divided over the mesh in context: kernels, which XLA cannot divide by itself, and a device's rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from ctx_jax.sharding import BATCH_AXES


def axes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes of the mesh in context that rows and heads are divided over; none where the program divides by hand."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True) if mesh.axis_names else ()
    automatic = {name for name, kind in kinds if kind == AxisType.Auto}
    return tuple(axis for axis in BATCH_AXES if axis in automatic), ("tensor",) if "tensor" in automatic else ()


def divides(rows: Any, heads: int = 0) -> bool:
    """Whether so many rows, and heads or groups of them, can be shared out evenly; symbolic ones cannot."""
    mesh = jax.sharding.get_abstract_mesh()
    over_rows, over_heads = (math.prod(mesh.shape[axis] for axis in some) for some in axes())
    return isinstance(rows, int) and rows % over_rows == 0 and heads % over_heads == 0


def rows_of_a_device(rows: int) -> int:
    """Of so many rows, on the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return -(-rows // math.prod(mesh.shape[axis] for axis in axes()[0]))


def heads_of_a_device(heads: int) -> int:
    """Of so many heads, or columns, on the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return -(-heads // math.prod(mesh.shape[axis] for axis in axes()[1]))


def divided(call: Callable[..., Any], inputs: Sequence[str], outputs: Sequence[str]) -> Callable[..., Any]:
    """The call for each device's own part.

    Args:
      call: takes and gives arrays; gives a tuple where there are several outputs.
      inputs: a letter for each axis of each array: `b` rows, `h` heads or their columns, anything else is not divided.
      outputs: likewise.
    """
    rows, heads = axes()
    if not rows and not heads:
        return call
    of = {"b": rows or None, "h": heads or None}
    specs = lambda names: tuple(PartitionSpec(*(of.get(letter) for letter in name)) for name in names)
    out = specs(outputs)
    return jax.shard_map(call, in_specs=specs(inputs), out_specs=out if len(out) > 1 else out[0], check_vma=False)
