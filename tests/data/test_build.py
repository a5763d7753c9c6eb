import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ctx_jax.data import build as build_lib
from ctx_jax.data import corpus as corpus_lib
from ctx_jax.data.build import build
from ctx_jax.data.corpus import Corpus
from ctx_jax.data.sources import find_sources, read_documents
from ctx_jax.errors import InputError
from ctx_jax.text.wordpiece import WordPiece

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'\"()*_"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Words of the topics that come often, letters, and no capital: `É` is unknown."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    pieces += ["the", "is", "of", "statement", "class", "##ing", "##ed", "expression", "object", "method", "text"]
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n")
    return WordPiece(path)


def contents(folder):
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name.name != "counts.json"}


def counts_without_seconds(folder):
    counts = json.loads((folder / "counts.json").read_text())
    for split in counts["splits"].values():
        assert split.pop("seconds") > 0
    return counts


@pytest.fixture(scope="module")
def topics(tmp_path_factory, tokenizer):
    """Python's topics in several shards, built without other processes."""
    out = tmp_path_factory.mktemp("topics") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_lib, "SHARD_BYTES", 200_000)
        build({"train": ["python:topics"]}, tokenizer, out, processes=1, record_tokens=64, show_progress=False)
    return out


def expected_tokens(tokenizer, names):
    """Ids of every sentence of every document, straight from the text."""
    return [
        [tokenizer.encode(sentence).ids for sentence in document.sentences]
        for source in find_sources(names)
        for document in read_documents(source)
    ]


def test_tokens_are_those_of_the_text(topics, tokenizer):
    documents = expected_tokens(tokenizer, ["python:topics"])
    sentences = [ids for document in documents for ids in document]
    corpus = Corpus(topics)
    np.testing.assert_array_equal(corpus.tokens(0, corpus.num_tokens), np.concatenate(sentences))
    np.testing.assert_array_equal(corpus.sentence_lengths, [len(ids) for ids in sentences])
    np.testing.assert_array_equal(corpus.document_sentences, [len(document) for document in documents])
    assert corpus.counts.tokens == sum(map(len, sentences))
    assert corpus.counts.unknown_tokens == sum(int((ids == tokenizer.specials.unk).sum()) for ids in sentences) > 0
    assert corpus.counts.unknown_rate == corpus.counts.unknown_tokens / corpus.counts.tokens


def test_plain_tfds_reads_the_same(topics):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(topics)
    assert len(builder.info.splits["train"].shard_lengths) > 2
    records = builder.as_data_source("train")
    corpus = Corpus(topics)
    assert len(records) == len(corpus.record_tokens)
    ids, lengths, documents = [], [], []
    for record, tokens in zip(records, corpus.record_tokens, strict=True):
        assert record["ids"].dtype == record["sentence_lengths"].dtype == np.int32
        assert len(record["ids"]) == record["sentence_lengths"].sum() == tokens
        assert len(record["ids"]) <= 64 or len(record["sentence_lengths"]) == 1
        ids.append(record["ids"])
        lengths.append(record["sentence_lengths"])
        documents += [record["document"]] * len(record["sentence_lengths"])
    np.testing.assert_array_equal(np.concatenate(ids), corpus.tokens(0, corpus.num_tokens))
    np.testing.assert_array_equal(np.concatenate(lengths), corpus.sentence_lengths)
    np.testing.assert_array_equal(documents, np.repeat(np.arange(corpus.num_documents), corpus.document_sentences))


def test_fields_of_a_record_lie_in_order(topics):
    """Protobuf's own order of a map differs from process to process, and with it the bytes of the data set."""
    import tensorflow_datasets as tfds

    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for data in tfds.builder_from_directory(topics).as_data_source("train", deserialize_method=raw):
        assert 0 < data.index(b"document") < data.index(b"ids") < data.index(b"sentence_lengths")


def test_records_are_as_long_as_they_may(topics):
    import tensorflow_datasets as tfds

    records = list(tfds.builder_from_directory(topics).as_data_source("train"))
    for record, following in itertools.pairwise(records):
        if record["document"] == following["document"]:
            assert len(record["ids"]) + following["sentence_lengths"][0] > 64


