import gzip
import itertools
import lzma
import random
import tracemalloc

import numpy as np
import pytest
import zstandard

from ctx_jax.data import sources as sources_lib
from ctx_jax.data.sources import Document, Source, choose_holdout, find_sources, read_documents
from ctx_jax.errors import InputError

PLAIN = "The bank was shut.\nIt rained. A lot.\n\n\nAnother document\n  with spaces \t\n"
TAGGED = """
<doc id="7" title="A &amp; B">
Mr. Smith went out. He came back.
A second paragraph.

</doc>
<doc title="two" id="Author/Two" year="1919">
One sentence only
</doc>
"""
COMPRESS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(*names, **options):
    return [document for source in find_sources(names) for document in read_documents(source, **options)]


def texts(documents):
    return [document.sentences for document in documents]


def test_plain_text_has_a_sentence_a_line_and_blank_lines_between_documents(tmp_path):
    documents = read(write(tmp_path / "a.txt", PLAIN))
    assert texts(documents) == [["The bank was shut.", "It rained. A lot."], ["Another document", "with spaces"]]
    assert all(document.ends for document in documents)
    assert documents[0].id != documents[1].id
    split = read(tmp_path / "a.txt", sentences="split")
    assert texts(split)[0] == ["The bank was shut.", "It rained.", "A lot."]
    assert [d.id for d in split] == [d.id for d in documents]


def test_tagged_text_has_a_paragraph_a_line(tmp_path):
    path = write(tmp_path / "a.txt", TAGGED)
    assert read(path) == [
        Document("7", ["Mr. Smith went out.", "He came back.", "A second paragraph."]),
        Document("Author/Two", ["One sentence only"]),
    ]
    assert texts(read(path, sentences="lines"))[0] == ["Mr. Smith went out. He came back.", "A second paragraph."]


def test_unknown_way_to_split_is_named(tmp_path):
    with pytest.raises(InputError, match=r"sentences='line' \(did you mean 'lines'\?\)"):
        read(write(tmp_path / "a.txt", PLAIN), sentences="line")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_byte_order_mark_and_line_ends_are_no_text(tmp_path, line_end):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + TAGGED.strip().replace("\n", line_end).encode())
    assert texts(read(path))[1] == ["One sentence only"]


@pytest.mark.parametrize("suffix", list(COMPRESS))
@pytest.mark.parametrize("named", [True, False])
def test_compressed_text_reads_like_plain_text(tmp_path, suffix, named):
    data = "\n".join(f"sentence {i} of the text" + "\n" * (i % 7 == 0) for i in range(5000)).encode()
    half = len(data) // 2
    several = COMPRESS[suffix](data[:half]) + COMPRESS[suffix](data[half:])  # streams may follow one another
    path = write(tmp_path / (f"a.txt.{suffix}" if named else "a"), several)
    read_bytes = []
    (source,) = find_sources([path])
    documents = list(read_documents(source, on_read=read_bytes.append))
    assert documents == read(write(tmp_path / "plain", data))
    assert sum(read_bytes) == path.stat().st_size == source.num_bytes


