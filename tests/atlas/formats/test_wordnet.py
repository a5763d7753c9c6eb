"""First senses come back from a random index, plain, compressed and in an archive."""

import io
import random
import tarfile

import pytest

from ctx_jax.atlas.formats.discover import inventory, left_aside
from ctx_jax.atlas.formats.wordnet import first_senses
from ctx_jax.errors import InputError


def random_index(rng):
    """Lines of lemmas with one to four senses a part of speech, in any order, and the first of each."""
    lines, first = [], {}
    for place in range(60):
        lemma = f"{rng.choice(['bank', 'take_place', 'o.k.', '1990s'])}{place}"
        for part in rng.sample("1234", rng.randint(1, 4)):
            for number in range(1, rng.randint(2, 5)):
                kind = rng.choice("35") if part == "3" else part
                key = f"{lemma}%{kind}:{rng.randrange(100):02}:{number:02}::"
                lines.append(f"{key} {rng.randrange(10**8):08} {number} {rng.randrange(9)}")
                if number == 1:
                    first[f"{lemma}%{part}"] = key
    rng.shuffle(lines)
    return "\n".join(lines) + "\n", first


def archive(path, text, name="dict/index.sense", mode="w:xz"):
    with tarfile.open(path, mode) as file:
        for member, content in (("dict/data.noun", b"x"), (name, text.encode())):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def test_first_senses_come_back(tmp_path):
    text, expected = random_index(random.Random(0))
    (tmp_path / "index.sense").write_text(text)
    assert first_senses(tmp_path / "index.sense") == expected
    for name, mode in (("wordnet-3.0-dict.tar.xz", "w:xz"), ("WNdb-3.0.tar.gz", "w:gz"), ("wordnet.tar", "w")):
        archive(tmp_path / name, text, mode=mode)
        assert first_senses(tmp_path / name) == expected


def test_a_wordnet_below_a_folder_is_found(tmp_path):
    assert inventory(tmp_path) == {}
    (tmp_path / "a").mkdir()
    text, expected = random_index(random.Random(1))
    archive(tmp_path / "a" / "wordnet-3.0.tar.xz", text)
    (tmp_path / "a" / "other.txt").write_text("x")
    assert inventory(tmp_path) == expected
    assert left_aside(tmp_path) == [tmp_path / "a" / "other.txt"]


def test_the_first_senses_of_wordnet_3(data):
    """Of every lemma of every part of speech one: its index files say how many those are."""
    found = inventory(data / "wordnet30")
    assert found["bank%1"] == "bank%1:17:01::"
    assert found["be%2"] == "be%2:42:03::"
    # wnstats(7WN): unique strings of each part of speech.
    counts = {part: sum(lemma.endswith(f"%{part}") for lemma in found) for part in "1234"}
    assert counts == {"1": 117798, "2": 11529, "3": 21479, "4": 4481}


@pytest.mark.parametrize("line", ["", "bank%1:17:01:: 1 1", "bank 1 1 1", "bank%6:17:01:: 1 1 1", "a%1:: 1 one 1"])
def test_a_wrong_line_is_named(tmp_path, line):
    path = tmp_path / "index.sense"
    path.write_text(f"bank%1:17:01:: 08420278 1 20\n{line}\n")
    with pytest.raises(InputError, match=r"index\.sense, line 2: .*expected key, offset"):
        first_senses(path)


def test_an_archive_without_it_or_none_is_named(tmp_path):
    archive(tmp_path / "wordnet.tar.xz", "x", name="dict/index.noun")
    with pytest.raises(InputError, match=r"wordnet\.tar\.xz: found no index\.sense"):
        first_senses(tmp_path / "wordnet.tar.xz")
    (tmp_path / "wordnet.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(InputError, match=r"wordnet\.tar: .*expected a tar archive"):
        first_senses(tmp_path / "wordnet.tar")
