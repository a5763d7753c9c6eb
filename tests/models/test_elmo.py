"""ELMo against a float64 twin at sizes that no file has; states; who sees whom; gradients; dropout; what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import elmo as oracle
from oracles.compiling import quick_jit

import ctx_jax.models.elmo as elmo
from ctx_jax.arrays import Representations
from ctx_jax.errors import InputError
from ctx_jax.models.elmo import Elmo, ElmoConfig, ElmoState, without_ends, zero_state
from ctx_jax.nn.lstm import LSTMState
from ctx_jax.nn.parameters import Bound, count_parameters, flat_paths

SMALL = ElmoConfig(
    filters=((1, 4), (2, 6), (3, 5)),
    character_dim=4,
    max_characters=8,
    num_highway=2,
    lstm_dim=11,
    projection_dim=6,
    num_layers=2,
    cell_clip=0.7,
    projection_clip=0.4,
)
TINY = dataclasses.replace(
    SMALL, filters=((1, 2), (3, 3)), num_highway=1, lstm_dim=4, projection_dim=3, max_characters=5
)
CONFIGS = {
    "small": SMALL,
    "one layer": dataclasses.replace(SMALL, num_layers=1, activation="tanh", num_highway=1),
    "three layers": dataclasses.replace(SMALL, num_layers=3, num_highway=0),
    "no clips": dataclasses.replace(SMALL, cell_clip=None, projection_clip=None, activation="tanh"),
    "no skip": dataclasses.replace(SMALL, skip_connections=False, projection_clip=None),
    "odd filters": dataclasses.replace(
        SMALL, filters=((5, 1), (1, 3), (8, 7), (5, 2)), character_dim=1, cell_clip=None
    ),
    "narrow": dataclasses.replace(SMALL, lstm_dim=1, projection_dim=1, filters=((2, 1),), max_characters=3),
    "all of one size": dataclasses.replace(SMALL, lstm_dim=4, projection_dim=4, filters=((4, 4),), num_layers=3),
}
LENGTHS = np.array([7, 1, 4, 0, 6], np.int32)


@functools.cache
def bound(config):
    return Bound(lambda rngs: Elmo(config, rngs=rngs))


@functools.cache
def params(config, seed=0, scale=1.2):
    return oracle.random_params(bound(config).shapes, seed, scale)


def random_words(config, lengths=LENGTHS, seed=1, steps=None):
    """Rows of words of 29 letters, zeros behind their lengths."""
    steps = max(lengths) if steps is None else steps
    ids = np.random.default_rng(seed).integers(1, 30, (len(lengths), steps, config.max_characters))
    return np.where(np.arange(steps)[None, :, None] < np.asarray(lengths)[:, None, None], ids, 0).astype(np.int16)


def random_state(config, rows, seed=2):
    rng = np.random.default_rng(seed)
    draw = lambda width: (0.3 * rng.normal(size=(rows, width))).astype(np.float32)
    one = lambda: LSTMState(draw(config.lstm_dim), draw(config.projection_dim))
    direction = lambda: tuple(one() for _ in range(config.num_layers))
    return ElmoState(direction(), direction())


@functools.cache
def runner(config, **options):
    return quick_jit(lambda p, ids, lengths, state: bound(config)(p)(ids, lengths, state, **options))


def twin(config, p, ids, lengths, state=None, **options):
    return oracle.encode(
        oracle.original_names(p),
        ids,
        lengths,
        state,
        activation=config.activation,
        cell_clip=config.cell_clip,
        projection_clip=config.projection_clip,
        skip=config.skip_connections,
        **options,
    )


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def relative(found, expected):
    """Largest difference, by the largest value that is compared."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_twin(name, stateful):
    """All layers and the state after; a sentence of no words, and one of one."""
    config = CONFIGS[name]
    p, ids = params(config), random_words(config)
    state = random_state(config, len(ids)) if stateful else zero_state(config, len(ids))
    out, after = runner(config)(p, ids, LENGTHS, state)
    expected, expected_after = twin(config, p, ids, LENGTHS, state if stateful else None)
    assert out.last.dtype == out.layers.dtype == jnp.float32
    for layer, theirs in enumerate(expected):
        assert relative(out.layers[layer], theirs) < 2e-6, layer
    np.testing.assert_array_equal(out.last, out.layers[-1])
    np.testing.assert_array_equal(out.mask, np.arange(7) < LENGTHS[:, None])
    assert not np.asarray(out.layers)[:, ~np.asarray(out.mask)].any()
    for found, theirs in zip(leaves(after), leaves(expected_after), strict=True):
        assert relative(found, theirs) < 3e-6


