import itertools
import random

import numpy as np
import pytest

from ctx_jax.errors import InputError
from ctx_jax.text.inputs import model_ids, model_inputs
from ctx_jax.text.wordpiece import WordPiece

CLS, SEP = 2, 3


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + "".join(f"w{i}\n" for i in range(100)) + "##x\n")
    return WordPiece(path)


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def ids(*numbers):
    return [n + 5 for n in numbers]


def test_one_text(tokenizer):
    (row,) = model_inputs(tokenizer, ["w1 w2x"], max_length=5)
    assert row.input_ids.tolist() == [CLS, *ids(1, 2), 105, SEP]
    assert row.token_type_ids.tolist() == [0] * 5
    assert row.special.tolist() == [True, False, False, False, True]
    assert row.offsets.tolist() == [[0, 0], [0, 2], [3, 5], [5, 6], [0, 0]]
    assert row.words.tolist() == [-1, 0, 1, 1, -1]
    assert (row.text, row.start) == (0, 0)
    integers = (row.input_ids, row.token_type_ids, row.offsets, row.words)
    assert {field.dtype for field in integers} == {np.dtype(np.int32)}


def test_pair(tokenizer):
    (row,) = model_inputs(tokenizer, ["w1 w2"], [["w3", "w4x"]], max_length=16)
    assert row.input_ids.tolist() == [CLS, *ids(1, 2), SEP, *ids(3, 4), 105, SEP]
    assert row.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert row.words.tolist() == [-1, 0, 1, -1, 0, 1, 1, -1]
    assert row.offsets[4].tolist() == [0, 2]
    assert row.special.tolist() == (row.words == -1).tolist()


def test_special_tokens_of_the_text_are_not_special(tokenizer):
    (row,) = model_inputs(tokenizer, ["w1 [SEP] [MASK]"], max_length=5)
    assert row.input_ids.tolist() == [CLS, *ids(1), SEP, 4, SEP]
    assert row.special.tolist() == [True, False, False, False, True]


def test_empty(tokenizer):
    assert model_inputs(tokenizer, [], max_length=3) == []
    (row,) = model_inputs(tokenizer, [""], max_length=3)
    assert row.input_ids.tolist() == [CLS, SEP]
    (row,) = model_inputs(tokenizer, [""], ["w1"], max_length=5)
    assert row.token_type_ids.tolist() == [0, 0, 1, 1]


def test_too_long_is_an_error(tokenizer):
    texts = [words(1, 2), words(*range(9))]
    with pytest.raises(InputError) as caught:
        model_inputs(tokenizer, texts, max_length=10)
    assert str(caught.value) == (
        "texts[1]: found 9 pieces, 11 tokens with the special ones, expected at most max_length = 10; "
        "on_too_long='truncate' cuts the end off, 'split' gives several rows"
    )
    assert len(model_inputs(tokenizer, texts, max_length=11)) == 2


def test_truncate(tokenizer):
    rows = model_inputs(tokenizer, [words(1, 2), words(*range(9))], max_length=6, on_too_long="truncate")
    assert [row.input_ids.tolist() for row in rows] == [[CLS, *ids(1, 2), SEP], [CLS, *ids(0, 1, 2, 3), SEP]]
    assert [(row.text, row.start) for row in rows] == [(0, 0), (1, 0)]


@pytest.mark.parametrize("on_too_long", ["error", "truncate"])
def test_ids_alone_are_those_of_the_inputs(tokenizer, on_too_long):
    rng = random.Random(7)
    longest = 60 if on_too_long == "error" else 3000
    texts: list = [words(*(rng.randrange(120) for _ in range(rng.randrange(longest)))) for _ in range(40)]
    texts += ["", [], ["w1", "", "w2x w3"], "[SEP] w1[MASK]x", "x" * 5000, ["w7"] * (longest // 2)]
    given = {"max_length": 64, "on_too_long": on_too_long}
    found, expected = model_ids(tokenizer, texts, **given), model_inputs(tokenizer, texts, **given)
    assert len(found) == len(expected)
    for ids, row in zip(found, expected, strict=True):
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, row.input_ids)
    assert model_ids(tokenizer, [], max_length=64) == []


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["w1", words(*range(9))], {}, r"texts\[1\]: found 9 pieces, 11 tokens with .* max_length = 8"),
        (["w1", None], {}, r"texts\[1\]: found None, expected a string or a list of words"),
        ("w1", {}, "texts: found str 'w1', expected a list of texts"),
        (["w1"], {"max_length": 1}, "max_length: found 1, expected at least 2, 2 of them special tokens"),
        (["w1"], {"on_too_long": "split"}, "on_too_long: found 'split', expected 'error' or 'truncate'"),
    ],
)
def test_ids_alone_of_what_cannot_be(tokenizer, texts, options, message):
    with pytest.raises(InputError, match=message):
        model_ids(tokenizer, texts, **{"max_length": 8, **options})


