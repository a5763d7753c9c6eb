import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend import core
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracles.unrolled import execute

from ctx_jax.errors import InputError
from ctx_jax.flops.jaxpr import ALL_REDUCE, ARITHMETIC, BUCKETS, CALLS, JOINING, MOVEMENT, UNSUPPORTED, Count
from ctx_jax.flops.jaxpr import count as walk
from ctx_jax.flops.jaxpr import count_jaxpr as walk_jaxpr
from ctx_jax.nn.linear import matmul

f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
c64 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.complex64)


def buckets(counted):
    """Of a Count, what is not zero; and all it says must agree."""
    assert sum(counted.by_primitive.values()) == counted.flops
    assert counted.flops == counted.matrix + counted.elementwise + counted.reduction + counted.transcendental
    return {name: getattr(counted, name) for name in BUCKETS if getattr(counted, name)}


# Random programs: functions of x [N, D] to [N, D], and the oracle executes them.

POLICIES = [None, "dots_saveable", "nothing_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable"]


def _weights(rng, *shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32) / 2)


def _dense(rng, d):
    wide = int(rng.integers(1, 5))
    up, down = _weights(rng, d, wide), _weights(rng, wide, d)
    return lambda x: jnp.tanh(x @ up) @ down


def _bf16(rng, d):
    w = _weights(rng, d, d).astype(jnp.bfloat16)
    product = functools.partial(jnp.einsum, "nk,mk->nm", preferred_element_type=jnp.float32)
    return lambda x: product(x.astype(jnp.bfloat16), w)


def _custom_vjp(rng, d):
    w = _weights(rng, d, d)
    return lambda x: matmul(x, w)


def _attention(rng, d):
    def apply(x):
        weights = jax.nn.softmax(jnp.einsum("qd,kd->qk", x, x) / math.sqrt(d))
        return jnp.einsum("qk,kd->qd", weights, x)

    return apply


def _batched(rng, d):
    w = _weights(rng, 3, d, d)
    return lambda x: jnp.einsum("nd,hde->hne", x, w).max(0)


def _pointwise(rng, d):
    shapes = [
        lambda x: x + jax.nn.sigmoid(x),
        lambda x: jnp.where(x > 0, x, jnp.exp(x) - 1.0),
        lambda x: (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1.0),
        lambda x: x**5 / (1.0 + jnp.abs(x)) - jnp.maximum(jnp.sin(x), 0.5),
        lambda x: jnp.cumsum(x, 0),
        lambda x: -jnp.log(1.0 + x * x),
    ]
    return shapes[rng.integers(len(shapes))]


def _scan(rng, d, inner):
    length, reverse, unroll = int(rng.integers(0, 5)), bool(rng.integers(2)), int(rng.integers(1, 3))
    body_of, mixes, w = inner(), bool(rng.integers(2)), _weights(rng, length, 1, d)

    def body(carry, x):
        y = body_of(carry[0]) + (x if mixes else 0.0)
        return (y, carry[1] + 1), (y[:1] if mixes else None)

    def apply(x):
        (x, _), ys = jax.lax.scan(body, (x, 0), w, length=length, reverse=reverse, unroll=unroll)
        return x + ys.sum(0) if mixes else x

    return apply


def _while(rng, d, inner):
    """Bounds that are constants when tracing: every comparison, upwards and downwards, met exactly or passed over."""
    body, step, start, trips = inner(), int(rng.integers(1, 4)), int(rng.integers(-3, 4)), int(rng.integers(0, 4))
    name, down = str(rng.choice(["lt", "le", "gt", "ge", "ne", "fori"])), bool(rng.integers(2))
    sign = -1 if down else 1
    passed = int(rng.integers(0, step)) if trips and name != "ne" else 0
    bound = sign * (start + trips * step - passed)
    if name == "fori":
        return lambda x: jax.lax.fori_loop(jnp.int32(start), jnp.int32(start) + trips, lambda i, x: body(x), x)
    compare = {
        "lt": lambda i, n: i < n,
        "le": lambda i, n: i <= n,
        "gt": lambda i, n: n > i,
        "ge": lambda i, n: n >= i,
        "ne": lambda i, n: i != n,
    }[name]
    goes_on = lambda i, n: compare(n, i) if down else compare(i, n)
    advance = lambda i: i - step if down else step + i

    def carried(x):  # the bound is a carry, as fori_loop makes it
        start_carry = (jnp.int32(sign * start), jnp.int32(bound), x)
        return jax.lax.while_loop(
            lambda c: goes_on(c[0], c[1]), lambda c: (advance(c[0]), c[1], body(c[2])), start_carry
        )[2]

    def closed(x):
        return jax.lax.while_loop(
            lambda c: goes_on(c[1], bound), lambda c: (body(c[0]), advance(c[1])), (x, jnp.int32(sign * start))
        )[0]

    return carried if rng.integers(2) else closed


def _remat(rng, d, inner):
    name = POLICIES[rng.integers(len(POLICIES))]
    return jax.checkpoint(inner(), policy=name and getattr(jax.checkpoint_policies, name))


def _cond(rng, d, inner):
    one, other, threshold = inner(), inner(), float(rng.normal())
    return lambda x: jax.lax.cond(x.sum() > threshold, one, other, x)