def test_the_random_rows_reach_what_they_are_to_reach():
    """Clips and each rule of a row: with a mistake in it the twin is far off at these sizes too."""
    p, ids, state = params(SMALL), random_words(SMALL), random_state(SMALL, 5)
    expected = twin(SMALL, p, ids, LENGTHS, state)[0]
    for mistake in set(oracle.MISTAKES) - {"padding not convolved"}:  # these words have no padding
        if mistake == "no ends":
            continue  # these sentences have none
        found, after = twin(SMALL, p, ids, LENGTHS, state, mistakes=[mistake])
        error = np.abs(found - expected).max()
        if mistake == "state after the longest":
            error = np.abs(after[0][0][0] - twin(SMALL, p, ids, LENGTHS, state)[1][0][0][0]).max()
        assert error > 1e-2, mistake


def test_the_last_layer_alone_is_the_same():
    p, ids = params(SMALL), random_words(SMALL)
    out, after = runner(SMALL)(p, ids, LENGTHS, None)
    alone, alone_after = runner(SMALL, all_layers=False)(p, ids, LENGTHS, None)
    assert alone.layers is None
    np.testing.assert_allclose(alone.last, out.last, rtol=0, atol=1e-6)
    for found, theirs in zip(leaves(alone_after), leaves(after), strict=True):
        np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-6)


def test_lengths_are_seen_in_the_ids():
    p, ids = params(SMALL), random_words(SMALL, steps=9)
    given, _ = runner(SMALL)(p, ids, LENGTHS, None)
    found, _ = runner(SMALL)(p, ids, None, None)
    np.testing.assert_array_equal(found.mask, given.mask)
    np.testing.assert_allclose(found.layers, given.layers, rtol=0, atol=1e-6)


def test_a_state_of_zeros_is_no_state():
    p, ids = params(SMALL), random_words(SMALL)
    zero = zero_state(SMALL, len(ids))
    assert not any(leaf.any() for leaf in leaves(zero))
    shapes = [leaf.shape for leaf in leaves(zero)]
    assert shapes == [(5, SMALL.lstm_dim), (5, SMALL.projection_dim)] * 4
    given, none = (runner(SMALL)(p, ids, LENGTHS, state)[0].layers for state in (zero, None))
    np.testing.assert_allclose(given, none, rtol=0, atol=1e-6)


