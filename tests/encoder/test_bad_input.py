"""Whatever comes, there is a vector or one clear error, and no neighbour is touched."""

import time

import jax
import numpy as np
import pytest

from ctx_jax import InputError, cli
from ctx_jax.encoder import BertEncoder, ElmoEncoder
from ctx_jax.interop.pretrained import Pretrained
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.interop.save import save
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.text.inputs import model_inputs
from ctx_jax.text.load import load_tokenizer

BERT = BertConfig(
    vocab_size=600, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_position_embeddings=32
)
ELMO = ElmoConfig(
    character_dim=4, filters=((1, 8), (2, 8)), num_highway=1, lstm_dim=12, projection_dim=8, num_layers=2, vocab_size=0
)
FIRST, LAST = "The river bank was flooded.", "A set is empty."
# Odd, and yet texts.
ODD = [
    "",
    [],
    " \t\n ",
    [""],
    ["", "word", ""],
    "\x00\x07",
    "\u200b\ufeff",
    "e\u0301" * 9,
    "🙂力",
    "[CLS] [SEP] <S> </S>",
]
BAD = [None, b"bytes", 3, 2.5, {"a": 1}, "lone \ud800 surrogate", ["word", "\udfff"], ["word", None], ["word", b"w"]]


@pytest.fixture(scope="module")
def tokenizer(topics_corpus):
    return load_tokenizer(topics_corpus / "tokenizer")


@pytest.fixture(scope="module", params=["bert", "elmo"])
def encoder(request, tokenizer):
    config, kind = (BERT, BertEncoder) if request.param == "bert" else (ELMO, ElmoEncoder)
    params = bound_model(config).init(jax.random.key(0))
    return kind(config, params, tokenizer if request.param == "bert" else None)


@pytest.fixture(scope="module")
def alone(encoder):
    return [encoder.encode(text, pool="mean")[0] for text in (FIRST, LAST)]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_an_odd_text_has_vectors_and_spoils_no_neighbour(encoder, alone, odd):
    found = encoder.encode([FIRST, odd, LAST], pool="mean")
    close(found[[0, 2]], alone)
    assert np.isfinite(found).all()
    streamed = list(encoder.encode_stream([FIRST, odd, LAST]))
    close(streamed, found)
    close(encoder.encode([odd], pool="mean"), found[1:2])
    tokens = encoder.encode([FIRST, odd, LAST])
    assert np.isfinite(tokens.layers).all()
    assert not tokens.layers[:, ~tokens.mask].any()


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_a_bad_text_is_named(encoder, alone, bad):
    for encode in (encoder.encode, lambda texts: encoder.encode(texts, pool="max")):
        with pytest.raises(InputError, match=r"^texts\[1\].*: found .*, expected"):
            encode([FIRST, bad, LAST])
    with pytest.raises(InputError, match=r"^texts\[1\]"):
        list(encoder.encode_stream([FIRST, bad, LAST]))
    close(encoder.encode([FIRST, LAST], pool="mean"), alone)  # the encoder is as it was


@pytest.mark.parametrize("texts", [None, b"bytes", 3], ids=repr)
def test_what_is_no_list_is_named(encoder, texts):
    for encode in (encoder.encode, lambda texts: next(encoder.encode_stream(texts))):
        with pytest.raises(InputError, match=r"^texts: found"):
            encode(texts)


def test_nothing_at_all(encoder):
    with pytest.raises(InputError, match="texts: found none, expected at least one"):
        encoder.encode([])
    assert list(encoder.encode_stream([])) == []
    with pytest.raises(InputError, match="texts: found 'A string', expected several"):
        next(encoder.encode_stream("A string"))


