"""Parquet shards hold what the .npy shards hold, bit for bit, and go on where a run was stopped."""

import sys

import jax
import numpy as np
import pytest

from ctx_jax import InputError, cli
from ctx_jax.encoder import BertEncoder
from ctx_jax.encoder.shards import read_shards, write_shards
from ctx_jax.interop.pretrained import Pretrained
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.interop.save import save
from ctx_jax.models.bert import BertConfig
from ctx_jax.text.load import load_tokenizer

CONFIG = BertConfig(
    vocab_size=600, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_position_embeddings=32
)
TEXTS = ["A set is empty.", "", ["Names", "refer", "to", "objects"], "Émigré 力 🙂", *map(str, range(7))]


@pytest.fixture(scope="module")
def encoder(topics_corpus):
    params = bound_model(CONFIG).init(jax.random.key(0))
    return BertEncoder(CONFIG, params, load_tokenizer(topics_corpus / "tokenizer"))


def write(encoder, folder, texts=TEXTS, **options):
    return write_shards(encoder, texts, folder, rows=4, batch_tokens=512, **options)


@pytest.mark.parametrize(
    ("layers", "columns"),
    [("last", ["vector"]), ("all", ["layer_0", "layer_1", "layer_2"]), ([-1, 0], ["layer_2", "layer_0"])],
    ids=["last", "all", "some"],
)
def test_parquet_holds_what_npy_holds(encoder, tmp_path, layers, columns):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    assert write(encoder, tmp_path / "npy", layers=layers) == len(TEXTS)
    assert write(encoder, tmp_path / "parquet", layers=layers, format="parquet", with_texts=True) == len(TEXTS)
    expected = [np.load(tmp_path / "npy" / f"{number:05d}.npy") for number in range(3)]
    tables = [parquet.read_table(tmp_path / "parquet" / f"{number:05d}.parquet") for number in range(3)]
    for table, vectors in zip(tables, expected, strict=True):
        assert table.column_names == ["number", "text", *columns]
        for place, column in enumerate(columns):
            assert table.schema.field(column).type == pyarrow.list_(pyarrow.float32(), 16)
            found = np.array(table[column].to_pylist(), np.float32)
            np.testing.assert_array_equal(found, vectors if layers == "last" else vectors[:, place])
    whole = pyarrow.concat_tables(tables)
    assert whole["number"].to_pylist() == list(range(len(TEXTS)))
    assert whole["text"].to_pylist() == [text if isinstance(text, str) else " ".join(text) for text in TEXTS]
    for found, vectors in zip(read_shards(tmp_path / "parquet"), expected, strict=True):
        np.testing.assert_array_equal(found, vectors)


def test_a_run_that_was_stopped_goes_on(encoder, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    write(encoder, tmp_path / "whole", format="parquet")

    def texts():
        yield from TEXTS[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(encoder, tmp_path / "out", texts(), format="parquet")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.parquet",
        "00001.parquet",
        "about.json",
    ]
    # Stopped while a file is written: nothing of it stays.
    written = parquet.write_table

    def stop(table, file, **options):
        written(table.slice(0, 1), file, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "write_table", stop)
        with pytest.raises(KeyboardInterrupt):
            write(encoder, tmp_path / "out", format="parquet")
    assert len(list((tmp_path / "out").iterdir())) == 3
    told = []
    assert write(encoder, tmp_path / "out", format="parquet", told=told.append) == len(TEXTS)
    assert [line.split(": ")[1] for line in told] == ["is there already", "is there already", "[3, 16]"]
    for found, expected in zip(read_shards(tmp_path / "out"), read_shards(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert parquet.read_table(tmp_path / "out" / "00002.parquet")["number"].to_pylist() == [8, 9, 10]
    for options, message in (
        ({"format": "npy"}, "was begun with format 'parquet', expected 'npy'"),
        ({"format": "parquet", "with_texts": True}, "was begun with with_texts False"),
    ):
        with pytest.raises(InputError, match=message):
            write(encoder, tmp_path / "out", **options)
    with pytest.raises(InputError, match="was made of other texts"):
        write(encoder, tmp_path / "out", ["other", *TEXTS[1:]], format="parquet")


def test_without_pyarrow_the_extra_is_named(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"no pyarrow, expected it installed: pip install 'ctx-jax\[parquet\]'"):
        write(encoder, tmp_path / "out", format="parquet")
    assert not (tmp_path / "out").exists()


def test_what_a_format_cannot_hold_is_named(encoder, tmp_path):
    pytest.importorskip("pyarrow")
    for options, message in (
        ({"format": "csv"}, "format: found 'csv'"),
        ({"with_texts": True}, "with_texts: found npy"),
        ({"format": "parquet", "layers": [0, -3]}, "found layer_0 twice"),
    ):
        with pytest.raises(InputError, match=message):
            write(encoder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_npy_needs_no_pyarrow(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert write(encoder, tmp_path / "out") == len(TEXTS)


def test_the_command_writes_parquet(encoder, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    save(Pretrained(CONFIG, encoder.params, encoder.tokenizer), tmp_path / "model", "hugging-face", certificate=False)
    text = tmp_path / "texts.txt"
    text.write_text("A set is empty.\n\nNames refer to objects.\n")
    words = ["encode", str(tmp_path / "model"), "--file", str(text), "--format", "parquet", "--with-texts"]
    assert cli.main(words) == 2
    assert "--format and --with-texts are of shards, expected --pool and --out too" in capsys.readouterr().err
    assert cli.main([*words, "--pool", "mean", "--out", str(tmp_path / "out")]) == 0
    expected = encoder.encode(["A set is empty.", "", "Names refer to objects."], pool="mean")
    np.testing.assert_allclose(np.concatenate(list(read_shards(tmp_path / "out"))), expected, rtol=1e-5, atol=2e-6)
