import itertools
import json
import pickle
import random

import numpy as np
import pytest

from ctx_jax.errors import InputError
from ctx_jax.text.bpe import ByteLevelBPE
from ctx_jax.text.inputs import model_inputs
from ctx_jax.text.load import load_tokenizer

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BYTES = "abcdehlorw.,'ĠĊÃ©"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "o r", "Ġ w", "Ġw or", "Ġ Ġ"]
ALPHABET = "abchelo wordé力😀\u0301\u200b\x00\n\t\u00a0.,'!?[]½ﬁ  "


def write(folder, vocabulary, merges):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("".join(f"{line}\n" for line in ["#version: 0.2", *merges]))
    return folder


@pytest.fixture
def folder(tmp_path):
    merged = [pair.replace(" ", "") for pair in MERGES]
    return write(tmp_path / "toy", dict.fromkeys([*SPECIALS, *BYTES, *merged]), MERGES)


@pytest.fixture(scope="session")
def roberta(data):
    return load_tokenizer(data / "vocab" / "roberta_base")


def random_text(rng):
    text = "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(40)))
    return text + rng.choice(["", "", "<mask>", " <mask> a", "</s>b", "a <s>"])


def spelled(tokenizer, text):
    pieces = tokenizer.encode(text)
    joined = text if isinstance(text, str) else " ".join(text)
    spans = [joined[start:end] for start, end in pieces.offsets]
    return list(zip(tokenizer.tokens(pieces.ids), spans, pieces.words.tolist(), strict=True))


# What the original implementations gave.


def test_golden_roberta(reference, roberta):
    cases = json.loads((reference / "tokenizers" / "roberta_bpe_golden.json").read_text())["cases"]
    assert len(cases) == 53
    assert sum("pair" in case for case in cases) > 1
    for case in cases:
        pairs = [case["pair"]] if "pair" in case else None
        (row,) = model_inputs(roberta, [case["text"]], pairs, max_length=512)
        assert row.input_ids.tolist() == case["ids"], case["text"]
        assert roberta.tokens(row.input_ids) == case["tokens"]
        assert row.offsets.tolist() == case["offsets"]
        assert row.token_type_ids.tolist() == case["type_ids"]


def test_published_roberta(reference, roberta, tmp_path):
    published = json.loads((reference / "tokenizers" / "published_cases.json").read_text())
    for text, ids in published["roberta_real_vocab"]["cases"]:
        (row,) = model_inputs(roberta, [text], max_length=64)
        assert row.input_ids.tolist() == ids
    mini = published["roberta_mini_bpe"]
    tokenizer = load_tokenizer(write(tmp_path / "mini", mini["vocab"], mini["merges"][1:-1]))
    pieces = tokenizer.encode(mini["text"])
    assert tokenizer.tokens(pieces.ids) == mini["tokens"]
    assert [*pieces.ids, tokenizer.token_id("<unk>")] == mini["ids_with_unk"]


# Against an implementation of its own.


def test_merges_in_their_order(folder):
    """One word of letters at a time: the earliest merge that is possible, everywhere, until there is none."""
    tokenizer = load_tokenizer(folder)
    ranks = {tuple(pair.split()): rank for rank, pair in enumerate(MERGES)}
    rng = random.Random(0)
    for _ in range(300):
        word = "".join(rng.choice("helorw") for _ in range(rng.randint(1, 12)))
        pieces = ["Ġ", *word]
        while possible := [pair for pair in itertools.pairwise(pieces) if pair in ranks]:
            first = min(possible, key=ranks.get)
            merged, at = [], 0
            while at < len(pieces):
                size = 2 if tuple(pieces[at : at + 2]) == first else 1
                merged.append("".join(pieces[at : at + size]))
                at += size
            pieces = merged
        assert tokenizer.tokens(tokenizer.encode(f" {word}").ids) == pieces


# Offsets and words.


def test_offsets_and_words(folder):
    tokenizer = load_tokenizer(folder)
    assert spelled(tokenizer, "hello hello, wor") == [
        ("hello", "hello", 0),
        ("Ġhello", "hello", 1),
        (",", ",", 2),
        ("Ġwor", "wor", 3),
    ]
    assert spelled(tokenizer, "é") == [("Ã", "é", 0), ("©", "é", 0)]
    assert spelled(tokenizer, "") == spelled(tokenizer, [""]) == spelled(tokenizer, []) == []
    assert spelled(tokenizer, "a   b")[1] == ("ĠĠ", "", 1)
    assert spelled(tokenizer, "a  <mask> b")[1] == ("<mask>", "<mask>", 1)
    assert [token for token, *_ in spelled(tokenizer, "zz")] == ["<unk>", "<unk>"]


def test_list_of_words_is_the_joined_text(roberta, data):
    spaced = ByteLevelBPE(data / "vocab" / "roberta_base" / "vocab.json", add_prefix_space=True)
    rng = random.Random(1)
    for _ in range(300):
        words = ["".join(rng.choice("abeé力.'1") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 6))]
        if rng.random() < 0.3:
            words.insert(rng.randrange(len(words) + 1), "<mask>")
        for tokenizer in (roberta, spaced):
            given, joined = tokenizer.encode(words), tokenizer.encode(" ".join(words))
            assert given.ids.tolist() == joined.ids.tolist(), words
            assert given.offsets.tolist() == joined.offsets.tolist()
            assert set(given.words) == set(range(len(words)))
            begins = np.cumsum([0, *(len(word) + 1 for word in words)])
            assert (np.searchsorted(begins, given.offsets[:, 0], side="right") - 1 == given.words).all()