def test_two_processes_write_the_same_bytes(topics, tokenizer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(corpus_lib, "SHARD_BYTES", 200_000)
    monkeypatch.setattr(build_lib, "_TASK_CHARACTERS", 3000)
    build({"train": ["python:topics"]}, tokenizer, tmp_path / "two", processes=2, record_tokens=64)
    assert contents(tmp_path / "two") == contents(topics)
    assert counts_without_seconds(tmp_path / "two") == counts_without_seconds(topics)
    progress = capfd.readouterr().err
    assert "train: 100%" in progress
    assert f"train: {Corpus(topics).num_documents:,} documents, " in progress
    assert os.listdir(tmp_path) == ["two"]


def test_what_has_no_token_is_dropped_and_counted(tokenizer, tmp_path):
    # U+200B is cleaned away by BERT's normalizer.
    text = "a b\n\u200b\nc É\n\n\u200b\n\nd e f\n"
    (tmp_path / "text").write_text(text)
    counts = build({"dev": [tmp_path / "text"]}, tokenizer, tmp_path / "out", processes=1, show_progress=False)["dev"]
    assert (counts.documents, counts.sentences, counts.tokens) == (2, 3, 7)
    assert (counts.dropped_documents, counts.dropped_sentences) == (1, 2)
    assert (counts.unknown_tokens, counts.unknown_rate) == (0, 0)
    assert (counts.characters, counts.text_bytes) == (3 + 1 + 3 + 1 + 5, 3 + 3 + 4 + 3 + 5)
    assert counts.sources[0]["bytes"] == len(text.encode())
    corpus = Corpus(tmp_path / "out", "dev")
    assert corpus.tokenizer.tokens(corpus.tokens(0, 7)) == list("abce") + list("def")
    np.testing.assert_array_equal(corpus.document_sentences, [2, 1])


def test_split_without_a_token_is_refused(tokenizer, tmp_path):
    (tmp_path / "text").write_text("\u200b\n")
    with pytest.raises(InputError, match="split 'train': no token in any of its documents"):
        build({"train": [tmp_path / "text"]}, tokenizer, tmp_path / "out", processes=1, show_progress=False)
    assert os.listdir(tmp_path) == ["text"]


def test_long_sentence_is_a_record_of_its_own(tokenizer, tmp_path):
    (tmp_path / "text").write_text("a b\nc d\n" + "e " * 50 + "\nf g\n")
    build(
        {"train": [tmp_path / "text"]}, tokenizer, tmp_path / "out", processes=1, record_tokens=8, show_progress=False
    )
    np.testing.assert_array_equal(Corpus(tmp_path / "out").record_tokens, [4, 50, 2])


def test_document_in_parts_is_one_document(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("\n".join(["a b c d"] * 30) + "\n\nlast\n")
    sources = {"train": [tmp_path / "text"]}
    build(sources, tokenizer, tmp_path / "whole", processes=1, show_progress=False)
    monkeypatch.setattr("ctx_jax.data.sources.PART_CHARACTERS", 40)
    monkeypatch.setattr(build_lib, "_TASK_CHARACTERS", 100)
    build(sources, tokenizer, tmp_path / "parts", processes=1, show_progress=False)
    whole, parts = Corpus(tmp_path / "whole"), Corpus(tmp_path / "parts")
    np.testing.assert_array_equal(parts.document_sentences, [30, 1])
    np.testing.assert_array_equal(parts.sentence_lengths, whole.sentence_lengths)
    np.testing.assert_array_equal(parts.tokens(0, parts.num_tokens), whole.tokens(0, whole.num_tokens))


def test_holdout_makes_a_validation_split(tokenizer, tmp_path):
    documents = [f"document {i}\n" for i in range(60)]
    (tmp_path / "text").write_text("\n".join(documents))
    sources, options = {"train": [tmp_path / "text"]}, {"processes": 1, "show_progress": False}
    counts = build(sources, tokenizer, tmp_path / "a", holdout=12, **options)
    assert (counts["train"].documents, counts["validation"].documents) == (48, 12)
    (tmp_path / "text").write_text("\n".join(reversed(documents)))
    build(sources, tokenizer, tmp_path / "b", holdout=12, **options)

    def held(folder):
        corpus = Corpus(folder, "validation")
        edges = itertools.pairwise(corpus.sentence_offsets)
        return [tuple(corpus.tokens(int(start), int(end))) for start, end in edges]

    assert held(tmp_path / "a") == held(tmp_path / "b")[::-1]
    with pytest.raises(InputError, match="expected 'train' and no 'validation'"):
        build({"dev": [tmp_path / "text"]}, tokenizer, tmp_path / "c", holdout=0.1, **options)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ({}, {}, "expected at least one split"),
        ({"train": []}, {}, "each with at least one source"),
        ({"train": "python:topics"}, {}, "expected a list"),
        ({"a b": ["python:topics"]}, {}, "split 'a b'"),
        ({"train": ["python:topics"], "validation": ["python:topics"]}, {}, "in the splits 'train' and 'validation'"),
        ({"train": ["python:topics"]}, {"record_tokens": 0}, "record_tokens=0; expected at least 1"),
        ({"train": ["python:topics"]}, {"processes": -1}, "processes=-1; expected at least 1"),
    ],
)
def test_bad_arguments_are_named(tokenizer, tmp_path, sources, options, message):
    with pytest.raises(InputError, match=message):
        build(sources, tokenizer, tmp_path / "out", show_progress=False, **options)
    assert not os.listdir(tmp_path)


def test_only_a_corpus_is_overwritten_and_only_if_asked(tokenizer, tmp_path):
    (tmp_path / "text").write_text("a b\n")
    sources, options = {"train": [tmp_path / "text"]}, {"processes": 1, "show_progress": False}
    build(sources, tokenizer, tmp_path / "out", **options)
    with pytest.raises(InputError, match="out: exists"):
        build(sources, tokenizer, tmp_path / "out", **options)
    (tmp_path / "text").write_text("a b c\n")
    build(sources, tokenizer, tmp_path / "out", overwrite=True, **options)
    assert Corpus(tmp_path / "out").num_tokens == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("")
    with pytest.raises(InputError, match="refusing to overwrite"):
        build(sources, tokenizer, tmp_path / "mine", overwrite=True, **options)
    assert sorted(os.listdir(tmp_path)) == ["mine", "out", "text"]


