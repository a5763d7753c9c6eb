"""Meshes of devices, and where every array lives on them. Models know nothing of this."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from ctx_jax.errors import InputError

BATCH_AXES = ("data", "fsdp")

RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Stacked layers have a leading layer axis. Products are split so that one reduction ends attention and one the
    # feed-forward (Shoeybi et al. 2019, section 3).
    (r"layers/.*/qkv/kernel$", PartitionSpec(None, "fsdp", None, "tensor")),
    (r"layers/.*/qkv/bias$", PartitionSpec(None, None, "tensor")),
    (r"layers/.*/gated_up/kernel$", PartitionSpec(None, "fsdp", None, "tensor")),
    (r"layers/.*/gated_up/bias$", PartitionSpec(None, None, "tensor")),
    (r"layers/.*/up/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/.*/up/bias$", PartitionSpec(None, "tensor")),
    (r"layers/.*/(out|down)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    # What a batch hands to the next has a row for each of the batch's.
    (r"^carry/", PartitionSpec(BATCH_AXES)),
    # An LSTM's gates lie side by side on an axis of their own, so that every device has a part of each. What each step
    # of the loop over words needs is not divided over fsdp: it would be gathered again at every word.
    (r"input_kernel$", PartitionSpec("fsdp", None, "tensor")),
    (r"recurrent_kernel$", PartitionSpec(None, None, "tensor")),
    (r"(^|/)(forward|backward)/\d+/bias$", PartitionSpec(None, "tensor")),
    (r"(^|/)(forward|backward)/\d+/projection$", PartitionSpec("tensor", None)),
    # A token table split over its width costs XLA a full rematerialisation; over the vocabulary it does not.
    (r"(token|masked_lm)/table$", PartitionSpec(("tensor", "fsdp"), None)),
    (r"masked_lm/bias$", PartitionSpec(("tensor", "fsdp"))),
    (r"position/table$", PartitionSpec("fsdp", None)),
    (r"dense/kernel$", PartitionSpec("fsdp", "tensor")),
)
"""Path pattern → axes, the first that matches wins; what none matches is replicated. Optimizer moments end in the same
paths as their parameters and follow the same rules."""


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh's axes; one of them may be -1, for all the devices that are left."""

    data: int = -1
    """Copies of the model, each with its part of the batch."""
    fsdp: int = 1
    """Parts of the parameters, gathered layer by layer; also splits the batch."""
    tensor: int = 1
    """Parts of every product."""


def make_mesh(shape: MeshShape = MeshShape(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor` over the devices given, else all."""
    devices = jax.devices() if devices is None else devices
    sizes = [shape.data, shape.fsdp, shape.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh sizes are {sizes}, expected positive numbers and at most one -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // math.prod(s for s in sizes if s != -1), 1)
    if math.prod(sizes) != len(devices):
        raise InputError(f"mesh data={sizes[0]} fsdp={sizes[1]} tensor={sizes[2]} does not fit {len(devices)} devices")
    names, kinds = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(tuple(sizes), names, axis_types=kinds, devices=list(devices))
    except NotImplementedError as error:  # TPUs are a torus, whose sides an axis takes whole
        found = " ".join(f"{axis}={size}" for axis, size in zip(names, sizes, strict=True))
        raise InputError(f"mesh {found}: expected products of the sides of the chips' torus; {error}") from error


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all the devices that hold different rows."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(shapes: Any, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]] = RULES) -> Any:
    """Where each leaf of a tree of parameters or optimizer state lives.

    Args:
      shapes: tree of anything with a shape.
      mesh: as `make_mesh` makes it.
      rules: path pattern → axes. An axis that does not divide its dimension is left out for that leaf.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), PartitionSpec())
        if len(spec) > len(leaf.shape):
            spec = PartitionSpec()
        axes = []
        for size, axis in zip(leaf.shape, spec, strict=False):
            names = (axis,) if isinstance(axis, str) else (axis or ())
            axes.append(axis if names and size % math.prod(mesh.shape[n] for n in names) == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, shapes)


def process_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, "R"]:
    """Rows of a batch that this process's devices hold, ascending: those that it has to read.

    Processes that share the copies of a row, as where `tensor` goes over several of them, read it each. The rows need
    not lie beside each other: on a TPU neighbours in the mesh are neighbours in the machine.

    Args:
      mesh: of devices of all the processes.
      batch_size: B over all of them; a multiple of the devices that hold different rows.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    if not places:
        raise InputError(f"process {jax.process_index()} has none of the mesh's {mesh.size} devices")
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[place] for place in places]))


def bytes_per_device(shapes: Any, shardings: Any) -> int:
    """What the arrays of a tree take on one device: on each the same, for an axis is split only where it divides.

    Args:
      shapes: tree of anything with a shape and a type.
      shardings: of each leaf, or one of all.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    sizes = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize, shapes, shardings
    )
    return sum(jax.tree.leaves(sizes))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays of the rows that `process_rows` says, as global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    own = len(process_rows(mesh, parts))

    def put(array: Any) -> jax.Array:
        array = np.asarray(array)
        shape = (len(array) * parts // own, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return jax.tree.map(put, batch)
