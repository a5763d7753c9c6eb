"""In float32 no product rounds what it multiplies, whatever device it is compiled for."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctx_jax.atlas.probes import training
from ctx_jax.atlas.probes.kinds import MLP
from ctx_jax.compilation import float32_means_float32
from ctx_jax.encoder import BertEncoder, ElmoEncoder
from ctx_jax.encoder import elmo as elmo_module
from ctx_jax.flops.architectures import encoder_function
from ctx_jax.interop.programs.forward import forward_program
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig

ELMO = ElmoConfig(
    filters=((1, 4),), character_dim=4, max_characters=8, num_highway=1, lstm_dim=8, projection_dim=6, num_layers=1
)


def products(traced) -> Counter:
    """How often which precision is asked for, of products of float32 and of bfloat16."""
    found = Counter()
    for line in traced.lower(lowering_platforms=("cpu", "tpu")).as_text().splitlines():
        if "stablehlo.dot_general" in line or "stablehlo.convolution" in line:
            precision = re.search(r"precision(?:_config)? = \[([^\]]*)\]", line)
            operands = re.findall(r"tensor<[^>]*x(f32|bf16)>", line)[:2]
            found["/".join(sorted(set(operands))), precision[1] if precision else ""] += 1
    return found


def bert(dtype):
    return BertConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, dtype=dtype)


def bert_encoder(dtype):
    config = bert(dtype)
    encoder = BertEncoder(config, bound_model(config).init(jax.random.key(0)))
    function, args = encoder.forward(2, 16, layers="all", pool="mean")
    return function.trace(*args)


def elmo_encoder(dtype):
    config = dataclasses.replace(ELMO, dtype=dtype)
    encoder = ElmoEncoder(config, bound_model(config).init(jax.random.key(0)))
    vectors = np.zeros((2, 5, 6), dtype)
    rows = elmo_module._Rows(vectors, np.array([5, 5], np.int32), np.zeros((2, 5), bool))
    return encoder._contextualise.trace(encoder.params, rows, None, (0, 1))


def program(dtype):
    made = forward_program(bert(dtype))
    inputs = {name: jax.ShapeDtypeStruct((2, 16), jnp.int32) for name in made.inputs}
    return jax.jit(made.function).trace(made.parameters, inputs)


def counted(dtype):
    function, args = encoder_function(bert(dtype), rows=2, length=16)
    return jax.jit(function).trace(*args)


@pytest.mark.parametrize("make", [bert_encoder, elmo_encoder, program, counted])
def test_float32_is_multiplied_whole(make):
    found = products(make("float32"))
    assert {operands for operands, _ in found} == {"f32"}
    assert {precision for _, precision in found} == {"HIGHEST, HIGHEST"}, found
    assert sum(found.values()) >= 2


@pytest.mark.parametrize("make", [bert_encoder, program, counted])
def test_bfloat16_stays_as_it_is(make):
    found = products(make("bfloat16"))
    assert all(precision != "HIGHEST, HIGHEST" for operands, precision in found if "bf16" in operands), found
    assert any("bf16" in operands for operands, _ in found)


def test_what_the_user_sets_is_obeyed():
    with jax.default_matmul_precision("high"):
        found = products(counted("float32"))
    assert {precision for _, precision in found} == {"HIGH, HIGH"}


def test_probes_too():
    probe, layers, seeds = MLP(8, 3), 2, 2
    one = jax.vmap(probe.init)(jax.random.split(jax.random.key(0), seeds))
    params = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], layers, 1), one)
    state = jax.vmap(jax.vmap(training.ADAM.build().init))(params)
    schedule = jnp.float32(0.1), jnp.float32(0), jnp.float32(10)
    order = np.zeros((2, seeds, 16), np.int32)
    scale = (jnp.ones((layers, 8)),)
    read = training._Read((jnp.ones((layers, 32, 8)),), scale, scale, None)
    traced = training._run.trace(probe, (params, state), read, jnp.zeros(32, jnp.int32), order, 2, schedule)
    assert {precision for _, precision in products(traced)} == {"HIGHEST, HIGHEST"}


def test_a_wrapped_function_keeps_its_arguments():
    def scaled(x, by):
        return x * by

    jitted = jax.jit(float32_means_float32("float32")(scaled), static_argnames="by")
    assert float(jitted(jnp.float32(2.0), by=3.0)) == 6.0
    assert float32_means_float32("bfloat16")(scaled) is scaled
