"""The projected LSTM by hand in float64: gates, clips, rows of several lengths, states, gradients."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import elmo as oracle
from oracles.compiling import quick_jit

from ctx_jax.nn import lstm as lstm_module
from ctx_jax.nn.lstm import LSTMState, ProjectedLSTM, reverse_within
from ctx_jax.nn.parameters import Bound

INPUTS, WIDTH, PROJECTION, ROWS, STEPS = 3, 5, 4, 5, 6
LENGTHS = np.array([6, 0, 1, 4, 6], np.int32)
CLIPS = {"both": (0.4, 0.3), "cell": (0.4, None), "projection": (None, 0.3), "none": (None, None)}


def logistic(x):
    return 1 / (1 + math.exp(-x))


@functools.cache
def bound(cell_clip=None, projection_clip=None, sizes=(INPUTS, WIDTH, PROJECTION)):
    clips = {"cell_clip": cell_clip, "projection_clip": projection_clip}
    return Bound(lambda rngs: ProjectedLSTM(*sizes, **clips, rngs=rngs))


def params(seed=0, scale=2.0):
    return oracle.random_params(bound().shapes, seed, scale)


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return draw(ROWS, STEPS, INPUTS), LSTMState(0.2 * draw(ROWS, WIDTH), 0.2 * draw(ROWS, PROJECTION))


@functools.cache
def runner(cell_clip=None, projection_clip=None, unroll=False):
    lstm = bound(cell_clip, projection_clip)
    return quick_jit(lambda p, x, lengths, state: lstm(p)(x, lengths, state, unroll=unroll))


def by_hand(p, x, lengths, state, cell_clip=None, projection_clip=None):
    """Row by row and step by step, float64: outputs, cells, hidden states."""
    w = oracle.cell_arrays(p, "cell")
    x, cells, hiddens = (np.asarray(a, np.float64).copy() for a in (x, *state))
    outputs = np.zeros((*x.shape[:2], hiddens.shape[1]))
    for row, length in enumerate(lengths):
        for t in range(length):
            outputs[row, t], cells[row], hiddens[row] = oracle.step(
                w,
                "cell",
                x[row, t],
                cells[row],
                hiddens[row],
                cell_clip=cell_clip,
                projection_clip=projection_clip,
            )
    return outputs, cells, hiddens


def close(found, expected, atol=2e-6):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=atol)


def test_one_step_with_numbers_on_paper():
    """Every weight zero but two of the bias's and the projection's: the gates' order, the forget bias, both products.

    i, j, f, o = 0.5, -1, 0.25, 2 for the first cell, which the first input moves by 1, 2, 3, 4 and the state by 5 to 8.
    """
    p = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), bound().shapes)
    p["bias"][:, 0] = [0.5, -1.0, 0.25, 2.0]
    p["input_kernel"][0, :, 0] = [1, 2, 3, 4]
    p["recurrent_kernel"][1, :, 0] = [5, 6, 7, 8]
    p["projection"][0, 2] = -3.0
    x, cell, hidden = np.zeros((1, 1, INPUTS)), np.zeros((1, WIDTH)), np.zeros((1, PROJECTION))
    x[0, 0, 0], hidden[0, 1], cell[0, 0] = 0.1, 0.2, 0.7
    i, j = 0.5 + 0.1 * 1 + 0.2 * 5, -1 + 0.1 * 2 + 0.2 * 6
    f, o = 0.25 + 0.1 * 3 + 0.2 * 7, 2 + 0.1 * 4 + 0.2 * 8
    expected = logistic(f + 1) * 0.7 + logistic(i) * math.tanh(j)
    state = LSTMState(cell.astype(np.float32), hidden.astype(np.float32))
    outputs, after = quick_jit(lambda *args: bound()(p)(*args))(x.astype(np.float32), np.array([1], np.int32), state)
    close(after.cell, [[expected, 0, 0, 0, 0]], 1e-6)
    projected = logistic(o) * math.tanh(expected) * -3
    close(outputs, [[[0, 0, projected, 0]]], 1e-6)
    np.testing.assert_array_equal(after.hidden, outputs[:, 0])


@pytest.mark.parametrize("clips", CLIPS)
def test_equals_the_sum_by_hand(clips):
    """Clips are met, the state before and after and lengths from 0 to all steps; outputs behind a length are zero."""
    p, (x, state) = params(), inputs()
    outputs, after = runner(*CLIPS[clips])(p, x, LENGTHS, state)
    expected, cells, hiddens = by_hand(p, x, LENGTHS, state, *CLIPS[clips])
    for found, theirs in ((outputs, expected), (after.cell, cells), (after.hidden, hiddens)):
        assert found.dtype == np.float32
        close(found, theirs)
    for row, length in enumerate(LENGTHS):
        assert not np.asarray(outputs)[row, length:].any()
    free = by_hand(p, x, LENGTHS, state)
    for which, limit, values in zip((1, 2), CLIPS[clips], (cells, hiddens), strict=True):
        if limit is not None:
            assert np.abs(free[which]).max() > limit + 0.1
            moved = LENGTHS > 0
            assert (np.abs(values[moved]) <= limit).all()
            assert np.isclose(np.abs(values[moved]), limit).any()


def test_a_row_without_steps_keeps_its_state():
    """To the last bit: a state is not clipped on the way, however large."""
    p, (x, state) = params(), inputs()
    state = LSTMState(state.cell * 50, state.hidden * 50)
    outputs, after = runner(*CLIPS["both"])(p, x, np.zeros(ROWS, np.int32), state)
    np.testing.assert_array_equal(after.cell, state.cell)
    np.testing.assert_array_equal(after.hidden, state.hidden)
    assert not np.asarray(outputs).any()


@pytest.mark.parametrize("what", [0.0, 1e3, np.nan, np.inf])
def test_what_stands_behind_a_row_is_never_seen(what):
    p, (x, state) = params(), inputs()
    other = np.where(np.arange(STEPS)[None, :, None] < LENGTHS[:, None, None], x, np.float32(what))
    outputs, after = runner(*CLIPS["both"])(p, x, LENGTHS, state)
    found, found_after = runner(*CLIPS["both"])(p, other, LENGTHS, state)
    np.testing.assert_array_equal(found, outputs)
    np.testing.assert_array_equal(found_after.cell, after.cell)
    np.testing.assert_array_equal(found_after.hidden, after.hidden)


def test_rows_know_nothing_of_each_other():
    p, (x, state) = params(), inputs()
    outputs, after = runner()(p, x, LENGTHS, state)
    order = np.array([3, 0, 4, 2, 1])
    moved = LSTMState(state.cell[order], state.hidden[order])
    found, found_after = runner()(p, x[order], LENGTHS[order], moved)
    close(found, np.asarray(outputs)[order], 1e-6)
    close(found_after.cell, np.asarray(after.cell)[order], 1e-6)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_state_goes_on_where_it_stopped(cut):
    """Also of rows that end before the cut, at it, or behind it."""
    p, (x, state) = params(), inputs()
    run = quick_jit(lambda *args: bound(*CLIPS["both"])(p)(*args))
    outputs, after = run(x, LENGTHS, state)
    first, between = run(x[:, :cut], np.minimum(LENGTHS, cut), state)
    second, last = run(x[:, cut:], np.maximum(LENGTHS - cut, 0), between)
    close(np.concatenate([first, second], axis=1), outputs, 1e-6)
    close(last.cell, after.cell, 1e-6)
    close(last.hidden, after.hidden, 1e-6)


BEGINS = np.array(
    [[0, 0, 1, 0, 1, 1], [0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]], bool
)


def anew(p, x, lengths, state, begins, *clips):
    """Each text of a row by itself: the state of the row before its first text, zero before every other."""
    outputs, cells, hiddens = np.zeros((ROWS, STEPS, PROJECTION)), *(np.asarray(a, np.float64).copy() for a in state)
    for row, length in enumerate(lengths):
        cuts = [0, *(t for t in range(length) if begins[row, t]), length]
        for number, (a, b) in enumerate(itertools.pairwise(cuts)):
            if number:
                cells[row], hiddens[row] = 0, 0
            one = slice(row, row + 1)
            outputs[one, a:b], cells[one], hiddens[one] = by_hand(
                p, x[one, a:b], [b - a], (cells[one], hiddens[one]), *clips
            )
    return outputs, cells, hiddens


@pytest.mark.parametrize("clips", CLIPS)
def test_a_text_that_begins_in_a_row_knows_nothing_of_the_one_before(clips):
    p, (x, state) = params(), inputs()
    run = quick_jit(lambda *args: bound(*CLIPS[clips])(p)(*args[:3], begins=args[3]))
    outputs, after = run(x, LENGTHS, state, BEGINS)
    for found, theirs in zip((outputs, *after), anew(p, x, LENGTHS, state, BEGINS, *CLIPS[clips]), strict=True):
        close(found, theirs)
    # The third row's only text begins: what state it had does not matter.
    other = run(x, LENGTHS, LSTMState(state.cell + 1, state.hidden - 1), BEGINS)[0]
    np.testing.assert_array_equal(other[2], outputs[2])
    assert np.abs(other[0, :2] - outputs[0, :2]).max() > 1e-2
    np.testing.assert_array_equal(other[0, 2:], outputs[0, 2:])


@pytest.mark.parametrize("words", [5, 10, 15, 29])
def test_steps_a_span_at_a_time_are_the_same(words, monkeypatch):
    """Spans of 1, 2, 3 and 5 steps, of which only the last leaves a rest; gradients too."""
    p, (x, state) = params(), inputs()
    towards = aims()

    def everything():
        def loss(p, x, state):
            found, after = bound(*CLIPS["both"])(p)(x, LENGTHS, state, begins=BEGINS)
            return sum((a * b).sum() for a, b in zip((found, *after), towards, strict=True)), (found, *after)

        return quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(p, x, state)

    whole = everything()
    monkeypatch.setattr(lstm_module, "WORDS_AT_ONCE", words)
    for found, expected in zip(jax.tree.leaves(everything()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_long_rows_take_memory_for_a_span_only():
    """256 rows of 256 steps: the gates of all would be 16 × as many as there may be."""
    sizes = (8, 64, 8)
    shapes = bound(sizes=sizes).shapes
    lstm = quick_jit(lambda p, x, lengths, state: bound(sizes=sizes)(p)(x, lengths, state))
    given = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    state = LSTMState(given(256, 64), given(256, 8))
    used = lstm.lower(shapes, given(256, 256, 8), jax.ShapeDtypeStruct((256,), np.int32), state).compile()
    gates = 256 * 256 * 4 * 64 * 4
    assert used.memory_analysis().temp_size_in_bytes < gates / 4


def test_unrolled_is_the_same_and_has_no_loop():
    p, (x, state) = params(), inputs()
    args = p, x, LENGTHS, state
    for ours, theirs in zip(
        jax.tree.leaves(runner(*CLIPS["both"], True)(*args)),
        jax.tree.leaves(runner(*CLIPS["both"])(*args)),
        strict=True,
    ):
        close(ours, theirs, 1e-6)
    loops = [runner(*CLIPS["both"], unroll).lower(*args).compile().as_text().count(" while(") for unroll in (0, 1)]
    assert loops[0] > 0
    assert loops[1] == 0


@functools.cache
def gradient(clips, unroll=False, packed=False):
    lstm = bound(*CLIPS[clips])

    def loss(p, x, state, towards):
        outputs, after = lstm(p)(x, LENGTHS, state, begins=BEGINS if packed else None, unroll=unroll)
        return sum((a * b).sum() for a, b in zip((outputs, *after), towards, strict=True))

    return quick_jit(jax.grad(loss, argnums=(0, 1, 2)))


def aims():
    rng = np.random.default_rng(4)
    shapes = (ROWS, STEPS, PROJECTION), (ROWS, WIDTH), (ROWS, PROJECTION)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("clips", "unroll"), [*((clips, False) for clips in CLIPS), ("both", True)])
def test_gradients_by_finite_differences(clips, unroll, packed):
    """Of the weights, the inputs and the state before, along random directions, by all outputs and the state after."""
    p, (x, state) = params(), inputs()
    towards = aims()
    found = gradient(clips, unroll, packed)(p, x, state, towards)
    nowhere = np.zeros_like(BEGINS)
    tree = (p, x, state)

    def loss(leaves):
        p, x, state = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        found = anew(p, x, LENGTHS, state, BEGINS if packed else nowhere, *CLIPS[clips])
        return sum((a * b).sum() for a, b in zip(found, towards, strict=True))

    wide = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    rng, h = np.random.default_rng(5), 1e-6
    for number, (leaf, slope) in enumerate(zip(wide, jax.tree.leaves(found), strict=True)):
        assert slope.shape == leaf.shape
        assert np.abs(slope).max() > 1e-2
        for _ in range(4):
            direction = rng.normal(size=leaf.shape)
            ends = [loss([*wide[:number], leaf + sign * h * direction, *wide[number + 1 :]]) for sign in (1, -1)]
            expected = (ends[0] - ends[1]) / (2 * h)
            scale = np.linalg.norm(slope) * np.sqrt(np.mean(direction**2))
            assert np.vdot(slope, direction) == pytest.approx(expected, abs=5e-6 * scale), number


def test_gradients_behind_a_row_are_zero_whatever_stands_there():
    """An absent input has none, gives none, and spoils none; a row without steps hands its state's on."""
    p, (x, state) = params(), inputs()
    towards = aims()
    absent = np.arange(STEPS)[None, :] >= LENGTHS[:, None]
    found = gradient("both")(p, x, state, towards)
    assert not np.asarray(found[1])[absent].any()
    assert np.asarray(found[1])[~absent].any(-1).all()
    np.testing.assert_allclose(found[2].cell[1], towards[1][1], rtol=1e-6)
    np.testing.assert_allclose(found[2].hidden[1], towards[2][1], rtol=1e-6)
    other = gradient("both")(p, np.where(absent[..., None], np.float32(1e3), x), state, towards)
    for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_bfloat16_rounds_products_and_keeps_the_state():
    """Largest difference by the largest value: measured 3.2e-3."""
    p, (x, state) = params(scale=1.0), inputs()
    outputs, after = runner(*CLIPS["none"])(p, jnp.asarray(x, jnp.bfloat16), LENGTHS, state)
    assert outputs.dtype == jnp.bfloat16
    assert after.cell.dtype == jnp.float32
    expected = by_hand(p, x, LENGTHS, state)
    error = np.abs(np.asarray(outputs, np.float64) - expected[0]).max() / np.abs(expected[0]).max()
    assert 5e-4 < error < 8e-3


