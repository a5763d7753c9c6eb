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

from ctx_jax.models.bert import BertConfig, BertForPreTraining
from ctx_jax.nn.parameters import Bound, flat_paths
from ctx_jax.objectives.mlm import MaskedLM, MaskedLMObjective
from ctx_jax.sharding import MeshShape, batch_sharding, make_mesh, put_batch, replicated, tree_shardings
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule
from ctx_jax.train.step import TrainState, init_state, make_eval_step, make_train_step, row_keys

CONFIG = BertConfig(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, max_position_embeddings=32
)
BOUND = Bound(lambda rngs: BertForPreTraining(CONFIG, rngs=rngs))
LENGTH, ROWS = 32, 8
OBJECTIVE = MaskedLMObjective(
    MaskedLM(rate=0.3, next_sentence=True), vocabulary(64), length=LENGTH, examples_per_row=3
)
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradients, state, params: (gradients, gradients)
)
"""Its state is the gradients."""


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


def fresh(transform):
    params = jax.tree.map(jnp.asarray, random_params(BOUND.shapes, 3))
    return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))


def run_steps(accumulate, transform, steps=1, dropout_seed=2):
    step = make_train_step(BOUND, OBJECTIVE, transform, mask_seed=1, dropout_seed=dropout_seed, accumulate=accumulate)
    step, state = quick_jit(step), fresh(transform)
    for _ in range(steps):
        state, sums = step(state, rows(), OBJECTIVE.arguments)
    return state, sums


def same(ours, theirs, tolerance):
    """Equal to `tolerance` of each leaf's largest value."""
    for (path, a), b in zip(flat_paths(ours).items(), flat_paths(theirs).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=path)


@functools.cache
def whole():
    return run_steps(1, KEEP)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches_give_the_gradients_of_the_whole(accumulate):
    """With dropout on, and as many predictions, texts and padding in no two micro-batches."""
    prepared, _ = quick_jit(OBJECTIVE.prepare)(rows(), jnp.int32(1), OBJECTIVE.arguments)
    parts = [
        [float(array[a::accumulate].sum()) for a in range(accumulate)]
        for array in (prepared.masked.weights, rows().next_sentence >= 0, rows().segment_ids == 0)
    ]
    assert all(len(set(part)) > 1 for part in parts)
    state, sums = run_steps(accumulate, KEEP)
    expected, expected_sums = whole()
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected.optimizer))
    same(state.optimizer, expected.optimizer, 1e-6)
    same(state.params, expected.params, 1e-6)
    assert {k: float(v) for k, v in sums.items()} == pytest.approx(
        {k: float(v) for k, v in expected_sums.items()}, rel=1e-6
    )
    assert state.step == 1


def test_micro_batches_train_alike():
    transform = optax.sgd(0.05, momentum=0.9)
    one, four = (run_steps(accumulate, transform, steps=4) for accumulate in (1, 4))
    same(four[0].params, one[0].params, 1e-6)
    assert four[0].step == one[0].step == 4


def test_dropout_is_on_and_changes_with_seed_and_step():
    other, _ = run_steps(1, KEEP, dropout_seed=3)
    difference = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), other.optimizer, whole()[0].optimizer)
    assert min(jax.tree.leaves(difference)) > 0
    keys = [quick_jit(row_keys, static_argnums=(0, 2))(2, jnp.int32(step), ROWS) for step in range(3)]
    data = np.concatenate([np.asarray(jax.random.key_data(k)) for k in keys])
    assert len({tuple(key) for key in data}) == 3 * ROWS
    # A row's key does not depend on how many rows there are.
    fewer = quick_jit(row_keys, static_argnums=(0, 2))(2, jnp.int32(0), 3)
    np.testing.assert_array_equal(jax.random.key_data(fewer), data[:3])


