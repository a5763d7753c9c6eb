"""The first layers of a model, taken out, are what they were in it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from oracles.parameters import random_params

from ctx_jax import Encoder, InputError, cli
from ctx_jax.encoder import BertEncoder, ElmoEncoder
from ctx_jax.interop.pretrained import Pooling
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import flat_paths
from ctx_jax.text.load import load_tokenizer

SMALL = BertConfig(
    vocab_size=600, hidden_size=16, num_layers=4, num_heads=2, intermediate_size=24, max_position_embeddings=40
)
BERTS = {
    "BERT": SMALL,
    "RoBERTa": dataclasses.replace(SMALL, heads=("masked_lm",), pooler=False, position_offset=2, type_vocab_size=1),
    "ELECTRA": dataclasses.replace(SMALL, heads=("replaced_token",), pooler=False, embedding_size=8),
    "DistilBERT, labels": dataclasses.replace(
        SMALL,
        heads=("sequence_classifier",),
        labels=("no", "yes"),
        pooler=False,
        type_vocab_size=0,
        classifier_activation="relu",
    ),
    "ALBERT": dataclasses.replace(SMALL, embedding_size=8, shared_layers=True, activation="gelu_tanh"),
    "gated, near": dataclasses.replace(SMALL, gated=True, attention_window=3, activation="silu"),
}
ELMO = ElmoConfig(filters=((1, 4), (3, 6)), character_dim=4, lstm_dim=12, projection_dim=6, num_layers=3, vocab_size=9)
TEXTS = ["The assignment statement binds names to values.", "A set is empty.", "", "Names refer to objects."]


@pytest.fixture(scope="module")
def tokenizer(topics_corpus):
    return load_tokenizer(topics_corpus / "tokenizer")


def make(config, tokenizer=None, pooling=None):
    params = jax.tree.map(jax.numpy.asarray, random_params(bound_model(config).shapes, 1))
    kind = BertEncoder if isinstance(config, BertConfig) else ElmoEncoder
    return kind(config, params, tokenizer, pooling)


@pytest.mark.parametrize("name", BERTS)
def test_layers_of_a_bert_are_those_of_the_whole(name, tokenizer, tmp_path):
    whole = make(BERTS[name], tokenizer, Pooling("cls", normalize=True))
    expected = whole.encode(TEXTS)
    for count in (1, 3):
        found = whole.truncate(count)
        assert found.config.num_layers == count
        assert found.config.all_heads == ()
        np.testing.assert_array_equal(found.encode(TEXTS).layers, expected.layers[: count + 1])
    assert found.tokenizer is tokenizer
    assert found.pooling == whole.pooling
    ours, shapes = flat_paths(found.params), flat_paths(bound_model(found.config).shapes)
    assert {path: leaf.shape for path, leaf in ours.items()} == {path: leaf.shape for path, leaf in shapes.items()}
    format = "ctx_jax" if found.config.gated else "hugging-face"
    found.save_pretrained(tmp_path / "out", format)
    again = Encoder.from_pretrained(tmp_path / "out")
    assert again.config == found.config
    assert again.pooling == found.pooling
    np.testing.assert_array_equal(again.encode(TEXTS).layers, expected.layers[:4])


def test_layers_of_an_elmo_are_those_of_the_whole(tmp_path):
    pytest.importorskip("h5py")
    whole = make(ELMO)
    texts = [text.split() for text in TEXTS]
    expected = whole.encode(texts)
    for count in (1, 2):
        found = whole.truncate(count)
        assert found.config == dataclasses.replace(ELMO, num_layers=count, vocab_size=0)
        np.testing.assert_array_equal(found.encode(texts).layers, expected.layers[: count + 1])
        found.save_pretrained(tmp_path / str(count))
        again = Encoder.from_pretrained(tmp_path / str(count))
        np.testing.assert_array_equal(again.encode(texts).layers, expected.layers[: count + 1])


def test_all_layers_are_the_model_itself(tokenizer):
    for whole in (make(SMALL, tokenizer), make(ELMO)):
        found = whole.truncate(whole.config.num_layers)
        assert found.config == whole.config
        assert found.params is whole.params
        assert "truncated" not in found.about


def test_repairs_stay_with_their_layers(tokenizer):
    whole = make(SMALL, tokenizer)
    whole.fit_repairs([*TEXTS, "A bank.", "Values"], ["centre"])
    found = whole.truncate(2)
    assert found.repairs.keys() == {0, 1, 2}
    expected = whole.encode(TEXTS, layers=[2], pool="mean", repair="centre")[0]
    np.testing.assert_array_equal(found.encode(TEXTS, pool="mean", repair="centre"), expected)


def test_the_card_says_where_it_comes_from(tokenizer, tmp_path):
    """The first layers of some first layers are those of the whole, through our own folder as well."""
    whole = make(SMALL, tokenizer)
    whole.about = {"data": "1234"}
    whole.truncate(3, name="base").save_pretrained(tmp_path / "three", "ctx_jax")
    Encoder.from_pretrained(tmp_path / "three").truncate(1, name="three").save_pretrained(tmp_path / "one", "ctx_jax")
    assert "the first 3 layers of a model of 4, `base`" in (tmp_path / "three" / "README.md").read_text()
    assert "the first 1 layers of a model of 4, `base`" in (tmp_path / "one" / "README.md").read_text()
    record = json.loads((tmp_path / "one" / "config.json").read_text())
    assert record["truncated"] == {"of": 4, "name": "base", "layers": 1}
    assert record["data"] == "1234"


@pytest.mark.parametrize("layers", [0, 5, -1, True, 2.0])
def test_layers_that_there_are_not(layers):
    with pytest.raises(InputError, match=rf"layers: found {layers!r}, expected 1 to 4"):
        make(SMALL).truncate(layers)


def test_from_the_command_line(tokenizer, tmp_path, capsys):
    whole, folder, out = make(SMALL, tokenizer), tmp_path / "base", tmp_path / "out"
    whole.save_pretrained(folder)
    capsys.readouterr()
    assert cli.main(["truncate", str(folder), "--layers", "2", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "2 layers" in shown
    assert f"wrote {out}" in shown
    assert "the first 2 layers of a model of 4, `base`" in (out / "README.md").read_text()
    found = Encoder.from_pretrained(out)
    np.testing.assert_array_equal(found.encode(TEXTS).layers, whole.encode(TEXTS, layers=[0, 1, 2]).layers)
    assert cli.main(["truncate", str(folder), "--layers", "5", str(tmp_path / "none")]) == 2
    assert "layers: found 5, expected 1 to 4" in capsys.readouterr().err
    assert cli.main(["truncate", str(folder), "--layers", "2", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert cli.main(["verify", str(out)]) == 0
