"""Certificates tell the truth: what a reader gets back is compared, and a changed weight is seen."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from oracles import bert as oracle
from oracles.parameters import original_names, random_params

from ctx_jax import Encoder, InputError, cli
from ctx_jax.encoder import BertEncoder, ElmoEncoder
from ctx_jax.interop.certificate import TOLERANCE, model_outputs, sample_inputs, verify
from ctx_jax.interop.files.safetensors_file import read_safetensors, write_safetensors
from ctx_jax.interop.pretrained import Pretrained
from ctx_jax.interop.programs.forward import ProgramOptions
from ctx_jax.interop.programs.stablehlo import read_stablehlo
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig

SMALL = BertConfig(61, 16, 3, 2, 24, 20, activation="gelu_tanh")
ELMO = ElmoConfig(filters=((1, 4), (2, 8)), character_dim=4, num_highway=1, lstm_dim=20, projection_dim=6, vocab_size=0)


def encoder(config, seed=0):
    params = jax.tree.map(jax.numpy.asarray, random_params(bound_model(config).shapes, seed))
    return (ElmoEncoder if isinstance(config, ElmoConfig) else BertEncoder)(config, params)


@pytest.mark.parametrize("format", ["hugging-face", "flax", "google-bert", "npz", "ctx_jax"])
def test_every_export_of_a_bert_has_one(format, tmp_path):
    checks = encoder(SMALL).save_pretrained(tmp_path / "out", format)
    assert checks[0].reader.startswith("ctx_jax ")
    assert checks[0].error == 0
    assert all(check.passed in (True, None) for check in checks)
    assert [check.reader for check in verify(tmp_path / "out")] == [check.reader for check in checks]
    record = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert record["format"] == format
    assert [check["error"] for check in record["checks"]] == [check.error for check in checks]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3 layers, width 16, 2 heads" in card
    assert "at most 20 tokens" in card
    assert "the weights came from elsewhere" in card


def test_an_elmos_export_has_one(tmp_path):
    checks = encoder(ELMO).save_pretrained(tmp_path / "out")
    assert checks[0].error == 0
    assert "an ELMo of 2 LSTMs a direction" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("config", [SMALL, ELMO, dataclasses.replace(SMALL, dtype="bfloat16", pooler=False)])
@pytest.mark.parametrize("weights", ["inside", "inputs"])
def test_a_program_has_one(config, weights, tmp_path):
    """Read back by JAX from the file alone, in float32 whatever the model was trained in."""
    model = encoder(config)
    checks = model.save_pretrained(tmp_path / "out", "stablehlo", ProgramOptions([0, -1], weights))
    assert [check.passed for check in checks] == [True]
    assert verify(tmp_path / "out") == checks
    assert (tmp_path / "out" / "weights.npz").exists() == (weights == "inputs")
    program = read_stablehlo(tmp_path / "out" / "model.stablehlo")
    assert program.about["outputs"]["hidden_states"][0] == 2
    heads = {"masked_lm", "next_sentence"} & set(getattr(config, "all_heads", ()))
    assert heads <= program.about["outputs"].keys()
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert record["model"]["num_layers"] == config.num_layers


def test_a_program_of_other_weights_is_seen(tmp_path):
    for seed in (0, 1):
        encoder(SMALL, seed).save_pretrained(tmp_path / str(seed), "stablehlo")
    (tmp_path / "1" / "model.stablehlo").replace(tmp_path / "0" / "model.stablehlo")
    assert verify(tmp_path / "0")[0].passed is False


@pytest.mark.parametrize("config", [SMALL, ELMO])
def test_onnx_has_one(config, tmp_path):
    python = os.environ.get("CTX_JAX_ONNX_PYTHON")
    if not python:
        pytest.skip("CTX_JAX_ONNX_PYTHON is not set: the Python of an environment with jax2onnx")
    checks = encoder(config).save_pretrained(tmp_path / "out", "onnx", ProgramOptions(python=python))
    assert "onnxruntime" in checks[0].reader
    assert checks[0].passed in (True, None)


@pytest.mark.parametrize("config", [SMALL, ELMO])
def test_a_saved_model_has_one(config, tmp_path):
    pytest.importorskip("tensorflow")
    checks = encoder(config).save_pretrained(tmp_path / "out", "saved-model")
    assert [check.passed for check in checks] == [True]


def test_options_are_for_programs(tmp_path):
    for format, options, message in (
        ("flax", ProgramOptions("last"), "expected none: flax holds the whole model"),
        ("onnx", ProgramOptions(weights="inputs"), "expected 'inside': onnx has them there"),
        ("stablehlo", ProgramOptions([7]), "layers: found 7"),
    ):
        with pytest.raises(InputError, match=message):
            encoder(SMALL).save_pretrained(tmp_path / "out", format, options)
    assert not list(tmp_path.iterdir())


def test_what_it_holds_is_what_the_twin_computes(tmp_path):
    model = encoder(dataclasses.replace(SMALL, dtype="bfloat16"), 1)
    model.save_pretrained(tmp_path / "out")
    with np.load(tmp_path / "out" / "certificate.npz") as arrays:
        found = dict(arrays)
    w = original_names(model.params)
    ids, mask, types = (found[f"in/{name}"] for name in ("input_ids", "attention_mask", "token_type_ids"))
    assert (mask.sum(1) < mask.shape[1]).any()
    assert types.any()
    for row, length in enumerate(mask.sum(1)):
        layers, _ = oracle.encode_text(
            w,
            ids[row, :length],
            types[row, :length],
            np.arange(length),
            num_layers=3,
            num_heads=2,
            activation="gelu_tanh",
        )
        np.testing.assert_allclose(found["out/hidden_states"][:, row, :length], layers, rtol=0, atol=1e-5)
        logits = oracle.masked_lm_logits(w, layers[-1], activation="gelu_tanh")
        np.testing.assert_allclose(found["out/masked_lm"][row, :length], logits, rtol=0, atol=2e-5)
        nsp = oracle.next_sentence_logits(w, layers[-1][0])
        np.testing.assert_allclose(found["out/next_sentence"][row], nsp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", ["bert.encoder.layer.2.output.dense.weight", "cls.predictions.bias"])
@pytest.mark.parametrize("by", [1e-2, np.nan])
def test_a_changed_weight_is_seen(which, by, tmp_path, capsys):
    encoder(SMALL).save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = {name: np.array(tensor.read()) for name, tensor in read_safetensors(file).items()}
    tensors[which].reshape(-1)[3] += by
    write_safetensors(file, tensors, {"format": "pt"})
    assert verify(tmp_path / "out")[0].passed is False
    assert cli.main(["verify", str(tmp_path / "out")]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_outputs_beyond_the_tolerance_leave_nothing(tmp_path, monkeypatch):
    from ctx_jax.interop import certificate

    def off(pretrained, inputs, layers="all"):
        off.calls += 1
        found = model_outputs(pretrained, inputs, layers)
        return {name: value + off.calls * TOLERANCE * 20 for name, value in found.items()}

    off.calls = 0
    monkeypatch.setattr(certificate, "model_outputs", off)
    with pytest.raises(InputError, match=r"ctx_jax .* gets .* back with an error of .*, expected at most 1e-05"):
        encoder(SMALL).save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rows_of_a_short_model_fit():
    for config in (
        dataclasses.replace(SMALL, max_position_embeddings=2),
        dataclasses.replace(SMALL, max_position_embeddings=5, position_offset=2, type_vocab_size=1, vocab_size=4),
        dataclasses.replace(SMALL, type_vocab_size=0),
    ):
        inputs = sample_inputs(config)
        assert inputs["input_ids"].max() < config.vocab_size
        assert inputs["token_type_ids"].max() < max(config.type_vocab_size, 1)
        found = model_outputs(Pretrained(config, encoder(config).params), inputs)
        assert all(np.isfinite(value).all() for value in found.values())


def test_the_commands(tmp_path, capsys):
    encoder(SMALL).save_pretrained(tmp_path / "theirs")
    run = lambda *words: cli.main([str(word) for word in words])
    assert run("import", tmp_path / "theirs", tmp_path / "ours") == 0
    out = capsys.readouterr().out
    assert "Bert, 6,465 parameters" in out or "parameters, heads: masked_lm, next_sentence, tokenizer: none" in out
    assert "largest error 0.0e+00" in out
    assert run("export", tmp_path / "ours", tmp_path / "flax", "--format", "flax", "--json") == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert run("verify", tmp_path / "flax", "--json") == 0
    assert run("export", tmp_path / "ours", tmp_path / "hlo", "--format", "stablehlo", "--layers=-1,0") == 0
    assert "jax 0." in capsys.readouterr().out
    ids = np.random.default_rng(0).integers(0, 61, (2, 9))
    expected = Encoder.from_pretrained(tmp_path / "theirs").encode_ids(ids).layers
    for folder in ("ours", "flax"):
        np.testing.assert_array_equal(Encoder.from_pretrained(tmp_path / folder).encode_ids(ids).layers, expected)
    for words, message in (
        (["import", tmp_path / "nothing", tmp_path / "x"], "expected a folder"),
        (["import", tmp_path / "theirs", tmp_path / "ours"], "exists already"),
        (["export", tmp_path / "ours", tmp_path / "x", "--format", "bilm"], "holds an ELMo"),
        (["export", tmp_path / "ours", tmp_path / "x", "--format", "onx"], "format: found 'onx'"),
        (["export", tmp_path / "ours", tmp_path / "x", "--format", "stablehlo", "--layers", "one"], "--layers: found"),
        (["verify", tmp_path], "certificate.json: cannot be read"),
    ):
        capsys.readouterr()
        assert run(*words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
