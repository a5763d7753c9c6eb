import json

import pytest

from ctx_jax.errors import InputError
from ctx_jax.text.load import load_tokenizer
from ctx_jax.text.sentencepiece import SentencePiece
from ctx_jax.text.wordpiece import WordPiece


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nA\n")
    return tmp_path


def configure(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_folder_and_file(folder):
    for path in (folder, str(folder), folder / "vocab.txt"):
        tokenizer = load_tokenizer(path)
        assert isinstance(tokenizer, WordPiece)
        assert tokenizer.lowercase is False  # the vocabulary has capitals and nothing says otherwise


def test_config_is_honoured(folder):
    configure(
        folder,
        do_lower_case=True,
        strip_accents=False,
        tokenize_chinese_chars=False,
        max_input_chars_per_word=7,
        unk_token={"content": "[UNK]", "lstrip": False},
        mask_token="[MASK]",
        added_tokens_decoder={"0": {"content": "[PAD]", "special": True}},
        model_max_length=512,
    )
    tokenizer = load_tokenizer(folder)
    options = (tokenizer.lowercase, tokenizer.strip_accents, tokenizer.split_cjk, tokenizer.max_word_length)
    assert options == (True, False, False, 7)
    assert tokenizer.encode("A").ids.tolist() == [5]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_lower_case": "yes"}, "tokenizer_config.json, do_lower_case: found 'yes', expected true, false or null"),
        ({"max_input_chars_per_word": 1.5}, "max_input_chars_per_word: found 1.5, expected a whole number"),
        ({"unk_token": "<unk>"}, r"tokenizer_config.json, unk_token: found '<unk>', expected '\[UNK\]'"),
        (
            {"added_tokens_decoder": {"4": {"content": "[MASK]"}, "7": {"content": "[ENTITY]"}}},
            r"added_tokens_decoder: found '\[ENTITY\]' as 7, expected tokens of vocab.txt alone",
        ),
        ({"added_tokens_decoder": {"3": "[MASK]"}}, r"added_tokens_decoder: found '\[MASK\]' as 3"),
        ({"added_tokens_decoder": ["[MASK]"]}, r"added_tokens_decoder: found \['\[MASK\]'\], expected an object"),
        ({"mask_token": {"content": "<mask>"}}, r"mask_token: found '<mask>', expected '\[MASK\]'"),
    ],
)
def test_config_that_cannot_be_followed(folder, config, message):
    configure(folder, **config)
    with pytest.raises(InputError, match=message):
        load_tokenizer(folder)


def test_broken_config(folder):
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config.json: found no JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"tokenizer_config.json: found list, expected a JSON object"):
        load_tokenizer(folder)


def test_nothing_to_load(tmp_path):
    with pytest.raises(InputError, match=r"found nothing, expected one vocab.txt \(WordPiece\), a .model file"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(InputError, match=r"found merges.txt, expected one vocab.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"merges.txt: found a file of this name, expected vocab.txt"):
        load_tokenizer(tmp_path / "merges.txt")
    with pytest.raises(InputError, match=r"tokenizer.json: found no file of this name, expected vocab.txt"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"nowhere: found no file of this name, expected vocab.txt"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"nowhere.model: cannot be read \(No such file or directory\)"):
        load_tokenizer(tmp_path / "nowhere.model")


def test_more_than_one(folder):
    (folder / "a.model").write_text("")
    with pytest.raises(InputError, match=r"found vocab.txt, a.model, expected one vocab.txt"):
        load_tokenizer(folder)
    (folder / "vocab.txt").unlink()
    (folder / "b.model").write_text("")
    with pytest.raises(InputError, match=r"found a.model, b.model, expected one"):
        load_tokenizer(folder)


def test_sentencepiece(tmp_path, data):
    albert = load_tokenizer(data / "vocab" / "albert_base_v2")
    assert isinstance(albert, SentencePiece)
    assert (albert.lowercase, albert.strip_accents) == (True, True)
    xlnet = load_tokenizer(data / "vocab" / "xlnet_base_cased" / "spiece.model")
    assert (xlnet.lowercase, xlnet.strip_accents) == (False, False)

    proto = (data / "vocab" / "albert_base_v2" / "spiece.model").read_bytes()
    (tmp_path / "a.model").write_bytes(proto)
    configure(tmp_path, tokenizer_class="AlbertTokenizer", do_lower_case=True, keep_accents=True)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.lowercase, tokenizer.strip_accents) == (True, False)
    configure(tmp_path, tokenizer_class="XLMRobertaTokenizer")
    with pytest.raises(InputError, match=r"tokenizer_class: found XLMRobertaTokenizer, whose ids differ from its"):
        load_tokenizer(tmp_path)