def test_broken_source_leaves_nothing(tokenizer, tmp_path):
    (tmp_path / "text").write_bytes(b"good\n" * 100_000 + b"\xff\n")
    for processes in (1, 2):
        with pytest.raises(InputError, match=r"text: byte 500000 of its text \(line 100001\) is 0xff"):
            build({"train": [tmp_path / "text"]}, tokenizer, tmp_path / "out", processes=processes, show_progress=False)
        assert os.listdir(tmp_path) == ["text"]


def raise_in_worker(sentences):
    raise InputError(f"worker {multiprocessing.parent_process() is not None} saw {sentences[0]}")


def test_worker_that_raises_stops_the_build(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(build_lib, "_encode_in_worker", raise_in_worker)
    (tmp_path / "text").write_text("hello\n")
    with pytest.raises(InputError, match="worker True saw hello"):
        build({"train": [tmp_path / "text"]}, tokenizer, tmp_path / "out", processes=2, show_progress=False)
    assert os.listdir(tmp_path) == ["text"]


def kill_in_worker(sentences):
    assert multiprocessing.parent_process() is not None
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_stops_the_build(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(build_lib, "_encode_in_worker", kill_in_worker)
    (tmp_path / "text").write_text("hello\n" * 100_000)
    with pytest.raises(RuntimeError, match="a tokenising process died"):
        build({"train": [tmp_path / "text"]}, tokenizer, tmp_path / "out", processes=2, show_progress=False)
    assert os.listdir(tmp_path) == ["text"]


KILLED = """
import multiprocessing, sys, threading, time
from ctx_jax.data.build import build
from ctx_jax.text.load import load_tokenizer

def report():
    while not (children := multiprocessing.active_children()):
        time.sleep(0.02)
    print(*(child.pid for child in children), flush=True)

if __name__ == "__main__":
    vocabulary, text, out = sys.argv[1:]
    threading.Thread(target=report, daemon=True).start()
    build({"train": [text]}, load_tokenizer(vocabulary), out, processes=2, show_progress=False)
"""


def is_running(pid):
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_build_leaves_nothing_whole_and_the_next_one_cleans_up(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "vocabulary")
    (tmp_path / "script.py").write_text(KILLED)
    (tmp_path / "text").write_text("the text of a class is an object and so on and on\n" * 600_000)
    work = tmp_path / "work"
    command = [sys.executable, "script.py", "vocabulary", "text", "work/out"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        wait_until(lambda: any(work.glob(".out.incomplete-*/train-00000")))
        assert workers
        assert process.poll() is None
        (left,) = os.listdir(work)
        (tmp_path / "short").write_text("the text\n")
        options = {"processes": 1, "show_progress": False}
        # While it runs, another build beside it leaves its folder alone.
        build({"train": [tmp_path / "short"]}, tokenizer, work / "out", **options)
        assert sorted(os.listdir(work)) == [left, "out"]
        build_lib.shutil.rmtree(work / "out")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert os.listdir(work) == [left]
        wait_until(lambda: not any(map(is_running, workers)))
    build({"train": [tmp_path / "short"]}, tokenizer, work / "out", **options)
    assert os.listdir(work) == ["out"]
    assert Corpus(work / "out").num_tokens == 2


def test_slow_writer_holds_the_reader_back(tokenizer, tmp_path, monkeypatch):
    """What is read ahead of what is written stays bounded."""
    (tmp_path / "text").write_text("the text of a class\n\n" * 20_000)
    monkeypatch.setattr(build_lib, "_TASK_CHARACTERS", 1000)
    read, ahead = [], []
    documents = build_lib.sources_lib.read_documents

    def count_reading(*arguments, **options):
        for document in documents(*arguments, **options):
            read.append(document)
            yield document

    add = corpus_lib.SplitWriter.add

    def count_ahead(self, *arguments):
        ahead.append(len(read) - len(ahead))
        add(self, *arguments)

    monkeypatch.setattr(build_lib.sources_lib, "read_documents", count_reading)
    monkeypatch.setattr(corpus_lib.SplitWriter, "add", count_ahead)
    build({"train": [tmp_path / "text"]}, tokenizer, tmp_path / "out", processes=2, show_progress=False)
    assert len(ahead) == 20_000
    assert max(ahead) < 1000


def test_wikipedia_sample(data, tmp_path):
    tokenizer = WordPiece(data / "vocab" / "bert_base_uncased" / "vocab.txt")
    sources = {"validation": [data / "wikipedia_en" / "wiki.valid.txt.xz"]}
    counts = build(sources, tokenizer, tmp_path / "out", processes=1, show_progress=False)["validation"]
    assert counts.documents == 338
    assert counts.unknown_rate < 1e-3