def test_windows_with_the_state_carried_are_one_long_run():
    """The forward half as it is; the backward one reads each window's words backwards, so its long run is of those.

    Windows hold 4, 2, 0 words of one row, 1, 4, 3 of another, and so on: a row goes on where it stopped.
    """
    p = params(SMALL)
    windows = np.array([[4, 2, 0], [1, 4, 3], [0, 0, 4], [4, 4, 4]], np.int32).T
    parts = [random_words(SMALL, lengths, seed, steps=4) for seed, lengths in enumerate(windows)]
    state, found = zero_state(SMALL, 4), []
    for ids, lengths in zip(parts, windows, strict=True):
        out, state = runner(SMALL)(p, ids, lengths, state)
        found.append(np.asarray(out.layers))
    totals = windows.sum(0)
    for direction, side in enumerate((slice(0, 6), slice(6, 12))):
        long = np.zeros((4, 12, SMALL.max_characters), np.int16)
        places = []
        for row in range(4):
            inside = [[(k, t) for t in range(lengths[row])] for k, lengths in enumerate(windows)]
            # Backwards within each window: the whole turned, windows and words, is a run from its last place.
            inside = inside[::-1] if direction else inside
            places.append([place for window in inside for place in window])
            for at, (k, t) in enumerate(places[row]):
                long[row, at] = parts[k][row, t]
        out, after = runner(SMALL)(p, long, totals, None)
        for row in range(4):
            ours = np.array([found[k][:, row, t, side] for k, t in places[row]]).reshape(-1, 3, 6)
            theirs = np.asarray(out.layers)[:, row, : totals[row], side].swapaxes(0, 1)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
        for ours, theirs in zip(leaves(state[direction]), leaves(after[direction]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    carried = np.abs(found[1] - np.asarray(runner(SMALL)(p, parts[1], windows[1], None)[0].layers)).max()
    assert carried > 0.1


def test_vectors_do_not_depend_on_batch_padding_or_order():
    """Alone and without padding, in a batch, in a wider one, in another order, beside itself."""
    p = params(SMALL)
    lengths = np.array([7, 3, 5], np.int32)
    ids = random_words(SMALL, lengths)
    together = np.asarray(runner(SMALL)(p, ids, lengths, None)[0].layers)
    wide = np.zeros((3, 12, SMALL.max_characters), np.int16)
    wide[:, :7] = ids
    wider = np.asarray(runner(SMALL)(p, wide, lengths, None)[0].layers)
    np.testing.assert_allclose(wider[:, :, :7], together, rtol=0, atol=1e-6)
    assert not wider[:, :, 7:].any()
    order = np.array([2, 0, 2, 1, 1])
    moved = np.asarray(runner(SMALL)(p, ids[order], lengths[order], None)[0].layers)
    np.testing.assert_allclose(moved, together[:, order], rtol=0, atol=1e-6)
    for row, length in enumerate(lengths):
        alone = runner(SMALL)(p, ids[row : row + 1, :length], lengths[row : row + 1], None)[0].layers
        np.testing.assert_allclose(alone[:, 0], together[:, row, :length], rtol=0, atol=1e-6)
    assert np.abs(together[:, 0, :3] - together[:, 1, :3]).max() > 0.1


@pytest.mark.parametrize("garbage", ["words", "ids outside the table"])
def test_absent_words_never_influence(garbage):
    """Whatever stands behind a row's length, its vectors, those of the others and the states are the same."""
    p, ids, state = params(SMALL), random_words(SMALL), random_state(SMALL, 5)
    behind = np.arange(7)[None, :, None] >= LENGTHS[:, None, None]
    spoilt = np.where(behind, {"words": np.int16(7), "ids outside the table": np.int16(3000)}[garbage], ids)
    if garbage == "ids outside the table":
        vectors = quick_jit(lambda ids: bound(SMALL)(p).word_vectors(ids))(spoilt)
        assert np.isnan(np.asarray(vectors)[behind[..., 0]]).all()
    out, after = runner(SMALL)(p, ids, LENGTHS, state)
    found, found_after = runner(SMALL)(p, spoilt, LENGTHS, state)
    np.testing.assert_array_equal(found.layers, out.layers)
    for ours, theirs in zip(leaves(found_after), leaves(after), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_word_with_an_unknown_character_is_seen():
    """In its own vectors and in those of its row that see it, not in other rows."""
    ids = random_words(SMALL)
    ids[0, 3, 2] = 262
    layers = np.asarray(runner(SMALL)(params(SMALL), ids, LENGTHS, None)[0].layers)
    wrong = np.isnan(layers).all(-1) | np.isnan(layers).any(-1)
    np.testing.assert_array_equal(wrong[0, 0], np.arange(7) == 3)
    assert np.isnan(layers[1, 0, 3:, :6]).all()
    assert np.isfinite(layers[1:, 0, :3, :6]).all()
    assert np.isnan(layers[1, 0, :4, 6:]).all()
    assert np.isfinite(layers[1:, 0, 4:, 6:]).all()
    assert np.isfinite(layers[:, 1:]).all()


def test_who_sees_whom():
    """Derivatives by the characters of each word, which has one of its own: forwards words up to its own, backwards
    words from its own on, absent ones nowhere.
    """
    config = dataclasses.replace(SMALL, activation="tanh", cell_clip=None, projection_clip=None)
    lengths = np.array([5, 2], np.int32)
    ids = np.zeros((2, 6, config.max_characters), np.int32)
    ids[0] = np.arange(1, 7)[:, None]
    ids[1] = ids[0, ::-1]
    towards = np.random.default_rng(5).normal(size=6).astype(np.float32)

    @quick_jit
    @jax.jacrev
    def jacobian(table):
        p = jax.tree.map(jnp.asarray, params(config))
        p["words"]["table"] = table
        layers = bound(config)(p)(ids, lengths)[0].layers
        return jnp.einsum("lbtsd,d->sblt", layers.reshape(*layers.shape[:3], 2, 6), towards)

    sees = np.abs(np.asarray(jacobian(params(config)["words"]["table"]))).max(-1)[..., :6] > 0
    word, other = np.indices((6, 6))
    for row, length in enumerate(lengths):
        present = (word < length) & (other < length)
        for layer in range(3):
            for direction in (0, 1):
                seen = word == other if layer == 0 else (other <= word if direction == 0 else other >= word)
                # Row 1 has the characters in the other order.
                found = sees[direction, row, layer][:, ::-1] if row else sees[direction, row, layer]
                np.testing.assert_array_equal(found, seen & present, err_msg=f"{row} {layer} {direction}")


def test_gradients_of_a_window_by_finite_differences():
    """Of every weight and the state before, by all layers and the state after, along random directions."""
    config, lengths = TINY, np.array([4, 2, 0], np.int32)
    p, ids, state = params(config), random_words(config, lengths), random_state(config, 3)
    rng = np.random.default_rng(6)
    out, after = twin(config, p, ids, lengths, state)
    aims = [rng.normal(size=x.shape).astype(np.float32) for x in (out, *leaves(after))]

    @quick_jit
    @jax.grad
    def gradient(tree):
        out, after = bound(config)(tree[0])(ids, lengths, tree[1])
        return sum((x * aim).sum() for x, aim in zip((out.layers, *jax.tree.leaves(after)), aims, strict=True))

    def loss(flat):
        p, state = jax.tree.unflatten(jax.tree.structure((p_, state_)), flat)
        out, after = twin(config, p, ids, lengths, state)
        return sum((x * aim).sum() for x, aim in zip((out, *leaves(after)), aims, strict=True))

    p_, state_ = p, state
    found = jax.tree.leaves(gradient((p, state)))
    paths = [*flat_paths(p), *(f"state {i}" for i in range(8))]
    wide, h = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves((p, state))], 1e-6
    for number, (path, leaf, slope) in enumerate(zip(paths, wide, found, strict=True)):
        assert slope.shape == leaf.shape, path
        assert np.abs(slope).max() > 1e-3, path
        for _ in range(3):
            direction = rng.normal(size=leaf.shape)
            ends = [loss([*wide[:number], leaf + sign * h * direction, *wide[number + 1 :]]) for sign in (1, -1)]
            expected = (ends[0] - ends[1]) / (2 * h)
            norm = float(np.linalg.norm(slope))
            assert np.vdot(slope, direction) == pytest.approx(expected, abs=1e-5 * norm), path


def test_absent_words_have_no_gradient():
    """A row's own words alone move the table, whatever stands behind them."""
    config = SMALL
    ids = np.tile(np.arange(1, 7, dtype=np.int32)[None, :, None], (2, 1, config.max_characters))
    run = quick_jit(jax.grad(lambda p, ids, lengths: (bound(config)(p)(ids, lengths)[0].layers ** 2).sum()))
    found = run(params(config), ids, np.array([3, 2], np.int32))
    moved = np.abs(np.asarray(found["words"]["table"])).max(1) > 0
    assert np.flatnonzero(moved).tolist() == [0, 1, 2]
    cut = run(params(config), np.where(np.arange(6)[None, :, None] < 3, ids, 0), np.array([3, 2], np.int32))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


def by_formula(lstm, projection, highways, filters=elmo.ORIGINAL_FILTERS, characters=262, size=16, layers=2):
    """Characters but the one of absent words; filters; highways; a projection; two directions of LSTMs."""
    table = (characters - 1) * size
    convolutions = sum(width * size * count + count for width, count in filters)
    features = sum(count for _, count in filters)
    highway = 2 * (features * features + features)
    to_words = features * projection + projection
    cell = 2 * projection * 4 * lstm + 4 * lstm + lstm * projection
    return table + convolutions + highways * highway + to_words + 2 * layers * cell


@pytest.mark.parametrize(
    ("lstm", "projection", "highways", "published"),
    [(4096, 512, 2, 93_600_848), (1024, 128, 1, 13_593_296), (2048, 256, 1, 28_027_728)],
    ids=["original", "small", "medium"],
)
def test_as_many_parameters_as_the_originals(lstm, projection, highways, published):
    """The paper's 93.6 million, and 13.6 and 28.0 of the sizes that AllenNLP lists."""
    config = ElmoConfig(lstm_dim=lstm, projection_dim=projection, num_highway=highways)
    assert by_formula(lstm, projection, highways) == published
    assert count_parameters(bound(config).shapes) == published
    if lstm == 4096:
        assert config == ElmoConfig()


@pytest.mark.parametrize("name", ["small", "three layers", "no skip"])
def test_stays_near_the_twin_in_bfloat16(name):
    """In units of 2⁻⁸, bfloat16's rounding: measured 0.9 to 2.5 as a root mean square, 11.6 at the worst value."""
    config = dataclasses.replace(CONFIGS[name], dtype="bfloat16")
    p, ids = params(config, scale=1.0), random_words(config)
    out, after = runner(config)(p, ids, LENGTHS, None)
    assert out.last.dtype == out.layers.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}
    for layer, theirs in enumerate(twin(config, p, ids, LENGTHS)[0]):
        difference = np.asarray(out.layers[layer], np.float64) - theirs
        size = np.sqrt(np.mean(theirs**2))
        assert 0.5 < np.sqrt(np.mean(difference**2)) / size * 2**8 < 3.2, layer
        assert np.abs(difference).max() / size * 2**8 < 15, layer


def test_unrolled_is_the_same():
    p, ids, state = params(SMALL), random_words(SMALL), random_state(SMALL, 5)
    unrolled = dataclasses.replace(SMALL, unroll=True)
    found = runner(unrolled)(p, ids, LENGTHS, state)
    expected = runner(SMALL)(p, ids, LENGTHS, state)
    for ours, theirs in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    jaxpr = lambda config: str(jax.make_jaxpr(lambda p: bound(config)(p)(ids, LENGTHS, state))(p))
    assert jaxpr(unrolled).count("unroll=7") == 4
    assert jaxpr(SMALL).count("unroll=1") == 4


# Dropout.


def split(seed, count):
    return quick_jit(lambda: jax.random.split(jax.random.key(seed), count))()


@functools.cache
def dropping(config):
    run = lambda p, ids, keys: bound(config)(p)(ids, np.full(len(ids), 6, np.int32), dropout_keys=keys)[0].layers
    return quick_jit(run)


def test_dropout_is_of_the_row():
    config = dataclasses.replace(SMALL, dropout=0.3)
    p, run, keys = params(config), dropping(config), split(1, 3)
    ids = np.tile(random_words(config, [6]), (4, 1, 1))
    layers = np.asarray(run(p, ids, keys[np.array([0, 1, 2, 0])]))
    moved = np.asarray(run(p, ids, keys[np.array([2, 0, 0, 1])]))
    np.testing.assert_array_equal(layers[:, 0], layers[:, 3])
    np.testing.assert_array_equal(moved[:, [1, 3, 0]], layers[:, :3])
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (np.abs(layers[1:, a] - layers[1:, b]).max((1, 2)) > 0.05).all()


def test_dropout_is_off_without_keys_or_rate():
    config = dataclasses.replace(SMALL, dropout=0.3)
    ids = np.tile(random_words(config, [6]), (4, 1, 1))
    off = np.asarray(dropping(config)(params(config), ids, None))
    none = dropping(dataclasses.replace(config, dropout=0.0))(params(config), ids, split(1, 4))
    np.testing.assert_array_equal(none, off)
    on = np.asarray(dropping(config)(params(config), ids, split(1, 4)))
    np.testing.assert_array_equal(on[0], off[0])
    assert (np.abs(on - off)[1:].max((1, 2, 3)) > 0.05).all()


@pytest.mark.parametrize("skip", [True, False])
def test_what_is_dropped_enters_neither_the_lstm_nor_its_skip_connection(skip, monkeypatch):
    """The twin with the masks that were drawn, each seen on ones; every layer of each direction has its own."""
    config = dataclasses.replace(SMALL, dropout=0.4, skip_connections=skip)
    p, ids, keys = params(config), random_words(config), split(3, 5)
    masks, original = [], elmo.dropout

    def record(x, rate, keys):
        mask = original(jnp.ones_like(x), rate, keys)
        masks.append(mask)
        return x * mask

    monkeypatch.setattr(elmo, "dropout", record)

    @quick_jit
    def run(p):
        masks.clear()
        layers = bound(config)(p)(ids, LENGTHS, dropout_keys=keys)[0].layers
        return layers, list(masks)

    recorded, drawn = run(p)
    monkeypatch.undo()
    drawn = [np.asarray(mask, np.float64) for mask in drawn]
    assert [mask.shape for mask in drawn] == [(5, 7, 6)] * 4
    for number, mask in enumerate(drawn):
        assert set(np.unique(mask.round(5))) == {0, round(1 / 0.6, 5)}
        assert 0.3 < (mask == 0).mean() < 0.5
        for other in drawn[:number]:
            assert 0.3 < (mask != other).mean() < 0.7
    # The backward direction's are in its own order.
    for mask in drawn[2:]:
        for row, length in enumerate(LENGTHS):
            mask[row, :length] = mask[row, :length][::-1].copy()
    expected = twin(config, p, ids, LENGTHS, masks=[drawn[:2], drawn[2:]])[0]
    for layer, theirs in enumerate(expected):
        assert relative(recorded[layer], theirs) < 2e-6, layer
    unpatched = quick_jit(lambda p: bound(config)(p)(ids, LENGTHS, dropout_keys=keys)[0].layers)(p)
    np.testing.assert_allclose(unpatched, recorded, rtol=0, atol=2e-6)


# Parts.


def test_contextualise_begins_with_word_vectors():
    p, ids, state = params(SMALL), random_words(SMALL), random_state(SMALL, 5)
    whole = runner(SMALL)(p, ids, LENGTHS, state)

    @quick_jit
    def run(p):
        model = bound(SMALL)(p)
        vectors = model.word_vectors(ids)
        return vectors, model.contextualise(vectors, LENGTHS, state)

    vectors, found = run(p)
    mask = np.arange(7) < LENGTHS[:, None]
    np.testing.assert_allclose(np.asarray(vectors)[mask], np.asarray(whole[0].layers)[0, mask, :6], rtol=0, atol=1e-6)
    # Absent words have vectors too, of which nothing is seen.
    assert np.abs(np.asarray(vectors)[~mask]).max() > 0.1
    for ours, theirs in zip(leaves(found), leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("all_layers", [True, False])
def test_without_ends(all_layers):
    """`<S>` and `</S>` are a row's first and last word, not the batch's."""
    lengths = np.array([6, 2, 3, 5], np.int32)
    layers = np.random.default_rng(0).normal(size=(3, 4, 6, 2)).astype(np.float32)
    mask = np.arange(6) < lengths[:, None]
    layers[:, ~mask] = 0
    given = Representations(layers[-1], layers if all_layers else None, mask)
    found = quick_jit(without_ends)(given)
    assert found.mask.shape == (4, 4)
    assert found.last.shape == (4, 4, 2)
    np.testing.assert_array_equal(np.asarray(found.mask).sum(1), lengths - 2)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(found.mask[row], np.arange(4) < length - 2)
        np.testing.assert_array_equal(found.last[row, : length - 2], layers[-1, row, 1 : length - 1])
        assert not np.asarray(found.last)[row, length - 2 :].any()
        if all_layers:
            np.testing.assert_array_equal(found.layers[:, row, : length - 2], layers[:, row, 1 : length - 1])
            assert not np.asarray(found.layers)[:, row, length - 2 :].any()
    assert (found.layers is None) == (not all_layers)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("character_dim", 0, "character_dim is 0, expected at least 1"),
        ("max_characters", 2, "max_characters is 2, expected at least 3"),
        ("num_characters", 261, "num_characters is 261, expected at least 262"),
        ("num_highway", -1, "num_highway is -1, expected at least 0"),
        ("lstm_dim", 0, "lstm_dim is 0, expected at least 1"),
        ("projection_dim", 0, "projection_dim is 0, expected at least 1"),
        ("num_layers", 0, "num_layers is 0, expected at least 1"),
        ("vocab_size", 3, "vocab_size is 3, expected at least 4"),
        ("filters", (), "filters is empty"),
        ("filters", ((1, 4), (51, 4)), r"found \(51, 4\), expected a width of 1 to 50"),
        ("filters", ((0, 4),), r"found \(0, 4\), expected a width of 1 to 50"),
        ("filters", ((1, 0),), r"found \(1, 0\), .* a count of at least 1"),
        ("activation", "rleu", "did you mean 'relu'"),
        ("activation", "gelu", "expected one of relu, tanh"),
        ("cell_clip", 0.0, "cell_clip is 0.0, expected above 0, or None"),
        ("projection_clip", -3.0, "projection_clip is -3.0, expected above 0, or None"),
        ("cell_clip", float("nan"), "cell_clip is nan"),
        ("dropout", 1.0, "dropout is 1.0, expected at least 0 and below 1"),
        ("dropout", -0.1, "dropout is -0.1"),
    ],
)
def test_impossible_configs_are_refused(field, value, words):
    with pytest.raises(InputError, match=words):
        ElmoConfig(**{field: value})


def test_ids_outside_the_table_behind_a_row_touch_no_gradient():
    """Nobody reads their vectors; zero times their NaN would be NaN all the same."""
    config = TINY
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 262, (2, 4, config.max_characters)).astype(np.int32)
    lengths = np.array([4, 2], np.int32)
    wild = ids.copy()
    wild[1, 2:] = 9999

    @quick_jit
    @jax.grad
    def gradients(params, ids):
        return bound(config)(params)(ids, lengths)[0].last.sum()

    for path, leaf in flat_paths(gradients(params(config), wild)).items():
        assert np.isfinite(leaf).all(), path
