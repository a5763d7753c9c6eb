"""CoNLL-U: what is written is read, what is no tree is refused, and the treebank has its published counts."""

import numpy as np
import pytest

from ctx_jax.atlas.formats import conllu
from ctx_jax.errors import InputError


def row(number, word="w", head=0, upos="NOUN", xpos="NN", relation="root"):
    return "\t".join([str(number), word, "lemma", upos, xpos, "_", str(head), relation, "_", "_"])


def has_cycle(heads):
    """A head's head's … head is still a word after as many steps as there are words."""
    above = np.zeros((len(heads), len(heads)), int)
    for word, head in enumerate(heads):
        if head:
            above[word, head - 1] = 1
    return np.linalg.matrix_power(above, len(heads)).any()


def random_tree(rng, length):
    """Heads from 1, 0 at a root: words in a random order, each below one before it or a root."""
    order = rng.permutation(length) + 1
    heads = np.zeros(length, int)
    for place, word in enumerate(order[1:], 1):
        heads[word - 1] = 0 if rng.random() < 0.05 else order[rng.integers(place)]
    return heads


def written(rng, words, upos, xpos, heads, relations):
    """The lines of a sentence, among them some that are no words."""
    lines = ["# text = # 1\tno word"]
    for number, word in enumerate(words, 1):
        if rng.random() < 0.1:
            lines.append(row(f"{number}-{number + 1}", "zwei", "_", "_", "_", "_"))
        lines.append(row(number, word, heads[number - 1], upos[number - 1], xpos[number - 1], relations[number - 1]))
        if rng.random() < 0.1:
            lines.append(row(f"{number}.1", "leer", "_", "_", "_", "_"))
    return "\n".join(lines)


def test_random_treebanks_come_back(write):
    rng = np.random.default_rng(0)
    choose = lambda values, size: [str(value) for value in rng.choice(values, size)]
    truth = []
    for _ in range(60):
        size = int(rng.integers(1, 30))
        columns = (
            choose(["ab", "New York", "#", "“", "1-2", "-"], size),
            choose(["NOUN", "PUNCT", "_"], size),
            choose(["NN", ".", "_"], size),
            random_tree(rng, size),
            choose(["root", "nsubj:pass", "punct"], size),
        )
        truth.append(columns)
    blank = lambda: rng.choice(["\n\n", "\n\n\n", "\n \n"])
    path = write("x.conllu", "".join(written(rng, *columns) + blank() for columns in truth).rstrip())
    corpus = list(conllu.sentences(path))

    pos, xpos, relations, trees = (
        read(corpus) for read in (conllu.pos, conllu.xpos, conllu.dependencies, conllu.trees)
    )
    for examples in (pos, xpos, relations, trees):
        assert [list(words) for words in examples.sentences] == [columns[0] for columns in truth]
    for edges, column in ((pos, 1), (xpos, 2)):
        labelled = [
            (sentence, [word, word + 1], label)
            for sentence, columns in enumerate(truth)
            for word, label in enumerate(columns[column])
            if label != "_"
        ]
        assert list(zip(edges.sentence, edges.first.tolist(), edges.labels, strict=True)) == labelled
        assert edges.second is None
    at = 0
    for sentence, (_, upos, _, heads, labels) in enumerate(truth):
        assert (trees.heads[sentence] == heads - 1).all()
        assert (trees.scored[sentence] == [label != "PUNCT" for label in upos]).all()
        for word, head in enumerate(heads):
            second = word if head == 0 else head - 1
            edge = (relations.sentence[at], *relations.first[at], *relations.second[at], relations.labels[at])
            assert edge == (sentence, word, word + 1, second, second + 1, labels[word])
            at += 1
    assert at == len(relations.labels)


def test_cycles_are_found_where_they_are(write):
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(300):
        size = int(rng.integers(1, 7))
        heads = [int(rng.choice([head for head in range(size + 1) if head != word])) for word in range(1, size + 1)]
        path = write("x.conllu", "\n".join(row(number, head=head) for number, head in enumerate(heads, 1)))
        seen.add(cyclic := bool(has_cycle(heads)))
        if not cyclic:
            assert (next(conllu.sentences(path)).heads == np.array(heads) - 1).all()
            continue
        with pytest.raises(
            InputError, match=r"a cycle through the words .*; expected heads that lead to a root"
        ) as error:
            list(conllu.sentences(path))
        cycle = [int(word) for word in str(error.value).split("words ")[1].split(";")[0].split(", ")]
        assert [heads[word - 1] for word in cycle] == [*cycle[1:], cycle[0]]
        assert f"x.conllu, line {cycle[0]}:" in str(error.value)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2\tw", "line 4: 2 columns"),
        (row(3), "line 4: ID '3'; expected 2"),
        (row("x"), "line 4: ID 'x'"),
        (row("2-"), "line 4: ID '2-'"),
        (row(2, word=" "), "line 4: FORM ' '"),
        (row(2, head="_"), "line 4: HEAD '_'; expected 0 or the ID of a word, up to 2"),
        (row(2, head=3), "line 4: HEAD '3'"),
        (row(2, head=-1), "line 4: HEAD '-1'"),
        (row(2, head="1" * 5000), "line 4: HEAD '111"),
        (row(2, head=2), "line 4: HEAD 2 of itself"),
        (row(2).replace("\t", " "), "line 4: 1 columns"),
    ],
)
def test_what_is_wrong_is_said(line, message, write):
    path = write("x.conllu", f"# c\n\n{row(1)}\n{line}\n")
    with pytest.raises(InputError) as error:
        list(conllu.sentences(path))
    assert str(error.value).startswith(f"{path}, {message}")


def test_no_sentences(write):
    assert list(conllu.sentences(write("x.conllu", "# nothing\n\n"))) == []
    assert conllu.pos([]).first.shape == conllu.dependencies([]).second.shape == (0, 2)


@pytest.mark.parametrize(
    ("split", "sentences", "words"), [("train", 12544, 204577), ("dev", 2001, 25147), ("test", 2077, 25094)]
)
def test_english_web_treebank_has_its_published_counts(split, sentences, words, data):
    corpus = list(conllu.sentences(data / "ud_english_ewt" / f"en_ewt-ud-{split}.conllu.xz"))
    assert (len(corpus), sum(len(sentence.words) for sentence in corpus)) == (sentences, words)
    relations = conllu.dependencies(corpus)
    assert len(relations.labels) == len(conllu.pos(corpus).labels) == words
    # UD's guidelines: the one root of a sentence, and nothing else, has the relation `root`.
    roots = (relations.first == relations.second).all(1)
    assert roots.sum() == sentences
    assert (roots == [label == "root" for label in relations.labels]).all()
