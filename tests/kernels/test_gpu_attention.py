"""The GPU's attention, interpreted, against XLA's form of the same formulas; and compiled for one, where JAX can."""

import functools

import jax
import jax.numpy as jnp
import pytest
from kernels import test_tpu_attention
from kernels.test_tpu_attention import compare, plain

from ctx_jax.kernels import gpu_attention
from ctx_jax.kernels.gpu_attention import Blocks
from ctx_jax.kernels.packed import Heads, heads_of
from ctx_jax.nn import attention
from ctx_jax.sharding import MeshShape, make_mesh

BLOCKS = Blocks(32, 16, 4, 2)


def inputs(*shape, **options):
    """Padding's context is nobody's, and has no cotangent."""
    packed, cotangent, segments, seeds = test_tpu_attention.inputs(*shape, **options)
    return packed, jnp.where(segments[:, :, None] > 0, cotangent, 0), segments, seeds


def kernels(heads, rate, packed, cotangent, segments, seeds, blocks=BLOCKS):
    """Forward and gradient by the kernels."""
    options = {"heads": heads, "rate": rate, "interpret": True, "blocks": blocks}
    out, sums = gpu_attention.forward(packed, segments, seeds, **options)
    return out, gpu_attention.backward(packed, segments, seeds, out, sums, cotangent, **options)


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (1, 2, 96, 128), (2, 4, 48, 32)])
def test_kernels_are_the_plain_formulas(shape, rate):
    """With dropout the same weights are dropped, bit for bit; a row's end is padding, whose queries see no key."""
    heads, given = heads_of(shape[1], shape[3]), inputs(*shape)
    compare(jax.jit(functools.partial(kernels, heads, rate))(*given), plain(heads, rate, *given), 2e-6)


@pytest.mark.parametrize("blocks", [Blocks(16, 64, 4, 2), Blocks(128, 64, 4, 2), Blocks(64, 16, 4, 2)])
def test_blocks_change_nothing(blocks):
    """Blocks longer than a row, too, and of keys longer than those of queries."""
    heads, given = heads_of(2, 64), inputs(1, 2, 64, 64)
    compare(jax.jit(functools.partial(kernels, heads, 0.3, blocks=blocks))(*given), plain(heads, 0.3, *given), 2e-6)


def test_heads_may_lie_as_one_group():
    """As the projection leaves them: all queries, all keys, all values."""
    given = inputs(2, 4, 32, 32)
    compare(kernels(Heads(4, 32, 4), 0.1, *given), plain(Heads(4, 32, 4), 0.1, *given), 2e-6)


def test_bfloat16():
    heads, given = heads_of(2, 64), inputs(2, 2, 64, 64, dtype=jnp.bfloat16)
    exact = (*(x.astype(jnp.float32) for x in given[:2]), *given[2:])
    compare([x.astype(jnp.float32) for x in kernels(heads, 0.1, *given)], plain(heads, 0.1, *exact), 2.0**-7)


@pytest.mark.parametrize("shape", [MeshShape(2, 2, 2), MeshShape(8, 1, 1)])
def test_a_mesh_changes_nothing(shape):
    """Rows over data and fsdp, heads over tensor, each with its own noise."""
    heads, given = heads_of(4, 64), inputs(8, 4, 32, 64)
    expected = plain(heads, 0.2, *given)
    with jax.set_mesh(make_mesh(shape)):
        assert gpu_attention.fits(8, 32, heads, jnp.bfloat16)
        compare(jax.jit(functools.partial(kernels, heads, 0.2))(*given), expected, 2e-6)


def test_what_fits():
    """Types and shapes that the kernels were not made for are left to XLA."""
    heads = heads_of(12, 64)
    fits = lambda rows=2, length=64, heads=heads, dtype=jnp.bfloat16: gpu_attention.fits(rows, length, heads, dtype)
    assert fits()
    assert not fits(dtype=jnp.float32)
    assert not fits(length=40)
    assert not fits(heads=heads_of(4, 48))
    with jax.set_mesh(make_mesh(MeshShape(8, 1, 1))):
        assert not fits(rows=4)
        assert fits(rows=16)


def test_only_gpus_have_them():
    """The program for a processor has no kernel and no sums that nobody asked for."""
    heads, (packed, cotangent, segments, seeds) = heads_of(2, 64), inputs(2, 2, 64, 64, dtype=jnp.bfloat16)
    mask = attention.attention_mask(segments)

    def loss(packed):
        return (attention.packed_attention(heads, 0.1, packed, mask, seeds) * cotangent).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss)).trace(packed).lower(lowering_platforms=("cpu",)).as_text()
    assert "triton" not in lowered
    assert "tensor<2x2x64xf32>" not in jax.jit(jax.grad(loss)).lower(packed).compile().as_text()
