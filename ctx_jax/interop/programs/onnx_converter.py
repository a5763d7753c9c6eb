"""What `write_onnx` runs in the other Python: `python -m ctx_jax.interop.programs.onnx_converter FOLDER`.

Only what jax2onnx brings along may be imported here: JAX, Flax, NumPy, jaxtyping, ONNX.
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax2onnx import to_onnx
from jaxtyping import Array

from ctx_jax.interop.programs.forward import Axes, forward_program
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import nested

_CONFIGS = {config.__name__: config for config in (BertConfig, ElmoConfig)}
_MOST = 2**31 - 1 - 2**24  # bytes of a protobuf, less something for the program itself


def convert(folder: pathlib.Path) -> None:
    """Reads `request.json` and `weights.npz`, and writes `out/<name>`."""
    request = json.loads((folder / "request.json").read_text())
    config = _CONFIGS[request["model"]](**request["config"])
    program = forward_program(config, layers=request["layers"], heads=request["heads"])
    with np.load(folder / "weights.npz") as weights:
        params = nested({path: jnp.asarray(weights[path]) for path in weights.files})

    def function(*inputs: Array) -> tuple[Array, ...]:
        outputs = program.function(params, dict(zip(program.inputs, inputs, strict=True)))
        return tuple(outputs[name] for name in program.outputs)

    model = to_onnx(
        function,
        [jax.ShapeDtypeStruct(axes, jnp.int32) for axes in program.inputs.values()],
        model_name=f"ctx_jax_{request['model'].removesuffix('Config').lower()}",
        opset=request["opset"],
        input_names=list(program.inputs),
        output_names=list(program.outputs),
    )
    for value, axes in zip(model.graph.output, program.outputs.values(), strict=True):
        _name_axes(value, axes)
    out = folder / "out" / request["name"]
    out.parent.mkdir()
    large = model.ByteSize() > _MOST
    onnx.save_model(model, out, save_as_external_data=large, location=f"{out.name}.data" if large else None)
    onnx.checker.check_model(out)


def _name_axes(value: onnx.ValueInfoProto, axes: Axes) -> None:
    """Gives the axes of an output the inputs' names: after a reshape the converter has lost them."""
    for dimension, axis in zip(value.type.tensor_type.shape.dim, axes, strict=True):
        if isinstance(axis, str):
            dimension.dim_param = axis
        else:
            dimension.dim_value = axis


if __name__ == "__main__":
    convert(pathlib.Path(sys.argv[1]))
