import dataclasses
import importlib.util
import sys

import jax
import numpy as np
import pytest
from oracles.programs import BERT, ELMO, SHAPES, inputs_of, params_of

from ctx_jax.errors import InputError
from ctx_jax.interop.programs.forward import forward_program
from ctx_jax.interop.programs.saved_model import write_saved_model

needs_tensorflow = pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="TensorFlow is not installed")


@pytest.mark.slow
@needs_tensorflow
@pytest.mark.filterwarnings("ignore")  # TensorFlow's own
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (BERT, {"heads": ["masked_lm", "next_sentence"]}),
        (BERT, {"layers": [-1, 0]}),
        (dataclasses.replace(BERT, pooler=False, activation="gelu_tanh", gated=True), {"layers": "last"}),
        (ELMO, {}),
    ],
    ids=["bert", "layers", "variant", "elmo"],
)
def test_tensorflow_computes_the_same(tmp_path, config, options):
    import tensorflow as tf

    path, params, program = tmp_path / "model", params_of(config), forward_program(config, **options)
    write_saved_model(path, config, params, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    call = tf.saved_model.load(str(path)).signatures["serving_default"]
    for shape in SHAPES:
        inputs = inputs_of(config, *shape)
        found = call(**{name: tf.constant(value) for name, value in inputs.items()})
        wanted = jax.jit(program.function)(params, inputs)
        assert found.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_allclose(found[name].numpy(), wanted[name], rtol=0, atol=1e-5, err_msg=name)
    if program.max_length is not None:
        inputs = inputs_of(config, 2, program.max_length + 1)
        with pytest.raises(tf.errors.InvalidArgumentError, match="T <= 40"):
            call(**{name: tf.constant(value) for name, value in inputs.items()})


def test_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(InputError, match=r"ctx-jax\[tensorflow\]"):
        write_saved_model(tmp_path / "model", BERT, params_of(BERT))
    assert not list(tmp_path.iterdir())


def test_no_model_is_written_over(tmp_path):
    with pytest.raises(InputError, match="found a folder"):
        write_saved_model(tmp_path, BERT, params_of(BERT))