def test_sums_of_the_step():
    state, sums = whole()
    gradients = np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(state.optimizer)])
    assert float(sums["gradient_norm"]) == pytest.approx(np.linalg.norm(gradients), rel=1e-6)
    assert sums["tokens"] == (rows().segment_ids > 0).sum()
    assert sums["nsp_weight"] == (rows().next_sentence >= 0).sum()
    same(state.params, jax.tree.map(jnp.add, fresh(KEEP).params, state.optimizer), 1e-7)


def test_eval_step_has_no_dropout_and_asks_what_training_asked():
    step = quick_jit(make_eval_step(BOUND, OBJECTIVE))
    params = fresh(KEEP).params
    sums, counts = step(params, rows(), jnp.int32(1), OBJECTIVE.arguments)
    again, _ = step(params, rows(), jnp.int32(1), OBJECTIVE.arguments)
    other, _ = step(params, rows(), jnp.int32(2), OBJECTIVE.arguments)
    trained = whole()[1]
    assert sums["mlm_loss"] == again["mlm_loss"] != other["mlm_loss"]
    assert sums["mlm_loss"] != trained["mlm_loss"]
    assert sums["mlm_weight"] == trained["mlm_weight"] == counts.sum()
    assert sums.keys() == trained.keys() - {"gradient_norm", "tokens"}


@functools.cache
def train(shape, count):
    """(losses of five steps, state after them, shardings) on the first `count` devices, as `pretrain` sets it up."""
    mesh = make_mesh(shape, jax.devices()[:count])
    transform = Optimizer("bert_adamw", Schedule("constant", 3e-3)).build()
    init = functools.partial(init_state, BOUND, transform)
    shardings = tree_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    state = quick_jit(init, out_shardings=shardings)(jax.random.key(0))
    born = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = quick_jit(
        make_train_step(BOUND, OBJECTIVE, transform, mask_seed=1, dropout_seed=2, accumulate=1 if count > 4 else 2),
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
    return np.array(losses), state, shardings, born, donated


MESHES = [
    (MeshShape(), 2),
    (MeshShape(data=1, fsdp=2), 2),
    (MeshShape(data=1, tensor=2), 2),
    (MeshShape(data=2, fsdp=2), 4),
    (MeshShape(data=2, fsdp=2, tensor=2), 8),
    (MeshShape(), 8),
]


@pytest.mark.parametrize(("shape", "count"), MESHES, ids=str)
def test_the_mesh_does_not_change_the_losses(shape, count):
    losses, expected = train(shape, count)[0], train(MeshShape(), 1)[0]
    assert expected[-1, 0] < expected[0, 0] * 0.98
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(("shape", "count"), [(MeshShape(), 1), (MeshShape(data=2, fsdp=2, tensor=2), 8)], ids=str)
def test_the_state_is_donated(shape, count):
    """All of it: nothing of the old state is left in memory."""
    for step in train(shape, count)[4]:
        assert all(step)


def test_parameters_and_moments_are_born_and_stay_where_the_rules_say():
    _, state, shardings, born, _ = train(MeshShape(data=2, fsdp=2, tensor=2), 8)
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


def test_no_two_meshes_start_alike_only_by_chance():
    """The same key makes the same parameters, sharded or not."""
    transform = Optimizer("bert_adamw", Schedule("constant", 3e-3)).build()
    init = functools.partial(init_state, BOUND, transform)
    mesh = make_mesh(MeshShape(data=1, fsdp=4, tensor=2))
    shardings = tree_shardings(jax.eval_shape(init, jax.random.key(7)), mesh)
    sharded = quick_jit(init, out_shardings=shardings)(jax.random.key(7))
    alone = quick_jit(init)(jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, sharded.params, alone.params)


def test_the_batch_stays_split():
    """Rows of a micro-batch lie on all devices: the loss of two meshes is equal, and so is what each device holds."""
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    split = quick_jit(lambda x: jnp.swapaxes(x.reshape(-1, 2, *x.shape[1:]), 0, 1)[0])
    part = split(put_batch(rows(), mesh).input_ids)
    assert part.sharding.is_equivalent_to(batch_sharding(mesh), 2)
