"""Hopper's gelu(x w + bias), interpreted, against NumPy in float64; when it is taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # JAX shows it nowhere else yet
from scipy.special import ndtr

from ctx_jax.hlo.parts import all_scopes
from ctx_jax.kernels import hopper_gelu
from ctx_jax.sharding import MeshShape, make_mesh

H100 = "NVIDIA H100 80GB HBM3"
interpreted = functools.partial(hopper_gelu.forward, interpret=InterpretGPUParams())


def inputs(rows, length, width, outputs, seed=0):
    rng = np.random.default_rng(seed)
    x, kernel, bias = (rng.normal(size=shape) for shape in ((rows, length, width), (width, outputs), (outputs,)))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel * width**-0.5, jnp.float32), jnp.asarray(bias, jnp.float32)


def exactly(x, kernel, bias):
    rounded = lambda value: np.asarray(value.astype(jnp.bfloat16), np.float64)
    y = rounded(x) @ rounded(kernel) + rounded(bias)
    return y * ndtr(y)


def same(found, expected):
    """But for bfloat16's rounding of the result, half a unit of its last bit, and the polynomial's error."""
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2.0**-8 + 4e-4, atol=2e-6)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(hopper_gelu, "cores", lambda: 3)


@pytest.mark.parametrize("shape", [(8, 64, 128, 512), (3, 128, 64, 256), (2, 256, 320, 256)])
def test_it_is_the_plain_formula(shape, on_hopper):
    """Tiles that the cores cannot share evenly, rings that are not filled, and longer sums than a ring has steps."""
    given = inputs(*shape)
    same(interpreted(*given), exactly(*given))


def test_blocks_change_nothing(on_hopper):
    given = inputs(4, 64, 128, 512)
    blocks = hopper_gelu.Blocks(rows=64, columns=128, depth=64, together=1, written=(64, 64))
    same(interpreted(*given, blocks=blocks), exactly(*given))


def test_gelu_is_as_near_as_bfloat16_sees():
    """Wherever float32 is: a tenth of bfloat16's rounding, and where Φ(x) is next to nothing, next to nothing."""
    x = np.concatenate([np.linspace(-6, 6, 200_001), np.geomspace(1e-30, 1e30, 2001), -np.geomspace(1e-30, 1e30, 2001)])
    x = x.astype(np.float32)
    found, exact = np.asarray(hopper_gelu.gelu(jnp.asarray(x)), np.float64), x * ndtr(x.astype(np.float64))
    np.testing.assert_allclose(found, exact, rtol=4e-4, atol=1.1e-6)
    assert np.isnan(hopper_gelu.gelu(jnp.float32(jnp.nan)))


def test_every_device_has_its_own_part(on_hopper, monkeypatch):
    """Rows over data, columns over tensor. The interpreter knows one device alone, so the formula stands for it."""
    given, parts = inputs(8, 64, 64, 1024), []

    def one_device(x, kernel, bias, **options):
        parts.append((x.shape, kernel.shape, bias.shape))
        y = x.astype(jnp.float32) @ kernel.astype(jnp.float32) + bias.astype(jnp.float32)
        return hopper_gelu.gelu(y).astype(x.dtype)

    monkeypatch.setattr(hopper_gelu, "_forward", one_device)
    with jax.set_mesh(make_mesh(MeshShape(4, 1, 2))), jax.numpy_rank_promotion("allow"):
        assert not hopper_gelu.fits((8, 64, 64), 1024, jnp.bfloat16)  # two tiles each, for three cores
        same(jax.jit(hopper_gelu.forward)(*given), exactly(*given))
    assert set(parts) == {((2, 64, 64), (64, 512), (512,))}


def test_it_is_a_part_of_whatever_calls_it(on_hopper):
    """What time it takes is the feed-forward's; its own name is no part of a model."""
    call = jax.named_scope("feed-forward")(hopper_gelu.forward)
    assert set(all_scopes(jax.make_jaxpr(call)(*inputs(8, 64, 128, 512)))) == {"feed-forward"}


def test_what_fits(monkeypatch):
    fits = lambda shape=(64, 512, 768), outputs=3072, dtype=jnp.bfloat16: hopper_gelu.fits(shape, outputs, dtype)
    assert not fits()  # a processor
    device = lambda kind: type("Device", (), {"device_kind": kind, "core_count": 132})
    monkeypatch.setattr(jax, "local_devices", lambda: [device("NVIDIA A100-SXM4-80GB")])
    assert not fits()
    for kind in (H100, "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe"):
        monkeypatch.setattr(jax, "local_devices", lambda kind=kind: [device(kind)])
        assert fits()
    assert not fits(dtype=jnp.float32)
    assert not fits(shape=(1, 512, 768))  # fewer tiles than cores
    assert not fits(shape=(63, 100, 768))
    assert not fits(shape=(64, 512, 800))
    assert not fits(outputs=3000)
    assert fits(shape=(256, 128, 384), outputs=1536)
    with jax.set_mesh(make_mesh(MeshShape(8, 1, 1))):
        assert not fits(shape=(60, 512, 768))
