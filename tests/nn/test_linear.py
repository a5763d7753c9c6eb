"""The product with its own gradient, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.compiling import quick_jit
from oracles.jaxprs import equations

from ctx_jax.nn.linear import Linear, matmul
from ctx_jax.nn.parameters import Bound

ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


def numbers():
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in ((300, 40), (40, 50), (300, 50))]


@quick_jit
def forward_and_gradients(x, w, dy):
    y, back = jax.vjp(matmul, x, w)
    return y, *back(dy)


def relative(ours, theirs):
    """Largest difference, relative to the root mean square."""
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.sqrt(np.mean(theirs**2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_float64_but_for_the_rounding_of_its_operands(dtype):
    x, w, dy = numbers()
    y, dx, dw = forward_and_gradients(jnp.asarray(x, dtype), w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, dtype, jnp.float32)
    # What the products may lose is the operands' last digits, nothing of the sums.
    rx, rw, rdy = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, w, dy))
    # Four standard deviations of a sum of n products, each step rounded once.
    sums = {n: 4 * np.sqrt(n) * ROUNDING["float32"] for n in (40, 50, 300)}
    assert relative(y, rx @ rw) < sums[40]
    assert relative(dw, rx.T @ rdy) < sums[300]
    expected = rdy @ rw.T
    atol = sums[50] * np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected, rtol=1.01 * ROUNDING[dtype], atol=atol)


def test_bfloat16_stays_near_float64():
    """Measured: at most 1.6 % of the root mean square in 12,000 to 15,000 values."""
    x, w, dy = numbers()
    y, dx, dw = forward_and_gradients(jnp.asarray(x, jnp.bfloat16), w, dy)
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    for ours, theirs in ((y, x @ w), (dx, dy @ w.T), (dw, x.T @ dy)):
        assert 1e-3 < relative(ours, theirs) < 2e-2


def test_every_product_takes_bfloat16_and_sums_in_float32():
    """The backward ones too: a float32 cotangent would pull them out of the matrix units."""

    def loss(x, w):
        return jnp.square(matmul(x, w)).sum()

    x, w, _ = numbers()
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(x, jnp.bfloat16), w)
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    for product in products:
        assert [v.aval.dtype for v in product.invars] == [jnp.bfloat16] * 2
    # The inputs' gradient, which is rounded anyway, is by GPUs as it is written.
    assert sorted(str(product.outvars[0].aval.dtype) for product in products) == ["bfloat16", *["float32"] * 3]


def test_linear_with_several_outputs_is_several_linears():
    bound = Bound(lambda rngs: Linear(8, (3, 5), stddev=1.0, rngs=rngs))
    rng = np.random.default_rng(1)
    params = {"kernel": rng.normal(size=(8, 3, 5)), "bias": rng.normal(size=(3, 5))}
    x = rng.normal(size=(2, 7, 8))
    single = jax.tree.map(lambda a: a.astype(np.float32), params)
    y = quick_jit(lambda params, x: bound(params)(x))(single, x.astype(np.float32))
    assert y.shape == (2, 7, 3, 5)
    for part in range(3):
        expected = x @ params["kernel"][:, part] + params["bias"][part]
        np.testing.assert_allclose(y[:, :, part], expected, rtol=1e-5, atol=2e-6)