def _jit(rng, d, inner):
    return jax.jit(inner())


def _vmap(rng, d, inner):
    apply = jax.vmap(inner())
    return lambda x: apply(jnp.stack([x, 2.0 * x, -x])).sum(0)


def _descend(rng, d, inner):
    apply = inner()
    return lambda x: x - 0.1 * jax.grad(lambda x: apply(x).sum())(x)


LEAVES = [_dense, _bf16, _custom_vjp, _attention, _batched, _pointwise]
NODES = [_scan, _scan, _scan, _remat, _cond, _jit, _vmap]


def random_program(rng, d, depth, nodes):
    """One to three pieces, one after the other; every second piece holds a smaller program."""
    pieces = []
    for _ in range(rng.integers(1, 4)):
        if depth and rng.integers(2):
            inner = lambda: random_program(rng, d, depth - 1, nodes)
            pieces.append(nodes[rng.integers(len(nodes))](rng, d, inner))
        else:
            pieces.append(LEAVES[rng.integers(len(LEAVES))](rng, d))
    return lambda x: functools.reduce(lambda x, piece: piece(x), pieces, x)


def check(fn, *args):
    jaxpr = jax.make_jaxpr(fn)(*args)
    _, tally = execute(jaxpr, *jax.tree.leaves(args))
    assert buckets(walk(fn, *args)) == tally, jaxpr
    return tally


def program_and_input(seed, nodes, depth=3):
    rng = np.random.default_rng(seed)
    n, d = (int(size) for size in rng.integers(1, 5, 2))
    return random_program(rng, d, depth, nodes), jnp.asarray(rng.normal(size=(n, d)).astype(np.float32))


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(s, marks=pytest.mark.slow) for s in range(20, 200))])
def test_random_program(seed):
    """Equals what an interpreter does that runs every trip: forward, and backward through everything."""
    program, x = program_and_input(seed, [*NODES, _descend])
    check(program, x)
    program, x = program_and_input(1000 + seed, NODES)
    check(jax.value_and_grad(lambda x: jnp.square(program(x)).sum()), x)


@pytest.mark.parametrize("seed", [*range(30), *(pytest.param(s, marks=pytest.mark.slow) for s in range(30, 200))])
def test_random_while_loops(seed):
    """Loops in loops; and vmapped, where the counters stay scalars."""
    program, x = program_and_input(2000 + seed, [_while, _while, _scan, _jit, _cond, _vmap], depth=2)
    check(program, x)


def test_random_programs_reach_everything():
    """What the random programs are made of, so that none of it goes untested unnoticed."""
    reached = set()

    def visit(jaxpr):
        for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            reached.add(equation.primitive.name)
            for inner in core.jaxprs_in_params(equation.params):
                visit(inner)

    for seed in range(20):
        program, x = program_and_input(1000 + seed, NODES)
        visit(jax.make_jaxpr(jax.grad(lambda x, f=program: f(x).sum()))(x))
        program, x = program_and_input(seed, [*NODES, _descend])
        visit(jax.make_jaxpr(program)(x))
        program, x = program_and_input(2000 + seed, [_while], depth=2)
        visit(jax.make_jaxpr(program)(x))
    assert {"scan", "while", "cond", "remat2", "jit", "custom_vjp_call", "dot_general", "reduce_max"} <= reached


# Single primitives, by hand.

