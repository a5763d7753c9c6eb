import random

import pytest

from ctx_jax.errors import InputError
from ctx_jax.text.load import load_tokenizer
from ctx_jax.text.sentencepiece_training import train_sentencepiece


def sentences(count, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdefghijklmnop") for _ in range(rng.randint(2, 6))) for _ in range(200)]
    return [" ".join(rng.choice(words) for _ in range(10)) for _ in range(count)]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_train(tmp_path, capfd, model_type):
    texts = sentences(500)
    tokenizer = train_sentencepiece(iter(texts), 200, tmp_path / "a" / "b", model_type=model_type)
    assert capfd.readouterr() == ("", "")
    assert tokenizer.vocab_size == 200
    assert tokenizer.tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.specials == (0, 1, 2, 3, 4)
    assert 1 not in tokenizer.encode(texts[0]).ids
    loaded = load_tokenizer(tmp_path / "a" / "b")
    assert loaded.encode(texts[1]).ids.tolist() == tokenizer.encode(texts[1]).ids.tolist()


@pytest.mark.parametrize("options", [{}, {"model_type": "bpe"}, {"max_sentences": 101}])
def test_same_texts_same_bytes(tmp_path, options):
    models = []
    for name in ("a", "b"):
        train_sentencepiece(sentences(1000), 100, tmp_path / name, **options)
        models.append((tmp_path / name / "spiece.model").read_bytes())
    assert models[0] == models[1]
    train_sentencepiece(sentences(1000, seed=1), 100, tmp_path / "c", **options)
    assert (tmp_path / "c" / "spiece.model").read_bytes() != models[0]


def test_the_sample_is_drawn_from_everywhere(tmp_path):
    texts = ["aaaa bbbb"] * 300 + ["cccc dddd"] * 300
    tokenizer = train_sentencepiece(texts, 12, tmp_path, max_sentences=101, model_type="bpe")
    assert 1 not in tokenizer.encode("abcd").ids


def test_lowercase(tmp_path):
    texts = [text.replace("a", "A") for text in sentences(200)]
    folding = train_sentencepiece(texts, 60, tmp_path / "folding")
    assert folding.encode("ABBA").ids.tolist() == folding.encode("abba").ids.tolist()
    keeping = train_sentencepiece(texts, 60, tmp_path / "keeping", lowercase=False)
    assert keeping.encode("Abb").ids.tolist() != keeping.encode("abb").ids.tolist()


@pytest.mark.parametrize("space", [" ", ""])
def test_long_lines_are_cut_not_lost(tmp_path, space):
    """What stands only at the beginning, in the middle or at the end of one line is all learnt."""
    middle = " ".join(sentences(400)).replace(" ", space)
    line = f"z{middle}ж{middle}力"
    assert len(line.encode()) > 30_000
    tokenizer = train_sentencepiece([line], 40, tmp_path, character_coverage=1.0)
    assert 1 not in tokenizer.encode("z ж 力").ids


def test_no_piece_of_text_is_lost(tmp_path, monkeypatch):
    """What is given to SentencePiece, joined, is the text; and each part is short enough, with words whole."""
    given = []

    def train(sentence_iterator, **_):
        given.extend(sentence_iterator)
        raise RuntimeError("enough")

    monkeypatch.setattr("sentencepiece.SentencePieceTrainer.train", train)
    rng = random.Random(0)
    texts = ["".join(rng.choice("ab é力😀 ") for _ in range(rng.choice([5, 3000, 20_000]))) for _ in range(20)]
    texts += ["x" * 4192, "y" * 4193, "a\n\nb\r\nc", "", " ", "p\u2585q"]
    with pytest.raises(InputError, match="cannot train on these"):
        train_sentencepiece(texts, 100, tmp_path)
    assert max(len(sentence.encode()) for sentence in given) <= 4192
    lines = [line for text in texts for line in text.replace("\u2585", " ").splitlines()]
    assert "".join(given).replace(" ", "") == "".join(lines).replace(" ", "")
    assert given[-4:] == ["a", "b", "c", "p q"]
    words = {word for line in lines for word in line.split()}
    assert {word for sentence in given for word in sentence.split() if len(word) < 4000} <= words | {"y"}


def test_reserved_character(tmp_path):
    tokenizer = train_sentencepiece([f"{text} z\u2585z" for text in sentences(100)], 60, tmp_path)
    assert 1 not in tokenizer.encode("zz").ids


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (
            sentences(5),
            {"vocab_size": 5000},
            r"vocab_size: found 5000, expected at most \d+, which is what 5 sentences",
        ),
        (sentences(99), {"vocab_size": 10}, r"vocab_size: found 10, expected at least \d+, one for each character"),
        (sentences(9), {"vocab_size": 5}, "vocab_size: found 5, expected more than the 5 special pieces"),
        (sentences(9), {"model_type": "word"}, "model_type: found 'word', expected 'unigram' or 'bpe'"),
        (sentences(9), {"character_coverage": 0.5}, "character_coverage: found 0.5, expected 0.98 to 1"),
        (sentences(9), {"max_sentences": 100}, "max_sentences: found 100, expected more than 100"),
        ([], {}, "texts: found no text, expected at least one line"),
        (["", " \n\t"], {}, "texts: found no text, expected at least one line"),
        (["a", None], {}, r"texts\[1\]: found None, expected a string"),
        (["a", b"b"], {}, r"texts\[1\]: found bytes"),
        (["a", "\udc80"], {}, r"texts\[1\]: found the lone surrogate '\\udc80' at character 0"),
    ],
)
def test_bad_input(tmp_path, capfd, texts, options, message):
    with pytest.raises(InputError, match=message):
        train_sentencepiece(texts, **{"vocab_size": 100, "folder": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()
    assert capfd.readouterr() == ("", "")


def test_the_texts_own_exception_comes_through(tmp_path):
    def texts():
        yield "a b"
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        train_sentencepiece(texts(), 100, tmp_path)
