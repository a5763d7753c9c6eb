"""`jax.export` for readers of another day: StableHLO of an older version, which newer ones read too.

jax 0.12 writes StableHLO 1.18, four weeks old when it came out. TensorFlow 2.21 reads up to 1.13 and jax 0.10.2 up to
1.17, and neither can refine dynamic shapes within composite ops. The programs here need nothing newer than 1.9.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export  # not an attribute of jax before it is imported
from jax.interpreters import mlir
from jaxlib.mlir.dialects import stablehlo
from jaxlib.mlir.passmanager import PassManager

PLATFORMS = ("cpu", "cuda", "tpu")
STABLEHLO = "1.9.0"
"""The version written: gathers with batch axes, which ELMo has, are in it and not in 1.0."""


def export_function(function: Callable[..., Any], platforms: Sequence[str], *arguments: Any) -> jax.export.Exported:
    """Exports a function, traced with arrays or with their shapes and types.

    The program names its sources' files without this machine's folders. Its composite ops, which exact GELU's erfc is,
    are written as calls of what they are composed of.
    """
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, "^.*/")  # what is removed
    try:
        exported = jax.export.export(jax.jit(function), platforms=tuple(platforms))(*arguments)
    finally:
        jax.config.update(option, before)
    stablehlo.register_stablehlo_passes()
    with mlir.make_ir_context() as context:
        module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        expand = PassManager.parse("builtin.module(func.func(stablehlo-legalize-composite-to-call))")
        expand.run(module.operation)
        older = stablehlo.serialize_portable_artifact(module, STABLEHLO)
    return dataclasses.replace(exported, mlir_module_serialized=older)


def require_readable(exported: jax.export.Exported) -> None:
    """Raises, of whatever kind, if this JAX cannot read the program: JAX itself looks when it first runs."""
    with mlir.make_ir_context() as context:
        stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