X, Y = f32(3, 4), f32(4, 5)
SUM_OF_EXPS = lambda x, y: jnp.exp(x) + y
BY_HAND = {
    "product": (jnp.matmul, (X, Y), {"matrix": 2 * 3 * 4 * 5}),
    "product, transposed": (lambda x, y: jnp.einsum("km,nk->mn", x, y), (f32(4, 3), f32(5, 4)), {"matrix": 120}),
    "product, batched": (jnp.matmul, (f32(2, 3, 4), f32(2, 4, 5)), {"matrix": 240}),
    "outer product": (jnp.outer, (f32(3), f32(5)), {"elementwise": 15}),
    "inner product": (jnp.dot, (f32(7), f32(7)), {"matrix": 14}),
    "bfloat16 product with a float32 sum": (
        lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32),
        (jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), jax.ShapeDtypeStruct((4, 5), jnp.bfloat16)),
        {"matrix": 120},
    ),
    "integer product": (jnp.matmul, (i32(3, 4), i32(4, 5)), {"integer": 120}),
    "int8 product with an int32 sum": (
        lambda x: jnp.matmul(x, x, preferred_element_type=jnp.int32),
        (jax.ShapeDtypeStruct((3, 3), jnp.int8),),
        {"integer": 54},
    ),
    "complex product": (jnp.matmul, (c64(3, 4), c64(4, 5)), {"matrix": 8 * 60}),
    "ragged product": (jax.lax.ragged_dot, (f32(6, 4), f32(3, 4, 5), i32(3)), {"matrix": 2 * 6 * 4 * 5}),
    "product over nothing": (jnp.matmul, (f32(3, 0), f32(0, 5)), {}),
    "add": (jnp.add, (X, X), {"elementwise": 12}),
    "complex add": (jnp.add, (c64(3, 4), c64(3, 4)), {"elementwise": 24}),
    "complex mul": (jnp.multiply, (c64(3, 4), c64(3, 4)), {"elementwise": 72}),
    "complex div": (jnp.divide, (c64(3, 4), c64(3, 4)), {"elementwise": 132}),
    "integer add": (jnp.add, (i32(3, 4), i32(3, 4)), {"integer": 12}),
    "max": (jnp.maximum, (X, X), {"elementwise": 12}),
    "clamp": (lambda x: jax.lax.clamp(0.0, x, 1.0), (X,), {"elementwise": 24}),
    "fifth power": (lambda x: x**5, (X,), {"elementwise": 3 * 12}),
    "inverse square": (lambda x: jax.lax.integer_pow(x, -2), (X,), {"elementwise": 2 * 12}),
    "seventh power": (lambda x: x**7, (X,), {"elementwise": 4 * 12}),
    "zeroth power": (lambda x: jax.lax.integer_pow(x, 0), (X,), {}),
    "any power": (lambda x, y: x**y, (X, X), {"transcendental": 12}),
    "comparison": (jnp.less, (X, X), {"integer": 12}),
    "select": (lambda m, x: jnp.where(m, x, x), (jax.ShapeDtypeStruct((3, 4), jnp.bool_), X), {}),
    "sum": (jnp.sum, (X,), {"reduction": 11}),
    "sum of rows": (lambda x: x.sum(1), (X,), {"reduction": 9}),
    "sum of nothing": (lambda x: x.sum(0), (f32(0, 4),), {}),
    "complex sum": (jnp.sum, (c64(3, 4),), {"reduction": 22}),
    "integer sum": (jnp.sum, (i32(3, 4),), {"integer": 11}),
    "largest": (jnp.max, (X,), {"reduction": 11}),
    "argmax": (lambda x: jnp.argmax(x, 1), (X,), {"reduction": 9}),
    "reduction of one's own": (
        lambda x: jax.lax.reduce(x, 0.0, SUM_OF_EXPS, (1,)),
        (X,),
        {"reduction": 9, "transcendental": 9},
    ),
    "transcendentals": (lambda x: jnp.exp(jnp.tanh(jax.lax.rsqrt(x))), (X,), {"transcendental": 36}),
    "erf": (jax.lax.erf, (X,), {"transcendental": 12}),
    "cumsum": (lambda x: jnp.cumsum(x, 1), (X,), {"elementwise": 9}),
    "cumsum of integers": (lambda x: jax.lax.cumsum(x, 0), (i32(3, 4),), {"integer": 8}),
    "cumlogsumexp": (lambda x: jax.lax.cumlogsumexp(x, 1), (X,), {"transcendental": 18}),
    "sort": (lambda x: jnp.sort(x, 1), (f32(3, 5),), {"integer": 3 * 5 * 3}),
    "sort of one": (lambda x: jnp.sort(x, 1), (f32(3, 1),), {}),
    "top_k": (lambda x: jax.lax.top_k(x, 2), (f32(3, 5),), {"integer": 3 * 5 * 3}),
    "windows": (lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 2), (1, 1), "VALID"), (f32(4, 4),),
                {"reduction": 9 * 3}),
    "windows of one's own": (
        lambda x: jax.lax.reduce_window(x, 0.0, SUM_OF_EXPS, (2, 2), (1, 1), "VALID"), (f32(4, 4),),
        {"reduction": 27, "transcendental": 27}),
    "fft": (jnp.fft.fft, (c64(3, 8),), {"elementwise": 3 * 5 * 8 * 3}),
    "real fft": (jnp.fft.rfft, (f32(3, 8),), {"elementwise": 3 * 5 * 8 * 3 // 2}),
    "inverse real fft": (jnp.fft.irfft, (c64(3, 5),), {"elementwise": 3 * 5 * 8 * 3 // 2}),
    # First column: 2 divisions, 4 multiply-subtracts; second: 1 and 1.
    "lu": (lambda a: jax.lax.linalg.lu(a)[0], (f32(3, 3),), {"elementwise": 2 + 8 + 1 + 2}),
    # Two right-hand sides: 3 divisions and 3 multiply-subtracts each.
    "triangular solve": (
        lambda a, b: jax.lax.linalg.triangular_solve(a, b, left_side=True), (f32(3, 3), f32(3, 2)),
        {"elementwise": 2 * (3 + 6)}),
    "random bits": (lambda: jax.random.bits(jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32)), (3, 4)), (),
                    {"integer": 12}),
    "moves": (lambda x: jnp.stack([x.T.reshape(2, 6), jnp.zeros((2, 6))])[::-1, :, :2].astype(jnp.bfloat16), (X,), {}),
    "calls": (lambda x: jax.nn.relu(x) + jax.jit(jax.nn.silu)(x), (X,), {"elementwise": 36, "transcendental": 12}),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    fn, args, expected = BY_HAND[name]
    assert buckets(walk(fn, *args)) == expected


def test_scatter():
    index, updates = i32(2), f32(2, 4)
    assert walk(lambda x, i, u: x.at[i].add(u), X, index, updates).by_primitive == {"scatter-add": 8}
    assert walk(lambda x, i, u: x.at[i].multiply(u), X, index, updates).by_primitive == {"scatter-mul": 8}
    assert walk(lambda x, i, u: x.at[i].set(u), X, index, updates).flops == 0
    assert walk(lambda x, i, u: x.at[i].max(u), X, index, updates).elementwise == 8
    assert walk(lambda x, i: x.at[i].apply(jnp.exp), X, index).transcendental == 8
    # What embedding tables cost: nothing to look up, one addition an element of the gradient.
    looked_up = walk(jax.grad(lambda x, i: x[i].sum()), X, index)
    assert looked_up.by_primitive["scatter-add"] == 8


def test_pooling_and_its_gradient():
    pool = lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2, 2), (2, 2), "VALID").sum()
    assert buckets(walk(pool, f32(4, 4))) == {"reduction": 4 * 3 + 3}
    # 4 windows: 3 comparisons to find whose the gradient is, and an addition there.
    assert walk(jax.grad(pool), f32(4, 4)).by_primitive["select_and_scatter_add"] == 4 * 4


