import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.programs import BERT, ELMO, inputs_of, params_of

from ctx_jax.errors import InputError
from ctx_jax.interop.programs.forward import forward_program, select_parameters
from ctx_jax.models.bert import BertWithHeads
from ctx_jax.models.elmo import ElmoForPreTraining
from ctx_jax.nn.parameters import Bound


def test_bert_is_the_model():
    @jax.jit
    def expected(params, inputs):
        model = Bound(lambda rngs: BertWithHeads(BERT, rngs=rngs))(params)
        read = model.encoder(inputs["input_ids"], inputs["token_type_ids"], inputs["attention_mask"], all_layers=True)
        return {
            "last_hidden_state": read.last,
            "hidden_states": read.layers,
            "pooler_output": model.encoder.pooler(read.last[:, 0]),
            "masked_lm": jnp.stack([model.masked_lm_logits(row) for row in read.last]),
        }

    assert_equal(forward_program(BERT, heads=["masked_lm"]), expected, params_of(BERT), inputs_of(BERT, 3, 7))


def test_elmo_is_the_model():
    @jax.jit
    def expected(params, inputs):
        model = Bound(lambda rngs: ElmoForPreTraining(ELMO, rngs=rngs))(params)
        read, _ = model.encoder(inputs["char_ids"], inputs["lengths"])
        return {"last_hidden_state": read.last, "hidden_states": read.layers}

    assert_equal(forward_program(ELMO), expected, params_of(ELMO), inputs_of(ELMO, 3, 7))


@pytest.mark.parametrize("config", [BERT, ELMO])
def test_nothing_that_onnx_has_no_word_for(config):
    """What jax2onnx 0.17 cannot write at opset 23, as far as it came in here once; all is written by the slow tests."""
    program = forward_program(config)
    traced = jax.make_jaxpr(program.function)(params_of(config), inputs_of(config, 2, 5))
    assert "dot_general" in str(traced)
    assert "bitcast_convert_type" not in str(traced)


def assert_equal(program, expected, params, inputs):
    found, wanted = jax.jit(program.function)(params, inputs), expected(params, inputs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (BERT, {"heads": ["masked_lm", "next_sentence"]}),
        (BERT, {"layers": "last"}),
        (BERT, {"layers": [0, -1]}),
        (dataclasses.replace(BERT, pooler=False, dtype="bfloat16", remat="all"), {}),
        (ELMO, {}),
        (dataclasses.replace(ELMO, dtype="bfloat16", unroll=True), {"layers": [1]}),
    ],
)
def test_the_names_are_those_of_the_outputs_all_float32(config, options):
    program = forward_program(config, **options)
    found = jax.eval_shape(program.function, select_parameters(program, params_of(config)), inputs_of(config, 2, 5))
    assert {name: value.shape for name, value in found.items()} == {
        name: tuple({"B": 2, "T": 5}.get(axis, axis) for axis in axes) for name, axes in program.outputs.items()
    }
    assert {value.dtype.name for value in found.values()} == {"float32"}


@pytest.mark.parametrize("layers", ["first", [], [3], [-4], [True], ["0"]])
def test_no_such_layers(layers):
    with pytest.raises(InputError, match="layers: found"):
        forward_program(BERT, layers=layers)


def test_elmo_predicts_no_masked_words():
    with pytest.raises(InputError, match="masked_lm"):
        forward_program(ELMO, heads=["masked_lm"])


def test_parameters_that_do_not_fit():
    params = params_of(BERT)
    program = forward_program(BERT, heads=["masked_lm"])
    with pytest.raises(InputError, match="masked_lm/bias: not found"):
        select_parameters(program, {"encoder": params["encoder"]})
    wider = jax.tree.map(lambda x: np.zeros((*x.shape, 1), np.float32), params)
    with pytest.raises(InputError, match=r"encoder/.*: found float32"):
        select_parameters(program, wider)
