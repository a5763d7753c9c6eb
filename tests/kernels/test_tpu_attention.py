"""The TPU's kernels, interpreted, against XLA's form of the same formulas; and compiled, where libtpu is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ctx_jax.kernels import tpu_attention
from ctx_jax.kernels.packed import heads_of
from ctx_jax.nn import attention
from ctx_jax.sharding import MeshShape, make_mesh


def inputs(rows, count, length, width, dtype=np.float32, seed=0):
    """Heads, packed vectors and cotangent; segments of random lengths with padding at the end; seeds."""
    rng = np.random.default_rng(seed)
    packed = jnp.asarray(rng.normal(size=(rows, length, 3 * count * width)), dtype)
    cotangent = jnp.asarray(rng.normal(size=(rows, length, count * width)), dtype)
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    segments[0, -length // 3 :] = 0
    return packed, cotangent, jnp.asarray(segments), jnp.asarray(rng.integers(0, 2**32, (rows, 2), np.uint32))


def plain(heads, rate, packed, cotangent, segments, seeds):
    """Forward and gradient by JAX's own derivative of the plain formulas."""
    mask = attention.attention_mask(segments)
    out, pull = jax.vjp(lambda packed: attention._plainly_packed(heads, rate, packed, mask, seeds), packed)
    return out, *pull(cotangent)


def kernels(heads, rate, packed, cotangent, segments, seeds):
    """The same by the kernels."""
    options = {"heads": heads, "rate": rate, "interpret": True}
    out = tpu_attention.forward(packed, segments, seeds, **options)
    return out, tpu_attention.backward(packed, segments, seeds, cotangent, **options)


def compare(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(2, 4, 128, 64), (1, 2, 256, 128), (2, 4, 128, 32)])
def test_kernels_are_the_plain_formulas(shape, rate):
    """With dropout the same weights are dropped, bit for bit: others would be far off."""
    heads, given = heads_of(shape[1], shape[3]), inputs(*shape)
    assert tpu_attention.fits(shape[0], shape[2], heads)
    compare(jax.jit(functools.partial(kernels, heads, rate))(*given), plain(heads, rate, *given), 2e-6)


@pytest.mark.parametrize(("length", "scores"), [(256, 128 * 256), (384, 128 * 384)])
def test_gradients_add_up_over_blocks_of_queries(length, scores, monkeypatch):
    monkeypatch.setattr(tpu_attention, "SCORES", scores)
    heads, given = heads_of(4, 64), inputs(2, 4, length, 64)
    plan = tpu_attention._Plan(given[0].shape, heads)
    assert (plan.queries, plan.groups, plan.whole) == (128, 1, False)
    compare(jax.jit(functools.partial(kernels, heads, 0.3))(*given), plain(heads, 0.3, *given), 2e-6)


def test_bfloat16():
    heads, given = heads_of(2, 64), inputs(2, 2, 128, 64, jnp.bfloat16)
    exact = (*(x.astype(jnp.float32) for x in given[:2]), *given[2:])
    compare([x.astype(jnp.float32) for x in kernels(heads, 0.1, *given)], plain(heads, 0.1, *exact), 2.0**-7)


@pytest.mark.parametrize("shape", [MeshShape(2, 2, 2), MeshShape(1, 4, 2), MeshShape(8, 1, 1)])
def test_a_mesh_changes_nothing(shape):
    """Rows over data and fsdp, heads over tensor, each with its own noise."""
    heads, given = heads_of(4, 64), inputs(8, 4, 128, 64)
    expected = plain(heads, 0.2, *given)
    with jax.set_mesh(make_mesh(shape)):
        assert tpu_attention.fits(8, 128, heads)
        found = jax.jit(functools.partial(kernels, heads, 0.2))(*given)
    # As many different parts as there are devices: nothing was gathered to be computed everywhere.
    assert len({str(shard.index) for shard in found[0].addressable_shards}) == 8
    compare(found, expected, 2e-6)


@pytest.mark.parametrize(
    ("rows", "length", "count", "width", "fit"),
    [
        (8, 128, 4, 64, True),
        (8, 100, 4, 64, False),
        (6, 128, 4, 64, False),  # rows that four devices cannot share
        (8, 128, 2, 64, False),  # one group of heads for two devices
        (8, 128, 4, 48, False),
        (8, 4096, 4, 64, False),
    ],
)
def test_what_fits(rows, length, count, width, fit):
    with jax.set_mesh(make_mesh(MeshShape(4, 1, 2))):
        assert tpu_attention.fits(rows, length, heads_of(count, width)) == fit


@pytest.mark.parametrize(("length", "groups", "queries"), [(128, 6, 128), (256, 2, 256), (512, 1, 512), (2048, 1, 128)])
def test_blocks_fill_the_memory_and_no_more(length, groups, queries):
    plan = tpu_attention._Plan((1, length, 3 * 768), heads_of(12, 64))
    assert (plan.groups, plan.queries) == (groups, queries)


def gradient(heads, mask, seeds, cotangent):
    loss = lambda packed: (attention.packed_attention(heads, 0.1, packed, mask, seeds) * cotangent).sum()
    return jax.grad(loss)


@pytest.mark.parametrize(("length", "window"), [(128, None), (128, 100), (128, 30), (40, None), (40, 7)])
def test_the_gradient_by_hand_is_the_derivative(length, window):
    """On a processor; the same program has kernels for TPUs in it where nothing but segments is masked."""
    heads, (packed, cotangent, segments, seeds) = heads_of(4, 64), inputs(2, 4, length, 64)
    mask = attention.attention_mask(segments, window)
    ours = gradient(heads, mask, seeds, cotangent)
    assert ("attention_backward" in str(jax.make_jaxpr(ours)(packed))) == (window is None and length == 128)
    theirs = jax.grad(lambda packed: (attention._plainly_packed(heads, 0.1, packed, mask, seeds) * cotangent).sum())
    compare([jax.jit(ours)(packed)], [jax.jit(theirs)(packed)], 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(16, 12, 512, 64), (64, 12, 128, 64), (8, 16, 2048, 64), (16, 4, 512, 128)])
def test_the_tpu_compiler_takes_them(shape, monkeypatch):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    rows, count, length, width = shape
    mesh = make_mesh(MeshShape(4, 1, 2), topologies.get_topology_desc("v5e:2x4", platform="tpu").devices)
    place = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, P(("data", "fsdp"), *axes))
    )
    packed = place((rows, length, 3 * count * width), jnp.bfloat16, None, "tensor")
    cotangent = place((rows, length, count * width), jnp.bfloat16, None, "tensor")
    segments, seeds = place((rows, length), jnp.int32), place((rows, 2), jnp.uint32)

    def run(packed, cotangent, segments, seeds):
        mask = attention.attention_mask(segments)
        return gradient(heads_of(count, width), mask, seeds, cotangent)(packed)

    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(packed, cotangent, segments, seeds).compile().as_text()
    assert text.count("tpu_custom_call") == 1  # the forward pass' result is not asked for
    assert "all-gather" not in text
