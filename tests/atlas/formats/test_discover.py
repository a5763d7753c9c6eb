"""What is found in folders: which files, of which corpora, in which splits; nothing read before it is asked for."""

import json
import lzma
import os
import pathlib
import subprocess
import sys

import pytest

from ctx_jax.atlas.formats.discover import TITLES, discover, left_aside
from ctx_jax.atlas.records import Edges, Senses, TextPairs, Trees, WordPairs
from ctx_jax.errors import InputError

CONLLU = "1\ta\ta\tNOUN\tNN\t_\t0\troot\t_\t_\n\n"
NO_XPOS = CONLLU.replace("NN", "_")
NER = "a\tB-X\n"
PARSED = "1\ta\tNN\tNN\t(TOP(NP*))\t-\t-\n"
SPANS = json.dumps({"text": "a", "targets": [{"span1": [0, 1], "label": "X"}]})
XML = '<corpus><sentence><instance id="i" lemma="a">a</instance></sentence></corpus>'
KEYS = "i a%1:00:00::\n"
WIC = "a\tN\t0-0\ta\ta\n"
STS = "g\tf\t2015\t1\t1.0\ta\tb\n"


@pytest.fixture
def fill(write, tmp_path):
    def fill(files):
        for name, content in files.items():
            write(name, content)
        return tmp_path

    return fill


def found(folder):
    return {corpus.name: list(corpus.splits) for corpus in discover(folder)}


def test_all_formats_in_their_places(fill):
    folder = fill(
        {
            "ud/en-ud-train.conllu": CONLLU,
            "ud/en-ud-dev.conllu.xz": lzma.compress(NO_XPOS.encode()),
            "ner/conll2003/eng.train": NER,
            "ner/conll2003/eng.testa": NER,
            "ner/conll2003/eng.testb": NER,
            "ner/wnut17train.conll": NER,
            "ner/emerging.dev.conll": NER,
            "ner/emerging.test.annotated": NER,
            "propbank.test.conll12": PARSED,
            "coref/train.jsonl": SPANS,
            "coref/valid.jsonl": SPANS,
            "wsd/semcor.data.xml": XML,
            "wsd/semcor.gold.key.txt": KEYS,
            "wsd/senseval2/senseval2.data.xml": XML,
            "wsd/senseval2/senseval2.gold.key.txt": KEYS,
            "wsd/blind.data.xml": XML,
            "coarse/a/classes_map.txt": '{"0": "a_a"}',
            "coarse/a/train.data.txt": "0\ta\n",
            "coarse/a/train.gold.txt": "0\n",
            "coarse/b/classes_map.txt": '{"0": "b_b"}',
            "coarse/b/train.data.txt": "0\tb\n",
            "coarse/b/train.gold.txt": "0\n",
            "WiC/train/train.data.txt": WIC,
            "WiC/train/train.gold.txt": "T\n",
            "WiC/dev/dev.data.txt": WIC,
            "WiC/dev/dev.gold.txt": "F\n",
            "WiC/test/test.data.txt": WIC,
            "sts/sts-train.csv": STS,
            "sts/sts-trial.csv": STS,
            "sts/2012/x.train.tsv": "1\ta\tb\n",
            "sts/2012/y.test.tsv": "1\ta\tb\n",
            "sts/2012/x.test.tsv": "2\ta\tb\n",
            "sts/2012/readme.txt": "",
            "other.jsonl": '{"text": "a"}',
            "empty.conllu": "",
            ".hidden/x.conllu": CONLLU,
            ".x.conllu": CONLLU,
        }
    )
    assert found(folder) == {
        "WiC/same-sense": ["train", "dev"],
        "coarse/senses": ["train"],
        "conll2003/ner": ["train", "dev", "test"],
        "coref/spans": ["train", "dev"],
        "en-ud/dep": ["train", "dev"],
        "en-ud/pos": ["train", "dev"],
        "en-ud/tree": ["train", "dev"],
        "en-ud/xpos": ["train"],
        "propbank/constituents": ["test"],
        "propbank/srl": ["test"],
        "semcor/senses": ["train"],
        "senseval2/senses": ["test"],
        "sts/similarity": ["train", "dev"],
        "sts12/similarity": ["train", "test"],
        "wnut17/ner": ["train", "dev", "test"],
    }
    assert [str(path.relative_to(folder)) for path in left_aside(folder)] == [
        "WiC/test/test.data.txt",
        "empty.conllu",
        "other.jsonl",
        "sts/2012/readme.txt",
        "wsd/blind.data.xml",
    ]
    corpora = {corpus.name: corpus for corpus in discover(folder)}
    kinds = {"same-sense": WordPairs, "senses": Senses, "tree": Trees, "similarity": TextPairs}
    for name, corpus in corpora.items():
        task = name.rpartition("/")[2]
        assert corpus.title == TITLES[task]
        for examples in corpus.splits.values():
            assert isinstance(examples, kinds.get(task, Edges))
    assert corpora["sts12/similarity"].splits["test"].sets == ("x", "y")
    assert corpora["coarse/senses"].splits["train"].lemmas == ["a", "b"]
    assert [bool(corpora["WiC/same-sense"].splits[split].same) for split in ("train", "dev")] == [True, False]


