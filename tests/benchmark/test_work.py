"""What is computed and what it costs, counted by hand."""

import dataclasses
import json

import numpy as np
import pytest

from ctx_jax.benchmark.bench import bench
from ctx_jax.benchmark.subjects import Subject, lay_out, static_of, with_random_weights
from ctx_jax.benchmark.work import Shape, read_texts, rows, texts
from ctx_jax.errors import InputError
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.text.load import load_tokenizer

ELMO = ElmoConfig(vocab_size=20, lstm_dim=16, projection_dim=8, filters=((1, 4), (2, 4)), num_highway=1)


def bert_flops(config, length):
    """A row by Devlin's layers: query, key, value and output; scores and context; two feed-forward products."""
    width, inner = config.hidden_size, config.intermediate_size
    return config.num_layers * (
        4 * 2 * length * width * width + 2 * 2 * length * length * width + 2 * 2 * length * width * inner
    )


def test_rows_of_ids(subject, tmp_path):
    work = rows(subject, Shape(3, 5), tmp_path)
    with np.load(work.inputs) as arrays:
        ids, mask = arrays["ids"], arrays["mask"]
    assert ids.shape == mask.shape == (3, 5)
    assert mask.all()
    assert ids.min() >= 20
    assert ids.max() < 40
    assert (work.sentences, work.tokens) == (3, 15)
    assert work.matrix_flops == 3 * bert_flops(subject.config, 5)
    assert work.pool is None
    assert work.mask is not None
    pooled = rows(subject, Shape(3, 5), tmp_path, "mean")
    assert (pooled.pool, pooled.mask, pooled.matrix_flops) == ("mean", None, work.matrix_flops)
    with pytest.raises(InputError, match="--lengths: found 17, tiny takes 16"):
        rows(subject, Shape(1, 17), tmp_path)


def test_texts_count_at_their_own_lengths(subject, topics_corpus, tmp_path):
    tokenizer = load_tokenizer(topics_corpus / "tokenizer")
    config = BertConfig(
        vocab_size=600, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, max_position_embeddings=16
    )
    lines = ["A set.", "Names refer to objects.", "word " * 50, "A set."]
    work = texts(Subject("model", config, tmp_path, tokenizer), lines, tmp_path)
    lengths = [min(len(tokenizer.encode(line).ids) + 2, 16) for line in lines]
    assert lengths[2] == 16
    assert work.tokens == sum(lengths)
    assert work.matrix_flops == sum(bert_flops(config, length) for length in lengths)
    assert json.loads(work.inputs.read_text()) == lines
    assert work.pool == "mean"
    with pytest.raises(InputError, match="tiny has no tokenizer"):
        texts(subject, lines, tmp_path)


def test_elmo_takes_words(tmp_path):
    elmo = lay_out("elmo", with_random_weights(ELMO), tmp_path / "elmo")
    assert elmo.alone == "no peer has ELMo"
    work = rows(elmo, Shape(2, 7), tmp_path)
    words = json.loads(work.inputs.read_text())
    assert [len(row) for row in words] == [7, 7]
    assert work.tokens == 14
    assert (work.pool, work.mask) == ("mean", None)
    read = 2 * (7 + 2)  # <S> and </S> too
    convolutions = sum(2 * (50 - width + 1) * width * ELMO.character_dim * count for width, count in ELMO.filters)
    lstms = 2 * ELMO.num_layers * (2 * 2 * 8 * 4 * 16 + 2 * 16 * 8)
    assert work.matrix_flops == read * (convolutions + 2 * 8 * 2 * 8 + 2 * 8 * 8 + lstms)
    assert texts(elmo, ["Two words"], tmp_path).tokens == 2
    with pytest.raises(InputError, match="found elmo before it"):
        static_of(elmo)


def test_a_model_that_the_format_cannot_hold_is_measured_alone(tmp_path):
    config = BertConfig(
        vocab_size=40, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16, gated=True, heads=()
    )
    found = lay_out("gated", with_random_weights(config), tmp_path / "gated")
    assert "gated" in found.alone
    static = static_of(found)
    assert (static.static, static.folder) == (True, found.folder)
    assert rows(static, Shape(1, 4), tmp_path).matrix_flops == 0


def test_peers_are_left_out_where_they_cannot_read_the_tokenizer(topics_corpus, make_peer, setting, tmp_path):
    config = BertConfig(
        vocab_size=600, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16, max_position_embeddings=16
    )
    tokenizer = load_tokenizer(topics_corpus / "tokenizer")
    made = dataclasses.replace(with_random_weights(config), tokenizer=tokenizer)
    subject = lay_out("pieces", made, tmp_path / "pieces")
    assert subject.alone is None
    (found,) = bench([subject], ["A set."], ["float32"], [make_peer("one")], [], setting)
    assert [(row.who, row.status) for row in found.rows] == [("ours", "failed"), ("peers", "left out")]
    assert "no SentencePiece model" in found.rows[1].note


def test_texts_of_a_file(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("One.\n\n  \nTwo.\n")
    assert read_texts(file) == ["One.", "Two."]
    file.write_text("\n \n")
    with pytest.raises(InputError, match="found no text"):
        read_texts(file)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"texts\.txt"):
        read_texts(file)
    with pytest.raises(InputError, match="nowhere"):
        read_texts(tmp_path / "nowhere")
