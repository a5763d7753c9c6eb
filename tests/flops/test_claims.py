"""What is claimed, what was counted, and ELECTRA's table to every digit."""

import json

import pytest

from ctx_jax import cli
from ctx_jax.flops.claims import check
from ctx_jax.flops.electra import ElectraCounts, training_flops

NAMES = {
    "h": "h",
    "l": "layers",
    "s": "s",
    "v": "v",
    "e": "e",
    "heads": "heads",
    "sparse_embed_lookup": "sparse_lookup",
}


@pytest.fixture(scope="module")
def electra(reference):
    return json.loads((reference / "electra_flops" / "expected.json").read_text())


def test_electras_table_comes_out_to_every_digit(electra):
    expected = electra["train_flops"]
    found = training_flops()
    assert {"elmo", "gpt", "bert_base", "bert_large", "electra_small"} <= found.keys() < expected.keys()
    for name, flops in found.items():
        assert flops == expected[name], name


def test_electras_components_come_out_to_every_digit(electra):
    assert len(electra["components"]) >= 9
    for name, case in electra["components"].items():
        counts = ElectraCounts(**{NAMES[key]: value for key, value in case["args"].items()})
        found = {
            "block": counts.block(),
            "embedding_in": counts.embedding_in(),
            "embedding_out": counts.embedding_out(),
            "binary_cls": counts.binary_classifier(),
            "infer": counts.inference(),
            "train_1step_bs1": counts.training(1, 1),
        }
        assert found == {key: case[key] for key in found}, name


def test_a_published_row_without_the_reference():
    """BERT-base of the paper's table, 6.4e19, so that something holds where the reference is absent."""
    assert training_flops()["bert_base"] == 6.428335104e19


def claims_about(words):
    return [claim for claim in check() if words in claim.claim]


def test_the_22_belong_to_128_tokens():
    (claim,) = claims_about("512 tokens")
    assert (claim.length, claim.unit, claim.right) == (512, "FLOP", False)
    assert claim.counted == 96_636_764_160
    assert "128 tokens cost (22.35 GFLOP)" in claim.verdict
    tiny, mobile = claims_about("22.5 B")
    assert tiny.right
    assert mobile.right
    assert tiny.counted == 22_347_251_712


def test_the_14_are_multiply_adds_at_128_words():
    (claim,) = claims_about("ELMo spends")
    assert not claim.right
    assert claim.counted / 1e9 == pytest.approx(26.15, abs=0.01)
    assert claim.counted / 128 / 1e6 == pytest.approx(204.3, abs=0.05)
    assert "13.1 are the multiply-adds" in claim.verdict
    assert "104.6 GFLOP" in claim.verdict


@pytest.mark.parametrize(("words", "counted"), [("110 M", 109_482_240), ("340 M", 335_141_888), ("93.6 M", 93_600_848)])
def test_parameters(words, counted):
    (claim,) = claims_about(words)
    assert claim.counted == counted
    assert claim.right


def test_the_command(capsys):
    assert cli.main(["flops", "claims"]) == 0
    shown = capsys.readouterr().out
    assert "96,636,764,160 FLOP at 512" in shown
    assert "wrong by a factor of 4.39" in shown
    assert "3,411,439,471,616,412,672 FLOP" in shown
    assert cli.main(["flops", "claims", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(check())
