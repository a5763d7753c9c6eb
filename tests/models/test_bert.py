"""BERT against a float64 twin written from the papers; who sees whom, by gradients; what must not change a result."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import bert as oracle
from oracles.compiling import quick_jit
from oracles.jaxprs import equations
from oracles.parameters import original_names, random_params
from oracles.rows import make_examples, rows_of

from ctx_jax.errors import InputError
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.nn.parameters import Bound, count_parameters, flat_paths

SMALL = BertConfig(
    vocab_size=83,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    intermediate_size=72,
    max_position_embeddings=24,
)
SIZES = {
    "one head": BertConfig(29, 12, 1, 1, 10, 24),
    "wide heads": BertConfig(57, 48, 2, 2, 40, 30, type_vocab_size=3, activation="gelu_tanh"),
    "many heads": BertConfig(40, 40, 2, 10, 16, 24, activation="silu", layer_norm_eps=1e-5),
    "small": SMALL,
    "gated": dataclasses.replace(SMALL, gated=True),
    "local": dataclasses.replace(SMALL, attention_window=3),
    "deep": dataclasses.replace(SMALL, num_layers=12, activation="relu"),
    "as RoBERTa": dataclasses.replace(SMALL, position_offset=2, max_position_embeddings=26),
    "own table": dataclasses.replace(SMALL, tied_head=False, vocab_size=40),
    "as ELECTRA": dataclasses.replace(SMALL, embedding_size=20),
    "as DistilBERT": dataclasses.replace(SMALL, type_vocab_size=0),
    "as ALBERT": dataclasses.replace(SMALL, embedding_size=20, shared_layers=True, num_layers=5),
}


@functools.cache
def bound(config):
    return Bound(lambda rngs: BertWithHeads(config, rngs=rngs))


def numbers(config):
    return {
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "activation": config.activation,
        "eps": config.layer_norm_eps,
        "window": config.attention_window,
        "position_offset": config.position_offset,
    }


def rows(config, seed=0, length=24):
    """Packed rows, rows with one text, padding of every length."""
    rng = np.random.default_rng(seed)
    short = make_examples(rng, 8, 5, length // 3, config.vocab_size)
    texts = short + make_examples(rng, 3, length // 2 + 1, length, config.vocab_size)
    batch = rows_of(texts, length, 3, rows=8)
    assert (batch.segment_ids == 3).any()
    assert (batch.segment_ids == 0).any()
    assert (batch.token_type_ids == 1).any()
    return batch


@functools.cache
def forward(config):
    """(params, batch) → all layers, last, MLM logits of every token, NSP logits of every token."""

    @quick_jit
    def run(params, batch):
        model = bound(config)(params)
        out = model.encoder(*batch[:4], all_layers=True)
        flat = out.last.reshape(-1, config.hidden_size)
        return out, model.masked_lm_logits(flat), model.next_sentence_logits(flat)

    return run


def expected(config, params, batch):
    w = original_names(params, config.num_layers)
    layers = oracle.encode(w, *batch[:4], **numbers(config))
    flat = layers[-1].reshape(-1, config.hidden_size)
    logits = oracle.masked_lm_logits(w, flat, activation=config.activation, eps=config.layer_norm_eps)
    return layers, logits, oracle.next_sentence_logits(w, flat)


def errors(config, seed=1):
    """Largest and root-mean-square difference, each relative to the size of what is compared, by name."""
    params = random_params(bound(config).shapes, seed)
    batch = rows(config)
    out, mlm, nsp = forward(config)(params, batch)
    layers, expected_mlm, expected_nsp = expected(config, params, batch)
    assert out.last.dtype == out.layers.dtype == config.dtype
    assert mlm.dtype == nsp.dtype == jnp.float32
    np.testing.assert_array_equal(out.mask, batch.segment_ids > 0)
    np.testing.assert_array_equal(np.asarray(out.layers[-1], np.float32), np.asarray(out.last, np.float32))
    pairs = {f"layer {i}": (out.layers[i], layers[i]) for i in range(config.num_layers + 1)}
    pairs |= {"mlm": (mlm, expected_mlm), "nsp": (nsp, expected_nsp)}
    found = {}
    for name, (ours, theirs) in pairs.items():
        seen = (batch.segment_ids > 0).reshape(-1)
        theirs = theirs.reshape(seen.size, -1)[seen]
        difference = np.asarray(ours, np.float64).reshape(seen.size, -1)[seen] - theirs
        size = np.sqrt(np.mean(theirs**2))
        assert np.isfinite(size)
        found[name] = np.abs(difference).max() / size, np.sqrt(np.mean(difference**2)) / size
    return found


@pytest.mark.parametrize("name", SIZES)
def test_equals_the_twin_in_float32(name):
    """The query takes the scores' factor before they are summed: where it is no power of 2, here for heads of 8, single
    values are off by 2.1e-6, ten times the root of the mean square.
    """
    for where, (largest, typical) in errors(SIZES[name]).items():
        assert typical < 6e-7, where
        assert largest < 3e-6, where


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu"])
def test_activations(activation):
    config = dataclasses.replace(SMALL, activation=activation)
    assert max(largest for largest, _ in errors(config).values()) < 2e-6


@pytest.mark.parametrize("name", ["one head", "wide heads", "deep"])
def test_stays_near_the_twin_in_bfloat16(name):
    """In units of 2⁻⁸, bfloat16's rounding: measured 2.9 as a root mean square, 12.4 at the worst value."""
    for where, (largest, typical) in errors(dataclasses.replace(SIZES[name], dtype="bfloat16")).items():
        assert 0.1 < typical * 2**8 < 4, where
        assert largest * 2**8 < 16, where


