"""The search against trying everything; the config that it writes, trained."""

import dataclasses
import itertools
import json
import math

import pytest

from ctx_jax import cli
from ctx_jax.errors import InputError
from ctx_jax.flops.architectures import encoder_cost
from ctx_jax.flops.budget import FlopBudget
from ctx_jax.flops.devices import PUBLISHED, named_peak
from ctx_jax.flops.search import SearchSpace, config_file, picked, search, tiled_flops
from ctx_jax.models.bert import BertConfig

BUDGET = FlopBudget(22.4e9, 512)


def test_finds_what_the_issue_of_22_gflop_named():
    found = {(c.config.num_layers, c.config.hidden_size): c for c in search(BUDGET, SearchSpace(gated=(False,)))
             if c.config.attention_window is None}  # fmt: skip
    assert round(found[10, 384].forward_flops / 1e9, 2) == 22.15
    assert round(found[14, 320].forward_flops / 1e9, 2) == 22.31


def test_equals_trying_every_depth_and_width():
    budget = FlopBudget(1.5e9, 96)
    space = SearchSpace(gated=(False,), windows=(None,), multiple=32, head_sizes=(32,), least_share=0.9, most_layers=30)
    expected = set()
    for layers, width in itertools.product(range(4, 31), range(32, 1024, 32)):
        spent = lambda n, w=width: n * (24 * 96 * w * w + 4 * 96 * 96 * w)
        if 0.9 * 1.5e9 <= spent(layers) <= 1.5e9 < spent(layers + 1):
            expected.add((layers, width, spent(layers)))
    found = search(budget, space)
    assert {(c.config.num_layers, c.config.hidden_size, c.forward_flops) for c in found} == expected
    assert len(found) > 5
    sizes = [c.layer_parameters for c in found]
    assert sizes == sorted(sizes, reverse=True)


def test_every_candidate_keeps_to_the_budget_and_could_not_be_deeper():
    for candidate in search(BUDGET):
        assert 0.95 * 22.4e9 <= candidate.forward_flops <= 22.4e9
        assert candidate.forward_flops == encoder_cost(candidate.config, length=512).matrix_flops
        deeper = dataclasses.replace(candidate.config, num_layers=candidate.config.num_layers + 1)
        assert encoder_cost(deeper, length=512).matrix_flops > 22.4e9
        assert candidate.config.hidden_size % 64 == candidate.config.intermediate_size % 64 == 0


def test_tiles_fill_up_what_is_no_multiple_of_them():
    one = BertConfig(hidden_size=384, num_layers=1, num_heads=6, intermediate_size=1536)
    other = BertConfig(hidden_size=320, num_layers=1, num_heads=5, intermediate_size=1280)
    t = 512
    assert tiled_flops(one, 64, rows=1, length=t) == encoder_cost(one, length=t).matrix_flops
    # On tiles of 128 a head of 64 is computed as one of 128, and 320 as 384.
    by_hand = 8 * t * 384 * 384 + 4 * t * 384 * 1280 + 4 * t * t * 5 * 128
    assert tiled_flops(other, 128, rows=1, length=t) == by_hand


def test_time_at_best_is_the_roofline():
    candidate = next(c for c in search(BUDGET) if c.config.hidden_size == 384 and not c.config.gated)
    peak = PUBLISHED["H200"]
    best = candidate.time_at_best(peak, rows=32, length=512)
    cost = encoder_cost(candidate.config, rows=32, length=512)
    assert best.seconds == max(cost.matrix_flops / 989e12, cost.bytes_moved / 4800e9)
    memory = candidate.training_bytes(rows=32, length=512)
    assert memory > 16 * candidate.parameters
    assert candidate.training_bytes(rows=64, length=512) - memory == pytest.approx(
        memory - 16 * candidate.parameters, rel=0.01
    )


def test_a_budget_that_nothing_fits_is_said(capsys):
    assert search(FlopBudget(1e3, 512)) == []
    assert cli.main(["flops", "search", "--budget", "1e3"]) == 2
    assert "no encoder uses" in capsys.readouterr().err
    with pytest.raises(InputError, match="expected a number"):
        search(FlopBudget())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"multiple": 0}, "multiple is 0"),
        ({"least_share": 0.0}, "least_share is 0"),
        ({"head_sizes": ()}, "head_sizes is empty"),
    ],
)
def test_bad_spaces(given, message):
    with pytest.raises(InputError, match=message):
        SearchSpace(**given)


def test_the_config_that_it_writes_trains(tmp_path, topics_corpus):
    """Every kind of layer that the search can propose."""
    budget = FlopBudget(6e7, 48)
    space = SearchSpace(600, 16, (16,), windows=(None, 4), least_layers=2, least_share=0.7)
    found = search(budget, space)
    kinds = {}
    for candidate in found:
        kinds.setdefault((candidate.config.gated, candidate.config.attention_window), candidate)
    assert len(kinds) == 4
    for number, candidate in enumerate(kinds.values()):
        path = tmp_path / f"found_{number}.py"
        path.write_text(config_file(candidate, budget, data=str(topics_corpus)))
        config = cli.load_config(path)
        assert config.model == candidate.config
        assert config.flop_budget == budget
        if kinds.get((True, 4)) is not candidate:
            continue  # the plain one is BERT, which other tests train
        words = ["pretrain", str(path), "--workdir", str(tmp_path / f"run_{number}"), "--steps", "2"]
        words += ["--optimizer.schedule.warmup-steps", "1", "--batch-size", "8"]
        words += ["--evaluation.rows", "8", "--evaluation.batch-size", "8"]
        assert cli.main(words) == 0
        cost = json.loads((tmp_path / f"run_{number}" / "cost.json").read_text())
        assert cost["budget"]["within"]
        assert cost["budget"]["forward_flops"] == candidate.forward_flops


def test_picking():
    found = search(BUDGET)
    assert picked(found, 1) is found[0]
    for wrong in (0, len(found) + 1):
        with pytest.raises(InputError, match=f"pick is {wrong}, expected 1 to {len(found)}"):
            picked(found, wrong)


def test_named_devices():
    assert named_peak("h200") == PUBLISHED["H200"]
    assert named_peak("v5e").flops_per_s("bfloat16") == 197e12
    assert math.isfinite(named_peak("cpu").bytes_per_s)
    with pytest.raises(InputError, match="did you mean 'H200'"):
        named_peak("H20O")