@pytest.mark.alone
def test_ten_megabytes_are_cut_in_seconds(tokenizer):
    encoder = BertEncoder(BERT, bound_model(BERT).init(jax.random.key(0)), tokenizer)
    options = {"pool": "mean", "on_too_long": "truncate"}
    alone = encoder.encode([FIRST, LAST], **options)
    start = time.perf_counter()
    found = encoder.encode([FIRST, "statement of the river " * 440_000, LAST], **options)
    assert time.perf_counter() - start < 5  # it takes less than one; to split it whole takes fifteen
    close(found[[0, 2]], alone)
    close(found[1:2], encoder.encode(["statement of the river " * 99], **options))
    with pytest.raises(InputError, match=r"texts\[0\]: found the lone surrogate"):
        encoder.encode(["statement of the river " * 9999 + "\ud800"], **options)


@pytest.fixture(params=["sentencepiece", "wordpiece"])
def splitter(request, tokenizer, tmp_path):
    if request.param == "sentencepiece":
        return tokenizer
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{x}" for x in letters),
        "state",
        "##ment",
        ",",
    ]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_cut_is_what_splitting_all_gives(splitter, seed):
    """Of words, runs of blanks, controls, texts without blanks; alone and in pairs, against the pieces of the whole."""
    rng = np.random.default_rng(seed)
    parts = [
        "statement",
        " ",
        "  ",
        "\n",
        "\t",
        "\u00a0",
        "力",
        "e\u0301",
        "[MASK]",
        "\x00",
        ", ",
        "naïve",
        "🙂",
        "x" * 150,
    ]
    weights = rng.dirichlet(np.full(len(parts), 0.3))
    texts = ["".join(rng.choice(parts, count, p=weights)) for count in (3, 400, 3000, 9000)]
    texts += [" " * 9000 + "behind blanks", "x" * 9000 + " y", "\n" * 9000]
    for row, text in zip(model_inputs(splitter, texts, max_length=16, on_too_long="truncate"), texts, strict=True):
        whole = splitter.encode(text)
        assert row.input_ids[1:-1].tolist() == whole.ids[:14].tolist()
        assert row.offsets[1:-1].tolist() == whole.offsets[:14].tolist()
        assert row.words[1:-1].tolist() == whole.words[:14].tolist()
    pairs = texts[::-1]
    for row, *pair in zip(
        model_inputs(splitter, texts, pairs, max_length=16, on_too_long="truncate"), texts, pairs, strict=True
    ):
        first, second = ([*splitter.encode(text).ids] for text in pair)
        while len(first) + len(second) > 13:
            (first if len(first) > len(second) else second).pop()
        assert row.input_ids[~row.special].tolist() == first + second


def test_the_command_names_the_file_and_writes_nothing(tokenizer, tmp_path, capsys):
    params = bound_model(BERT).init(jax.random.key(0))
    save(Pretrained(BERT, params, tokenizer), tmp_path / "model", "hugging-face", certificate=False)
    text, out = tmp_path / "texts.txt", tmp_path / "out"
    words = ["encode", str(tmp_path / "model"), "--file", str(text), "--pool", "mean", "--out", str(out)]
    text.write_bytes(b"A set is empty.\n\xff\xfe broken\n")
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert "texts.txt: 'utf-8' codec can't decode byte 0xff" in shown.err
    assert shown.err.count("ctx-jax: ") == 1
    assert not list(out.glob("*.npy"))
    text.write_text(f"{FIRST}\n\n{LAST}\n" + "word " * 99)
    assert cli.main(words) == 2
    assert "texts[3]: found" in capsys.readouterr().err
    assert cli.main([*words, "--on-too-long", "truncate"]) == 2  # the folder was begun to be an error
    assert "was begun with on_too_long 'error'" in capsys.readouterr().err
    text.write_text(f"{FIRST}\n\n{LAST}")
    assert cli.main(words) == 0
    found = np.load(out / "00000.npy")
    encoder = BertEncoder(BERT, params, tokenizer)
    close(found, [encoder.encode(line, pool="mean")[0] for line in (FIRST, "", LAST)])
    text.write_bytes(b"")
    assert cli.main([*words[:-2]]) == 2
    assert "found none, expected at least one" in capsys.readouterr().err