def test_without_types_segments_and_positions_it_is_one_text_from_zero():
    params = random_params(bound(SMALL).shapes, 2)
    ids = np.random.default_rng(3).integers(0, 83, (2, 10)).astype(np.int32)
    # Op by op, so that both compute the very same: compiled, constants are fused in another way than arguments.
    with jax.disable_jit():
        encoder = bound(SMALL)(jax.tree.map(jnp.asarray, params)).encoder
        plain = encoder(jnp.asarray(ids))
        positions = np.tile(np.arange(10, dtype=np.int32), (2, 1))
        full = encoder(*map(jnp.asarray, (ids, np.zeros_like(ids), np.ones_like(ids), positions)))
    assert plain.layers is None
    assert plain.mask.all()
    np.testing.assert_array_equal(plain.last, full.last)


def encoder_size(vocab, width, layers, intermediate, positions=512, types=2):
    """Written from the paper's figure: tables and a LayerNorm, L layers, no pooler."""
    attention = 4 * (width * width + width)
    feed_forward = width * intermediate + intermediate + intermediate * width + width
    norm = 2 * width
    return (vocab + positions + types) * width + norm + layers * (attention + feed_forward + 2 * norm)


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        ((768, 12, 12, 3072), 109_482_240),
        ((1024, 24, 16, 4096), 335_141_888),
        ((128, 2, 2, 512), 4_385_920),
    ],
    ids=["base", "large", "tiny"],
)
def test_as_many_parameters_as_the_originals(sizes, published):
    width, layers, heads, intermediate = sizes
    config = BertConfig(30522, width, layers, heads, intermediate)
    shapes = bound(config).shapes
    pooler = width * width + width
    assert encoder_size(30522, width, layers, intermediate) + pooler == published
    assert count_parameters(shapes["encoder"]) == published
    heads = (width * width + width) + 2 * width + 30522 + 2 * width + 2
    assert count_parameters(shapes) == published + heads
    if width == 768:
        assert published + heads == 110_106_428
    without = bound(dataclasses.replace(config, pooler=False)).shapes
    assert count_parameters(without) == published + heads - pooler - (2 * width + 2)
    assert not [path for path in flat_paths(without) if "pooler" in path or "next_sentence" in path]


def test_birth_is_googles():
    """Kernels and tables: normal of 0.02 cut at two deviations; biases 0, LayerNorms 1; no two layers alike."""
    config = dataclasses.replace(SMALL, hidden_size=64, num_layers=4, vocab_size=500)
    params = {k: np.asarray(v) for k, v in flat_paths(quick_jit(bound(config).init)(jax.random.key(0))).items()}
    for path, values in params.items():
        assert values.dtype == np.float32
        if path.endswith("bias"):
            assert not values.any(), path
        elif path.endswith("scale"):
            assert (values == 1).all(), path
        else:
            assert 0.035 < np.abs(values).max() <= 0.04 or values.size < 200, path
            if values.size > 4000:
                # A normal cut at two deviations keeps 0.8796 of its deviation.
                assert values.std() == pytest.approx(0.02 * 0.8796, rel=0.05), path
    for path in (p for p in params if p.endswith("kernel") and "/layers/" in p):
        matrices = params[path].reshape(4, -1)
        assert np.abs(np.corrcoef(matrices) - np.eye(4)).max() < 0.1, path
    qkv = params["encoder/layers/attention/qkv/kernel"][0]
    assert np.abs(np.corrcoef(qkv.transpose(1, 0, 2).reshape(3, -1)) - np.eye(3)).max() < 0.1