@pytest.mark.parametrize("suffix", list(COMPRESS))
def test_truncated_file_names_itself_the_line_and_the_byte(tmp_path, suffix):
    generator = random.Random(0)
    lines = [f"{generator.random()} in a line" for _ in range(20000)]
    data = "\n".join(lines).encode()
    compressed = COMPRESS[suffix](data)
    path = write(tmp_path / f"a.{suffix}", compressed[: len(compressed) // 2])
    with pytest.raises(InputError, match=r"a\.\w+: broken after byte \d+ of its text \(line \d+\): .*cut off") as error:
        read(path)
    words = str(error.value).split()
    byte, line = int(words[words.index("byte") + 1]), int(words[words.index("(line") + 1].rstrip("):"))
    assert 0.2 * len(data) < byte < 0.8 * len(data)
    assert line == data[:byte].count(b"\n") + 1


@pytest.mark.parametrize("suffix", list(COMPRESS))
def test_corrupt_file_is_refused(tmp_path, suffix):
    generator = random.Random(1)
    options = {"write_checksum": True}
    compress = COMPRESS | {"zst": lambda data: zstandard.ZstdCompressor(**options).compress(data)}
    compressed = bytearray(compress[suffix]("\n".join(str(generator.random()) for _ in range(20000)).encode()))
    middle = len(compressed) // 2
    compressed[middle : middle + 8] = bytes(8)
    # xz checks a block at its end, so there the text is the first to look wrong.
    with pytest.raises(InputError, match=rf"a\.{suffix}: (broken after )?byte \d+ of its text \(line \d+\)"):
        read(write(tmp_path / f"a.{suffix}", bytes(compressed)))


def test_file_that_is_not_compressed_as_it_is_named_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.xz: begins with the bytes '3c 68 74 6d 6c 3e'; expected xz"):
        read(write(tmp_path / "a.xz", "<html>not found</html>"))


def test_invalid_utf8_names_line_and_byte(tmp_path):
    path = write(tmp_path / "a.txt", "Grüße\nzweite ".encode() + b"\xffZeile\n")
    with pytest.raises(InputError, match=r"a\.txt: byte 15 of its text \(line 2\) is 0xff, invalid start byte"):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<doc id="1">\na\n', r"a: ends inside the <doc> of line 1; expected </doc>"),
        ('<doc id="1">\na\n<doc id="2">\n', r"a, line 3: <doc> inside the <doc> of line 1"),
        ('<doc id="1">\na\n</doc>\n\nstray\n', r"a, line 5: 'stray' outside <doc>"),
        ('<doc id="1">\n</doc>\n</doc>\n', r"a, line 3: </doc> without <doc>"),
        ('<doc title="x">\n</doc>\n', r"a, line 1: '<doc title=\"x\">'; expected <doc id="),
        ('<doc id="1">text</doc>\n', r"a, line 1: .*alone on its line"),
        ("", r"a: holds no document"),
        (" \n\n", r"a: holds no document"),
    ],
)
def test_broken_structure_names_the_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / "a", text))


def test_long_documents_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_lib, "PART_CHARACTERS", 50)
    lines = [f"sentence number {i}" for i in range(20)]
    plain = read(write(tmp_path / "plain", "\n".join(lines) + "\n\nlast\n"))
    tagged = read(
        write(tmp_path / "tagged", '<doc id="x">\n' + "\n".join(lines) + '\n</doc>\n<doc id="y">\nlast\n</doc>')
    )
    for documents in (plain, tagged):
        assert len(documents) == 8
        assert [document.ends for document in documents] == [False] * 6 + [True, True]
        assert len({document.id for document in documents[:7]}) == 1
        assert documents[7].id != documents[0].id
        assert list(itertools.chain(*texts(documents)[:7])) == lines


def test_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_lib, "LINE_BYTES", 10_000)
    with pytest.raises(InputError, match="a: line 2 is longer than 10000 bytes"):
        read(write(tmp_path / "a", "short\n" + "x" * 50_000))


def test_folders_and_globs_are_sorted(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a.txt", ".hidden", "b/.git/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, name)
    names = [source.name for source in find_sources([tmp_path])]
    assert names == [str(tmp_path / name) for name in ("a.txt", "b/1.txt", "b/2.txt")]
    assert [source.name for source in find_sources([f"{tmp_path}/b/*.txt"])] == names[1:]
    with pytest.raises(InputError, match="named twice"):
        find_sources([tmp_path, tmp_path / "b" / ".." / "a.txt"])