def test_solve():
    # Two matrices of 3 roots, 3 divisions, and 4 multiply-subtracts: one each in the first two columns' places, …
    cholesky = walk(lambda a: jax.lax.linalg.cholesky(a, symmetrize_input=False), f32(2, 3, 3))
    assert cholesky.by_primitive == {"cholesky": 2 * (3 + 3 + 2 * 4)}
    counted = walk(jnp.linalg.solve, f32(3, 3), f32(3, 2))
    assert counted.by_primitive == {"lu": 13, "triangular_solve": 2 * (6 + 9)}


# Closed forms.

B, D, H, E = 7, 5, 11, 3


def mlp_loss(params, x, y):
    w1, b1, w2, b2 = params
    out = jnp.tanh(x @ w1 + b1[None]) @ w2 + b2[None]
    return jnp.square(out - y).sum()


MLP = ((f32(D, H), f32(H), f32(H, E), f32(E)), f32(B, D), f32(B, E))


def test_mlp():
    forward = walk(mlp_loss, *MLP)
    products = 2 * B * D * H + 2 * B * H * E
    assert buckets(forward) == {
        "matrix": products,
        "elementwise": B * H + 3 * B * E,
        "reduction": B * E - 1,
        "transcendental": B * H,
    }
    # Two products for each of the forward pass, but the input needs no gradient.
    training = walk(jax.value_and_grad(mlp_loss), *MLP)
    assert training.matrix == 3 * products - 2 * B * D * H
    assert training.by_primitive["dot_general"] == training.matrix
    # The gradients of the biases sum over the batch.
    assert training.reduction == B * E - 1 + (B - 1) * (H + E)
    assert training.transcendental == B * H


@pytest.mark.parametrize(
    ("policy", "again"), [("everything_saveable", 0), ("dots_saveable", 0), ("nothing_saveable", 1)]
)
def test_remat_counts_what_it_computes_again(policy, again):
    layer = lambda x, w: jnp.tanh(x @ w)
    layer = jax.checkpoint(layer, policy=getattr(jax.checkpoint_policies, policy))
    loss = lambda x, w: layer(layer(x, w), w).sum()
    counted = walk(jax.value_and_grad(loss, argnums=(0, 1)), f32(B, D), f32(D, D))
    assert counted.matrix == (3 + again) * 2 * 2 * B * D * D


def test_every_trip_counts_and_xla_counts_one():
    """The reason for the module. When XLA counts trips, this fails, and may go."""
    n, trips = 16, 10
    layer = lambda x: x @ x
    scanned = lambda x: jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=trips)[0]
    unrolled = lambda x: functools.reduce(lambda x, _: layer(x), range(trips), x)
    xla = lambda fn: jax.jit(fn).lower(f32(n, n)).cost_analysis()["flops"]
    assert walk(scanned, f32(n, n)).flops == walk(unrolled, f32(n, n)).flops == trips * 2 * n**3
    assert xla(unrolled) == pytest.approx(trips * 2 * n**3, rel=0.02)
    assert xla(scanned) == pytest.approx(2 * n**3, rel=0.02)


def test_scan_in_scan_in_grad():
    inner = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=3)[0]
    outer = lambda x: jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=5)[0].sum()
    assert walk(jax.value_and_grad(outer), f32(4, 4)).matrix == 3 * 15 * 2 * 4**3


def test_dearer_branch():
    dear, cheap = lambda x: x @ x, lambda x: x + x
    for branches in ([dear, cheap], [cheap, dear], [cheap, dear, cheap]):
        counted = walk(lambda i, x, b=tuple(branches): jax.lax.switch(i, b, x), i32(), f32(4, 4))
        assert (counted.matrix, counted.elementwise) == (128, 0)


def test_nothing_is_allocated():
    counted = walk(lambda x, w: jnp.tanh(x @ w).sum(), f32(10**9, 10**6), f32(10**6, 10**6))
    assert (counted.matrix, counted.transcendental) == (2 * 10**21, 10**15)
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), "VALID")
    for long, short in ((10**13, 3), (3, 10**13)):  # of outputs and of taps
        assert walk(conv, f32(1, 1, long + short - 1), f32(1, 1, short)).matrix == 2 * 3 * 10**13


