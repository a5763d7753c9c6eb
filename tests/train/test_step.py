"""The training step: micro-batches and meshes change nothing, the state is donated and born where it belongs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles.compiling import quick_jit
from oracles.parameters import random_params
from oracles.rows import make_examples, rows_of, vocabulary

from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.nn.parameters import Bound, flat_paths
from ctx_jax.objectives.mlm import MaskedLM, MaskedLMObjective
from ctx_jax.sharding import MeshShape, make_mesh, put_batch, replicated, tree_shardings
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule
from ctx_jax.train.step import TrainState, init_state, make_eval_step, make_train_step, row_keys

CONFIG = BertConfig(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, max_position_embeddings=32
)
BOUND = Bound(lambda rngs: BertWithHeads(CONFIG, rngs=rngs))
LENGTH, ROWS = 32, 8
OBJECTIVE = MaskedLMObjective(MaskedLM(rate=0.3, next_sentence=True), vocabulary(64), length=LENGTH, examples_per_row=3)


def remember_gradients(inner):
    """`inner`, with the gradients beside its state."""
    return optax.GradientTransformation(
        lambda params: (jax.tree.map(jnp.zeros_like, params), inner.init(params)),
        lambda gradients, state, params: ((new := inner.update(gradients, state[1], params))[0], (gradients, new[1])),
    )


SGD = remember_gradients(optax.sgd(0.05, momentum=0.9))


@functools.cache
def rows():
    """Eight rows, the first half nearly full, the second nearly empty, in an order that mixes them unevenly."""
    rng = np.random.default_rng(0)
    full = rows_of(make_examples(rng, 15, 8, 12, 64), LENGTH, 3)
    thin = rows_of(make_examples(rng, 3, 5, 7, 64), LENGTH, 3)
    single = rows_of(make_examples(rng, 3, 28, 32, 64), LENGTH, 3)
    parts = [full, thin, single]
    batch = type(full)(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    order = np.argsort(np.random.default_rng(1).permutation(len(batch.input_ids)))[:ROWS]
    return type(full)(*(array[order] for array in batch))


def fresh():
    params = jax.tree.map(jnp.asarray, random_params(BOUND.shapes, 3))
    return TrainState(jnp.zeros((), jnp.int32), params, SGD.init(params))


@functools.cache
def stepper(accumulate):
    return quick_jit(make_train_step(BOUND, OBJECTIVE, SGD, mask_seed=1, dropout_seed=2, accumulate=accumulate))


@functools.cache
def after(accumulate, steps):
    """State and sums after some steps on the same rows; masks are the same in all of them, dropout is not."""
    state = fresh() if steps == 1 else after(accumulate, steps - 1)[0]
    return stepper(accumulate)(state, rows(), OBJECTIVE.arguments)


def same(ours, theirs, tolerance):
    """The difference's norm is at most `tolerance` of the leaf's, for each leaf."""
    for (path, a), b in zip(flat_paths(ours).items(), flat_paths(theirs).values(), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), path


def as_floats(sums):
    return {name: float(value) for name, value in sums.items()}


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_give_the_gradients_of_the_whole(accumulate):
    """With dropout on, and as many predictions, texts and padding in no two micro-batches."""
    prepared, _ = quick_jit(OBJECTIVE.prepare)(rows(), jnp.int32(1), OBJECTIVE.arguments)
    for array in (prepared.masked.weights, rows().next_sentence >= 0, rows().segment_ids == 0):
        assert len({float(array[a::accumulate].sum()) for a in range(accumulate)}) > 1
    state, sums = after(accumulate, 1)
    expected, expected_sums = after(1, 1)
    assert all(np.abs(gradient).max() > 0 for gradient in jax.tree.leaves(expected.optimizer[0]))
    same(state.optimizer[0], expected.optimizer[0], 1e-6)
    same(state.params, expected.params, 1e-6)
    assert as_floats(sums) == pytest.approx(as_floats(expected_sums), rel=1e-6)


def test_micro_batches_train_alike():
    """Four steps with momentum."""
    four, one = after(4, 4)[0], after(1, 4)[0]
    same(four.params, one.params, 1e-6)
    assert four.step == one.step == 4


def test_rows_keys_are_of_seed_step_and_row():
    keys = quick_jit(row_keys, static_argnums=(0, 2))
    data = [jax.random.key_data(keys(seed, jnp.int32(step), ROWS)) for seed, step in ((2, 0), (2, 1), (2, 2), (3, 0))]
    assert len({tuple(key) for key in np.concatenate(data)}) == 4 * ROWS
    # How many rows there are does not matter.
    np.testing.assert_array_equal(jax.random.key_data(keys(2, jnp.int32(0), 3)), data[0][:3])


def test_the_steps_dropout_changes_from_step_to_step():
    here, there = (stepper(1)(fresh()._replace(step=jnp.int32(s)), rows(), OBJECTIVE.arguments)[1] for s in (0, 1))
    assert here["mlm_loss"] == after(1, 1)[1]["mlm_loss"] != there["mlm_loss"]
    assert here["mlm_weight"] == there["mlm_weight"]


def test_sums_of_the_step():
    state, sums = after(1, 1)
    gradients = np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(state.optimizer[0])])
    assert float(sums["gradient_norm"]) == pytest.approx(np.linalg.norm(gradients), rel=1e-6)
    assert float(sums["tokens"]) == (rows().segment_ids > 0).sum()
    assert float(sums["nsp_weight"]) == (rows().next_sentence >= 0).sum()
    assert state.step == 1
    expected = jax.tree.map(lambda p, g: p - np.float32(0.05) * g, fresh().params, state.optimizer[0])
    same(state.params, expected, 1e-6)


def test_eval_step_has_no_dropout_and_asks_what_training_asked():
    step = quick_jit(make_eval_step(BOUND, OBJECTIVE))
    params = fresh().params
    sums, counts, carry = step(params, rows(), jnp.int32(1), OBJECTIVE.arguments, ())
    again, *_ = step(params, rows(), jnp.int32(1), OBJECTIVE.arguments, ())
    other, *_ = step(params, rows(), jnp.int32(2), OBJECTIVE.arguments, ())
    assert carry == ()
    trained = after(1, 1)[1]
    assert sums["mlm_loss"] == again["mlm_loss"] != other["mlm_loss"]
    assert sums["mlm_loss"] != trained["mlm_loss"]
    assert sums["mlm_weight"] == trained["mlm_weight"] == counts.sum()
    assert sums.keys() == trained.keys() - {"gradient_norm", "tokens"}


@functools.cache
def train(shape, count):
    """Five steps on the first `count` devices, set up as in `pretrain`, every other mesh in two micro-batches.

    Returns losses, the state after, wanted shardings, those at birth, what was donated, parameters at the start.
    """
    mesh = make_mesh(shape, jax.devices()[:count])
    transform = Optimizer("bert_adamw", Schedule("constant", 3e-3)).build()
    init = functools.partial(init_state, BOUND, transform)
    shardings = tree_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    init = quick_jit(init, out_shardings=shardings)
    state = init(jax.random.key(0))
    born = jax.tree.map(lambda leaf: leaf.sharding, state)
    # Made anew: NumPy looks into an array's own memory, which then cannot be donated.
    start = jax.tree.map(np.asarray, init(jax.random.key(0)).params)
    step = quick_jit(
        make_train_step(BOUND, OBJECTIVE, transform, mask_seed=1, dropout_seed=2, accumulate=1 + (count in (2, 8))),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    batch, losses, donated = put_batch(rows(), mesh), [], []
    for _ in range(5):
        before = jax.tree.leaves(state)
        state, sums = step(state, batch, OBJECTIVE.arguments)
        jax.block_until_ready(state)
        donated.append([leaf.is_deleted() for leaf in before])
        losses.append([float(sums[f"{name}_loss"]) / float(sums[f"{name}_weight"]) for name in ("mlm", "nsp")])
    assert step._cache_size() == 1
    return np.array(losses), state, shardings, born, donated, start


ALL = MeshShape(data=2, fsdp=2, tensor=2)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)  # they tell which axis it is when the others fail
MESHES = [
    (MeshShape(data=1, fsdp=2, tensor=2), 4),
    (ALL, 8),
    slow(MeshShape(), 2),
    slow(MeshShape(data=1, fsdp=2), 2),
    slow(MeshShape(data=1, tensor=2), 2),
    slow(MeshShape(), 8),
]


@pytest.mark.parametrize(("shape", "count"), MESHES, ids=str)
def test_the_mesh_does_not_change_the_losses(shape, count):
    losses, expected = train(shape, count)[0], train(MeshShape(), 1)[0]
    assert expected[-1, 0] < expected[0, 0] * 0.98
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(("shape", "count"), [(MeshShape(), 1), (ALL, 8)], ids=str)
def test_the_state_is_donated(shape, count):
    """All of it: nothing of the old state is left in memory."""
    for step in train(shape, count)[4]:
        assert all(step)


def test_parameters_and_moments_are_born_and_stay_where_the_rules_say():
    _, state, shardings, born, *_ = train(ALL, 8)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), at_birth, wanted in zip(leaves, jax.tree.leaves(born), jax.tree.leaves(shardings), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert at_birth.is_equivalent_to(wanted, leaf.ndim), name
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.size, leaf.addressable_shards[0].data.size)
        for path, leaf in leaves
    }
    split = [name for name, (size, shard) in sizes.items() if size == 4 * shard]
    for kind in ("params", "mu", "nu"):
        for parameter in ("token/table", "qkv/kernel", "out/kernel", "up/kernel", "down/kernel", "masked_lm/bias"):
            assert any(f"{kind}/" in name and name.endswith(parameter) for name in split), (kind, parameter)


def test_the_same_key_makes_the_same_parameters_sharded_or_not():
    """What `train` compares starts alike."""
    for ours, theirs in zip(*(jax.tree.leaves(train(*mesh)[5]) for mesh in ((ALL, 8), (MeshShape(), 1))), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_micro_batch_lies_on_all_devices():
    """Rows a, a + A, … of a batch that is split in runs: no device has to send its rows to another."""
    mesh = make_mesh(ALL)
    rows_on = {s.device: s.index[0] for s in put_batch(rows(), mesh).input_ids.addressable_shards}
    assert all(len({row % 2 for row in range(ROWS)[place]}) == 2 for place in rows_on.values())
