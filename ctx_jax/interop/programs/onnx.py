"""ONNX, by the package jax2onnx, in an environment of its own.

jax2onnx wants an Orbax that is older than the one that checkpoints need: no one environment holds both. So another
Python converts, which gets the request and the weights in a temporary folder:

    python -m venv converter && converter/bin/pip install "jax2onnx>=0.17.1" "jax<0.12"
    write_onnx("bert.onnx", config, params, python_executable="converter/bin/python")

jax2onnx 0.17.1 converts BERT with jax 0.12 too, but not ELMo: it looks for a class that is no longer there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import jax
import numpy as np

import ctx_jax
from ctx_jax.errors import InputError
from ctx_jax.interop.programs.forward import Layers, forward_program, require_new, select_parameters
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import Params, flat_paths

OPSET = 23


def write_onnx(
    path: str | os.PathLike[str],
    config: BertConfig | ElmoConfig,
    params: Params,
    *,
    layers: Layers = "all",
    heads: Sequence[str] = (),
    python_executable: str | os.PathLike[str] = sys.executable,
) -> None:
    """Writes the forward pass as ONNX, weights inside, with dynamic batch B and length T.

    Weights beyond 2 GB, more than a protobuf holds, go into a file beside it, `<path>.data`. ONNX cannot bound T: what
    BERT computes beyond `max_position_embeddings` is NaN.

    Args:
      path: new file.
      config: of the model.
      params: of the whole model.
      layers: as for `forward_program`.
      heads: likewise.
      python_executable: of an environment with jax2onnx.

    Raises:
      InputError: the path is taken, the params do not fit the config, attention is local (its blocks are padded by a
        length that is not known, which jax2onnx does not convert), or that Python does not convert.
    """
    path = require_new(path)
    beside = require_new(path.with_name(f"{path.name}.data"))
    if isinstance(config, BertConfig) and config.attention_window is not None:
        raise InputError(f"BertConfig.attention_window: found {config.attention_window}, ONNX is written for None only")
    program = forward_program(config, layers=layers, heads=heads)
    weights = flat_paths(jax.device_get(select_parameters(program, params)))
    request = {
        "model": type(config).__name__,
        "config": dataclasses.asdict(config),
        "layers": layers if isinstance(layers, str) else list(layers),
        "heads": list(heads),
        "opset": OPSET,
        "name": path.name,
    }
    # Beside the target, so that what is finished only has to be renamed.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
        folder = pathlib.Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        np.savez(folder / "weights.npz", **weights)
        _convert(os.fspath(python_executable), folder)
        if (folder / "out" / beside.name).exists():
            (folder / "out" / beside.name).replace(beside)
        (folder / "out" / path.name).replace(path)


def _convert(python: str, folder: pathlib.Path) -> None:
    source = os.fspath(pathlib.Path(ctx_jax.__file__).resolve().parent.parent)
    # Nothing of this environment's own paths: the other one must find its own packages.
    environment = {**os.environ, "PYTHONPATH": source, "JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_FILTERING": "off"}
    command = [python, "-P", "-m", "ctx_jax.interop.programs.onnx_converter", os.fspath(folder)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"python_executable: {python}: {error.strerror}, expected a Python with jax2onnx") from error
    if done.returncode:
        # The error itself, which may go on over more lines.
        errors = re.findall(r"^[\w.]+(?:Error|Operation|Exception)\b.*", done.stderr, re.MULTILINE)
        found = errors[-1] if errors else done.stderr.strip()[-200:] or f"exit code {done.returncode}"
        expected = "one that converts this model, as jax2onnx 0.17.1 does with jax 0.10 or 0.11"
        if "No module named" in found:
            expected = 'the Python of an environment with `pip install "jax2onnx>=0.17.1" "jax<0.12"`'
        raise InputError(f"python_executable: {python}: found {found}, expected {expected}")
