"""Models in several files: an index in JSON says which tensor lies in which."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from ctx_jax.errors import InputError
from ctx_jax.interop.files.json_text import parse_json
from ctx_jax.interop.files.tensors import Tensors, short

_MAX_INDEX = 2**24


def read_shards(path: pathlib.Path, read: Callable[[pathlib.Path], Tensors]) -> Tensors:
    """The tensors of all shards, in the index's order.

    Args:
      path: the index, an object with a `weight_map` of names to files beside it.
      read: reads one file.

    Raises:
      InputError: the index cannot be read or leads elsewhere, it and a shard do not hold the same names, or as `read`.
    """
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= _MAX_INDEX else b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected an index in JSON") from error
    if size > _MAX_INDEX:
        raise InputError(f"{path}: found {size} bytes, expected at most {_MAX_INDEX}")
    index = parse_json(text, str(path))
    weight_map = index.get("weight_map") if type(index) is dict else None
    if type(weight_map) is not dict:
        raise InputError(f"{path}: weight_map: found {short.repr(weight_map)}, expected an object of names to files")
    shards: dict[str, Tensors] = {}
    for name, shard in weight_map.items():
        where = f"{path}: tensor {short.repr(name)}"
        # The name comes from a file that somebody downloaded: it may not lead out of the folder.
        if type(shard) is not str or not shard.isprintable() or set(shard) & set("/\\") or ".." in shard or not shard:
            raise InputError(f"{where}: found shard {short.repr(shard)}, expected the name of a file in the folder")
        if shard not in shards:
            shards[shard] = read(path.parent / shard)
        if name not in shards[shard]:
            raise InputError(f"{path.parent / shard}: no tensor {short.repr(name)}, expected it by {path.name}")
    for shard, tensors in shards.items():
        for name in tensors:
            if weight_map.get(name) != shard:
                there = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise InputError(f"{path.parent / shard}: found tensor {short.repr(name)}, {there} by {path.name}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}