def test_a_split_is_read_when_asked_for_and_once_for_all_tasks(fill):
    folder = fill({"x-train.conllu": CONLLU + CONLLU, "x-test.conllu": CONLLU + "broken\n"})
    corpora = {corpus.name: corpus for corpus in discover(folder)}
    assert len(corpora["x/pos"].splits["train"].labels) == 2
    (folder / "x-train.conllu").unlink()
    assert len(corpora["x/dep"].splits["train"].labels) == 2
    assert corpora["x/pos"].splits["train"] is corpora["x/pos"].splits["train"]
    for _ in range(2):
        with pytest.raises(InputError, match=r"x-test.conllu, line 3: 1 columns"):
            corpora["x/pos"].splits["test"]


@pytest.mark.parametrize(
    ("name", "corpus", "split"),
    [
        ("en_ewt-ud-train.conllu", "en_ewt-ud", "train"),
        ("test.conllu", "{root}", "test"),
        ("a/test.conllu", "a", "test"),
        ("a/Validation/x.conllu", "x", "dev"),
        ("a/Validation/test.conllu", "a", "test"),
        ("dev_x.conllu", "x", "dev"),
        ("x.train.v2.conllu", "x.v2", "train"),
        ("latest.conllu", "latest", "train"),
        ("train-test.conllu", "train", "test"),
    ],
)
def test_names_say_corpus_and_split(name, corpus, split, fill):
    folder = fill({name: NO_XPOS})
    corpus = corpus.format(root=folder.name)
    assert found(folder) == {f"{corpus}/{task}": [split] for task in ("dep", "pos", "tree")}


def test_names_are_unique(fill):
    folder = fill({"a/x.conll": NER, "b/train/x.conll": NER, "b/test/x.conll": NER, "y.conll": NER})
    assert found(folder) == {"a/x/ner": ["train"], "b/x/ner": ["train", "test"], "y/ner": ["train"]}
    fill({"X/X.data.xml": XML, "X/X.gold.key.txt": KEYS})
    fill({f"X/a/{name}": "{}" for name in ("classes_map.txt", "train.data.txt", "train.gold.txt")})
    with pytest.raises(InputError, match="two corpora are called X/X/senses"):
        discover(folder)


def test_two_files_for_one_split_are_refused(fill):
    folder = fill({"x.dev.conll": NER, "x.valid.conll": NER})
    with pytest.raises(InputError, match=r"dev of x: both .*x.dev.conll and .*x.valid.conll; expected one file"):
        discover(folder)


def test_nothing_known_says_what_is(fill, tmp_path):
    with pytest.raises(InputError, match=r"nothing known among 0 files; expected CoNLL-U .* WiC .* as .bz2, .gz, .xz"):
        discover(tmp_path)
    fill({"a/readme.md": "", "b.conllx.zip": ""})
    with pytest.raises(InputError, match="nothing known among 2 files"):
        discover(tmp_path)
    assert len(left_aside(tmp_path)) == 2
    for call in (discover, left_aside):
        with pytest.raises(InputError, match="none: no folder"):
            call(tmp_path / "none")


def test_links_are_followed_once(fill, monkeypatch):
    folder = fill({"real/2013/x.test.tsv": "1\ta\tb\n", "real/x.conll": NER})
    (folder / "real" / "again").symlink_to(folder / "real", target_is_directory=True)
    (folder / "empty").mkdir()
    (folder / "empty" / "link").symlink_to(folder / "real", target_is_directory=True)
    assert found(folder) == found(folder / "empty") == {"sts13/similarity": ["test"], "x/ner": ["train"]}
    monkeypatch.chdir(folder / "real" / "2013")
    assert found(".") == {"sts13/similarity": ["test"]}


def test_known_files_that_cannot_be_read_are_said(fill):
    folder = fill({"x.conllu": "broken\n"})
    with pytest.raises(InputError, match=r"x.conllu, line 1: 1 columns"):
        discover(folder)


def test_real_data_are_found(data, tmp_path):
    for name in ("ud_english_ewt", "ewt_propbank", "semcor", "coarsewsd20", "sts", "ner"):
        (tmp_path / name).symlink_to(data / name)
    assert found(tmp_path) == {
        "CoarseWSD-20/senses": ["train", "test"],
        **{f"en_ewt-ud/{task}": ["train", "dev", "test"] for task in ("dep", "pos", "tree", "xpos")},
        **{f"ewt_propbank/{task}": ["train", "dev", "test"] for task in ("constituents", "srl")},
        "semcor/senses": ["train"],
        "sts/similarity": ["train", "dev", "test"],
        "sts12/similarity": ["train", "test"],
        **{f"sts{year}/similarity": ["test"] for year in (13, 14, 15, 16)},
        "wnut17/ner": ["train", "dev", "test"],
    }
    aside = {path.name for path in left_aside(tmp_path)}
    assert not {name for name in aside if not ("readme" in name.lower() or "license" in name.lower())}


def test_readers_load_no_jax():
    root = pathlib.Path(__file__).resolve().parents[3]
    code = (
        "import sys, ctx_jax.atlas.formats.discover; print([name for name in ('jax', 'flax') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
