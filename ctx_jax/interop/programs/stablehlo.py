"""StableHLO: one file that any JAX runs, on CPU, CUDA and TPU, and that holds StableHLO for those who have none.

The file is what `jax.export` serialises, so `jax.export.deserialize(bytearray(file.read_bytes()))` reads it without
this library. Behind it stand a description in JSON, its length, a checksum of all before, and eight bytes that only a
complete file ends with: flatbuffers carry no checksum and read a truncated file as another program.
"""

from __future__ import annotations

import json
import os
import pathlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export  # not an attribute of jax before it is imported
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ctx_jax.errors import InputError
from ctx_jax.interop.files.replacing import replacing
from ctx_jax.interop.programs.forward import (
    Layers,
    forward_program,
    require_new,
    select_parameters,
    symbolic_inputs,
)
from ctx_jax.interop.programs.portable import PLATFORMS, export_function, require_readable
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import Params, flat_paths, nested

_MAGIC = b"ctxjaxS1"
_FOOTER = struct.Struct("<QI8s")  # bytes of the JSON, crc32 of all before this, magic
_MOST = 2**31 - 1 - 2**24  # a flatbuffer has offsets of 31 bits; something for the program itself


class StableHLO(NamedTuple):
    """A program that was read.

    Attributes:
      about: inputs and outputs (name → axes), max_length, platforms, weights ("inside" or "inputs"), parameters (path →
        type and shape, in the order of the program's first arguments when they are inputs), and the jax that wrote it.
      exported: `exported.mlir_module_serialized` is StableHLO; its arguments are the parameters, then the inputs,
        each in the order of sorted names.
    """

    about: dict[str, Any]
    exported: jax.export.Exported

    def __call__(self, inputs: Mapping[str, Int[Array, "..."]], params: Params | None = None) -> dict[str, Array]:
        """Runs the program.

        Args:
          inputs: int32, by name.
          params: for a program that was written with its weights as inputs; more leaves than it reads may be there.

        Raises:
          InputError: an input is missing, of another type or shape, or longer than the model takes; the weights are
            missing, or are inside already.
        """
        checked = _checked(self.about, inputs)
        if self.about["weights"] == "inside":
            if params is not None:
                raise InputError("params: found some, expected none: the program has its weights inside")
            return self.exported.call(checked)
        if params is None:
            raise InputError("params: found none, expected the weights: the program takes them as inputs")
        found = flat_paths(params)
        for path, (dtype, shape) in self.about["parameters"].items():
            leaf = found.get(path)
            if leaf is None or (str(leaf.dtype), list(leaf.shape)) != (dtype, shape):
                there = "none" if leaf is None else f"{leaf.dtype} {list(leaf.shape)}"
                raise InputError(f"params: {path}: found {there}, expected {dtype} {shape}")
        return self.exported.call(nested({path: found[path] for path in self.about["parameters"]}), checked)


def write_stablehlo(
    path: str | os.PathLike[str],
    config: BertConfig | ElmoConfig,
    params: Params,
    *,
    layers: Layers = "all",
    heads: Sequence[str] = (),
    weights_inside: bool = True,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes the forward pass as StableHLO with symbolic batch and length. The file is complete or not there.

    Args:
      path: new file.
      config: of the model.
      params: of the whole model.
      layers: as for `forward_program`.
      heads: likewise.
      weights_inside: False writes the program alone, which then takes the weights as its first argument.
      platforms: to lower for; the one file serves all of them.

    Raises:
      InputError: the path is taken or cannot be written, the params do not fit the config, a platform is unknown, or
        the weights are too large to be inside.
    """
    path = require_new(path)
    for platform in platforms:
        if platform not in PLATFORMS:
            raise InputError(f"platforms: found {platform!r}, expected some of {', '.join(PLATFORMS)}")
    program = forward_program(config, layers=layers, heads=heads)
    params = select_parameters(program, params)
    inputs = symbolic_inputs(program)
    if weights_inside:
        weights = jax.tree.map(jnp.asarray, jax.device_get(params))  # from wherever they are to one device
        if (size := sum(leaf.nbytes for leaf in jax.tree.leaves(weights))) > _MOST:
            raise InputError(f"{path}: weights of {size} bytes, expected at most {_MOST}; use weights_inside=False")
        function, arguments = lambda inputs: program.function(weights, inputs), (inputs,)
    else:
        function, arguments = program.function, (program.parameters, inputs)
    exported = export_function(function, platforms, *arguments)
    about = {
        "model": type(config).__name__,
        "inputs": {name: list(axes) for name, axes in program.inputs.items()},
        "outputs": {name: list(axes) for name, axes in program.outputs.items()},
        "max_length": program.max_length,
        "platforms": list(platforms),
        "weights": "inside" if weights_inside else "inputs",
        "parameters": {
            name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in flat_paths(program.parameters).items()
        },
        "jax": jax.__version__,
    }
    description = json.dumps(about).encode()
    body = bytes(exported.serialize()) + description
    footer = _FOOTER.pack(len(description), zlib.crc32(body), _MAGIC)
    with replacing(path) as (file,):
        file.write(body)
        file.write(footer)


def read_stablehlo(path: str | os.PathLike[str]) -> StableHLO:
    """Reads what `write_stablehlo` wrote.

    Raises:
      InputError: no file, another kind of file, a truncated or changed one, or one that this JAX cannot read.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path}: found {'a folder' if path.is_dir() else 'no file'}, expected a StableHLO file")
    content = path.read_bytes()
    expected = "expected a whole file written by write_stablehlo"
    if len(content) < _FOOTER.size:
        raise InputError(f"{path}: found {len(content)} bytes, {expected}")
    length, checksum, magic = _FOOTER.unpack(content[-_FOOTER.size :])
    body = memoryview(content)[: -_FOOTER.size]
    if magic != _MAGIC:
        raise InputError(f"{path}: found the end {magic!r}, {expected}, which ends with {_MAGIC!r}")
    if zlib.crc32(body) != checksum or length > len(body):
        raise InputError(f"{path}: found another checksum than at its end, {expected}")
    about = json.loads(bytes(body[len(body) - length :]))
    try:
        exported = jax.export.deserialize(bytearray(body[: len(body) - length]))
        require_readable(exported)
    except Exception as error:  # of many kinds: the serialisation is JAX's own affair
        found = f"a program of jax {about['jax']}, which jax {jax.__version__} cannot read"
        raise InputError(f"{path}: found {found} ({error}), expected one of this version or a little older") from error
    return StableHLO(about, exported)


def _checked(about: dict[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, if they are what the program takes."""
    if inputs.keys() != about["inputs"].keys():
        raise InputError(f"inputs: found {', '.join(sorted(inputs))}, expected {', '.join(sorted(about['inputs']))}")
    sizes: dict[str, int] = {}
    for name, axes in about["inputs"].items():
        shape, dtype = np.shape(inputs[name]), inputs[name].dtype
        fits = len(shape) == len(axes) and dtype == np.int32
        # The first input that has an axis says how long it is.
        if not fits or any(
            size != (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
            for size, axis in zip(shape, axes, strict=True)
        ):
            known = [sizes.get(axis, axis) for axis in axes]
            raise InputError(f"inputs: {name}: found {dtype} {list(shape)}, expected int32 {known}")
    longest = about["max_length"]
    if longest is not None and sizes["T"] > longest:
        raise InputError(f"inputs: found rows of {sizes['T']}, the model takes {longest}")
    if not all(sizes.values()):
        raise InputError(f"inputs: found {sizes}, expected at least 1 of each")
    return dict(inputs)
