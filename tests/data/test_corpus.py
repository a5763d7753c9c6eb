import json
import pickle
import random
import shutil
import threading

import numpy as np
import pytest

from ctx_jax.data import corpus as corpus_lib
from ctx_jax.data.build import build
from ctx_jax.data.corpus import Corpus
from ctx_jax.errors import InputError
from ctx_jax.text.wordpiece import WordPiece


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 documents of 1 to 5 sentences of 1 to 20 words in records of some 30 tokens, in several shards."""
    path = tmp_path_factory.mktemp("corpus")
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(300)]
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    generator = random.Random(0)

    def sentence():
        return " ".join(generator.choices(words, k=generator.randint(1, 20)))

    documents = ["\n".join(sentence() for _ in range(generator.randint(1, 5))) for _ in range(300)]
    (path / "train").write_text("\n\n".join(documents))
    (path / "dev").write_text("\n\n".join(documents[:20]))
    tokenizer = WordPiece(path / "vocab.txt")
    sources = {"train": [path / "train"], "validation": [path / "dev"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_lib, "SHARD_BYTES", 20_000)
        build(sources, tokenizer, path / "out", processes=1, record_tokens=30, show_progress=False)
    return path / "out"


@pytest.fixture(scope="module")
def stream(folder):
    """All tokens of the split, straight from the text."""
    text = (folder.parent / "train").read_text()
    return WordPiece(folder.parent / "vocab.txt").encode(text).ids


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_numbers_and_offsets(folder, stream):
    corpus = Corpus(folder)
    assert (corpus.num_documents, corpus.num_tokens) == (300, len(stream))
    assert corpus.num_sentences == len(corpus.sentence_lengths) == corpus.document_sentences.sum()
    assert isinstance(corpus.sentence_lengths, np.memmap)
    for offsets, lengths in (
        (corpus.sentence_offsets, corpus.sentence_lengths),
        (corpus.document_offsets, corpus.document_sentences),
    ):
        assert offsets.dtype == np.int64
        assert offsets[0] == 0
        np.testing.assert_array_equal(np.diff(offsets), lengths)
    assert len(corpus.counts.shard_lengths) > 2
    assert corpus.tokenizer.vocab_size == 305
    assert Corpus(folder, "validation").num_documents == 20


def test_any_range_of_tokens(folder, stream):
    corpus = Corpus(folder)
    generator = random.Random(1)
    for _ in range(500):
        start = generator.randint(0, len(stream))
        end = min(len(stream), start + generator.choice([0, 1, 5, 128, 3000]))
        tokens = corpus.tokens(start, end)
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, stream[start:end])
    for start in np.cumsum(corpus.record_tokens)[:50].tolist():
        np.testing.assert_array_equal(corpus.tokens(start - 1, start + 1), stream[start - 1 : start + 1])
    tokens = corpus.tokens(0, 10)
    tokens[:] = 0
    np.testing.assert_array_equal(corpus.tokens(0, 10), stream[:10])
    for start, end in ((-1, 5), (5, 4), (0, len(stream) + 1)):
        with pytest.raises(IndexError):
            corpus.tokens(start, end)


def test_many_threads_read_the_same(folder, stream):
    corpus = Corpus(folder)
    wrong = []

    def read(seed):
        generator = random.Random(seed)
        for _ in range(300):
            start = generator.randrange(len(stream) - 128)
            if not np.array_equal(corpus.tokens(start, start + 128), stream[start : start + 128]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pickles_as_its_path(folder, stream):
    data = pickle.dumps(Corpus(folder, "train"))
    assert len(data) < 1000
    corpus = pickle.loads(data)
    assert corpus.split == "train"
    np.testing.assert_array_equal(corpus.tokens(3, 300), stream[3:300])


def test_fingerprint_is_that_of_the_content(folder, copy, tmp_path):
    assert Corpus(folder).fingerprint == Corpus(copy).fingerprint != Corpus(folder, "validation").fingerprint
    tokenizer = WordPiece(folder.parent / "vocab.txt")
    text = (folder.parent / "train").read_text()
    fingerprints = set()
    for name, changed in (
        ("same", text),
        ("word", text.replace("waa", "wab", 1)),
        ("end", text.replace("\n\n", "\n", 1)),
    ):
        (tmp_path / name).write_text(changed)
        out = tmp_path / f"{name}.out"
        build({"train": [tmp_path / name]}, tokenizer, out, processes=1, record_tokens=30, show_progress=False)
        fingerprints.add(Corpus(out).fingerprint)
    assert len(fingerprints) == 3
    assert Corpus(folder).fingerprint in fingerprints  # whatever the shards


def test_wrong_folder_and_unknown_split(folder, tmp_path):
    with pytest.raises(InputError, match=r"no counts\.json there; expected a folder written by"):
        Corpus(tmp_path)
    with pytest.raises(
        InputError, match=r"no split 'valid' \(did you mean 'validation'\?\); expected one of \['train', "
    ):
        Corpus(folder, "valid")
    (tmp_path / "counts.json").write_text("{")
    with pytest.raises(InputError, match=r"counts\.json: .*expected JSON"):
        Corpus(tmp_path)
    (tmp_path / "counts.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match=r"counts\.json: not of format 1"):
        Corpus(tmp_path)


def shard(folder, index):
    return sorted(folder.glob("corpus-train*"))[index]


def test_missing_or_truncated_files_are_named(copy):
    data = shard(copy, 1).read_bytes()
    shard(copy, 1).write_bytes(data[:-1000])
    with pytest.raises(
        InputError, match=rf"train\.array_record-00001-of-\d+: {len(data) - 1000} bytes; expected {len(data)}"
    ):
        Corpus(copy)
    shard(copy, 1).write_bytes(data)
    Corpus(copy)
    (copy / "index" / "train.record_tokens.npy").unlink()
    with pytest.raises(InputError, match=r"train\.record_tokens\.npy: missing"):
        Corpus(copy)


def rewrite_counts(folder, change):
    counts = json.loads((folder / "counts.json").read_text())
    change(counts)
    (folder / "counts.json").write_text(json.dumps(counts))


def test_truncated_array_record_is_refused_even_where_its_size_is_right(copy):
    path = shard(copy, 1)
    path.write_bytes(path.read_bytes()[:-1000])
    rewrite_counts(copy, lambda counts: counts["files"].update({path.name: path.stat().st_size}))
    with pytest.raises(InputError, match=r"array_record-00001-of-\d+: .*expected an array_record file"):
        Corpus(copy)


def test_swapped_shards_are_refused(copy):
    first, last = shard(copy, 0), shard(copy, -1)
    data = first.read_bytes(), last.read_bytes()
    last.write_bytes(data[0])
    first.write_bytes(data[1])
    sizes = {path.name: path.stat().st_size for path in (first, last)}
    rewrite_counts(copy, lambda counts: counts["files"].update(sizes))
    with pytest.raises(InputError, match=r"array_record-00000-of-\d+: \d+ records; expected \d+"):
        Corpus(copy)


def test_damaged_record_is_named_when_it_is_read(folder, tmp_path):
    # Larger than two of array_record's blocks of 64 kB, as damage in the last one is seen on opening.
    generator = np.random.default_rng(0)
    (tmp_path / "index").mkdir()
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    with corpus_lib.SplitWriter(tmp_path, "train", record_tokens=100, unknown=1) as writer:
        for _ in range(1000):
            writer.add(generator.integers(0, 2**31, 100, np.int32), np.array([50, 50], np.int32))
    corpus_lib.write_metadata(tmp_path, {"train": writer.counts}, 100)
    (path,) = tmp_path.glob("corpus-train*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    path.write_bytes(data)
    corpus = Corpus(tmp_path)
    assert len(corpus.tokens(0, 1000)) == 1000
    with pytest.raises(InputError, match=r"split 'train', record \d{3}: damaged: .*Corrupted"):
        corpus.tokens(0, corpus.num_tokens)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("record_tokens", "sum of record_tokens is"),
        ("sentence_lengths", "sum of sentence_lengths is"),
        ("document_sentences", "sum of document_sentences is"),
    ],
)
def test_index_that_does_not_add_up_is_refused(copy, name, message):
    path = copy / "index" / f"train.{name}.npy"
    array = np.load(path)
    array[3] += 1
    np.save(path, array)
    with pytest.raises(InputError, match=message):
        Corpus(copy)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(InputError, match=rf"train\.{name}\.npy: .*expected an array"):
        Corpus(copy)


def test_index_that_disagrees_with_the_records_is_refused(copy):
    path = copy / "index" / "train.record_tokens.npy"
    array = np.load(path)
    array[3] += 1
    array[4] -= 1
    np.save(path, array)
    corpus = Corpus(copy)
    with pytest.raises(InputError, match=r"record 3: \d+ tokens; expected \d+, as the index says"):
        corpus.tokens(0, 1000)


def test_array_that_grows_is_an_npy_file(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    file = corpus_lib._ArrayFile(tmp_path / "a.npy")
    for start in range(0, len(values), 777):
        file.extend(values[start : start + 777])
    file.close()
    loaded = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert loaded.dtype == np.uint32
    np.testing.assert_array_equal(loaded, values)