def test_arguments():
    key = jax.eval_shape(lambda: jax.random.key(0))
    tree = {"x": X, "rest": (Y, 2.0)}
    fn = lambda tree, key, *, bias: (
        jax.random.normal(key, (3, 5)) + tree["x"] @ tree["rest"][0] * tree["rest"][1] + bias
    )
    counted = walk(fn, tree, key, bias=f32(3, 5))
    assert counted.matrix == 120
    assert counted == walk_jaxpr(jax.make_jaxpr(fn)(tree, key, bias=f32(3, 5)))
    assert counted.by_primitive["erf_inv"] == 15
    assert counted.integer > 15  # random bits


def test_counts_add_and_multiply():
    one, two = walk(jnp.matmul, X, Y), walk(lambda x: jnp.exp(x) + x, X)
    both = sum([one, two, two], Count())
    assert both == one + 2 * two == two * 2 + one
    assert both.by_primitive == {"dot_general": 120, "exp": 24, "add": 24}
    assert 0 * both == Count()
    assert hash(both) == hash(one + 2 * two)


# Convolutions.


def brute_force_taps(inputs, taps, outputs, strides, padding, holes, dilations):
    """Multiply-adds of one channel in and out: lays the input out with its padding and holes, and looks at each tap."""
    real = np.ones(inputs)
    for axis, (hole, (low, high)) in enumerate(zip(holes, padding, strict=True)):
        spread = np.zeros([*real.shape[:axis], (real.shape[axis] - 1) * hole + 1, *real.shape[axis + 1 :]])
        spread[(slice(None),) * axis + (slice(None, None, hole),)] = real
        width = [(max(low, 0), max(high, 0)) if a == axis else (0, 0) for a in range(real.ndim)]
        cut = slice(max(-low, 0), spread.shape[axis] - max(-high, 0))
        real = np.pad(spread[(slice(None),) * axis + (cut,)], width)
    return sum(
        real[tuple(o * s + k * d for o, s, k, d in zip(position, strides, tap, dilations, strict=True))]
        for position in np.ndindex(*outputs)
        for tap in np.ndindex(*taps)
    )


def random_convolution(rng, batch_groups):
    dims = int(rng.integers(1, 3))
    draw = lambda low, high: [int(v) for v in rng.integers(low, high, dims)]
    groups, per_group, out_per_group = (int(v) for v in rng.integers(1, 4, 3))
    batch = int(rng.integers(1, 3))
    options = {
        "window_strides": draw(1, 4),
        "padding": [(int(rng.integers(-1, 4)), int(rng.integers(0, 4))) for _ in range(dims)],
        "lhs_dilation": draw(1, 4) if rng.integers(2) else [1] * dims,
        "rhs_dilation": draw(1, 3),
    }
    spatial, taps = draw(4, 8), draw(1, 4)
    if batch_groups:
        options["batch_group_count"] = groups
        x, w = f32(batch * groups, per_group, *spatial), f32(groups * out_per_group, per_group, *taps)
    else:
        options["feature_group_count"] = groups
        x, w = f32(batch, groups * per_group, *spatial), f32(groups * out_per_group, per_group, *taps)
    conv = functools.partial(jax.lax.conv_general_dilated, **options)
    return conv, x, w, options


@pytest.mark.parametrize("batch_groups", [False, True])
def test_convolution(batch_groups):
    """Against looking at every tap; and its gradients cost what it costs."""
    rng, reached = np.random.default_rng(5 + batch_groups), 0
    for _ in range(60):
        conv, x, w, options = random_convolution(rng, batch_groups)
        try:
            out = jax.eval_shape(conv, x, w)
        except ValueError:
            continue  # holes and cuts left nothing to convolve
        taps = brute_force_taps(
            x.shape[2:],
            w.shape[2:],
            out.shape[2:],
            options["window_strides"],
            options["padding"],
            options["lhs_dilation"],
            options["rhs_dilation"],
        )
        expected = 2 * out.shape[0] * out.shape[1] * w.shape[1] * int(taps)
        assert buckets(walk(conv, x, w)) == ({"matrix": expected} if expected else {}), options
        backward = jax.value_and_grad(lambda x, w, conv=conv: conv(x, w).sum(), argnums=(0, 1))
        if 0 not in out.shape:
            assert walk(backward, x, w).matrix == 3 * expected, options
            reached += expected > 0
    assert reached > 30


def test_convolution_by_hand():
    conv = lambda padding: lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), padding)
    x, w = f32(2, 3, 6, 6), f32(5, 3, 3, 3)
    assert walk(conv("VALID"), x, w).matrix == 2 * (2 * 5 * 4 * 4) * (3 * 3 * 3)
    # With "SAME", of 3·6 taps a dimension the 2 at the edges fall on padding.
    assert walk(conv("SAME"), x, w).matrix == 2 * (2 * 5 * 3) * (3 * 6 - 2) ** 2
    assert walk(conv("SAME"), i32(2, 3, 6, 6), i32(5, 3, 3, 3)).flops == 0
    assert walk(conv("VALID"), c64(2, 3, 6, 6), c64(5, 3, 3, 3)).matrix == 8 * (2 * 5 * 4 * 4) * (3 * 3 * 3)


def test_convolution_of_another_layout():
    conv = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 2), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    same = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 2), padding="SAME")
    x, w = f32(2, 5, 7, 3), f32(3, 2, 3, 4)
    assert walk(conv, x, w) == walk(same, f32(2, 3, 5, 7), f32(4, 3, 3, 2))


