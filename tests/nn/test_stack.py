"""A stack of layers is the layers one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.compiling import quick_jit

from ctx_jax.nn.linear import Linear
from ctx_jax.nn.parameters import Bound, count_parameters, flat_paths
from ctx_jax.nn.stack import build_layers, run_layers


class Stack(nnx.Module):
    def __init__(self, count, rngs):
        self.layers = build_layers(lambda rngs: Linear(4, 4, stddev=0.5, rngs=rngs), count, rngs)


BOUND = Bound(lambda rngs: Stack(3, rngs))


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("remat", ["none", "dots", "all"])
def test_runs_the_layers_in_order_and_tells_each_its_number(remat, unroll):
    params = quick_jit(BOUND.init)(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)

    @quick_jit
    def run(params, x):
        apply = lambda layer, x, index: jnp.tanh(layer(x)) + index.astype(jnp.float32)
        stack = BOUND(params).layers
        last, nothing = run_layers(stack, apply, x, count=3, remat=remat, unroll=unroll)
        assert nothing is None
        return last, *run_layers(stack, apply, x, count=3, all_layers=True, remat=remat, unroll=unroll)

    alone, last, layers = run(params, x)
    expected = [x.astype(np.float64)]
    for layer in range(3):
        kernel, bias = (np.asarray(params["layers"][k][layer], np.float64) for k in ("kernel", "bias"))
        expected.append(np.tanh(expected[-1] @ kernel + bias) + layer)
    np.testing.assert_allclose(layers, expected, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(alone, expected[-1], rtol=1e-6, atol=2e-6)
    np.testing.assert_array_equal(layers[-1], last)
    np.testing.assert_array_equal(layers[0], x)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("remat", ["none", "all"])
def test_one_layer_stands_for_all(remat, unroll):
    """Values and gradients are those of a stack of equal layers, the gradients summed over the layers."""
    one = Bound(lambda rngs: Stack(1, rngs))
    params = quick_jit(one.init)(jax.random.key(3))
    x = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)

    @quick_jit
    def both(params, x):
        apply = lambda layer, x, index: jnp.tanh(layer(x)) * (1 + index.astype(jnp.float32))

        def loss(bound, params):
            out = run_layers(
                bound(params).layers, apply, x, count=3, all_layers=bound is one, remat=remat, unroll=unroll
            )
            return (out[0] ** 2).sum(), out

        copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (3, *leaf.shape[1:])), params)
        grad = lambda bound, params: jax.value_and_grad(lambda p: loss(bound, p), has_aux=True)(params)
        return grad(one, params), grad(BOUND, copies)

    ((shared, (last, layers)), grads), ((copied, (other, _)), copied_grads) = both(params, x)
    np.testing.assert_allclose(shared, copied, rtol=1e-6)
    np.testing.assert_allclose(last, other, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(layers[-1], other, rtol=1e-6, atol=1e-6)
    summed = jax.tree.map(lambda leaf: leaf.sum(0, keepdims=True), copied_grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grads, summed)


def test_two_layers_are_not_three():
    stack = Bound(lambda rngs: Stack(2, rngs))
    with pytest.raises(ValueError, match="2 layers are stored, expected 3"):
        run_layers(
            stack(stack.init(jax.random.key(0))).layers, lambda layer, x, _: layer(x), jnp.ones((1, 1, 4)), count=3
        )


def test_each_layer_is_born_of_its_own_key():
    kernel = np.asarray(quick_jit(BOUND.init)(jax.random.key(1))["layers"]["kernel"])
    assert kernel.shape == (3, 4, 4)
    assert len(np.unique(kernel)) == kernel.size


def test_bound_knows_shapes_and_paths():
    assert {path: leaf.shape for path, leaf in flat_paths(BOUND.shapes).items()} == {
        "layers/kernel": (3, 4, 4),
        "layers/bias": (3, 4),
    }
    assert count_parameters(BOUND.shapes) == 3 * (16 + 4)
