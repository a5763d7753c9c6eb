"""Raganato's XML: words and senses come back, what is wrong is said with its line, SemCor has its published counts."""

import collections
import random
from xml.sax.saxutils import escape, quoteattr

import pytest

from ctx_jax.atlas.formats import raganato
from ctx_jax.errors import InputError


def test_random_files_come_back(write):
    rng = random.Random(0)
    xml, gold, sentences, truth = (
        ['<?xml version="1.0" encoding="UTF-8" ?>\n<corpus lang="en">\n<text id="d0">'],
        [],
        [],
        [],
    )
    for number in range(200):
        words = []
        xml.append(f'<sentence id="s{number}">')
        for place in range(rng.randint(0, 8)):
            text = rng.choice(["bank", "took place", "R & D", "<", "„é“", "x" * 3000])
            lemma = rng.choice(["bank", "take_place", 'a"b'])
            if rng.random() < 0.5:
                xml.append(f'<wf lemma={quoteattr(lemma)} pos="X">{escape(text)}</wf>')
            else:
                name = f"d0.s{number}.t{place}"
                part = rng.choice("12345")
                keys = [f"k%{part}:0{n}:00::" for n in range(rng.randint(1, 3))]
                xml.append(f'<instance id="{name}" lemma={quoteattr(lemma)} pos="X">{escape(text)}</instance>')
                gold.append(f"{name} {' '.join(keys)}\n")
                span = [len(words), len(words) + len(text.split())]
                truth.append((len(sentences), span, f"{lemma}%{'3' if part == '5' else part}", tuple(keys), name))
            words += text.split()
        xml.append("</sentence>")
        if words:
            sentences.append(words)
    xml.append("</text></corpus>")
    rng.shuffle(gold)
    senses = raganato.senses(write("x.data.xml", "\n".join(xml)), write("x.gold.key.txt", "".join(gold)))
    assert senses.sentences == sentences
    places = zip(senses.sentence.tolist(), senses.span.tolist(), strict=True)
    rest = zip(senses.lemmas, senses.keys, senses.names, strict=True)
    assert [(*place, *about) for place, about in zip(places, rest, strict=True)] == truth


ONE = '<instance id="a" lemma="bank" pos="NOUN">bank</instance>'
KEY = "a bank%1:14:00::\n"


@pytest.mark.parametrize(
    ("line", "gold", "where", "message"),
    [
        (ONE, "", "xml", "line 3: instance 'a' has no keys in"),
        (f"{ONE}\n{ONE}", KEY, "xml", "line 4: instance 'a' a second time"),
        (ONE, f"{KEY}b bank%1:14:00::\n", "gold", "line 2: keys of 'b', not in"),
        (ONE, f"{KEY}\n{KEY}", "gold", "line 3: 'a' a second time, after line 1"),
        (ONE, "a\n", "gold", "line 1: key '' of 'a'"),
        (ONE, "a bank%1:14:00:: wn:123\n", "gold", "line 1: key 'wn:123' of 'a'"),
        (ONE, "a bank%6:14:00::\n", "gold", "line 1: key 'bank%6:14:00::'"),
        ("<wf>x", KEY, "xml", "line 4: mismatched tag"),
        ("a & b", KEY, "xml", "line 3: not well-formed"),
        ("text", KEY, "xml", "line 3: text 'text' outside words"),
        ("<sentence>", KEY, "xml", "line 3: <sentence> inside a <sentence>"),
        ("<wf>a <b/></wf>", KEY, "xml", "line 3: <b> inside a word"),
        ('</sentence><wf>x</wf><sentence id="2">', KEY, "xml", "line 3: <wf> outside a sentence"),
        ('<instance id="a">x</instance>', KEY, "xml", "line 3: <instance> with {'id': 'a'}"),
        ('<instance id="a" lemma="bank"> </instance>', KEY, "xml", "line 3: <instance> without text"),
    ],
)
def test_what_is_wrong_is_said(line, gold, where, message, write):
    xml = write("xml", f'<corpus>\n<sentence id="1">\n{line}\n</sentence>\n</corpus>\n')
    keys = write("gold", gold)
    with pytest.raises(InputError) as error:
        raganato.senses(xml, keys)
    assert str(error.value).startswith(f"{xml if where == 'xml' else keys}, {message}")


def test_a_file_that_is_cut_off_is_bad_input(write):
    path = write("xml", "<corpus>\n<sentence>\n<wf>a</wf>\n")
    with pytest.raises(InputError, match="xml, line 4: no element found; expected well-formed XML"):
        raganato.senses(path, write("gold", ""))


def test_semcor_has_its_published_counts(data):
    senses = raganato.senses(data / "semcor" / "semcor.data.xml.xz", data / "semcor" / "semcor.gold.key.txt.xz")
    assert (len(senses.sentences), len(senses.names)) == (37176, 226350)
    parts = collections.Counter(lemma.rpartition("%")[2] for lemma in senses.lemmas)
    assert parts == {"1": 87002, "2": 88334, "3": 32067, "4": 18947}
    words = [senses.sentences[s][b:e] for s, (b, e) in zip(senses.sentence[:4], senses.span[:4], strict=True)]
    assert words == [["Fulton", "County", "Grand", "Jury"], ["said"], ["Friday"], ["investigation"]]
    assert senses.lemmas[:4] == ["group%1", "say%2", "friday%1", "investigation%1"]
    assert senses.keys[0] == ("group%1:03:00::",)