def test_truncate_pairs_longest_first(tokenizer):
    for a, b, room in itertools.product(range(9), range(9), range(2, 12)):
        (row,) = model_inputs(
            tokenizer, [words(*range(a))], [words(*range(50, 50 + b))], max_length=room + 3, on_too_long="truncate"
        )
        # Google's loop, step by step.
        first, second = list(range(a)), list(range(50, 50 + b))
        while len(first) + len(second) > room:
            (first if len(first) > len(second) else second).pop()
        assert row.input_ids.tolist() == [CLS, *ids(*first), SEP, *ids(*second), SEP], (a, b, room)


@pytest.mark.parametrize("with_pair", [False, True])
def test_split_covers_every_piece(tokenizer, with_pair):
    """Each window but the last is full, repeats `stride` pieces of the one before, and together they are the text."""
    rng = random.Random(0)
    several = 0
    for _ in range(300):
        numbers = [rng.randrange(100) for _ in range(rng.randrange(30))]
        first = [7, 8] if with_pair else []
        fixed = 3 + len(first) if with_pair else 2
        room = rng.randint(1, 8)
        stride = rng.randrange(room)
        texts = [words(*first)] if with_pair else [words(*numbers)]
        pairs = [words(*numbers)] if with_pair else None
        # A text before it, so that the index of the text is not always 0.
        rows = model_inputs(
            tokenizer,
            ["w99", *texts],
            ["w98", *pairs] if with_pair else None,
            max_length=max(fixed + room, 5),
            on_too_long="split",
            stride=stride,
        )[1:]
        room = max(fixed + room, 5) - fixed
        covered = 0
        for row in rows:
            assert row.text == 1
            content = row.input_ids[~row.special].tolist()
            assert content[: len(first)] == ids(*first)
            content = content[len(first) :]
            assert content == ids(*numbers[row.start : row.start + len(content)])
            assert row.start == (covered - stride if row is not rows[0] else 0)
            assert len(content) == room or row is rows[-1]
            assert row.start + len(content) > covered or not numbers
            offsets = row.offsets[~row.special][len(first) :].tolist()
            whole = words(*numbers)
            assert [whole[a:b] for a, b in offsets] == [f"w{n - 5}" for n in content]
            covered = row.start + len(content)
        assert covered == len(numbers)
        several += len(rows) > 2
    assert several > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 2}, "max_length: found 2, expected at least 3, 2 of them special"),
        ({"max_length": 4, "pairs": ["w1"]}, "max_length: found 4, expected at least 5, 3 of them special"),
        ({"max_length": 9, "on_too_long": "cut"}, "on_too_long: found 'cut', expected 'error', 'truncate' or 'split'"),
        ({"max_length": 9, "stride": 1}, "stride: found 1, expected 0 unless on_too_long='split'"),
        ({"max_length": 9, "stride": -1, "on_too_long": "split"}, "stride: found -1, expected 0 to 6"),
        ({"max_length": 9, "stride": 7, "on_too_long": "split"}, "stride: found 7, expected 0 to 6"),
        ({"max_length": 9, "pairs": ["w1", "w2"]}, "pairs: found 2, expected one for each of the 1 texts"),
        ({"max_length": 9, "pairs": [None]}, r"second texts\[0\]: found None"),
        (
            {"max_length": 9, "pairs": [words(*range(20))], "on_too_long": "split", "stride": 3},
            r"texts\[0\]: found 3 pieces, expected less than 3, since max_length = 9 and stride = 3",
        ),
    ],
)
def test_bad_arguments(tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        model_inputs(tokenizer, ["w1 w2 w3"], **options)
