"""Columns: entities by the shared tasks' rule, constituents and arguments as they were written."""

import collections
import itertools
import lzma
import random
import re

import numpy as np
import pytest

from ctx_jax.atlas.formats import columns
from ctx_jax.errors import InputError


def triples(edges):
    """(sentence, begin, end, label) of each edge."""
    return [
        (int(s), int(b), int(e), label)
        for s, (b, e), label in zip(edges.sentence, edges.first, edges.labels, strict=True)
    ]


def conlleval(tags):
    """Chunks of a sentence by startOfChunk and endOfChunk of conlleval.pl, word by word."""
    split = lambda tag: ("O", "") if tag == "O" else tuple(tag.split("-", 1))
    chunks, begin = [], None
    for place in range(len(tags) + 1):
        letter, kind = split(tags[place]) if place < len(tags) else ("O", "")
        before, before_kind = split(tags[place - 1]) if place else ("O", "")
        ends = before != "O" and (letter in "BO" or kind != before_kind)
        starts = letter == "B" or (letter == "I" and (before == "O" or kind != before_kind))
        if ends:
            chunks.append((begin, place, before_kind))
        if starts:
            begin = place
    return chunks


def entities(write, sentences, tab="\t"):
    text = "\n\n".join("\n".join(f"w{tab}{tag}" for tag in tags) for tags in sentences)
    return triples(columns.named_entities(write("x.conll", text)))


def test_cases_of_both_schemes(write):
    cases = {
        # Examples of Tjong Kim Sang and Veenstra 1999, section 2: in IOB1 a B only where entities of one type meet.
        "I-PER O I-LOC I-LOC": [(0, 1, "PER"), (2, 4, "LOC")],
        "I-PER B-PER I-PER": [(0, 1, "PER"), (1, 3, "PER")],
        "B-PER I-PER O B-LOC": [(0, 2, "PER"), (3, 4, "LOC")],
        "B-PER I-LOC I-LOC": [(0, 1, "PER"), (1, 3, "LOC")],
        "I-A-B I-A": [(0, 1, "A-B"), (1, 2, "A")],
        "O": [],
    }
    found = entities(write, [tags.split() for tags in cases])
    assert found == [(s, *entity) for s, expected in enumerate(cases.values()) for entity in expected]


def test_any_tags_are_read_as_by_conlleval(write):
    rng = random.Random(0)
    sentences = [rng.choices(["O", "B-X", "I-X", "B-Y", "I-Y"], k=rng.randint(1, 12)) for _ in range(300)]
    expected = [(s, *chunk) for s, tags in enumerate(sentences) for chunk in conlleval(tags)]
    assert entities(write, sentences) == entities(write, sentences, tab=" X ") == expected


def test_documents_of_conll2003(write):
    document = "-DOCSTART- -X- -X- O\n\n"
    text = f"{document}EU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\n{document}U.N. NNP I-NP I-ORG \n"
    edges = columns.named_entities(write("eng.train", text))
    assert edges.sentences == [["EU", "rejects"], ["U.N."]]
    assert triples(edges) == [(0, 0, 1, "ORG"), (1, 0, 1, "ORG")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tO\nb\tX\n", "line 2: tag 'X'; expected O, B-… or I-…"),
        ("a\tO\nb\tB-\n", "line 2: tag 'B-'"),
        ("a\tO\n\nb\tNN\tO\n", "line 3: 3 columns"),
        ("a\tO\n\tO\n", "line 2: 2 columns in '\\tO'"),
        ("a\nb\n", "line 1: 1 columns"),
    ],
)
def test_wrong_entities_are_said(text, message, write):
    path = write("x.conll", text)
    with pytest.raises(InputError) as error:
        columns.named_entities(path)
    assert str(error.value).startswith(f"{path}, {message}")


def random_constituents(rng, begin, end, depth=0):
    """Constituents over some words, outer before inner: (begin, end, label as it is written)."""
    found = []
    if depth and rng.random() < 0.7:
        found = [(begin, end, rng.choice(["NP", "NP-SBJ", "VP", "S=2", "ADVP|PRT", "X-1-2"]))]
        if rng.random() < 0.3:
            return found + random_constituents(rng, begin, end, depth + 1)
    if end - begin > 1:
        cut = rng.randint(begin + 1, end - 1)
        found += random_constituents(rng, begin, cut, depth + 1) + random_constituents(rng, cut, end, depth + 1)
    return found