# Devices.


def mesh(*sizes):
    return jax.make_mesh(sizes, ("a", "b")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def test_shard_map_counts_all_devices():
    """Data-parallel over 4 × 2 devices: in all, and in its gradients' reductions, what one device would do."""
    mlp = lambda params, x, y: mlp_loss(params, x, y)
    params, x, y = MLP[0], f32(16, D), f32(16, E)
    local = lambda params, x, y: jax.lax.psum(mlp_loss(params, x, y), ("a", "b"))
    sharded = jax.shard_map(local, mesh=mesh(4, 2), in_specs=(P(), P(("a", "b")), P(("a", "b"))), out_specs=P())
    assert buckets(walk(sharded, params, x, y)) == buckets(walk(mlp, params, x, y))
    training = walk(jax.jit(jax.value_and_grad(sharded)), params, x, y)
    alone = walk(jax.value_and_grad(mlp), params, x, y)
    assert (training.matrix, training.transcendental) == (alone.matrix, alone.transcendental)
    # The weights' gradients are products: their terms of 8 devices are summed on top. The biases' are sums already.
    assert training.reduction == alone.reduction + 7 * (D * H + H * E)


def test_shard_map_sums_products():
    """Contraction split over two devices: the same product, and one addition for each element of the result."""
    multiply = lambda x, w: jax.lax.psum(x @ w, "b")
    sharded = jax.shard_map(multiply, mesh=mesh(4, 2), in_specs=(P("a", "b"), P("b")), out_specs=P("a"))
    counted = walk(sharded, f32(8, 6), f32(6, 5))
    assert buckets(counted) == {"matrix": 2 * 8 * 6 * 5, "reduction": 8 * 5}
    scatter = lambda x, w: jax.lax.psum_scatter(x @ w, "b", tiled=True)
    sharded = jax.shard_map(scatter, mesh=mesh(4, 2), in_specs=(P("a", "b"), P("b")), out_specs=P(("a", "b")))
    assert buckets(walk(sharded, f32(8, 6), f32(6, 5))) == buckets(counted)


def test_shard_map_over_some_axes():
    square = lambda x: jax.lax.scan(lambda c, _: (c * c, None), x, None, length=3)[0]
    some = jax.shard_map(square, mesh=mesh(4, 2), in_specs=P("a"), out_specs=P("a"), axis_names={"a"})
    every = jax.shard_map(square, mesh=mesh(4, 2), in_specs=P("a"), out_specs=P("a"), check_vma=False)
    assert walk(some, f32(8, 3)).elementwise == 3 * 8 * 3
    # Both devices of "b" do the same: that is what the mesh computes.
    assert walk(every, f32(8, 3)).elementwise == 2 * 3 * 8 * 3


def test_shard_map_in_shard_map():
    inner = jax.shard_map(lambda x: x * x, in_specs=P(None, "b"), out_specs=P(None, "b"), axis_names={"b"})
    outer = jax.shard_map(inner, mesh=mesh(4, 2), in_specs=P("a"), out_specs=P("a"), axis_names={"a"})
    assert walk(outer, f32(8, 6)).elementwise == 48


def test_sums_over_a_mapped_axis_and_over_groups():
    mapped = jax.vmap(lambda x: jax.lax.psum(x, "i"), axis_name="i")
    assert buckets(walk(mapped, f32(8, 4))) == {"reduction": 7 * 4}
    summed = lambda x: jax.lax.psum(x, "a", axis_index_groups=[[0, 1], [2, 3]])
    sharded = jax.shard_map(summed, mesh=mesh(4), in_specs=P("a"), out_specs=P("a"), check_vma=False)
    # Two groups of two devices, one addition for each of a device's 6 elements.
    assert buckets(walk(sharded, f32(8, 3))) == {"reduction": 2 * 6}


def test_axis_of_unknown_size():
    jaxpr = jax.make_jaxpr(lambda x: jax.lax.psum(x, "rows"), axis_env=[("rows", 4)])(X)
    with pytest.raises(InputError, match=r"psum.*rows"):
        walk_jaxpr(jaxpr)


# Loops.


def test_bounds_come_through_calls():
    loop = jax.jit(lambda n, x: jax.lax.fori_loop(0, n + 1, lambda i, x: x @ x, x))
    assert walk(lambda x: loop(jnp.int32(4), x), f32(3, 3)).matrix == 5 * 54
    nested = lambda x: jax.lax.fori_loop(jnp.int32(0), jnp.int32(3), lambda i, x: loop(jnp.int32(4), x), x)
    assert walk(nested, f32(3, 3)).matrix == 15 * 54


def test_counters_go_through_calls():
    goes_on, advance = jax.jit(lambda i: i < 4), jax.jit(lambda i: i + 1)
    loop = lambda x: jax.lax.while_loop(
        lambda c: goes_on(c[0]), lambda c: (advance(c[0]), c[1] @ c[1]), (jnp.int32(0), x)
    )
    assert walk(loop, f32(3, 3)).matrix == 4 * 54


def test_inside_another_trace():
    counts = []

    @jax.make_jaxpr
    def outer(n, x):
        loop = lambda x: jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)
        with pytest.raises(InputError, match="while_trips"):
            walk(loop, x)
        counts.append(walk(loop, x, while_trips=2))

    outer(5, f32(3, 3))
    assert counts[0].matrix == 2 * 54


