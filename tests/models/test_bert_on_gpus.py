"""The branches that only GPUs take, run on the processor: kernels interpreted, products rounded as they are written."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # JAX shows it nowhere else yet
from models.test_bert import SMALL, bound, random_params, rows

from ctx_jax.arrays import Batch
from ctx_jax.encoder import BertEncoder
from ctx_jax.kernels import gpu_attention, gpu_norm, hopper_gelu
from ctx_jax.models.bert import BertWithHeads

LENGTH = 32
CONFIG = dataclasses.replace(
    SMALL, hidden_size=64, num_heads=2, intermediate_size=96, max_position_embeddings=LENGTH, dtype="bfloat16"
)


ON_HOPPER = dataclasses.replace(CONFIG, intermediate_size=256)
"""Wide enough for the kernels of these cards."""


@pytest.fixture
def on_gpus(monkeypatch):
    """From here on every choice by platform is a GPU's, a Hopper's with one core; a list of the kernels called."""
    called = []

    def choose(*args, default, **branches):
        return branches.get("cuda", default)(*args)

    def noted(module, name, interpret=True):
        kernel = functools.partial(getattr(module, name), interpret=interpret)

        def run(*args, **options):
            called.append(f"{module.__name__.rpartition('.')[2]} {name}")
            return kernel(*args, **options)

        return run

    def switch():
        monkeypatch.setattr(jax.lax, "platform_dependent", choose)
        for module in (gpu_attention, gpu_norm):
            for name in ("forward", "backward"):
                monkeypatch.setattr(module, name, noted(module, name))
        monkeypatch.setattr(hopper_gelu, "forward", noted(hopper_gelu, "forward", InterpretGPUParams()))
        monkeypatch.setattr(hopper_gelu, "cores", lambda: 1)
        return called

    return switch


def encode(config, params, batch):
    """The last layer, in float32."""
    run = jax.jit(lambda params: bound(config)(params).encoder(*batch[:4]).last.astype(jnp.float32))
    return np.asarray(run(params))


def loss_and_gradients(config, params, batch, weights):
    """Of some number made of the logits, with dropout."""
    keys = jax.random.split(jax.random.key(1, impl="threefry2x32"), len(batch.input_ids))

    def loss(params):
        model: BertWithHeads = bound(config)(params)
        last = model.encoder(*batch[:4], dropout_keys=keys).last
        return (model.masked_lm_logits(last.reshape(-1, config.hidden_size)) * weights).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)]


def inputs(config):
    batch: Batch = rows(config, length=LENGTH)
    seen = (batch.segment_ids > 0).reshape(-1, 1)
    weights = np.random.default_rng(3).normal(size=(seen.size, config.vocab_size)).astype(np.float32) * seen
    return random_params(bound(config).shapes, 1), batch, weights


@pytest.fixture(scope="module")
def given():
    return inputs(CONFIG)


def error(found, exact):
    """Root of the mean square, relative."""
    return np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))


@pytest.mark.parametrize("config", [CONFIG, ON_HOPPER], ids=["any", "hopper"])
def test_encoding_is_as_near_as_elsewhere(config, on_gpus):
    """To float32, by the root of the mean square; nearer where fewer values are rounded on the way."""
    params, batch, _ = inputs(config)
    seen = batch.segment_ids > 0
    exact = encode(dataclasses.replace(config, dtype="float32"), params, batch)[seen]
    elsewhere = error(encode(config, params, batch)[seen], exact)
    called = on_gpus()
    assert 0.3 * elsewhere < error(encode(config, params, batch)[seen], exact) < 1.3 * elsewhere
    assert set(called) == {"gpu_attention forward"} | ({"hopper_gelu forward"} if config is ON_HOPPER else set())


def test_training_is_as_near_as_elsewhere(given, on_gpus):
    """Loss and gradients with the same noise: other noise would be a hundred times as far off. Heads that are not asked
    have gradients of 0.
    """
    params, batch, weights = given
    exact_loss, exact = loss_and_gradients(dataclasses.replace(CONFIG, dtype="float32"), params, batch, weights)
    loss, gradients = loss_and_gradients(CONFIG, params, batch, weights)
    called = on_gpus()
    gpu_loss, gpu_gradients = loss_and_gradients(CONFIG, params, batch, weights)
    assert set(called) == {f"gpu_{what} {way}" for what in ("attention", "norm") for way in ("forward", "backward")}
    assert abs(gpu_loss - exact_loss) < max(3 * abs(loss - exact_loss), 2e-3 * abs(exact_loss))
    asked = [right.any() for right in exact]
    assert sum(asked) > len(asked) / 2
    for ours, theirs, right, is_asked in zip(gpu_gradients, gradients, exact, asked, strict=True):
        if is_asked:
            assert error(ours, right) < 1.5 * error(theirs, right) + 1e-3
        else:
            assert not ours.any()


@pytest.mark.parametrize("config", [CONFIG, ON_HOPPER], ids=["any", "hopper"])
def test_gradients_without_dropout(config, on_gpus):
    """The way of encoding, followed back: what probes and fine-tuning without dropout ask for."""
    params, batch, weights = inputs(config)

    def gradients(dtype):
        def loss(params):
            model = bound(dataclasses.replace(config, dtype=dtype))(params)
            last = model.encoder(*batch[:4]).last.reshape(-1, config.hidden_size)
            return (last.astype(jnp.float32) * weights[:, : config.hidden_size]).mean()

        found = jax.jit(jax.grad(loss))(params)["encoder"]["layers"]
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found)]

    exact, elsewhere = gradients("float32"), gradients("bfloat16")
    called = on_gpus()
    for ours, theirs, right in zip(gradients("bfloat16"), elsewhere, exact, strict=True):
        assert error(ours, right) < 1.5 * error(theirs, right) + 1e-3
    assert "gpu_attention backward" in called


def test_devices_have_rows_of_their_own(given, on_gpus, monkeypatch):
    """XLA would give every device all rows of a kernel."""
    params, batch, _ = given
    ids, mask = np.asarray(batch.input_ids), np.asarray(batch.segment_ids) > 0
    mask[:, 0] = True
    expected = BertEncoder(CONFIG, params).encode_ids(ids, mask, layers="last").last
    on_gpus()
    rows, inner = [], gpu_attention._forward

    def one_device(seeds, segment_ids, packed, **options):
        rows.append(len(packed))
        return inner(seeds, segment_ids, packed, **options)

    monkeypatch.setattr(gpu_attention, "_forward", one_device)
    encoder = BertEncoder(CONFIG, params)
    found = encoder.encode_ids(ids, mask, layers="last").last
    assert encoder.mesh.size == jax.local_device_count() > 1
    assert set(rows) == {1}
    assert error(found[mask], expected[mask]) < 2e-2


def test_float32_takes_no_kernel_of_attention(given, on_gpus):
    """Triton's products of float32 would be TF32's."""
    params, batch, _ = given
    plain = dataclasses.replace(CONFIG, dtype="float32")
    expected = encode(plain, params, batch)
    called = on_gpus()
    np.testing.assert_array_equal(encode(plain, params, batch), expected)
    assert not called
