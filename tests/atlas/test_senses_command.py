"""`ctx-jax senses` with small models from end to end."""

import json
import re

import jax
import numpy as np
import pytest
from oracles.parameters import random_params

from ctx_jax import cli
from ctx_jax.atlas.occurrences import search, span_vectors
from ctx_jax.atlas.report import senses
from ctx_jax.atlas.results import WordSenses, from_json
from ctx_jax.encoder import BertEncoder, ElmoEncoder, Encoder
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.text.load import load_tokenizer

BERT = BertConfig(
    vocab_size=600, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_position_embeddings=64
)
ELMO = ElmoConfig(filters=((1, 4), (2, 8)), character_dim=4, num_highway=1, lstm_dim=20, projection_dim=6, vocab_size=0)
TEXT = """The river bank was flooded.
A bank lends money to the Bank of the river.

Banks are other words, and the bank-note is one, too.
The bank pays.
They went home by the bank.
"""


def saved(config, folder, tokenizer=None):
    params = jax.tree.map(jax.numpy.asarray, random_params(bound_model(config).shapes, 0))
    if isinstance(config, ElmoConfig):
        ElmoEncoder(config, params).save_pretrained(folder, "ctx_jax")
    else:
        BertEncoder(config, params, tokenizer).save_pretrained(folder, "ctx_jax")
    return folder


@pytest.fixture(scope="module")
def bert(topics_corpus, tmp_path_factory):
    return saved(BERT, tmp_path_factory.mktemp("bert") / "tiny", load_tokenizer(topics_corpus / "tokenizer"))


@pytest.fixture(scope="module")
def elmo(tmp_path_factory):
    return saved(ELMO, tmp_path_factory.mktemp("elmo") / "tiny")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def no_pictures(monkeypatch):
    """What a map looks like is the report's concern."""
    monkeypatch.setattr(senses, "draw", lambda plot: (plot.title, b""))


def rows(shown):
    """Of the table of layers: layer, clusters, silhouette, self-similarity."""
    lines = shown.split("layer  clusters")[1].splitlines()[1:]
    return [line.split() for line in lines if re.match(r" +\d+ ", line)]


@pytest.mark.parametrize("kind", ["bert", "elmo"])
def test_a_word_in_a_text(kind, text, tmp_path, capsys, request, no_pictures):
    model, out = request.getfixturevalue(kind), tmp_path / "out"
    assert cli.main(["senses", "bank", str(model), "--corpus", str(text), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"'bank' occurs 5 times in 5 sentences of {text}; all are looked at" in shown
    assert "« Bank »" in shown or "« bank »" in shown
    assert "near: " in shown
    found = from_json(WordSenses, json.loads((out / "senses.json").read_text()))
    assert (out / "pca-1.svg").read_text() == f"bank: {found.model}, layer 1 (PCA)"
    assert (found.model, found.occurrences, found.sentences, len(found.layers)) == ("tiny", 5, 5, 3)
    assert found.maps[0].contexts[2] == "A bank lends money to the « Bank » of the river."
    assert [int(row[0]) for row in rows(shown)] == [0, 1, 2]
    assert [int(row[1]) for row in rows(shown)] == [len(layer.clusters) for layer in found.layers]
    # The numbers are those of the model's vectors.
    encoder, occurrences = Encoder.from_pretrained(model), search("bank", text)
    vectors = span_vectors(encoder, occurrences.sentences, occurrences.sentence, occurrences.spans, [0, 1, 2])
    for layer, row, its in zip(found.layers, rows(shown), vectors, strict=True):
        directions = its / np.linalg.norm(its, axis=1, keepdims=True)
        expected = (directions @ directions.T)[np.triu_indices(5, 1)].mean()
        assert layer.self_similarity == pytest.approx(expected, abs=1e-5)
        assert float(row[3]) == pytest.approx(expected, abs=6e-4)
    if kind == "elmo":  # layer 0 knows the word alone, and `Bank` is another
        assert found.layers[0].labels == [0, 0, 1, 0, 0]


def test_the_text_that_every_python_has(bert, capsys):
    assert cli.main(["senses", "base class", str(bert), "--most", "20", "--layers", "-1", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"occurs \d+ times in [\d,]+ sentences of python:topics; 20 of them are looked at", shown)
    assert [row[0] for row in rows(shown)] == ["2"]
    assert "« base class »" in shown
    assert cli.main(["senses", "base class", str(bert), "--most", "20", "--layers", "last", "--seed", "3"]) == 0
    assert capsys.readouterr().out == shown


def test_labelled_data(bert, tmp_path, capsys):
    folder = tmp_path / "coarse" / "bank"
    folder.mkdir(parents=True)
    (folder / "classes_map.txt").write_text('{"0": "money", "1": "river"}')
    for split in ("train", "test"):
        lines = [f"1\tthe bank lends {split} {number}\n3\tsat on the banks {split} {number}\n" for number in range(5)]
        (folder / f"{split}.data.txt").write_text("".join(lines))
        (folder / f"{split}.gold.txt").write_text("0\n1\n" * 5)
    assert cli.main(["senses", "bank", str(bert), "--corpus", str(tmp_path / "coarse")]) == 0
    shown = capsys.readouterr().out
    assert "ARI" in shown
    assert "money 10" in shown
    assert "river 10" in shown
    assert all(len(row) == 6 for row in rows(shown))


def test_bad_input(bert, text, tmp_path, capsys, monkeypatch):
    def refused(*words):
        assert cli.main(["senses", *words]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        return shown.err

    model, corpus = str(bert), ["--corpus", str(text)]
    assert "'bnak' does not occur in its 5 sentences (did you mean 'bank'" in refused("bnak", model, *corpus)
    assert "expected a word" in refused(" ", model)
    assert "nowhere" in refused("bank", str(tmp_path / "nowhere"))
    assert "nowhere" in refused("bank", model, "--corpus", str(tmp_path / "nowhere"))
    assert "expected 0 to 2, or -3 to -1" in refused("bank", model, *corpus, "--layers", "7")
    assert "--layers: found 'x'" in refused("bank", model, "--layers", "x")
    assert "--most: found 0" in refused("bank", model, "--most", "0")
    assert "expected --out too" in refused("bank", model, "--umap")
    out = tmp_path / "out"
    with monkeypatch.context() as absent:
        absent.setattr("importlib.util.find_spec", lambda name: None)
        assert "pip install 'ctx-jax[atlas]'" in refused("bank", model, *corpus, "--out", str(out))
    assert "there is no folder" in refused("bank", model, *corpus, "--out", str(out / "below"))
    (tmp_path / "broken.txt").write_bytes(b"A bank.\n\xff\n")
    assert "expected UTF-8" in refused("bank", model, "--corpus", str(tmp_path / "broken.txt"))
    assert not out.exists()