def test_condition_runs_once_more():
    counted = walk(lambda x: jax.lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, c[1]), (jnp.int32(0), x)), X)
    assert counted.integer == 5 + 4
    dear = lambda c: (c[1] @ c[1]).sum() < 1.0
    counted = walk(lambda x: jax.lax.while_loop(dear, lambda c: c, (0, x)), f32(3, 3), while_trips=2)
    assert counted.matrix == 3 * 54


def test_loops_without_a_proof():
    f = lambda condition, step, start: (
        lambda x: jax.lax.while_loop(lambda c: condition(c[0]), lambda c: (step(c[0]), c[1] * 2.0), (start, x))
    )
    wraps = f(lambda i: i < 120, lambda i: i + jnp.int8(50), jnp.int8(0))
    twice = jax.jit(lambda n: n + n)
    unbounded = {
        "wrong way": f(lambda i: i < 5, lambda i: i - 1, jnp.int32(0)),
        "missed": f(lambda i: i != 5, lambda i: i + 2, jnp.int32(0)),
        "never moves": f(lambda i: i < 5, lambda i: i, jnp.int32(0)),
        "doubles": f(lambda i: i < 5, lambda i: i * 2, jnp.int32(1)),
        "float": f(lambda i: i < 5.0, lambda i: i + 1.0, 0.0),
        "wraps": wraps,
        "swaps": lambda x: jax.lax.while_loop(
            lambda c: c[0] < 5, lambda c: (c[1] + 1, c[0], c[2] * 2.0), (jnp.int32(0), jnp.int32(0), x)
        ),
        "doubles and adds": f(lambda i: i < 5, lambda i: i + i + 1, jnp.int32(1)),
        "wraps when compared": f(lambda i: i.astype(jnp.int8) < 100, lambda i: i + 90, jnp.int32(0)),
        "bound wraps": f(lambda i: i < twice(jnp.int8(100)).astype(jnp.int32), lambda i: i + 1, jnp.int32(0)),
        "on data": lambda x: jax.lax.while_loop(lambda x: x.sum() < 10.0, lambda x: x * 2.0, x),
        "two conditions": f(lambda i: (i < 5) & (i != 3), lambda i: i + 1, jnp.int32(0)),
        "flags": lambda x: jax.lax.while_loop(
            lambda c: c[0] != c[1], lambda c: c, (jnp.int32(3) < 4, jnp.int32(3) < 4, x)
        ),
    }
    for name, loop in unbounded.items():
        with pytest.raises(InputError, match="while_trips"):
            walk(loop, X)
        if name not in ("on data", "flags"):
            assert walk(loop, X, while_trips=3).by_primitive["mul"] == 36, name
    assert walk(f(lambda i: i < 100, lambda i: i + jnp.int8(50), jnp.int8(0)), X).elementwise == 24


def line_of(fn, offset):
    return f"test_jaxpr.py:{fn.__code__.co_firstlineno + offset}"


def test_error_names_the_line_of_the_loop():
    def search(n, x):
        y = jnp.exp(x)
        return jax.lax.fori_loop(0, n, lambda i, y: y * 2.0, y)

    with pytest.raises(InputError, match="while_trips=") as error:
        walk(jax.jit(jax.vmap(search, (None, 0))), 5, X)
    assert line_of(search, 2) in str(error.value)
    assert "\n" not in str(error.value)
    assert walk(search, 5, X, while_trips=6).by_primitive == {"exp": 12, "mul": 72}
    with pytest.raises(InputError, match="-1"):
        walk(search, 5, X, while_trips=-1)


# What cannot be known.


def test_unknown_primitive():
    twist = core.Primitive("twist")
    twist.def_abstract_eval(lambda x: x)

    def twisted(x):
        return twist.bind(x) + 1.0

    looped = jax.jit(lambda x: jax.lax.scan(lambda c, _: (twisted(c), None), x, None, length=3)[0])
    with pytest.raises(InputError, match=r"'twist'.*custom_calls") as error:
        walk(looped, X)
    assert line_of(twisted, 1) in str(error.value)
    assert walk(looped, X, custom_calls={"twist": 100}).by_primitive == {"twist": 300, "add": 36}
    of_equation = lambda equation: equation.outvars[0].aval.size * 7
    assert walk(looped, X, custom_calls={"twist": of_equation}).matrix == 3 * 12 * 7


def test_kernels():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2.0

    def double(cost):
        call = pl.pallas_call(kernel, out_shape=f32(8, 128), interpret=True, name="double", cost_estimate=cost)
        return lambda x: call(x)

    with pytest.raises(InputError, match=r"test_jaxpr.py.*'double'.*cost_estimate"):
        walk(double(None), f32(8, 128))
    assert walk(double(None), f32(8, 128), custom_calls={"double": 1024}).matrix == 1024
    assert walk(double(None), f32(8, 128), custom_calls={"pallas_call": 1024}).matrix == 1024
    cost = pl.CostEstimate(flops=1000, transcendentals=20, bytes_accessed=1)
    assert buckets(walk(double(cost), f32(8, 128))) == {"matrix": 1000, "transcendental": 20}
    assert walk(double(cost), f32(8, 128), custom_calls={"double": 3}).flops == 3


