"""Every optimizer against float64 NumPy written from the papers' formulas, on a tree named as the models' are."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ctx_jax.errors import InputError
from ctx_jax.train.optimizer import KINDS, Optimizer, decay_mask
from ctx_jax.train.schedules import Schedule

STEPS = 12
SCHEDULE = Schedule(kind="linear", peak=0.05, warmup_steps=3, total_steps=20)
DECAYED = {
    "embeddings/token/table",
    "layers/attention/qkv/kernel",
    "layers/attention/out/kernel",
    "layers/feed_forward/gated_up/kernel",
    "layers/norm/matrix",
    "pooler/kernel",
}
NOT_DECAYED = {"layers/attention/qkv/bias", "layers/norm/scale", "layers/norm/bias", "embeddings/norm/scale"}
NOT_DECAYED |= {"mlm/output_bias", "pooler/bias"}


def tree(rng, scale=1.0, dtype=np.float64):
    """Three stacked layers; layers differ a hundredfold in size, so that a norm over all of them is no layer's norm."""

    def array(*shape):
        values = rng.normal(size=shape) * scale
        if shape[0] == 3:
            values *= np.array([0.1, 1.0, 10.0]).reshape(3, *[1] * (len(shape) - 1))
        return values.astype(dtype)

    return {
        "embeddings": {"token": {"table": array(7, 4)}, "norm": {"scale": array(4)}},
        "layers": {
            "attention": {
                "qkv": {"kernel": array(3, 4, 3, 4), "bias": array(3, 3, 4)},
                "out": {"kernel": array(3, 4, 4)},
            },
            "feed_forward": {"gated_up": {"kernel": array(3, 4, 2, 6)}},
            "norm": {"scale": array(3, 4), "bias": array(3, 4), "matrix": array(3, 2, 5)},
        },
        "pooler": {"kernel": array(4, 4), "bias": array(4)},
        "mlm": {"output_bias": array(7)},
    }


def flat(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def problem(seed=0):
    """Parameters and STEPS gradients; every third gradient is small enough not to be clipped."""
    rng = np.random.default_rng(seed)
    params = tree(rng)
    return params, [tree(rng, scale=0.002 if step % 3 == 0 else 0.7) for step in range(STEPS)]


def learning_rate(step):
    return 0.05 * step / 3 if step < 3 else 0.05 * (20 - step) / 17


def matrices(name, leaf):
    """Index of each weight matrix of a leaf, as the original models store them."""
    layers = [(layer,) for layer in range(3)] if name.startswith("layers") else [()]
    stored_as_one = 3 if "qkv/kernel" in name else 2 if "gated_up/kernel" in name else 0
    parts = [(slice(None), which) for which in range(stored_as_one)] or [()]
    return [layer + part for layer in layers for part in parts]


def oracle(
    kind, params, grads, clip_norm, *, eps=None, corrected=None, decay=0.01, exclude=NOT_DECAYED, per_matrix=True
):
    """The formulas of the papers (and of BERT's and bilm-tf's code) in float64, leaf by leaf."""
    params = {name: value.copy() for name, value in flat(params).items()}
    eps = {"bert_adamw": 1e-6, "adamw": 1e-8, "lamb": 1e-6, "adagrad": 0}[kind] if eps is None else eps
    corrected = kind != "bert_adamw" if corrected is None else corrected
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.ones_like(value) * (kind == "adagrad") for name, value in params.items()}
    for step, tree_of_grads in enumerate(grads):
        g = flat(tree_of_grads)
        norm = math.sqrt(sum(float(np.sum(x**2)) for x in g.values()))
        g = {name: x * clip_norm / max(norm, clip_norm) for name, x in g.items()}
        for name, p in params.items():
            lr = learning_rate(step)
            if kind == "adagrad":
                v[name] += g[name] ** 2
                p -= lr * g[name] / np.sqrt(v[name])
                continue
            m[name] = 0.9 * m[name] + 0.1 * g[name]
            v[name] = 0.999 * v[name] + 0.001 * g[name] ** 2
            debias = (1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)) if corrected else (1, 1)
            u = m[name] / debias[0] / (np.sqrt(v[name] / debias[1]) + eps)
            if name not in exclude:
                u = u + decay * p
            if kind == "lamb" and name not in exclude:
                for index in matrices(name, p) if per_matrix else [...]:
                    u[index] *= np.linalg.norm(p[index]) / np.linalg.norm(u[index])
            p -= lr * u
    return params


def run(optimizer, params, grads, dtype=jnp.float32):
    transformation = optimizer.build()
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)

    @jax.jit
    def update(params, state, grad):
        updates, state = transformation.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(transformation.init)(params)
    for grad in grads:
        params, state = update(params, state, jax.tree.map(lambda x: jnp.asarray(x, dtype), grad))
    return params, state


