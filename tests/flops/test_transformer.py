"""BERT's formulas against the walk of its jaxpr, against XLA, and against sums written out by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from ctx_jax.data.plan import RowsConfig
from ctx_jax.experiment import Experiment
from ctx_jax.experiment.assembly import abstract_step
from ctx_jax.experiment.cost import step_cost
from ctx_jax.flops import architectures, jaxpr, parts
from ctx_jax.flops.architectures import count_encoder, encoder_cost, encoder_function
from ctx_jax.flops.jaxpr import count
from ctx_jax.flops.xla import xla_flops
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.nn.parameters import Bound, count_parameters
from ctx_jax.objectives.mlm import MaskedLM

BASE = BertConfig()
LARGE = BertConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096)


def random_config(rng, **given):
    heads, size = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    sizes = {
        "vocab_size": int(rng.integers(20, 99)),
        "hidden_size": heads * size,
        "num_layers": int(rng.integers(1, 5)),
        "num_heads": heads,
        "intermediate_size": int(rng.integers(1, 70)),
        "max_position_embeddings": 64,
        "activation": str(rng.choice(["gelu", "gelu_tanh", "relu", "silu"])),
        "gated": bool(rng.integers(2)),
        "attention_window": None if rng.integers(2) else int(rng.integers(1, 20)),
        "pooler": bool(rng.integers(2)),
        "dtype": str(rng.choice(["float32", "bfloat16"])),
        "unroll": bool(rng.integers(2)),
        "embedding_size": None if rng.integers(2) else int(rng.integers(1, 20)),
        "shared_layers": bool(rng.integers(2)),
        "type_vocab_size": int(rng.integers(0, 4)),
        "tied_head": bool(rng.integers(2)),
    }
    return BertConfig(**(sizes | given))


@pytest.mark.parametrize(
    ("config", "length", "giga"),
    [(BASE, 128, 22.35), (BASE, 512, 96.64), (LARGE, 128, 78.92), (BASE, 1, 0.17)],
    ids=["base 128", "base 512", "large 128", "base 1"],
)
def test_published_sizes(config, length, giga):
    d, f = config.hidden_size, config.intermediate_size
    by_hand = 0
    for _layer in range(config.num_layers):
        for inputs, outputs in ((d, d), (d, d), (d, d), (d, d), (d, f), (f, d)):
            by_hand += 2 * length * inputs * outputs
        for _head in range(config.num_heads):
            by_hand += 2 * 2 * length * length * (d // config.num_heads)
    cost = encoder_cost(config, length=length)
    assert cost.matrix_flops == by_hand
    assert round(by_hand / 1e9, 2) == giga


def test_a_quarter_of_the_text_is_what_the_22_buy():
    assert encoder_cost(BASE, length=512).matrix_flops / encoder_cost(BASE, length=128).matrix_flops > 4.3
    scores = next(p for p in encoder_cost(BASE, length=512).parts if p.name == "attention scores")
    assert scores.matrix_flops / encoder_cost(BASE, length=512).matrix_flops == pytest.approx(0.10, abs=0.005)


@pytest.mark.parametrize("seed", range(12))
def test_forward_formula_equals_the_walk_to_the_last_flop(seed):
    rng = np.random.default_rng(seed)
    config, rows, length = random_config(rng), int(rng.integers(1, 5)), int(rng.integers(1, 65))
    cost = encoder_cost(config, rows=rows, length=length)
    function, args = encoder_function(config, rows=rows, length=length)
    walk = count(function, *args)
    assert walk.matrix == cost.matrix_flops
    assert walk.flops - walk.matrix == cost.other_flops


@pytest.mark.parametrize("seed", range(8))
def test_parameters_are_the_models(seed):
    config = random_config(np.random.default_rng(100 + seed))
    bound = Bound(lambda rngs: BertWithHeads(config, rngs=rngs))
    shapes = bound.shapes
    assert encoder_cost(config, length=8).parameters == count_parameters(shapes["encoder"])
    whole = architectures.bert_cost(config, rows=1, length=8, masked_lm=True, next_sentence=config.pooler)
    assert whole.parameters == count_parameters(shapes)


def random_experiment(rng, remat):
    pairs = bool(rng.integers(2))
    accumulate = int(rng.integers(1, 3))
    return Experiment(
        data="none",
        model=random_config(rng, pooler=pairs, remat=remat),
        rows=RowsConfig(
            length=int(rng.integers(8, 64)),
            kind="pairs" if pairs else "sentences",
            examples_per_row=1 if pairs else int(rng.integers(1, 4)),
        ),
        objective=MaskedLM(next_sentence=pairs, unit=str(rng.choice(["token", "word", "span"]))),
        batch_size=accumulate * int(rng.integers(1, 4)),
        accumulate=accumulate,
    )


@pytest.mark.parametrize("remat", ["none", "dots", "all"])
@pytest.mark.parametrize("seed", range(4))
def test_training_formula_equals_the_walk_of_the_very_step(seed, remat):
    experiment = random_experiment(np.random.default_rng(200 + seed), remat)
    step, args = abstract_step(experiment)
    walk = count(step, *args, while_trips=1)
    cost = step_cost(experiment)
    assert walk.matrix == cost.training_matrix_flops
    again = sum(part.again_flops for part in cost.parts)
    scores = next(part for part in cost.parts if part.name == "attention scores")
    assert scores.again_flops == scores.matrix_flops * (1.5 if remat == "all" else 0.5)
    assert (again > scores.again_flops) == (remat == "all")
    assert cost.training_matrix_flops == 3 * cost.matrix_flops + again


@pytest.mark.parametrize("length", [128, 512])
def test_xla_agrees_on_a_twin_and_counts_a_scan_once(length):
    found = count_encoder(BASE, length=length)
    assert found.agree
    assert found.xla / found.walk.flops == pytest.approx(1, abs=0.02)
    tanh = count_encoder(dataclasses.replace(BASE, activation="gelu_tanh"), length=length)
    assert tanh.xla_erf == 0
    assert tanh.xla / tanh.walk.flops == pytest.approx(1, abs=0.01)
    scanned, args = encoder_function(BASE, rows=1, length=length)
    # What jax issues 13956, 18672 and 22249 are about: twelve layers count as one.
    assert xla_flops(jax.jit(scanned).trace(*args)) < found.walk.flops / 11


def test_nothing_is_allocated():
    """BERT-large at a batch of a million rows: 77 exabytes of scores."""
    walk = count_encoder(LARGE, rows=10**6, length=512).walk
    assert walk.matrix == 10**6 * encoder_cost(LARGE, length=512).matrix_flops


@pytest.mark.parametrize("mistake", ["none", "MAC for FLOP", "doubled MAC", "a forgotten part", "a scan counted once"])
def test_each_mistake_is_found(mistake, monkeypatch):
    """`agree` is what the command prints; here it must see one thing go wrong at a time."""
    config = dataclasses.replace(BASE, hidden_size=256, num_layers=3, num_heads=4, intermediate_size=1024)
    affine = parts.affine

    def scaled(factor):
        def wrong(*args, **kwargs):
            part = affine(*args, **kwargs)
            return part._replace(matrix_flops=int(part.matrix_flops * factor))

        return wrong

    import ctx_jax.flops.transformer as transformer

    if mistake == "MAC for FLOP":
        monkeypatch.setattr(transformer, "affine", scaled(0.5))
    elif mistake == "doubled MAC":
        monkeypatch.setattr(transformer, "affine", scaled(2))
    elif mistake == "a forgotten part":
        monkeypatch.setattr(transformer, "softmax", lambda *_: parts.Part("softmax"))
    elif mistake == "a scan counted once":
        found = count_encoder(config, length=32)
        function, args = encoder_function(dataclasses.replace(config, num_layers=1), rows=1, length=32)
        once = found._replace(walk=jaxpr.count(function, *args))
        assert not once.agree
        return
    assert count_encoder(config, length=32).agree == (mistake == "none")


def test_bytes_are_the_least_that_products_must_move():
    """One layer without tables: operands and results of its products, weights once."""
    config = BertConfig(vocab_size=10, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=20, pooler=False)
    t, d, f, size = 16, 8, 20, 4
    activations = (d + 3 * d) + 4 * d + 2 * d + (d + f) + (f + d)
    weights = 4 * (3 * d * d + 3 * d + d * d + d + 2 * d * f + f + d) + 4 * 2 * 2 * d
    embeddings = 4 * (3 * t * d + 2 * d)
    assert encoder_cost(config, length=t).bytes_moved == size * t * activations + weights + embeddings
    half = encoder_cost(dataclasses.replace(config, dtype="bfloat16"), length=t).bytes_moved
    assert half == size * t * activations // 2 + weights + embeddings


def test_kept_activations_grow_with_layers_and_shrink_with_remat():
    from ctx_jax.flops.search import kept_bytes

    config = BertConfig(vocab_size=10, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, pooler=False)
    one, two = (kept_bytes(dataclasses.replace(config, num_layers=n), rows=3, length=32) for n in (1, 2))
    remat = kept_bytes(dataclasses.replace(config, remat="all"), rows=3, length=32)
    assert two > 1.7 * one
    assert remat < two / 3