def test_a_token_sees_its_own_text_and_nothing_else():
    """Derivative of each layer at token i by the embedding of token j: each place has an id of its own."""
    config = dataclasses.replace(SMALL, vocab_size=14, hidden_size=16, num_heads=2)
    segments = np.array([[1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 3, 3, 0, 0]], np.int32)
    ids = np.arange(14, dtype=np.int32)[None]
    positions = np.array([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 0, 1, 0, 0]], np.int32)
    params = random_params(bound(config).shapes, 4)
    # Of a LayerNorm's output the plain sum over the width has no derivative.
    direction = np.random.default_rng(5).normal(size=16).astype(np.float32)

    @quick_jit
    @jax.jacrev
    def jacobian(table):
        tree = jax.tree.map(jnp.asarray, params)
        tree["encoder"]["embeddings"]["token"]["table"] = table
        out = bound(config)(tree).encoder(ids, jnp.zeros_like(ids), segments, positions, all_layers=True)
        return jnp.einsum("ltd,d->lt", out.layers[:, 0], direction)

    sees = np.abs(np.asarray(jacobian(params["encoder"]["embeddings"]["token"]["table"])))
    assert np.isfinite(sees).all()
    sees = sees.max(-1)
    same = (segments[0][:, None] == segments[0][None, :]) & (segments[0] > 0)
    tokens = segments[0] > 0
    for layer in range(config.num_layers + 1):
        expected = np.eye(14, dtype=bool) if layer == 0 else same
        np.testing.assert_array_equal((sees[layer] != 0)[tokens], expected[tokens], err_msg=f"layer {layer}")


def loss_and_gradients(config):
    @quick_jit
    @jax.value_and_grad
    def run(params, batch, keys):
        out = bound(config)(params).encoder(*batch[:4], dropout_keys=keys)
        towards = jnp.asarray(np.random.default_rng(6).normal(size=out.last.shape).astype(np.float32))
        return jnp.where(out.mask[..., None], out.last * towards, 0.0).mean()

    return run


@pytest.fixture(scope="module")
def plain():
    config = dataclasses.replace(SMALL, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)
    params, batch = random_params(bound(config).shapes, 7), rows(config)
    keys = quick_jit(lambda: jax.random.split(jax.random.key(1), 8))()
    return config, (params, batch, keys), loss_and_gradients(config)(params, batch, keys)


@pytest.mark.parametrize(
    ("remat", "unroll"), [("none", True), ("dots", False), ("dots", True), ("all", False), ("all", True)]
)
def test_remat_and_unrolling_change_nothing(plain, remat, unroll):
    """Neither the loss nor a gradient, with dropout on."""
    config, args, (loss, gradients) = plain
    other, others = loss_and_gradients(dataclasses.replace(config, remat=remat, unroll=unroll))(*args)
    assert float(other) == pytest.approx(float(loss), rel=1e-6)
    for (path, ours), theirs in zip(flat_paths(gradients).items(), flat_paths(others).values(), strict=True):
        scale = np.abs(ours).max()
        assert (scale > 0) == (path.startswith("encoder/") and "pooler" not in path), path
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-6 * scale + 1e-12, err_msg=path)