@functools.cache
def trained(kind):
    """The parameters after `problem()`."""
    return run(Optimizer(kind, SCHEDULE), *problem())[0]


def largest_difference(ours, expected):
    """Largest difference of any leaf, relative to how far the leaf's values reach."""
    ours = flat(ours)
    return max(np.max(np.abs(ours[name] - x)) / np.max(np.abs(x)) for name, x in expected.items())


CLIP = {"bert_adamw": 1.0, "adamw": 1.0, "lamb": 1.0, "adagrad": 10.0}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formulas(kind):
    assert largest_difference(trained(kind), oracle(kind, *problem(), CLIP[kind])) < 1e-6


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("bert_adamw", {"corrected": True}),
        ("bert_adamw", {"eps": 1e-3}),
        ("bert_adamw", {"decay": 0.0}),
        ("bert_adamw", {"exclude": set()}),
        ("bert_adamw", {"exclude": NOT_DECAYED - {"layers/norm/scale"}}),
        ("bert_adamw", {"exclude": NOT_DECAYED - {"mlm/output_bias"}}),
        ("bert_adamw", {"clip_norm": 1e9}),
        ("adamw", {"corrected": False}),
        ("adamw", {"exclude": set()}),
        ("lamb", {"corrected": False}),
        ("lamb", {"exclude": set()}),
        ("lamb", {"per_matrix": False}),
        ("adagrad", {"clip_norm": 1.0}),
        ("adagrad", {"eps": 0.1, "clip_norm": 1e9}),
    ],
    # Sets in their order: every process that collects must find the same names.
    ids=lambda value: (
        str({key: sorted(v) if isinstance(v, set | frozenset) else v for key, v in value.items()})
        if isinstance(value, dict)
        else str(value)
    ),
)
def test_the_wrong_formulas_are_far_off(kind, wrong):
    """The comparison above would notice: each deviation is at least a thousand times its tolerance."""
    expected = oracle(kind, *problem(), **{"clip_norm": CLIP[kind], **wrong})
    assert largest_difference(trained(kind), expected) > 1e-3


def run_optax(transformation, params, grads):
    single = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    params = single(params)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        state, update = transformation.init(params), jax.jit(transformation.update)
        for grad in grads:
            updates, state = update(single(grad), state, params)
            params = optax.apply_updates(params, updates)
    return params


def test_adamw_is_optax_adamw():
    params, grads = problem()
    ours, _ = run(Optimizer("adamw", SCHEDULE, clip_norm=math.inf), params, grads)
    theirs = run_optax(optax.adamw(SCHEDULE.build(), eps=1e-8, weight_decay=0.01, mask=decay_mask), params, grads)
    assert largest_difference(ours, flat(theirs)) < 1e-5


def test_decay_goes_by_name():
    mask = decay_mask(jax.tree.map(jnp.asarray, problem()[0]))
    decided = {
        jax.tree_util.keystr(path, simple=True, separator="/"): value
        for path, value in jax.tree_util.tree_leaves_with_path(mask)
    }
    assert decided == dict.fromkeys(DECAYED, True) | dict.fromkeys(NOT_DECAYED, False)


def unstack(params):
    """Every layer, and every one of query, key and value, as a tree entry of its own."""
    out = {name: value for name, value in params.items() if name != "layers"}
    for layer in range(3):
        one = jax.tree.map(lambda x, layer=layer: x[layer], params["layers"])
        qkv = one["attention"].pop("qkv")
        for which, name in enumerate(("query", "key", "value")):
            one["attention"][name] = {"kernel": qkv["kernel"][:, which], "bias": qkv["bias"][which]}
        out[f"layer_{layer}"] = one
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_layers_train_like_separate_ones(kind):
    params, grads = problem(seed=1)
    stacked, _ = run(Optimizer(kind, SCHEDULE), params, grads)
    separate, _ = run(Optimizer(kind, SCHEDULE), unstack(params), [unstack(g) for g in grads])
    assert largest_difference(unstack(stacked), flat(separate)) < 1e-6


def test_optax_lamb_would_mix_the_layers():
    """Why LAMB's trust ratio is ours: optax takes one norm over all layers of a stacked leaf."""
    params, grads = problem(seed=1)
    lamb = optax.lamb(0.05, weight_decay=0.01, mask=decay_mask)
    stacked, separate = run_optax(lamb, params, grads), run_optax(lamb, unstack(params), [unstack(g) for g in grads])
    assert largest_difference(unstack(stacked), flat(separate)) > 0.05


