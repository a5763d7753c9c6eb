"""TensorFlow SavedModel: the program as StableHLO within one op, XlaCallModule, its weights as TensorFlow's variables.

Not by jax2tf, which hands TensorFlow the StableHLO of JAX's own day, as `portable` does not.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax

from ctx_jax.errors import InputError
from ctx_jax.interop.programs.forward import (
    Layers,
    forward_program,
    require_new,
    select_parameters,
    symbolic_inputs,
)
from ctx_jax.interop.programs.portable import PLATFORMS, export_function
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import Params


def write_saved_model(
    path: str | os.PathLike[str],
    config: BertConfig | ElmoConfig,
    params: Params,
    *,
    layers: Layers = "all",
    heads: Sequence[str] = (),
) -> None:
    """Writes the forward pass as a SavedModel with dynamic batch and length. The folder is complete or not there.

    `tf.saved_model.load(path).signatures["serving_default"]` takes the inputs and returns the outputs by name.
    TensorFlow refuses an empty batch, and rows longer than the model takes. Gradients do not pass.

    Args:
      path: new folder.
      config: of the model.
      params: of the whole model.
      layers: as for `forward_program`.
      heads: likewise.

    Raises:
      InputError: TensorFlow is not installed, the path is taken, or the params do not fit the config.
    """
    path = require_new(path)
    program = forward_program(config, layers=layers, heads=heads)
    weights = jax.device_get(select_parameters(program, params))
    try:
        import tensorflow as tf
        from tensorflow.compiler.tf2xla.python import xla  # the one way to the op: tf.raw_ops has it not
    except ImportError as error:
        raise InputError(f"SavedModel: found {error}, expected TensorFlow: pip install ctx-jax[tensorflow]") from error

    exported = export_function(program.function, PLATFORMS, program.parameters, symbolic_inputs(program))
    dynamic = lambda axes: [axis if isinstance(axis, int) else None for axis in axes]
    attributes = {
        "version": exported.calling_convention_version,
        "module": exported.mlir_module_serialized,
        "platforms": [platform.upper() for platform in PLATFORMS],
        "Tout": [tf.as_dtype(out.dtype) for out in exported.out_avals],
        "Sout": [dynamic(out.shape) for out in exported.out_avals],
    }
    leaves, structure = jax.tree.flatten(weights)
    variables = [tf.Variable(leaf, trainable=False) for leaf in leaves]

    def forward(*inputs: Any) -> dict[str, Any]:
        arguments = variables + jax.tree.leaves(dict(zip(program.inputs, inputs, strict=True)))
        kept = [arguments[place] for place in exported.module_kept_var_idx]
        outputs = xla.call_module(kept, **attributes)
        return jax.tree.unflatten(exported.out_tree, outputs)

    specs = [tf.TensorSpec(dynamic(axes), tf.int32, name) for name, axes in program.inputs.items()]
    module = tf.Module()
    module.weights = jax.tree.unflatten(structure, variables)  # a tree of its own: TensorFlow changes it
    module.forward = tf.function(forward, input_signature=specs, autograph=False)
    # Beside the target, so that what is finished only has to be renamed.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
        unfinished = pathlib.Path(name) / "model"
        tf.saved_model.save(module, os.fspath(unfinished), signatures=module.forward.get_concrete_function())
        unfinished.rename(path)