def test_random_sentences_come_back(write):
    rng = random.Random(0)
    blocks, trees, roles = [], [], []
    for sentence in range(80):
        size = rng.randint(1, 15)
        constituents = random_constituents(rng, 0, size)
        pieces = [""] * size
        for begin, _, label in [(0, size, "TOP"), *constituents]:
            pieces[begin] += f"({label}"
        closing = [")" * sum(end == word + 1 for _, end, _ in [(0, size, ""), *constituents]) for word in range(size)]
        trees += [(sentence, begin, end, re.split(r"[-=|]", label)[0]) for begin, end, label in constituents]

        owners = sorted(rng.sample(range(size), rng.randint(0, min(3, size))))
        arguments = []
        for owner in owners:
            # Cut the sentence into runs; the one of the predicate is V, of the others some are arguments.
            cuts = sorted({0, size, owner, *rng.choices(range(size), k=4)})
            column, has_v = ["*"] * size, rng.random() < 0.8
            predicate, found = (owner, owner + 1), []
            for begin, end in itertools.pairwise(cuts):
                own = begin == owner
                if (own and not has_v) or (not own and rng.random() < 0.3):
                    continue
                role = "V" if own else rng.choice(["ARG0", "C-V", "R-ARG1", "ARGM-TMP"])
                column[begin] = f"({role}*"
                column[end - 1] += ")"
                predicate = (begin, end) if own else predicate
                found += [] if own else [(begin, end, role)]
            roles += [(sentence, *predicate, *argument) for argument in found]
            arguments.append(column)
        lines = [f"# sent_id = {sentence}", "# text = not\twords"]
        for word in range(size):
            roleset = "run.01" if word in owners else "-"
            piece = f"{pieces[word]}*{closing[word]}"
            row = [str(word + 1), f"w{word}", "NN", "NN", piece, "-", roleset, *(column[word] for column in arguments)]
            lines.append("\t".join(row))
        blocks.append("\n".join(lines))
    path = write("x.conll", "\n\n".join(blocks) + "\n")
    assert columns.is_parsed(path)
    corpus = list(columns.parsed(path))
    assert triples(columns.constituents(corpus)) == trees
    edges = columns.semantic_roles(corpus)
    assert [
        (int(s), *map(int, first), *map(int, second), label)
        for s, first, second, label in zip(edges.sentence, edges.first, edges.second, edges.labels, strict=True)
    ] == roles


GOOD = [
    ["1", "He", "PRP", "PRP", "(TOP(S(NP*)", "-", "-", "(ARG0*)"],
    ["2", "runs", "VBZ", "VBZ", "(VP*)))", "run", "run.01", "(V*)"],
]


@pytest.mark.parametrize(
    ("word", "column", "piece", "message"),
    [
        (1, 0, "3", "line 3: word 'runs' with number '3'; expected a word, 2"),
        (1, 1, " ", "line 3: word ' '"),
        (0, 4, "(TOP(S(NP", "line 2: piece of a tree '(TOP(S(NP'"),
        (1, 4, "(VP*))))", "line 3: piece of a tree '(VP*))))'"),
        (1, 4, "(VP*))", "line 2: constituent TOP is not closed"),
        (0, 6, "be.01", "line 2: 8 columns; expected 9"),
        (1, 6, "-", "line 2: 8 columns; expected 7"),
        (0, 7, "*)", "line 2: argument '*)'"),
        (0, 7, "ARG0", "line 2: argument 'ARG0'"),
        (0, 7, "(ARG0*", "line 3: argument '(V*)'"),
        (1, 7, "(V*", "line 3: argument V is not closed"),
    ],
)
def test_wrong_trees_are_said(word, column, piece, message, write):
    rows = [[*row] for row in GOOD]
    rows[word][column] = piece
    path = write("x.conll", "# c\n" + "\n".join("\t".join(row) for row in rows))
    with pytest.raises(InputError) as error:
        list(columns.parsed(path))
    assert str(error.value).startswith(f"{path}, {message}")


def test_a_line_that_is_too_short_is_said(write):
    path = write("x.conll", "1\tHe\n")
    assert not columns.is_parsed(path)
    with pytest.raises(InputError, match="line 1: 2 columns; expected 7"):
        list(columns.parsed(path))


def test_nothing_is_read_as_nothing(write):
    path = write("x.conll", "\n")
    assert not columns.is_parsed(path)
    assert list(columns.parsed(path)) == []
    edges = columns.semantic_roles([])
    assert edges.first.shape == edges.second.shape == columns.named_entities(path).first.shape == (0, 2)


@pytest.mark.parametrize(
    ("file", "sentences"),
    [("wnut17train.conll.xz", 3394), ("emerging.dev.conll.xz", 1009), ("emerging.test.annotated.xz", 1287)],
)
def test_wnut17_has_its_published_counts(file, sentences, data):
    path = data / "ner" / "wnut17" / file
    edges = columns.named_entities(path)
    assert len(edges.sentences) == sentences
    # The files are IOB2: an entity is a B.
    with lzma.open(path, "rt", encoding="utf-8") as file:
        begins = re.findall(r"\tB-(.*)", file.read())
    assert collections.Counter(edges.labels) == collections.Counter(begins)


@pytest.mark.parametrize(("split", "sentences"), [("train", 12512), ("dev", 1966), ("test", 2057)])
def test_ewt_propbank_has_its_published_counts(split, sentences, data):
    path = data / "ewt_propbank" / f"ewt_propbank.{split}.conll.xz"
    corpus = list(columns.parsed(path))
    assert len(corpus) == sentences
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file if line.strip() and not line.startswith("#")]
    constituents = collections.Counter(label for row in rows for label in re.findall(r"\(([A-Z]+)", row[4]))
    assert constituents.pop("TOP") == sentences
    assert collections.Counter(columns.constituents(corpus).labels) == constituents
    roles = collections.Counter(role for row in rows for piece in row[7:] for role in re.findall(r"\(([^*]+)", piece))
    assert roles.pop("V") == sum(len(sentence.frames) for sentence in corpus)
    edges = columns.semantic_roles(corpus)
    assert collections.Counter(edges.labels) == roles
    assert np.diff(edges.first).min() > 0
    assert np.diff(edges.second).min() > 0