def test_lamb_takes_a_ratio_of_one_where_a_norm_is_zero():
    params = {"layers": {"out": {"kernel": np.stack([np.zeros((2, 2)), np.ones((2, 2))])}}}
    constant = Schedule(kind="constant", peak=0.1)
    optimizer = Optimizer("lamb", constant, weight_decay=0.0, clip_norm=math.inf)
    grad = {"layers": {"out": {"kernel": np.ones((2, 2, 2))}}}
    ours, _ = run(optimizer, params, [grad])
    # Adam's first step is the sign of the gradient, whose norm here is 2, as is that of the second layer's weights.
    np.testing.assert_allclose(ours["layers"]["out"]["kernel"][0], -0.1, rtol=1e-5)
    np.testing.assert_allclose(ours["layers"]["out"]["kernel"][1], 0.9, rtol=1e-5)
    still, _ = run(optimizer, params, [jax.tree.map(np.zeros_like, grad)])
    np.testing.assert_array_equal(still["layers"]["out"]["kernel"], params["layers"]["out"]["kernel"])


def test_clips_by_the_global_norm():
    """A gradient thirty times too long trains like the same gradient cut to norm 1; a short one is left alone."""
    params, grads = problem()
    grads = [grads[1]]
    norm = float(optax.tree.norm(grads[0]))
    assert norm > 10
    cut = [jax.tree.map(lambda x: x / norm, grads[0])]
    free = Optimizer("adagrad", Schedule(kind="constant", peak=0.2), clip_norm=math.inf)
    clipped = Optimizer("adagrad", Schedule(kind="constant", peak=0.2), clip_norm=1.0)
    assert largest_difference(run(clipped, params, grads)[0], flat(run(free, params, cut)[0])) < 1e-6
    short = [jax.tree.map(lambda x: x / 2, cut[0])]
    assert largest_difference(run(clipped, params, short)[0], flat(run(free, params, short)[0])) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_float32_under_bfloat16_parameters(kind):
    params, grads = problem()
    ours, state = run(Optimizer(kind, SCHEDULE), params, grads, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.bfloat16)}
    moments = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert moments.count(jnp.float32) == len(moments) == len(jax.tree.leaves(ours)) * (1 if kind == "adagrad" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_donated_and_sharded(kind):
    """Sharded over eight devices, in place, and with the numbers of one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    params = {"layers": {"out": {"kernel": rng.normal(size=(3, 16, 4)), "bias": rng.normal(size=(3, 16))}}}
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape), params) for _ in range(3)]
    expected, _ = run(Optimizer(kind, SCHEDULE), params, grads)
    transformation = Optimizer(kind, SCHEDULE).build()
    sharded, replicated = NamedSharding(mesh, PartitionSpec(None, "data")), NamedSharding(mesh, PartitionSpec())
    put = lambda tree: jax.tree.map(lambda x: jax.device_put(x.astype(np.float32), sharded), tree)
    params = put(params)
    shapes = jax.eval_shape(transformation.init, params)
    shardings = jax.tree.map(lambda x: sharded if x.ndim else replicated, shapes)
    state = jax.jit(transformation.init, out_shardings=shardings)(params)

    def update(params, state, grad):
        updates, state = transformation.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(update, donate_argnums=(0, 1))
    for grad in grads:
        given = params, state
        params, state = step(params, state, put(grad))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert all(leaf.sharding.is_equivalent_to(sharded, leaf.ndim) for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert largest_difference(params, flat(expected)) < 1e-6


def test_settings_are_the_published_ones_unless_given():
    assert Optimizer("adagrad").settings == {"initial_accumulator": 1.0, "clip_norm": 10.0}
    assert Optimizer("lamb", b2=0.99).settings["b2"] == 0.99
    assert Optimizer("lamb").settings["b2"] == 0.999
    assert hash(Optimizer()) == hash(Optimizer())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "adamv"}, r"Optimizer.kind: 'adamv' \(did you mean 'adamw'\?\), expected one of bert_adamw"),
        ({"b1": 1.0}, "Optimizer.b1: 1.0, expected at least 0 and less than 1"),
        ({"eps": -1e-6}, "Optimizer.eps: -1e-06, expected a finite"),
        ({"weight_decay": math.inf}, "Optimizer.weight_decay: inf, expected a finite"),
        ({"clip_norm": 0.0}, "Optimizer.clip_norm: 0.0, expected more than 0"),
        ({"clip_norm": math.nan}, "Optimizer.clip_norm: nan, expected more than 0"),
        ({"kind": "adagrad", "weight_decay": 0.01}, "Optimizer.weight_decay: 0.01 with kind 'adagrad', which has only"),
        ({"initial_accumulator": 1.0}, "Optimizer.initial_accumulator: 1.0 with kind 'bert_adamw', which has only b1"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(InputError, match=message):
        Optimizer(**settings)