def products(remat, unroll):
    """How many products without and with batch dimensions one layer's gradient makes."""
    config = dataclasses.replace(SMALL, remat=remat, unroll=unroll)
    ids = np.ones((2, 8), np.int32)
    gradient = jax.grad(lambda params: bound(config)(params).encoder(ids).last.sum())
    jaxpr = jax.make_jaxpr(gradient)(bound(config).shapes)
    ranks = [e.outvars[0].aval.ndim for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    return ranks.count(2), ranks.count(4)


@pytest.mark.parametrize("unroll", [False, True])
def test_remat_computes_again_what_it_says(unroll):
    """A layer has four products with weights (qkv, out, up, down) and two in attention; each has two backward, and for
    them attention makes its scores anew.
    """
    assert products("none", unroll) == (12, 7)
    assert products("dots", unroll) == (12, 7)
    assert products("all", unroll) == (16, 9)


def test_asking_for_all_layers_changes_nothing():
    params, batch = random_params(bound(SMALL).shapes, 8), rows(SMALL)
    everything = forward(SMALL)(params, batch)[0]
    run = quick_jit(lambda params, batch: bound(SMALL)(params).encoder(*batch[:4]))
    np.testing.assert_allclose(run(params, batch).last, everything.last, rtol=0, atol=1e-6)


def test_dropout_is_of_the_row_and_of_the_place():
    config = dataclasses.replace(SMALL, hidden_dropout=0.3, attention_dropout=0.3)
    params = random_params(bound(config).shapes, 9)
    ids = np.tile(np.arange(5, 17, dtype=np.int32), (4, 1))
    run = quick_jit(lambda params, keys: bound(config)(params).encoder(ids, dropout_keys=keys, all_layers=True).layers)
    keys = quick_jit(lambda: jax.random.split(jax.random.key(2), 3))()
    layers = np.asarray(run(params, keys[np.array([0, 1, 2, 0])]))
    moved = np.asarray(run(params, keys[np.array([2, 0, 0, 1])]))
    np.testing.assert_array_equal(layers[:, 0], layers[:, 3])
    np.testing.assert_array_equal(moved[:, [1, 3, 0]], layers[:, :3])
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (np.abs(layers[:, a] - layers[:, b]).max((1, 2)) > 0.1).all()
    off = np.asarray(run(params, None))
    np.testing.assert_array_equal(off[:, 0], off[:, 1])
    assert (np.abs(off - layers).max((1, 2, 3)) > 0.1).all()


@pytest.mark.parametrize("which", ["hidden_dropout", "attention_dropout"])
def test_each_dropout_acts_alone(which):
    config = dataclasses.replace(SMALL, **({"hidden_dropout": 0.0, "attention_dropout": 0.0} | {which: 0.5}))
    params = random_params(bound(config).shapes, 9)
    ids = np.tile(np.arange(5, 17, dtype=np.int32), (2, 1))
    run = quick_jit(lambda params, keys: bound(config)(params).encoder(ids, dropout_keys=keys, all_layers=True).layers)
    on = np.asarray(run(params, quick_jit(lambda: jax.random.split(jax.random.key(3), 2))()))
    off = np.asarray(forward_plain(params, ids))
    # Attention has its first say in layer 1, the embeddings theirs in layer 0.
    zeros = (on[0] == 0).mean()
    assert (np.abs(on[1:] - off[1:]).max((1, 2, 3)) > 0.1).all()
    if which == "attention_dropout":
        np.testing.assert_array_equal(on[0], off[0])
    else:
        assert 0.4 < zeros < 0.6


def forward_plain(params, ids):
    return quick_jit(lambda params: bound(SMALL)(params).encoder(ids, all_layers=True).layers)(params)


def test_no_two_places_share_their_noise():
    """Of one row's key, each layer and each of its three places draws from a key of its own, and the embeddings too."""
    config = dataclasses.replace(SMALL, num_layers=2)
    seen = []

    def record(x, rate, keys):
        seen.append((rate, jax.random.key_data(keys)))
        return x

    def attend(heads, rate, packed, mask, seeds):
        seen.append((rate, seeds))
        return packed[..., : packed.shape[-1] // 3]

    def norm(eps, rate, x, branch, scale, bias, seeds):
        seen.append((rate, seeds))
        return x + branch

    import ctx_jax.models.bert as bert
    import ctx_jax.nn.attention as attention
    import ctx_jax.nn.norm as norms

    patch = pytest.MonkeyPatch()
    patch.setattr(bert, "dropout", record)
    patch.setattr(attention, "packed_attention", attend)
    patch.setattr(norms, "residual_norm", norm)
    try:
        model = bound(config)(jax.tree.map(jnp.asarray, random_params(bound(config).shapes, 0)))
        keys = jax.random.split(jax.random.key(0), 1)
        with jax.disable_jit():
            model.encoder(np.ones((1, 2), np.int32), dropout_keys=keys)
    finally:
        patch.undo()
    assert len(seen) == 1 + 3 * 2
    assert len({np.asarray(noise).tobytes() for _, noise in seen}) == 7


def test_an_unknown_id_or_position_is_seen():
    params = random_params(bound(SMALL).shapes, 0)
    run = quick_jit(lambda params, ids, positions: bound(SMALL)(params).encoder(ids, positions=positions).last)
    ids, positions = np.full((1, 4), 7, np.int32), np.arange(4, dtype=np.int32)[None]
    assert np.isfinite(run(params, ids, positions)).all()
    for wrong in (83, 1000, -1, -84):
        assert np.isnan(run(params, np.where(positions == 2, wrong, ids), positions)).any(), f"id {wrong}"
    for wrong in (24, -1):
        assert np.isnan(run(params, ids, np.where(positions == 2, wrong, positions))).any(), f"position {wrong}"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_size", 770, "770 is not a multiple of num_heads 12"),
        ("num_layers", 0, "num_layers is 0"),
        ("activation", "gelu_tahn", "did you mean 'gelu_tanh'"),
        ("hidden_dropout", 1.0, "hidden_dropout is 1.0"),
        ("attention_dropout", -0.1, "attention_dropout is -0.1"),
        ("attention_window", 0, "attention_window is 0"),
    ],
)
def test_impossible_configs_are_refused(field, value, words):
    with pytest.raises(InputError, match=words):
        BertConfig(**{field: value})
