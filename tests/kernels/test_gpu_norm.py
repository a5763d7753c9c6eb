"""The GPU's kernels for LayerNorm(x + dropout(branch)), interpreted, against JAX's derivative of the plain formula."""

import functools

import jax
import jax.numpy as jnp
import pytest
from kernels.test_tpu_norm import EPS, by_hand, compare, inputs

from ctx_jax.kernels import gpu_norm
from ctx_jax.nn.norm import residual_norm
from ctx_jax.sharding import MeshShape, make_mesh


def kernels(rate, x, branch, scale, bias, seeds, cotangent, **blocks):
    options = {"eps": EPS, "rate": rate, "interpret": True, **blocks}
    out, total = gpu_norm.forward(x, branch, scale, bias, seeds, **options)
    return out, *gpu_norm.backward(total, scale, seeds, cotangent, **options)


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(2, 48, 768), (2, 128, 96), (3, 40, 128), (1, 9, 100), (1, 2, 8192)])
def test_kernels_are_the_formula(shape, rate):
    """Also where a vector is several pieces, and where few tokens or many steps make a program."""
    given = inputs(*shape)
    compare(jax.jit(functools.partial(kernels, rate))(*given), by_hand(rate, *given), 3e-6)


@pytest.mark.parametrize("blocks", [gpu_norm.Blocks(4, 1, 1), gpu_norm.Blocks(4, 1, 48), gpu_norm.Blocks(16, 2, 20)])
def test_any_blocks_will_do(blocks):
    given = inputs(2, 48, 96)
    run = jax.jit(functools.partial(kernels, 0.1, blocks=blocks))
    compare(run(*given), by_hand(0.1, *given), 3e-6)


def test_bfloat16():
    given = inputs(2, 48, 96, jnp.bfloat16)
    exact = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in given]
    found = kernels(0.1, *given)
    assert [x.dtype.name for x in found] == ["bfloat16"] * 3 + ["float32"] * 2
    compare(found, by_hand(0.1, *exact), 2.0**-6)


@pytest.mark.parametrize("shape", [MeshShape(2, 2, 2), MeshShape(8, 1, 1)])
def test_a_mesh_changes_nothing(shape):
    given = inputs(8, 48, 96)
    expected = by_hand(0.2, *given)
    with jax.set_mesh(make_mesh(shape)):
        assert gpu_norm.fits(given[0].shape, given[0].dtype)
        assert not gpu_norm.fits((3, 48, 96), given[0].dtype)
        found = jax.jit(functools.partial(kernels, 0.2))(*given)
    assert len({str(shard.index) for shard in found[0].addressable_shards}) == 8 // shape.tensor
    compare(found, expected, 3e-6)


def test_what_fits():
    (rows,) = jax.export.symbolic_shape("b")
    assert gpu_norm.fits((3, 7, 96), jnp.bfloat16)
    assert not gpu_norm.fits((3, 7, 96), jnp.float16)
    assert not gpu_norm.fits((3, 7, 24), jnp.float32)
    assert not gpu_norm.fits((3, 7, 8224), jnp.float32)
    assert not gpu_norm.fits((rows, 7, 96), jnp.float32)
    assert not gpu_norm.fits((3, rows, 96), jnp.float32)


@pytest.mark.parametrize(("shape", "platforms"), [((2, 40, 96), 1), ((3, 40, 24), 0), ((1, 128, 128), 2)])
def test_the_gradient_on_a_processor(shape, platforms):
    *args, seeds, cotangent = inputs(*shape)
    gradient = jax.grad(lambda *args: (residual_norm(EPS, 0.1, *args, seeds) * cotangent).sum(), (0, 1, 2, 3))
    # Of each platform's kernels: one for the forward and one for the backward pass.
    assert str(jax.make_jaxpr(gradient)(*args)).count("pallas_call[") == 2 * platforms
    compare(jax.jit(gradient)(*args), by_hand(0.1, *args, seeds, cotangent)[1:], 3e-6)
