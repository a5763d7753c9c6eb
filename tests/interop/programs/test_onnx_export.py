"""ONNX as onnxruntime computes it, both in an environment of its own: CTX_JAX_ONNX_PYTHON is its Python."""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from oracles.programs import BERT, ELMO, SHAPES, inputs_of, params_of

from ctx_jax.errors import InputError
from ctx_jax.interop.programs.forward import forward_program
from ctx_jax.interop.programs.onnx import write_onnx

RUN = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for arguments in sys.argv[2:]:
    found = session.run(None, dict(numpy.load(arguments + ".in.npz")))
    numpy.savez(arguments + ".out.npz", **{o.name: x for o, x in zip(session.get_outputs(), found)})
print([[i.name, i.type, i.shape] for i in session.get_inputs()])
print([[o.name, o.shape] for o in session.get_outputs()])
"""


@pytest.fixture(scope="session")
def python():
    if not (path := os.environ.get("CTX_JAX_ONNX_PYTHON")):
        pytest.skip("CTX_JAX_ONNX_PYTHON is not set: the Python of an environment with jax2onnx")
    return path


def run(python, path, tmp_path, cases):
    """Outputs for each case, and what the session says of its inputs and outputs."""
    names = [str(tmp_path / str(number)) for number in range(len(cases))]
    for name, inputs in zip(names, cases, strict=True):
        np.savez(f"{name}.in.npz", **inputs)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", RUN, str(path), *names], env=environment, capture_output=True, text=True, check=True
    )
    return [dict(np.load(f"{name}.out.npz")) for name in names], done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (BERT, {"heads": ["masked_lm", "next_sentence"]}),
        (BERT, {"layers": [-1, 0]}),
        (dataclasses.replace(BERT, pooler=False, activation="gelu_tanh", gated=True), {"layers": "last"}),
        (ELMO, {}),
        (dataclasses.replace(ELMO, cell_clip=None, projection_clip=None, skip_connections=False), {}),
    ],
    ids=["bert", "layers", "variant", "elmo", "elmo variant"],
)
def test_onnxruntime_computes_the_same(python, tmp_path, config, options):
    path, params = tmp_path / "model.onnx", params_of(config)
    write_onnx(path, config, params, python_executable=python, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    program = forward_program(config, **options)
    cases = [inputs_of(config, *shape) for shape in SHAPES]
    found, said = run(python, path, tmp_path, cases)
    for inputs, outputs in zip(cases, found, strict=True):
        wanted = jax.jit(program.function)(params, inputs)
        assert outputs.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_allclose(outputs[name], wanted[name], rtol=0, atol=1e-5, err_msg=name)
    assert said.splitlines() == [
        str([[name, "tensor(int32)", list(axes)] for name, axes in program.inputs.items()]),
        str([[name, list(axes)] for name, axes in program.outputs.items()]),
    ]


def test_a_python_without_the_converter(tmp_path):
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('jax2onnx') is not None)"
    if subprocess.run([sys.executable, "-c", code]).returncode:
        pytest.skip("this Python has jax2onnx")
    with pytest.raises(InputError, match=r"python_executable: .*No module named"):
        write_onnx(tmp_path / "model.onnx", BERT, params_of(BERT))
    assert not list(tmp_path.iterdir())


def test_no_python(tmp_path):
    with pytest.raises(InputError, match=r"python_executable: .*No such file"):
        write_onnx(tmp_path / "model.onnx", BERT, params_of(BERT), python_executable=tmp_path / "python")


def test_an_error_of_the_other_python_is_shown(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Traceback\nmodule.OddError: no such op\n for more details' >&2; exit 1\n")
    python.chmod(0o755)
    with pytest.raises(InputError, match=r"found module\.OddError: no such op, expected one that converts"):
        write_onnx(tmp_path / "model.onnx", BERT, params_of(BERT), python_executable=python)


def test_local_attention_does_not_convert(tmp_path):
    config = dataclasses.replace(BERT, attention_window=5)
    with pytest.raises(InputError, match="attention_window: found 5"):
        write_onnx(tmp_path / "model.onnx", config, params_of(BERT))


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "model.onnx.data").write_bytes(b"")
    with pytest.raises(InputError, match="expected a new path"):
        write_onnx(tmp_path / "model.onnx", BERT, params_of(BERT))
