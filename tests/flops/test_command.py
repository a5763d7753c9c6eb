"""`ctx-jax flops`: budgets, exit codes, tables that fit the terminal, JSON."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from ctx_jax import cli
from ctx_jax.errors import InputError
from ctx_jax.experiment import Experiment
from ctx_jax.experiment.cost import budget_verdict
from ctx_jax.flops.architectures import count_encoder, encoder_function
from ctx_jax.flops.budget import FlopBudget
from ctx_jax.flops.jaxpr import count
from ctx_jax.models.bert import BertConfig

CONFIGS = sorted((pathlib.Path(__file__).resolve().parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_keeps_to_its_budget(path):
    """A change that makes a model dearer fails here."""
    experiment = cli.load_config(path)
    verdict = budget_verdict(experiment)
    assert verdict is not None, f"{path.name} states no budget"
    assert verdict.within, str(verdict)
    assert verdict.share > 0.9, f"{path.name}: a budget that much is left of holds nobody"


def test_budgets_are_checked():
    assert FlopBudget().verdict(10**30) is None
    assert FlopBudget(10.0, 4).verdict(10).within
    assert not FlopBudget(10.0, 4).verdict(11).within
    assert "OVER" in str(FlopBudget(10.0, 4).verdict(11))
    for given, message in (((0.0,), "forward_flops is 0"), ((-1.0,), "forward_flops is -1"), ((1.0, 0), "length is 0")):
        with pytest.raises(InputError, match=message):
            FlopBudget(*given)
    with pytest.raises(InputError, match=r"flop_budget\.length 1024"):
        Experiment(data="x", model=BertConfig(), flop_budget=FlopBudget(1e9, 1024))


def base():
    return next(str(path) for path in CONFIGS if path.stem == "bert_base")


def test_exit_codes(capsys):
    assert cli.main(["flops", base(), "--length", "128"]) == 0
    assert "within budget: 22.35 of 22.40 GFLOP" in capsys.readouterr().out
    assert cli.main(["flops", base(), "--length", "512", "--budget", "22.4e9"]) == 1
    assert "OVER budget: 96.64 of 22.40 GFLOP forward at 512 tokens" in capsys.readouterr().out
    assert cli.main(["flops", base(), "--length", "128", "--budget", "22.4e9"]) == 0
    capsys.readouterr()
    for words, message in (
        (["flops"], "at least one CONFIG"),
        (["flops", "nowhere.py"], "no such config"),
        (["flops", base(), "--length", "0"], "at least 1"),
        (["flops", base(), "--budget", "-1"], "forward_flops is -1"),
        (["flops", base(), "--length", "128", "4096", "--budget", "1e9"], "the model takes 512"),
        (["flops", base(), "--device", "H20"], "did you mean 'H200'"),
        (["flops", "serch"], "no such config"),
    ):
        assert cli.main(words) == 2, words
        shown = capsys.readouterr()
        assert message in shown.err, words
        assert not shown.out, words


def test_a_config_that_raises_is_named(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("from ctx_jax.models.bert import BertConfig\nconfig = BertConfig(num_heads=7)\n")
    assert cli.main(["flops", str(path)]) == 2
    assert f"{path}: BertConfig.hidden_size 768 is not a multiple of num_heads 7" in capsys.readouterr().err
    path.write_text("config = (\n")
    assert cli.main(["flops", str(path)]) == 2
    assert "SyntaxError" in capsys.readouterr().err


def test_tables_fit_a_terminal_of_100_columns(capsys):
    words = ["flops", *map(str, CONFIGS), "--length", "64", "128", "512", "--train", "--device", "H200"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, (line for line in lines if "configs/" not in line))) <= 100
    assert cli.main(["flops", "claims"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    assert cli.main(["flops", "search", "--budget", "22.4e9", "--top", "3"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_json_says_what_the_tables_say(capsys):
    assert cli.main(["flops", base(), "--length", "128", "--train", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    forward = record["forward"][0]
    assert forward["formula"]["matrix_flops"] == forward["walk"]["matrix_flops"] == 22_347_251_712
    assert forward["formula"]["matrix_flops"] + forward["formula"]["other_flops"] == forward["walk"]["flops"]
    assert sum(part["matrix_flops"] for part in forward["formula"]["parts"]) == 22_347_251_712
    step = record["training_step"]
    assert step["training_matrix_flops"] == step["walk"]["matrix_flops"]
    assert record["budget"]["within"]
    assert cli.main(["flops", "search", "--budget", "22.4e9", "--plain", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"num_layers": 10, "hidden_size": 384}.items() <= found[0].items()


def test_training_tables_equal_the_step(capsys):
    mini = next(str(path) for path in CONFIGS if path.stem == "bert_mini")
    assert cli.main(["flops", mini, "--train"]) == 0
    assert "by the jaxpr of the step equal" in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_model_and_its_twin_are_one_walk(path):
    """`count_encoder` walks the twin's jaxpr, whose loops lowering would write out: the model's own has the same."""
    config = cli.load_config(path).model
    function, args = encoder_function(config, rows=3, length=20)
    assert count_encoder(config, rows=3, length=20).walk == count(function, *args)


@pytest.mark.alone
def test_all_configs_take_less_than_ten_seconds():
    """In a process of its own, imports and all, nothing compiled. Of the processor, so that no other process counts."""
    begin = os.times()
    words = [sys.executable, "-m", "ctx_jax.cli", "flops", *map(str, CONFIGS)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=_plain_environment())
    end = os.times()
    seconds = end.children_user + end.children_system - begin.children_user - begin.children_system
    assert done.returncode == 0, done.stderr
    assert 0.5 < seconds < 10, f"{seconds:.1f} s"


def _plain_environment():
    return {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}


def test_the_cost_card_holds_the_verdict():
    experiment = cli.load_config(next(path for path in CONFIGS if path.stem == "quickstart"))
    over = dataclasses.replace(experiment, flop_budget=FlopBudget(1e8, 128))
    assert budget_verdict(experiment).within
    assert not budget_verdict(over).within
    assert budget_verdict(dataclasses.replace(experiment, flop_budget=FlopBudget())) is None
