"""Masked-language-model training: loss and gradients against float64, packed rows, and what is never computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import bert as oracle
from oracles.compiling import quick_jit
from oracles.jaxprs import equations, largest_value
from oracles.parameters import nested, original_names, random_params
from oracles.rows import make_examples, rows_of, vocabulary
from scipy import stats

from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.nn.parameters import Bound, flat_paths
from ctx_jax.objectives.mlm import MaskedLM, MaskedLMObjective, softmax_cross_entropy, unigram_entropy

CONFIG = BertConfig(
    vocab_size=61,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=24,
    max_position_embeddings=64,
    activation="gelu_tanh",
)
LENGTH, ROWS = 48, 10
SEED = 5  # of the parameters: three of 32 predictions are right, and six of nine labels


@functools.cache
def bound(config=CONFIG):
    return Bound(lambda rngs: BertWithHeads(config, rngs=rngs))


def objective(per_row, next_sentence):
    config = MaskedLM(rate=0.3, next_sentence=next_sentence)
    return MaskedLMObjective(config, vocabulary(61), length=LENGTH, examples_per_row=per_row)


@functools.cache
def texts():
    found = make_examples(np.random.default_rng(0), ROWS, 6, 22, 61)
    assert {e.next_sentence for e in found} == {-1, 0, 1}
    return found


@functools.cache
def run(per_row, next_sentence):
    """(loss, sums, gradients, prepared, MLM logits [B, P, V], NSP logits of every token) of texts packed so."""
    mlm = objective(per_row, next_sentence)

    @quick_jit
    def step(params, batch):
        prepared, totals = mlm.prepare(batch, jnp.int32(5), mlm.arguments)
        (loss, (sums, _)), gradients = jax.value_and_grad(
            lambda params: mlm.loss(bound()(params), prepared, totals), has_aux=True
        )(params)
        model = bound()(params)
        vectors = model.encoder(prepared.masked.input_ids, *prepared.batch[1:4]).last
        at = jnp.take_along_axis(vectors, prepared.masked.positions[..., None], axis=1)
        logits = model.masked_lm_logits(at.reshape(-1, 16)).reshape(*at.shape[:2], -1)
        nsp = model.next_sentence_logits(vectors.reshape(-1, 16)).reshape(*vectors.shape[:2], 2)
        return loss, sums, gradients, prepared, totals, logits, nsp

    # Rows of nothing but padding stand at the end of both.
    batch = rows_of(texts(), LENGTH, per_row, rows=ROWS + 1)
    params = random_params(bound().shapes, SEED)
    return jax.tree.map(np.asarray, step(params, batch))


def by_example(prepared, values, wanted):
    """{(example, position in it): value} for the predictions, or for the `[CLS]` of examples with a label."""
    batch, masked = prepared
    found = {}
    if wanted == "predictions":
        for r, p in zip(*np.nonzero(masked.weights), strict=True):
            at = masked.positions[r, p]
            found[batch.example_ids[r, batch.segment_ids[r, at] - 1], batch.positions[r, at]] = values[r, p]
    else:
        for r, s in zip(*np.nonzero(batch.next_sentence >= 0), strict=True):
            found[batch.example_ids[r, s], 0] = values[r, np.flatnonzero(batch.segment_ids[r] == s + 1)[0]]
    return found


def expected_loss(w, prepared, next_sentence):
    """The sums of the log, from the definition, in float64."""
    batch, masked = prepared
    config = {"num_layers": 2, "num_heads": 2, "activation": "gelu_tanh"}
    layers = oracle.encode(w, masked.input_ids, *batch[1:4], **config)[-1]
    rows, slots = np.nonzero(masked.weights)
    logits = oracle.masked_lm_logits(w, layers[rows, masked.positions[rows, slots]], activation="gelu_tanh")
    targets = masked.targets[rows, slots]
    sums = {
        "mlm_loss": oracle.cross_entropy(logits, targets).sum(),
        "mlm_correct": (logits.argmax(1) == targets).sum(),
        "mlm_weight": len(targets),
    }
    if next_sentence:
        pairs = [(r, s) for r, s in np.ndindex(batch.next_sentence.shape) if batch.next_sentence[r, s] != -1]
        cls = np.array([layers[r, list(batch.segment_ids[r]).index(s + 1)] for r, s in pairs])
        labels = np.array([batch.next_sentence[r, s] for r, s in pairs])
        logits = oracle.next_sentence_logits(w, cls)
        sums |= {
            "nsp_loss": oracle.cross_entropy(logits, labels).sum(),
            "nsp_correct": (logits.argmax(1) == labels).sum(),
            "nsp_weight": len(labels),
        }
    return sums


@pytest.mark.parametrize("next_sentence", [False, True])
@pytest.mark.parametrize("per_row", [1, 3])
def test_loss_and_accuracy_equal_float64(per_row, next_sentence):
    loss, sums, _, prepared, totals, _, _ = run(per_row, next_sentence)
    expected = expected_loss(original_names(random_params(bound().shapes, SEED)), prepared, next_sentence)
    assert sums.keys() == expected.keys()
    assert sums["mlm_weight"] == totals["mlm"] > 2 * ROWS
    for name, value in expected.items():
        assert float(sums[name]) == pytest.approx(value, rel=2e-6 if name.endswith("loss") else 0), name
    assert 0 < sums["mlm_correct"] < sums["mlm_weight"]
    means = {name: expected[f"{name}_loss"] / expected[f"{name}_weight"] for name in totals}
    assert float(loss) == pytest.approx(sum(means.values()), rel=2e-6)
    shown = MaskedLMObjective.means({name: float(value) for name, value in sums.items()})
    assert shown["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert shown["mlm_accuracy"] == expected["mlm_correct"] / expected["mlm_weight"]
    assert ("nsp_accuracy" in shown) == next_sentence


def test_the_gradient_is_the_slope_of_the_float64_loss():
    """Along random directions of all parameters at once, and of each leaf alone."""
    _, _, gradients, prepared, _, _, _ = run(3, True)
    params = random_params(bound().shapes, SEED)
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    def loss(step, only):
        moved = {
            path: leaf + step * way * (only in ("", path))
            for (path, leaf), way in zip(flat_paths(params).items(), jax.tree.leaves(direction), strict=True)
        }
        sums = expected_loss(original_names(nested(moved)), prepared, True)
        return sum(sums[f"{name}_loss"] / sums[f"{name}_weight"] for name in ("mlm", "nsp"))

    terms = {
        path: gradient.astype(np.float64) * way
        for (path, gradient), way in zip(flat_paths(gradients).items(), jax.tree.leaves(direction), strict=True)
    }
    terms[""] = np.concatenate([leaf.ravel() for leaf in terms.values()])
    for path, term in terms.items():
        h = 1e-5
        theirs = (loss(h, path) - loss(-h, path)) / (2 * h)
        # Terms of both signs that are each off by their last digits.
        assert term.sum() == pytest.approx(theirs, rel=0, abs=2e-6 * np.linalg.norm(term)), path


@pytest.mark.parametrize("next_sentence", [False, True])
def test_packed_rows_give_what_rows_of_their_own_give(next_sentence):
    alone, packed = run(1, next_sentence), run(3, next_sentence)
    assert (packed[3].batch.segment_ids == 3).any()
    for wanted, values in (("predictions", -2), ("cls", -1)):
        ours, theirs = (by_example(which[3], which[values], wanted) for which in (packed, alone))
        assert ours.keys() == theirs.keys()
        assert len(ours) > (20 if wanted == "predictions" else 4)
        for place in ours:
            np.testing.assert_allclose(ours[place], theirs[place], rtol=0, atol=1e-5, err_msg=str(place))
    assert float(packed[0]) == pytest.approx(float(alone[0]), rel=1e-6)
    assert {k: float(v) for k, v in packed[1].items()} == pytest.approx({k: float(v) for k, v in alone[1].items()})
    unused = {"encoder/pooler/dense", "next_sentence"}
    for (path, ours), theirs in zip(flat_paths(packed[2]).items(), flat_paths(alone[2]).values(), strict=True):
        assert np.isfinite(ours).all()
        assert ours.any() == (next_sentence or path.rsplit("/", 1)[0] not in unused), path
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=path)


def test_labels_of_next_sentence_prediction():
    """0 is next and 1 is random, as logits stand in that order; -1 counts for nothing."""
    mlm = objective(2, True)
    batch = rows_of(texts()[:4], LENGTH, 2)
    batch.next_sentence[:] = [[0, 1], [-1, 0]]

    class Model:
        """Vectors say how sure to be of (next, random)."""

        def __init__(self, logits):
            self.logits = logits

        def encoder(self, ids, *_, dropout_keys):
            class Out:
                last = jnp.zeros((*ids.shape, 2)).at[jnp.arange(2)[:, None], cls].set(self.logits)

            return Out

        def masked_lm_logits(self, vectors):
            return jnp.zeros((len(vectors), 61))

        def next_sentence_logits(self, vectors):
            return vectors

    cls = np.array([[list(row).index(s) for s in (1, 2)] for row in batch.segment_ids])
    sure = np.array([[[3, 0], [0, 3]], [[0, 3], [3, 0]]], np.float32)

    @quick_jit
    def run(logits):
        prepared, totals = mlm.prepare(batch, jnp.int32(0), mlm.arguments)
        return totals["nsp"], mlm.evaluate(Model(logits), prepared, totals)[0]

    total, sums = run(sure)
    assert (total, sums["nsp_correct"], sums["nsp_weight"]) == (3, 3, 3)
    assert float(sums["nsp_loss"]) == pytest.approx(3 * np.log1p(np.exp(-3)), rel=1e-5)
    total, sums = run(-sure)
    assert (total, sums["nsp_correct"]) == (3, 0)
    assert float(sums["nsp_loss"]) == pytest.approx(3 * np.log1p(np.exp(3)), rel=1e-5)


def test_cross_entropy():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(200, 30)) * 5 + 100).astype(np.float32)
    targets, weights = rng.integers(0, 30, 200), rng.integers(0, 2, 200).astype(np.float32)
    loss, correct = quick_jit(softmax_cross_entropy)(logits, targets, weights)
    losses = oracle.cross_entropy(logits.astype(np.float64), targets)
    assert float(loss) == pytest.approx(losses @ weights, rel=2e-6)
    assert float(correct) == (logits.argmax(1) == targets) @ weights


def test_gradient_of_the_cross_entropy():
    """Written by hand: p less 1 at the target, times the weight."""
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(200, 30)) * 5 + 100).astype(np.float32)
    targets, weights = rng.integers(0, 30, 200), rng.integers(0, 2, 200).astype(np.float32)
    found = quick_jit(jax.grad(lambda logits: 3 * softmax_cross_entropy(logits, targets, weights)[0]))(logits)
    values = np.exp(logits - logits.max(1, keepdims=True).astype(np.float64))
    expected = 3 * (values / values.sum(1, keepdims=True) - np.eye(30)[targets]) * weights[:, None]
    # Eight times the last digit of a logit near 115, which the exponential makes relative.
    np.testing.assert_allclose(found, expected, rtol=0, atol=6e-5)


def test_unigram_entropy():
    counts = np.random.default_rng(0).integers(0, 50, 300).astype(np.float32)
    counts[:40] = 0
    assert unigram_entropy(counts) == pytest.approx(stats.entropy(counts), rel=1e-12)
    assert unigram_entropy(np.array([0, 7, 0], np.float32)) == 0


def test_target_counts_are_those_of_the_used_slots():
    prepared = run(3, False)[3]
    counts = quick_jit(objective(3, False).target_counts)(prepared)
    targets = prepared.masked.targets[prepared.masked.weights > 0]
    assert (prepared.masked.weights == 0).any()
    np.testing.assert_array_equal(counts, np.bincount(targets, minlength=61))


# V is large, so that a [B, T, V] array is larger than anything else could be.
WIDE = dataclasses.replace(CONFIG, vocab_size=700, hidden_size=8)
B, T, P, V = 3, LENGTH, 7, 700


def jaxpr_of_the_gradient(loss, remat="none"):
    mlm = MaskedLMObjective(MaskedLM(next_sentence=True), vocabulary(V), length=T, examples_per_row=1)
    assert mlm.slots == P
    wide = bound(dataclasses.replace(WIDE, remat=remat))
    batch = rows_of(texts()[:3], T, 1)

    def step(params, batch):
        prepared, totals = mlm.prepare(batch, jnp.int32(0), mlm.arguments)
        return jax.grad(lambda params: loss(mlm, wide(params), prepared, totals))(params)

    return jax.make_jaxpr(jax.jit(step))(wide.shapes, batch)


@pytest.mark.parametrize("remat", ["none", "dots", "all"])
def test_the_vocabulary_projection_sees_predictions_only(remat):
    jaxpr = jaxpr_of_the_gradient(lambda mlm, *args: mlm.loss(*args)[0], remat)
    largest = largest_value(jaxpr)
    assert B * P * V <= largest < B * T * V
    shapes = {v.aval.shape for e in equations(jaxpr) for v in e.outvars}
    assert (B * P, V) in shapes
    assert not {s for s in shapes if V in s and np.prod(s) // V not in (1, 8, B * P)}


def test_a_projection_of_every_token_would_be_found():
    def wasteful(mlm, model, prepared, totals):
        vectors = model.encoder(prepared.masked.input_ids, *prepared.batch[1:4]).last
        logits = model.masked_lm_logits(vectors.reshape(-1, 8)).reshape(B, T, V)
        logits = jnp.take_along_axis(logits, prepared.masked.positions[..., None], axis=1)
        masked = prepared.masked
        return softmax_cross_entropy(logits.reshape(-1, V), masked.targets.ravel(), masked.weights.ravel())[0]

    assert largest_value(jaxpr_of_the_gradient(wasteful)) >= B * T * V

    def hidden(*args):
        inside = jax.jit(functools.partial(wasteful, *args))
        return jax.lax.scan(lambda total, _: (total + inside(), None), 0.0, None, 1)[0]

    assert largest_value(jaxpr_of_the_gradient(hidden)) >= B * T * V