def test_a_bfloat16_cell_adds_up_small_steps():
    """100 steps that add 1/1000 each to a cell of 1, whose own digits in bfloat16 are 1/128 apart."""
    shapes = bound(sizes=(1, 1, 1)).shapes
    p = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    p["bias"][:, 0] = [30.0, np.arctanh(1e-3), 30.0, 0.0]
    x, state = (
        jnp.zeros((1, 100, 1), jnp.bfloat16),
        LSTMState(np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)),
    )
    after = quick_jit(lambda x, state: bound(sizes=(1, 1, 1))(p)(x, np.array([100], np.int32), state))(x, state)[1]
    assert float(after.cell[0, 0]) == pytest.approx(1.1, abs=1e-4)


# Rows turned around.


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 2, 3)])
def test_rows_are_turned_within_their_own_length(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    lengths = np.array([6, 0, 1, 4], np.int32)
    turned = np.asarray(quick_jit(reverse_within)(x, lengths))
    for row, found, length in zip(x, turned, lengths, strict=True):
        assert found.tolist() == row.tolist()[:length][::-1] + row.tolist()[length:]
    np.testing.assert_array_equal(quick_jit(reverse_within)(turned, lengths), x)


def test_turning_has_the_turned_gradient():
    lengths = np.array([3, 2], np.int32)
    towards = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    gradient = quick_jit(jax.grad(lambda x: (reverse_within(x, lengths) * towards).sum()))(np.zeros_like(towards))
    np.testing.assert_array_equal(gradient[0], towards[0, ::-1])
    np.testing.assert_array_equal(gradient[1], towards[1, [1, 0, 2]])


def test_birth_is_tensorflows():
    """Glorot's uniform of the whole matrix and of the projection; biases 0, the forget gate's too."""
    sizes = (30, 50, 20)
    p = {k: np.asarray(v) for k, v in quick_jit(bound(sizes=sizes).init)(jax.random.key(0)).items()}
    assert {name: leaf.shape for name, leaf in p.items()} == {
        "input_kernel": (30, 4, 50),
        "recurrent_kernel": (20, 4, 50),
        "bias": (4, 50),
        "projection": (50, 20),
    }
    assert not p["bias"].any()
    for names, fans in ((("input_kernel", "recurrent_kernel"), 30 + 20 + 4 * 50), (("projection",), 50 + 20)):
        limit = math.sqrt(6 / fans)
        for name in names:
            assert 0.98 * limit < np.abs(p[name]).max() <= limit
            assert p[name].std() == pytest.approx(limit / math.sqrt(3), rel=0.05)
            assert abs(p[name].mean()) < 0.1 * limit