def test_of_branches_for_devices_the_one_for_all_others_counts():
    dear, cheap = (lambda x: x * x * x * x), (lambda x: x + x)
    assert walk(lambda x: jax.lax.platform_dependent(x, cuda=dear, tpu=dear, default=cheap), X).flops == 12
    assert walk(lambda x: jax.lax.platform_dependent(x, cpu=cheap, cuda=dear), X).flops == 36


def test_foreign_code():
    callback = lambda x: jax.pure_callback(np.sin, x, x)
    with pytest.raises(InputError, match="'pure_callback' runs code"):
        walk(callback, X)
    assert walk(callback, X, custom_calls={"pure_callback": 12}).flops == 12
    foreign = lambda x: jax.ffi.ffi_call("flash", X)(x)
    with pytest.raises(InputError, match="'flash' runs code"):
        walk(foreign, X)
    assert walk(foreign, X, custom_calls={"flash": 5}).flops == 5
    with pytest.raises(InputError, match=r"test_jaxpr.py:\d+.*'svd' has no single textbook count"):
        walk(lambda x: jnp.linalg.svd(x), X)
    with pytest.raises(InputError, match="'random_gamma'"):
        walk(lambda: jax.random.gamma(jax.random.key(0), 2.0))


STRUCTURE = {"scan", "while", "cond", "shard_map"}


def test_every_primitive_of_jax_has_its_place():
    modules = [jax.lax, jax.lax.linalg, jax.extend.core.primitives]
    names = {value.name for module in modules for key, value in vars(module).items() if key.endswith("_p")}
    assert len(names) > 150
    tables = [ARITHMETIC, JOINING, ALL_REDUCE, MOVEMENT, CALLS, UNSUPPORTED, STRUCTURE]
    known = set().union(*tables)
    assert names - known == set()
    assert sum(map(len, tables)) == len(known), "a primitive in two tables"


def test_what_jax_commonly_emits_is_known():
    x, key = f32(6, 4), jax.eval_shape(lambda: jax.random.key(0))
    functions = [
        jnp.median, jnp.var, lambda x: jnp.unique(x, size=3), jax.nn.logsumexp, jax.nn.gelu, jax.nn.log_softmax,
        lambda x: jax.nn.gelu(x, approximate=False), jax.nn.softplus, jax.nn.silu, jnp.linalg.norm, jnp.cumprod,
        lambda x: jnp.quantile(x, 0.3), lambda x: jnp.interp(x[0], x[1], x[2]), lambda x: jnp.convolve(x[0], x[1]),
        lambda x: jnp.nonzero(x > 0, size=4), lambda x: jnp.searchsorted(x[0], x[1]), lambda x: jnp.histogram(x, 4),
        lambda x: jnp.take_along_axis(x, jnp.argsort(x, 0), 0), jnp.trace, jnp.diff, jnp.sort, jnp.round, jnp.isnan,
        lambda x: jnp.linalg.det(x[:4]), lambda x: jnp.linalg.inv(x[:4]), lambda x: jnp.kron(x, x),
        lambda x: jax.image.resize(x, (3, 8), "bilinear"), lambda x: jax.lax.associative_scan(jnp.add, x),
        lambda x: jax.lax.map(jnp.sum, x, batch_size=4), lambda x: jnp.fft.fft2(x).real, lambda x: x // 2.0 + x % 3.0,
        lambda x: jax.nn.dot_product_attention(*[x.reshape(1, 3, 2, 4)] * 3), lambda x: jax.lax.top_k(x, 2),
        lambda x: jax.scipy.special.betainc(x, x, x), jax.hessian(lambda x: jnp.tanh(x).sum()), jax.jacfwd(jnp.sin),
        lambda x: jax.nn.one_hot(x[0].astype(int), 3),
    ]  # fmt: skip
    for fn in functions:
        counted = walk(fn, x)
        assert counted.flops + counted.integer > 0
    draws = [
        jax.random.normal, jax.random.uniform, jax.random.gumbel, jax.random.exponential, jax.random.laplace,
        jax.random.rademacher, jax.random.cauchy, lambda key, shape: jax.random.bernoulli(key, 0.1, shape),
        lambda key, shape: jax.random.truncated_normal(key, -2.0, 2.0, shape),
        lambda key, shape: jax.random.randint(key, shape, 0, 7), lambda key, shape: jax.random.permutation(key, 12),
        lambda key, shape: jax.random.categorical(key, jnp.ones(shape)),
        lambda key, shape: jax.random.choice(jax.random.split(key)[0], 12, (3,), replace=False),
    ]  # fmt: skip
    for draw in draws:
        assert walk(lambda key, draw=draw: draw(key, (3, 4)), key).integer > 0
    optax = pytest.importorskip("optax")
    for make in (optax.adamw, optax.lamb, optax.lion, optax.sgd):
        tx = optax.chain(optax.clip_by_global_norm(1.0), make(1e-3))
        params = {"w": x, "b": f32(4)}
        step = lambda params, grads, tx=tx: tx.update(grads, tx.init(params), params)
        with jax.numpy_dtype_promotion("standard"):
            assert walk(step, params, params).elementwise >= 28
