"""Files are read whatever they are compressed with, and errors say which line."""

import bz2
import gzip
import lzma
import random

import pytest

from ctx_jax.atlas.formats.files import lines, opened, without_compression
from ctx_jax.atlas.formats.splits import Splits
from ctx_jax.atlas.formats.tables import index, paired, score
from ctx_jax.errors import InputError

TEXT = "\ufeffeins\r\nzwei \t\n\nvîer"
LINES = [(1, "eins"), (2, "zwei \t"), (3, ""), (4, "vîer")]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress, bz2.compress])
def test_compression_is_seen_by_the_content(compress, write):
    assert list(lines(write("text", compress(TEXT.encode())))) == LINES
    assert list(lines(write("empty", compress(b"")))) == []


def test_text_that_begins_like_bzip2_is_text(write):
    assert list(lines(write("text", "BZh9 is its magic"))) == [(1, "BZh9 is its magic")]


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bz2.compress])
def test_a_broken_file_is_bad_input(compress, write):
    whole = compress(random.Random(0).randbytes(1000))
    for cut in (len(whole) // 2, len(whole) - 1):
        path = write("cut", whole[:cut])
        with pytest.raises(InputError, match=r"cut: .*; expected a whole file"), opened(path) as stream:
            stream.read()


def test_no_file_and_no_utf8(write, tmp_path):
    with pytest.raises(InputError, match=r"none: .*No such file"):
        list(lines(tmp_path / "none"))
    with pytest.raises(InputError, match="latin, line 2: byte 1 is 0xe9; expected UTF-8"):
        list(lines(write("latin", b"one\nt\xe9\n")))


def test_names_without_compression():
    assert [without_compression(f"a.b{end}") for end in ("", ".xz", ".gz", ".bz2", ".zip")] == [*["a.b"] * 4, "a.b.zip"]


def test_paired_lines_end_together():
    one = [(1, "a"), (2, ""), (3, "c"), (4, ""), (5, " ")]
    assert list(paired(("x", one), ("y", one[:3]))) == [(line, line) for line in one[:3]]
    with pytest.raises(InputError, match="x, line 2: y ends before"):
        list(paired(("x", one), ("y", one[:2])))
    with pytest.raises(InputError, match="y, line 1: x ends before"):
        list(paired(("x", []), ("y", one)))


def test_numbers_in_columns():
    assert [index(text, 3) for text in ("0", "2", "3", "-1", "", "1.0", "٢", "9" * 5000)] == [0, 2, *[None] * 6]
    assert [score(text, 0, 5) for text in ("0", "5.000", "5.1", "-1", "", "nan", "inf", "a")] == [0, 5, *[None] * 6]


def test_splits_are_read_once_when_asked_for():
    read = []
    splits = Splits({split: lambda split=split: read.append(split) or split.upper() for split in ("train", "test")})
    assert (list(splits), len(splits), "test" in splits, "dev" in splits, read) == (
        ["train", "test"],
        2,
        True,
        False,
        [],
    )
    assert (splits["test"], splits["test"], splits.get("dev"), read) == ("TEST", "TEST", None, ["test"])
    assert (dict(splits), read) == ({"train": "TRAIN", "test": "TEST"}, ["test", "train"])
    with pytest.raises(KeyError):
        splits["dev"]
