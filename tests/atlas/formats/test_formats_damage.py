"""Whatever is done to a file, a reader reads it or says what is wrong: no other error, no span outside its sentence."""

import random

import pytest

from ctx_jax.atlas.formats import coarse_wsd, columns, conllu, raganato, spans, sts, wic
from ctx_jax.errors import InputError

FILES = {
    "x.conllu": (
        "# c\n1-2\taab\t_\t_\t_\t_\t_\t_\t_\t_\n"
        "1\ta\ta\tNOUN\tNN\t_\t2\tdet\t_\t_\n2\tb\tb\tPUNCT\t.\t_\t0\troot\t_\t_\n\n"
        "1\ta\ta\tNOUN\tNN\t_\t0\troot\t_\t_\n"
    ),
    "ner": "-DOCSTART- O\n\na B-X\nb I-X\n\nc O\n",
    "parsed": (
        "1\tHe\tP\tP\t(TOP(S(NP*)\t-\t-\t(A0*)\n2\truns\tV\tV\t(VP*)))\trun\trun.01\t(V*)\n\n1\tx\tX\tX\t(TOP*)\t-\t-\n"
    ),
    "spans": (
        '{"text": "a b", "targets": [{"span1": [0, 1], "span2": [1, 2], "label": "X"}]}\n'
        '{"tokens": ["a"], "targets": []}\n'
    ),
    "xml": (
        '<?xml version="1.0"?>\n<corpus><sentence><instance id="i" lemma="a">a b</instance>\n'
        "<wf>c</wf></sentence></corpus>\n"
    ),
    "keys": "i a%1:00:00:: a%1:00:01::\n",
    "word/classes_map.txt": '{"0": "a_a", "1": "a_b"}\n',
    "word/train.data.txt": "1\tthe a is\n0\ta is\n",
    "word/train.gold.txt": "0\n1\n",
    "wic.data": "a\tN\t0-1\ta b\tb a\nb\tV\t0-0\tb\tb\n",
    "wic.gold": "T\nF\n",
    "sts.csv": 'g\tf\t2015\t1\t1.0\t"a\tb\ng\tf\t2015\t1\t5\ta\tb\ts\tt\n',
    "x.test.tsv": "1.0\ta\tb\n\tc\td\n",
}
PIECES = [*'\t\n -90\0"{](*)<&%', "", "é\u2028", "\udcff"]


def everything(corpus):
    return conllu.pos(corpus), conllu.xpos(corpus), conllu.dependencies(corpus), conllu.trees(corpus)


def roles(corpus):
    return columns.constituents(corpus), columns.semantic_roles(corpus)


READERS = {
    ("x.conllu",): lambda at: everything(list(conllu.sentences(at("x.conllu")))),
    ("ner",): lambda at: [columns.named_entities(at("ner"))],
    ("parsed",): lambda at: roles(list(columns.parsed(at("parsed")))),
    ("spans",): lambda at: [spans.edges(at("spans"))],
    ("xml", "keys"): lambda at: [raganato.senses(at("xml"), at("keys"))],
    tuple(f"word/{name}" for name in coarse_wsd.names_of("train")): lambda at: [
        coarse_wsd.senses([at("word")], "train")
    ],
    ("wic.data", "wic.gold"): lambda at: [wic.word_pairs(at("wic.data"), at("wic.gold"))],
    ("sts.csv",): lambda at: [sts.benchmark(at("sts.csv"))],
    ("x.test.tsv",): lambda at: [sts.semeval([at("x.test.tsv")])],
}


def damaged(rng, content):
    """Some bytes put in, taken out, doubled, or changed for what means something in one of the formats."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        begin = rng.randrange(len(content) + 1)
        end = min(len(content), begin + rng.choice([0, 0, 1, 2, 9]))
        piece = rng.choice(PIECES).encode(errors="surrogateescape")
        content[begin:end] = rng.choice([piece, bytes(content[begin:end]) * 2])
    return bytes(content)


@pytest.mark.parametrize("names", READERS, ids=lambda names: names[0])
def test_damaged_files_are_read_or_refused(names, write, tmp_path):
    rng = random.Random(0)
    read, refused = 0, []
    for name in names:
        write(name, FILES[name])
    for _ in range(150):
        name = rng.choice(names)
        write(name, damaged(rng, FILES[name].encode()))
        try:
            records = READERS[names](lambda name: tmp_path / name)
        except InputError as error:
            refused.append(str(error))
        else:
            read += 1
            for record in records:
                check(record)
        write(name, FILES[name])
    assert read > 3
    assert len(refused) > 3
    # One line that names the file.
    assert all(message.startswith(str(tmp_path)) and "; expected " in message for message in refused)
    assert not any("\n" in message for message in refused)


def check(record):
    fields = record._asdict()
    words = fields.get("sentences")
    assert words is None or all(words)
    for name, owners in (("first", "sentence"), ("second", "sentence"), ("span", "sentence"), ("spans", None)):
        places = fields.get(name)
        if places is None or words is None:
            continue
        owners = range(len(words)) if owners is None else fields[owners]
        for sentence, (begin, end) in zip(owners, places, strict=True):
            assert 0 <= begin < end <= len(words[sentence])