def test_missing_sources_are_named(tmp_path):
    write(tmp_path / "wiki.train.txt", PLAIN)
    with pytest.raises(InputError, match=r"wiki\.tran\.txt: not found \(did you mean 'wiki\.train\.txt'\?\)"):
        find_sources([tmp_path / "wiki.tran.txt"])
    with pytest.raises(InputError, match="no file there"):
        find_sources([f"{tmp_path}/*.xz"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no file there"):
        find_sources([tmp_path / "empty"])
    with pytest.raises(InputError, match="expected 'python:topics'"):
        find_sources(["python:topic"])


def test_pythons_topics_are_prose():
    (source,) = find_sources(["python:topics"])
    read_bytes = []
    documents = list(read_documents(source, on_read=read_bytes.append))
    assert sum(read_bytes) == source.num_bytes
    ids = [document.id for document in documents]
    assert ids == sorted(ids)
    assert 60 <= len(ids) <= 120  # 79 in Python 3.11 and 3.12
    assert {"assert", "comparisons", "strings"} <= set(ids)
    sentences = list(itertools.chain(*texts(documents)))
    assert sum(map(len, sentences)) > 200_000
    assert 'The "assert" statement' in sentences
    # Wrapped lines are joined; code, grammar, underlines and tables are gone.
    assert "Assert statements are a convenient way to insert debugging assertions into a program:" in sentences
    assert not [s for s in sentences if "::=" in s or ">>>" in s or "****" in s or "====" in s or "+--" in s]


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory):
    import tensorflow_datasets as tfds

    class TinyCtxText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "text": tfds.features.Text(),
                "title": tfds.features.Text(),
                "label": tfds.features.Scalar(np.int64),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(4), "test": self._generate_examples(1)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"text": f"Record {i} is short. É.\n\nA second line.", "title": f"Title {i}", "label": i}

    folder = tmp_path_factory.mktemp("tfds")
    builder = TinyCtxText(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    tfds.core.add_data_dir(folder)
    return builder.data_dir


def test_tfds_records_are_documents(tiny_tfds):
    expected = [[f"Record {i} is short.", "É.", "A second line."] for i in range(4)]
    by_name = read("tfds:tiny_ctx_text")
    assert texts(by_name) == texts(read(f"tfds:{tiny_tfds}")) == expected
    assert len({document.id for document in by_name}) == 4
    assert texts(read("tfds:tiny_ctx_text:1.0.0:train[1:3]")) == expected[1:3]
    assert texts(read("tfds:tiny_ctx_text:test", sentences="lines")) == [["Record 0 is short. É.", "A second line."]]
    assert texts(read("tfds:tiny_ctx_text:test#title")) == [["Title 0"]]
    read_bytes = []
    (source,) = find_sources(["tfds:tiny_ctx_text"])
    list(read_documents(source, on_read=read_bytes.append))
    assert sum(read_bytes) == source.num_bytes > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tfds:tiny_ctx_text:trian",
            r"no split 'trian' \(did you mean 'train'\?\); expected one of \['test', 'train'\]",
        ),
        ("tfds:tiny_ctx_text#label", r"no text field 'label'; expected one of \['text', 'title'\]"),
        ("tfds:no_such_data_set", r"source tfds:no_such_data_set: .*not found"),
    ],
)
def test_tfds_errors_are_clear(tiny_tfds, name, message):
    with pytest.raises(InputError, match=message):
        find_sources([name])


def test_holdout_is_stable_under_reordering(tmp_path):
    documents = [f"document {i} about\nsomething\n" for i in range(400)]
    write(tmp_path / "a", "\n".join(documents))
    random.Random(0).shuffle(documents)
    write(tmp_path / "b", "\n".join(documents[:100]))
    write(tmp_path / "c", "\n".join(documents[100:]))

    def held(amount, *names):
        sources = find_sources([tmp_path / name for name in names])
        chosen = choose_holdout(sources, amount)
        return {d.sentences[0] for source in sources for d in read_documents(source) if d.id in chosen}

    assert held(0.25, "a") == held(0.25, "c", "b")
    assert 60 < len(held(0.25, "a")) < 140
    assert held(30, "a") == held(30, "c", "b")
    assert len(held(30, "a")) == 30
    assert held(20, "a") < held(30, "a")
    for amount in (0, -1, 1.5, 400):
        with pytest.raises(InputError, match=rf"holdout={amount}\b"):
            held(amount, "a")


def test_holdout_is_the_same_in_every_process():
    held = choose_holdout([], 0.5)
    assert [i for i in range(12) if f"document {i}" in held] == [0, 1, 2, 6, 7, 9, 11]


@pytest.mark.parametrize("suffix", list(COMPRESS))
def test_memory_is_flat(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(sources_lib, "PART_CHARACTERS", 1 << 16)
    words = random.Random(0).choices([f"word{i}" for i in range(5000)], k=400_000)
    lines = [" ".join(words[i : i + 10]) for i in range(0, len(words), 10)]
    data = "\n".join(lines).encode()  # 3.5 MB; xz with a small window, as the decoder allocates all of it
    path = write(tmp_path / "a", lzma.compress(data, preset=0) if suffix == "xz" else COMPRESS[suffix](data))
    source = Source(str(path), 0)
    tracemalloc.start()
    try:
        sentences = sum(len(part.sentences) for part in read_documents(source))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sentences == len(lines)
    assert peak < len(data) / 2
