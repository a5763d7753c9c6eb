"""Texts that share rows, on one device or several, in either type: each has the vectors that it has alone."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from ctx_jax import InputError
from ctx_jax.encoder import BertEncoder, Encoder
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.models.bert import BertConfig

CONFIG = BertConfig(
    vocab_size=90, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_position_embeddings=100
)


def make(config=CONFIG, devices=None):
    grow = lambda path, x: x * 8 if path[-1].key in ("kernel", "table") else x
    params = jax.tree_util.tree_map_with_path(grow, bound_model(config).init(jax.random.key(0)))
    encoder = BertEncoder(config, params)
    if devices:
        encoder.mesh = Mesh(np.array(jax.local_devices()[:devices]), ("data",))
    return encoder


def many(seed, count, longest):
    """Rows of ids, most of them short, with padding within some."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.06, count), longest)
    mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
    mask[::7, 1:4] = 0
    return rng.integers(0, 90, (count, longest)), mask, rng.integers(0, 2, (count, longest))


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, attention_window=3)], ids=["whole", "local"])
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_a_shared_row_changes_nothing(config, devices):
    encoder = make(config, devices)
    ids, mask, types = many(devices, 60, 100)
    found = encoder.encode_ids(ids, mask, types, batch_tokens=300)
    # The model itself, a row of padding for each text.
    alone = bound_model(config)(encoder.params).encoder(ids, types, mask, all_layers=True)
    shown = mask > 0
    np.testing.assert_array_equal(found.mask, shown)
    np.testing.assert_allclose(found.layers[:, shown], np.asarray(alone.layers)[:, shown], rtol=1e-5, atol=3e-6)
    assert not found.layers[:, ~shown].any()
    used = {device for leaf in jax.tree.leaves(encoder._weights()) for device in leaf.devices()}
    assert used == set(jax.local_devices()[:devices])


def test_bfloat16_casts_matrices_once_and_changes_no_vector():
    """Equal to the last bit to a model that casts at every call: tables, norms and biases stay float32."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    encoder, plain = make(config, 1), make(config, 1)
    ids, mask, types = many(0, 20, 30)
    types_of = {str(leaf.dtype) for leaf in jax.tree.leaves(encoder._weights())}
    assert types_of == {"float32", "bfloat16"}
    plain._placed = plain.params, plain._laid_out(plain.params)
    ours, theirs = (x.encode_ids(ids, mask, types).layers for x in (encoder, plain))
    np.testing.assert_array_equal(ours, theirs)
    exact = make(CONFIG, 1).encode_ids(ids, mask, types).layers
    assert 1e-4 < np.abs(ours - exact).max() < 0.1


def test_a_stack_gives_what_layers_one_by_one_give():
    """What runs on other devices than processors."""
    ids, mask, types = many(3, 20, 30)
    listed, stacked = make(), make()
    stacked._by_layer = False
    assert isinstance(listed._weights()["encoder"]["layers"], list)
    assert isinstance(stacked._weights()["encoder"]["layers"], dict)
    found = [encoder.encode_ids(ids, mask, types).layers for encoder in (listed, stacked)]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_never_leave_the_kernel_of_attention(dtype):
    """Of products, mask and softmax XLA makes one kernel, in every layer, with the mask not laid out for each head."""
    rows, length, heads = 8, 128, 4  # smaller scores XLA keeps in several kernels
    sizes = {"hidden_size": 64 * heads, "num_heads": heads, "max_position_embeddings": length}
    encoder = make(dataclasses.replace(CONFIG, dtype=dtype, **sizes))
    function, (params, inputs, *static, affine) = encoder.forward(rows, length, layers="last")
    as_users_do = {"xla_backend_optimization_level": 3}
    text = function.lower(params, inputs, *static, affine).compile(as_users_do).as_text()
    if "ynn_fusion" not in text:
        pytest.skip("XLA has no such kernels here")
    entry = text[text.index("ENTRY ") :]
    written = re.findall(rf"= \w+\[{rows},{heads},{length},{length}\]", entry)
    assert not written
    assert f"[{rows},1,{length},{length}]" in entry


def test_new_parameters_are_used():
    encoder = make()
    ids = np.arange(20).reshape(2, 10)
    before = encoder.encode_ids(ids).last
    encoder.params = jax.tree.map(lambda leaf: leaf * 1.5, encoder.params)
    assert np.abs(encoder.encode_ids(ids).last - before).max() > 1e-3


def test_the_type_is_chosen_when_loading(tmp_path):
    encoder = make()
    encoder.save_pretrained(tmp_path / "model")
    ids = np.arange(20).reshape(2, 10)
    loaded = Encoder.from_pretrained(tmp_path / "model", dtype="bfloat16")
    assert loaded.config.dtype == "bfloat16"
    difference = np.abs(loaded.encode_ids(ids).last - encoder.encode_ids(ids).last).max()
    assert 1e-4 < difference < 0.1
    with pytest.raises(InputError, match="dtype: found 'float16', expected 'float32' or 'bfloat16'"):
        Encoder.from_pretrained(tmp_path / "model", dtype="float16")