def test_batch_is_one_by_one(roberta):
    rng = random.Random(2)
    texts = [random_text(rng) if rng.random() < 0.5 else random_text(rng).split(" ") for _ in range(200)]
    for text, together in zip(texts, roberta.encode_batch(texts), strict=True):
        for alone, part in zip(roberta.encode(text), together, strict=True):
            np.testing.assert_array_equal(alone, part)
            assert part.dtype == np.int32
        assert (np.diff(together.words) >= 0).all()
        assert (together.offsets[:, 0] <= together.offsets[:, 1]).all()


def test_prefix_space(folder):
    plain, spaced = load_tokenizer(folder), ByteLevelBPE(folder / "vocab.json", add_prefix_space=True)
    assert spelled(plain, "hello")[0] == ("hello", "hello", 0)
    assert spelled(spaced, "hello")[0] == spelled(spaced, ["hello"])[0] == ("Ġhello", "hello", 0)
    assert spelled(spaced, " hello") == [("Ġhello", "hello", 0)]
    assert spelled(spaced, ".hello")[0] == ("Ġ", "", 0)
    assert spelled(plain, ["hello", "hello", "", "wor"])[1:] == [("Ġhello", "hello", 1), ("Ġwor", "wor", 3)]


def test_pairs_have_two_separators(folder):
    tokenizer = load_tokenizer(folder)
    (row,) = model_inputs(tokenizer, ["a"], ["b"], max_length=6)
    assert tokenizer.tokens(row.input_ids) == ["<s>", "a", "</s>", "</s>", "b", "</s>"]
    assert not row.token_type_ids.any()
    assert row.special.tolist() == [True, False, True, True, False, True]
    with pytest.raises(InputError, match="max_length: found 5, expected at least 6, 4 of them special tokens"):
        model_inputs(tokenizer, ["a"], ["b"], max_length=5)


def test_vocabulary_of_bpe(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.specials._asdict() == {"cls": 0, "pad": 1, "sep": 2, "unk": 3, "mask": 4}
    tokens = tokenizer.tokens(range(tokenizer.vocab_size))
    begins = [token for token, continues in zip(tokens, tokenizer.continues_word, strict=True) if not continues]
    assert begins == [*SPECIALS, "Ġ", "Ġhello", "Ġw", "Ġwor", "ĠĠ"]


@pytest.mark.parametrize("options", [{}, {"add_prefix_space": True}, {"mask_takes_space": False}])
def test_save_bpe(folder, tmp_path, options):
    tokenizer = ByteLevelBPE(folder / "vocab.json", **options)
    tokenizer.save(tmp_path / "saved")
    again, pickled = load_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))
    rng = random.Random(3)
    texts = [random_text(rng) for _ in range(100)] + [["a", "b <mask>"]]
    for pieces in zip(*(t.encode_batch(texts) for t in (tokenizer, again, pickled)), strict=True):
        for fields in zip(*pieces, strict=True):
            np.testing.assert_array_equal(fields[0], fields[1])
            np.testing.assert_array_equal(fields[0], fields[2])
    assert again.merges() == tokenizer.merges()


# Bad input.


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vocab.json", '{"a": 0, ', r"vocab.json: found no JSON \(.*\), expected a vocabulary \(vocab.json\)"),
        ("vocab.json", "[]", "vocab.json: found list, expected a vocabulary"),
        ("vocab.json", '{"a": 0, "b": 2}', "vocab.json, 'b': found 2, expected an id from 0 to 1"),
        ("vocab.json", '{"a": 0, "b": "1"}', "vocab.json, 'b': found '1', expected an id from 0 to 1"),
        ("vocab.json", '{"a": 0, "b": 0}', "vocab.json, 'b': found the id 0 again, first that of 'a'"),
        ("vocab.json", '{"a": 0}', "vocab.json: found no unk token, expected a piece <unk>"),
        ("merges.txt", "#version: 0.2\nh e\nl l o\n", "merges.txt, line 3: found 'l l o', expected two pieces and a"),
        ("merges.txt", "h e\n\nl l\n", "merges.txt, line 2: found '', expected two pieces and a"),
        ("merges.txt", "h e\nc d\n", r"merges.txt, line 2: found 'c d', but .*vocab.json has no piece 'cd'"),
        ("merges.txt", "h q\n", r"merges.txt, line 1: found 'h q', but .*vocab.json has no piece 'q'"),
    ],
)
def test_bad_files_of_bpe(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_missing_files_of_bpe(folder):
    (folder / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"toy: found vocab.json, expected one vocab.txt"):
        load_tokenizer(folder)
    with pytest.raises(InputError, match=r"merges.txt: cannot be read .*expected the merges of vocab.json"):
        load_tokenizer(folder / "vocab.json")
    vocabulary = {token: index for index, token in enumerate(["<unk>", "a"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("")
    with pytest.raises(InputError, match="found no pad token, expected a piece <pad>"):
        _ = load_tokenizer(folder).specials
