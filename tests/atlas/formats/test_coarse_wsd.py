"""CoarseWSD-20, as folders and as an archive."""

import collections
import io
import tarfile

import pytest

from ctx_jax.atlas.formats import coarse_wsd
from ctx_jax.errors import InputError

FILES = {
    "bank/classes_map.txt": '{"0": "bank_bank", "1": "bank_bank_(geography)"}',
    "bank/train.data.txt": "1\tthe bank lends\n3\tsat on the  bank .\n",
    "bank/train.gold.txt": "0\n1",
    "bank/test.data.txt": "0\tbank\n",
    "bank/test.gold.txt": "1\n",
    "apple/classes_map.txt": '{"0": "apple_apple"}',
    "apple/train.data.txt": "1\tan apple\n",
    "apple/train.gold.txt": "0\n",
    "README.txt": "not a word",
}


@pytest.fixture
def folder(write):
    for name, text in FILES.items():
        path = write(f"Coarse/{name}", text)
    return path.parent


def archive(files, path, mode):
    with tarfile.open(path, f"w:{mode}") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"Coarse/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def check(senses):
    assert senses.sentences == [["an", "apple"], ["the", "bank", "lends"], ["sat", "on", "the", "bank", "."]]
    assert (senses.sentence.tolist(), senses.span.tolist()) == ([0, 1, 2], [[1, 2], [1, 2], [3, 4]])
    assert senses.lemmas == ["apple", "bank", "bank"]
    assert senses.keys == [("apple_apple",), ("bank_bank",), ("bank_bank_(geography)",)]
    assert senses.names == ["apple.train.1", "bank.train.1", "bank.train.2"]


def test_folders(folder):
    check(coarse_wsd.senses([folder / "apple", folder / "bank"], "train"))
    assert coarse_wsd.senses([folder / "bank"], "test").keys == [("bank_bank_(geography)",)]


@pytest.mark.parametrize("mode", ["", "gz", "xz", "bz2"])
def test_archives(mode, tmp_path):
    path = archive(FILES, tmp_path / "x.tar", mode)
    check(coarse_wsd.senses_of_tar(path, "train"))
    with pytest.raises(InputError, match=r"x.tar: apple has no test.data.txt; expected classes_map.txt"):
        coarse_wsd.senses_of_tar(path, "test")
    with pytest.raises(InputError, match=r"no folder with classes_map.txt"):
        coarse_wsd.senses_of_tar(archive({"README": ""}, path, mode), "test")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.data.txt", "1\tthe bank lends\n3\tthe bank\n", "line 2: place '3'; expected that of a word, below 2"),
        ("train.data.txt", "1\tthe bank lends\nx\tthe bank\n", "line 2: place 'x'"),
        ("train.data.txt", "1\tthe bank lends\n1 the bank\n", "line 2: '1 the bank'"),
        ("train.data.txt", "1\tthe bank lends\n" * 3, "line 3: {folder}train.gold.txt ends before"),
        ("train.gold.txt", "0\n1\n1\n", "line 3: {folder}train.data.txt ends before"),
        ("train.gold.txt", "0\n2\n", "line 2: class '2'; expected one of 0, 1 in {folder}classes_map.txt"),
        ("classes_map.txt", '{"0":\nx', "line 2: Expecting value; expected JSON"),
        ("classes_map.txt", "[]", "line 1: '[]'"),
    ],
)
def test_what_is_wrong_is_said(name, text, message, folder, tmp_path):
    (folder / "bank" / name).write_text(text)
    with pytest.raises(InputError) as error:
        coarse_wsd.senses([folder / "bank"], "train")
    begin = f"{folder / 'bank'}/"
    assert str(error.value).startswith(f"{begin}{name}, {message.format(folder=begin)}")

    path = archive({**FILES, f"bank/{name}": text}, tmp_path / "x.tar", "xz")
    with pytest.raises(InputError) as error:
        coarse_wsd.senses_of_tar(path, "train")
    begin = f"{path}/Coarse/bank/"
    assert str(error.value).startswith(f"{begin}{name}, {message.format(folder=begin)}")


def test_missing_and_broken_files_are_said(folder, write):
    (folder / "bank" / "train.gold.txt").unlink()
    with pytest.raises(InputError, match=r"train.gold.txt: .*No such file"):
        coarse_wsd.senses([folder / "bank"], "train")
    with pytest.raises(InputError, match=r"x.tar: .*; expected a tar file"):
        coarse_wsd.senses_of_tar(write("x.tar", "no archive" * 100), "train")


@pytest.mark.parametrize(("split", "count"), [("train", 23370), ("test", 10196)])
def test_coarse_wsd_has_its_published_counts(split, count, data):
    senses = coarse_wsd.senses_of_tar(data / "coarsewsd20" / "CoarseWSD-20.tar.xz", split)
    assert (len(senses.names), len(set(senses.names)), len(set(senses.lemmas))) == (count, count, 20)
    # Every place is that of the word itself.
    places = zip(senses.sentence, senses.span, strict=True)
    assert [" ".join(senses.sentences[s][b:e]) for s, (b, e) in places] == senses.lemmas
    banks = collections.Counter(key for lemma, key in zip(senses.lemmas, senses.keys, strict=True) if lemma == "bank")
    assert set(banks) == {("bank_bank",), ("bank_bank_(geography)",)}
