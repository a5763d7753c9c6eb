"""WiC: pairs come back, and what is wrong is said with its line."""

import random

import pytest

from ctx_jax.atlas.formats import wic
from ctx_jax.errors import InputError


def test_random_files_come_back(write):
    rng = random.Random(0)
    data, gold, sentences, spans, same = [], [], [], [], []
    for _ in range(100):
        pair = [rng.choices(["a", "'s", "bed", "é"], k=rng.randint(1, 9)) for _ in range(2)]
        places = [rng.randrange(len(words)) for words in pair]
        same.append(rng.random() < 0.5)
        data.append("\t".join(["bed", "N", "-".join(map(str, places)), *map(" ".join, pair)]))
        gold.append("T" if same[-1] else "F")
        sentences += pair
        spans += [[place, place + 1] for place in places]
    pairs = wic.word_pairs(write("data", "\n".join(data)), write("gold", "\n".join(gold) + "\n"))
    assert (pairs.sentences, pairs.spans.tolist(), pairs.same.tolist()) == (sentences, spans, same)


GOOD = "bed\tN\t0-1\tbed a\ta bed"


@pytest.mark.parametrize(
    ("line", "answer", "where", "message"),
    [
        ("bed\tN\t0-1\tbed a", "T", "data", "line 2: 4 columns"),
        ("bed\tN\t0-2\tbed a\ta bed", "T", "data", "line 2: places '0-2'; expected two, I-J, in sentences of 2 and 2"),
        ("bed\tN\t0\tbed a\ta bed", "T", "data", "line 2: places '0'"),
        ("bed\tN\t0-1-1\tbed a\ta bed", "T", "data", "line 2: places '0-1-1'"),
        ("bed\tN\t0--1\tbed a\ta bed", "T", "data", "line 2: places '0--1'"),
        (GOOD, "True", "gold", "line 2: 'True'; expected T or F"),
        (GOOD, "", "data", "line 2: {gold} ends before"),
        (GOOD, "T\nF", "gold", "line 3: {data} ends before"),
    ],
)
def test_what_is_wrong_is_said(line, answer, where, message, write):
    paths = {"data": write("data", f"{GOOD}\n{line}\n"), "gold": write("gold", f"T\n{answer}\n")}
    with pytest.raises(InputError) as error:
        wic.word_pairs(**paths)
    assert str(error.value).startswith(f"{paths[where]}, {message.format(**paths)}")
