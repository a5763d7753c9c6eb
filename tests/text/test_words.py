"""Whole words: against a scanner that goes character by character, counts by hand, and files of every bad kind."""

import collections
import json
import pickle
import random

import numpy as np
import pytest

from ctx_jax import cli
from ctx_jax.data import build as build_lib
from ctx_jax.data.build import build
from ctx_jax.data.corpus import Corpus
from ctx_jax.errors import InputError
from ctx_jax.text import words as words_lib
from ctx_jax.text.load import load_tokenizer
from ctx_jax.text.words import Words, split_words, train_words

MARKS = ["</S>", "<S>", "<UNK>"]
END, BEGIN, UNK = range(3)
# Letters of several scripts, digits that are none of 0 to 9, what joins words and what does not, spaces of all kinds.
ALPHABET = (
    "abAéßıΣжא한カ力½²Ⅸ３07'’.-_,!?\"()<>/SUNK$@#~«—…。😀👩\u200d\u0301\u200b\ufeff\x00\x7f"
    " \t\n\r\x0b\x1c\x85\u00a0\u2003\u2028\u3000"
)


@pytest.fixture
def make(tmp_path):
    def make(*words):
        path = tmp_path / "words.txt"
        path.write_bytes("".join(f"{word}\n" for word in [*MARKS, *words]).encode())
        return Words(path)

    return make


def random_text(rng, alphabet=ALPHABET, length=60):
    marks = rng.choices([*MARKS, ""], [1, 1, 1, 30], k=length)
    return "".join(mark or rng.choice(alphabet) for mark in marks[: rng.randrange(length)])


def scan(text):
    """Spans of the words, character by character."""
    spans, at = [], 0
    while at < len(text):
        end = at + 1
        mark = next((mark for mark in MARKS if text.startswith(mark, at)), "")
        if mark:
            end = at + len(mark)
        elif text[at].isalnum():
            while text[end : end + 1].isalnum() or (
                text[end : end + 1] in {*"'’.-"} and text[end + 1 : end + 2].isalnum()
            ):
                end += 1
        elif text[at] == "_":
            while text[end : end + 1] == "_":
                end += 1
        if not text[at].isspace():
            spans.append([at, end])
        at = end
    return spans


# Splitting.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \t\n\u00a0\u3000", ""),
        ("I don't, can't; it’s o'clock.", "I don't , can't ; it’s o'clock ."),
        ("'tis the dogs' rock’n’roll'", "' tis the dogs ' rock’n’roll '"),
        ("twenty-one re-re-read -5 a--b end-", "twenty-one re-re-read - 5 a - - b end -"),
        ("3.14 1,000.5 50% $7 1990s 2-3", "3.14 1 , 000.5 50 % $ 7 1990s 2-3"),
        ("U.S. e.g. end... a.b@c.de", "U.S . e.g . end . . . a.b @ c.de"),
        ('"(Well!)" he said?!', '" ( Well ! ) " he said ? !'),
        ("Straße naïve Ærø Ἀθῆναι Москва", "Straße naïve Ærø Ἀθῆναι Москва"),
        ("שלום עולם 한국어 力加勝北。Ⅸ x² ３", "שלום עולם 한국어 力加勝北 。 Ⅸ x² ３"),
        ("ok😀👍 👩\u200d👧", "ok 😀 👍 👩 \u200d 👧"),
        ("__init__ foo_bar _ a_1", "__ init __ foo _ bar _ a _ 1"),
        ("a<S>b </S>.<UNK><s> <S", "a <S> b </S> . <UNK> < s > < S"),
        # Case is kept, and a mark that stands beside its word is a word: accents are expected composed (NFC).
        ("THE The the cafe\u0301", "THE The the cafe \u0301"),
    ],
)
def test_splitting(text, expected):
    assert split_words(text) == expected.split(" ") * bool(expected)


def test_nothing_but_white_space_is_lost(make):
    rng = random.Random(0)
    tokenizer = make()
    seen = set()
    for trial in range(2000):
        text = random_text(rng, ALPHABET if trial % 2 else "aß3'’.-_ ")
        spans, found = scan(text), split_words(text)
        assert found == [text[a:b] for a, b in spans], repr(text)
        assert "".join(found) == "".join(text.split())
        assert tokenizer.encode(text).offsets.tolist() == spans
        seen.update(found)
    assert seen >= {*MARKS, "__", "'", ".", "😀", "\u200d", "<", "\u0301"}
    assert any("'" in word[1:-1] for word in seen)
    assert any("-" in word[1:-1] and "." in word[1:-1] for word in seen)


# Words to ids.


def test_ids_offsets_and_words_of_a_string(make):
    tokenizer = make("the", "cat", "don't", ".")
    pieces = tokenizer.encode("  the cat\tdon't… The<S>.\n")
    assert pieces.ids.tolist() == [3, 4, 5, UNK, UNK, BEGIN, 6]
    assert pieces.offsets.tolist() == [[2, 5], [6, 9], [10, 15], [15, 16], [17, 20], [20, 23], [23, 24]]
    assert pieces.words.tolist() == list(range(7))
    assert [array.dtype for array in pieces] == [np.int32] * 3


def test_words_of_a_list_are_kept_whole(make):
    tokenizer = make("the", "a-b_c!", "x", "_")
    words = ["the", "", "a-b_c!", "New York", "<S>", "", "x_x", " ", "x", ""]
    pieces = tokenizer.encode(words)
    assert pieces.ids.tolist() == [3, 4, UNK, BEGIN, UNK, UNK, 5]
    assert pieces.words.tolist() == [0, 2, 3, 4, 6, 7, 8]
    joined = " ".join(words)
    assert [joined[a:b] for a, b in pieces.offsets] == [word for word in words if word]
    assert [array.dtype for array in pieces] == [np.int32] * 3


def test_lists_and_strings_in_one_batch(make):
    rng = random.Random(1)
    tokenizer = make(*dict.fromkeys(["a", "b", "A", "07", "é", "'"]))
    texts = []
    for _ in range(300):
        text = random_text(rng, "abA07é' \t-")
        texts.append(text if rng.random() < 0.5 else [random_text(rng, "ab é'", 4) for _ in range(rng.randrange(6))])
    ids = {word: index for index, word in enumerate(tokenizer.spellings())}
    lists = 0
    for text, pieces in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if isinstance(text, str):
            spans, numbers, joined = scan(text), list(range(len(scan(text)))), text
        else:
            joined, spans, numbers, at = " ".join(text), [], [], 0
            for number, word in enumerate(text):
                if word:
                    spans.append([at, at + len(word)])
                    numbers.append(number)
                at += len(word) + 1
            lists += len(numbers) < len(text)
        assert pieces.offsets.shape == (len(spans), 2)
        assert pieces.offsets.tolist() == spans
        assert pieces.words.tolist() == numbers
        assert pieces.ids.tolist() == [ids.get(joined[a:b], UNK) for a, b in spans]
        for one, other in zip(tokenizer.encode(text), pieces, strict=True):
            np.testing.assert_array_equal(one, other)
    assert lists > 20  # with empty words


def test_nothing_to_encode(make):
    tokenizer = make("a")
    for text in ("", " \n", [], ["", ""]):
        pieces = tokenizer.encode(text)
        assert [array.shape for array in pieces] == [(0,), (0, 2), (0,)]
        assert [array.dtype for array in pieces] == [np.int32] * 3
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], r"texts\[1\]: found None, expected a string or a list of words"),
        ([["a", 3]], r"texts\[0\]\[1\]: found int 3, expected a string"),
        (["a\ud800"], r"texts\[0\]: found the lone surrogate"),
        ([["a", "\udfff"]], r"texts\[0\]\[1\]: found the lone surrogate"),
        ("a", "texts: found str 'a', expected a list of texts"),
    ],
)
def test_texts_that_are_none_are_refused(make, texts, message):
    with pytest.raises(InputError, match=message):
        make("a").encode_batch(texts)


def test_looking_words_up(make):
    tokenizer = make("the", "cat")
    assert tokenizer.vocab_size == 5
    assert tokenizer.spellings() == [*MARKS, "the", "cat"]
    assert tokenizer.tokens([4, 0, 3, 3]) == ["cat", "</S>", "the", "the"]
    assert [tokenizer.token_id(word) for word in tokenizer.spellings()] == list(range(5))
    with pytest.raises(InputError, match=r"words.txt: found no piece 'cta'.*did you mean 'cat'"):
        tokenizer.token_id("cta")
    for index in (-1, 5):
        with pytest.raises(InputError, match=rf"ids\[1\]: found {index}, expected 0 to 4"):
            tokenizer.tokens([0, index])
    # `[CLS]`, `[SEP]` and the rest, by BERT's names.
    assert tokenizer.specials._asdict() == {"pad": UNK, "unk": UNK, "cls": BEGIN, "sep": END, "mask": UNK}
    assert tokenizer.continues_word.tolist() == [False] * 5
    assert tokenizer.continues_word.dtype == bool
    # A caller's list is not the vocabulary.
    tokenizer.spellings().append("dog")
    assert tokenizer.spellings() == [*MARKS, "the", "cat"]


# Files.


def same_tokenizer(one, other):
    text = "The the don't, 力 <S> é\u0301 zebra_"
    for a, b in zip(one.encode(text), other.encode(text), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.spellings() == other.spellings()
    assert one.specials == other.specials
    np.testing.assert_array_equal(one.continues_word, other.continues_word)


def test_saved_and_loaded_is_the_same(make, tmp_path):
    tokenizer = make("the", "don't", ",", "力", "\u0301", "The", "#", "[MASK]")
    tokenizer.save(tmp_path / "deep" / "folder")
    tokenizer.save(str(tmp_path / "again"))  # a string, and the same bytes
    for name in ("words.txt", "tokenizer_config.json"):
        found = (tmp_path / "deep" / "folder" / name).read_bytes()
        assert found == (tmp_path / "again" / name).read_bytes()
    assert (tmp_path / "again" / "words.txt").read_bytes() == (tmp_path / "words.txt").read_bytes()
    config = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "Words"
    assert config["do_lower_case"] is False
    assert [config[f"{name}_token"] for name in ("cls", "sep", "unk")] == ["<S>", "</S>", "<UNK>"]
    for path in (tmp_path / "again", str(tmp_path / "again"), tmp_path / "again" / "words.txt"):
        loaded = load_tokenizer(path)
        assert type(loaded) is Words
        same_tokenizer(loaded, tokenizer)
    same_tokenizer(pickle.loads(pickle.dumps(tokenizer)), tokenizer)


def test_a_file_without_a_last_line_break(tmp_path):
    (tmp_path / "words.txt").write_bytes("</S>\n<S>\n<UNK>\nnaïve".encode())
    assert load_tokenizer(tmp_path).spellings() == [*MARKS, "naïve"]  # nor a tokenizer_config.json
    (tmp_path / "words.txt").write_bytes(b"</S>\n<S>\n<UNK>")
    assert Words(str(tmp_path / "words.txt")).vocab_size == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"found \[''\] on lines 1 to 3, expected </S>, <S> and <UNK>"),
        (b"</S>\n<S>\n", r"found \['</S>', '<S>'\] on lines 1 to 3"),
        (b"<S>\n</S>\n<UNK>\na\n", r"found \['<S>', '</S>', '<UNK>'\] on lines 1 to 3"),
        (b"</S>\n<S>\n<unk>\na\n", "on lines 1 to 3"),
        (b"\xef\xbb\xbf</S>\n<S>\n<UNK>\na\n", "on lines 1 to 3"),
        (b"</S>\r\n<S>\r\n<UNK>\r\na\r\n", "on lines 1 to 3"),
        (b"</S>\n<S>\n<UNK>\na\n\nb\n", "line 5: found '', expected a word without white space"),
        (b"</S>\n<S>\n<UNK>\na\n\n", "line 5: found '', expected a word"),
        (b"</S>\n<S>\n<UNK>\na\nb\na\n", "line 6: found 'a' again"),
        (b"</S>\n<S>\n<UNK>\na\n<S>\n", "line 5: found '<S>' again"),
        (b"</S>\n<S>\n<UNK>\nNew York\n", "line 4: found 'New York', expected a word without white space"),
        (b"</S>\n<S>\n<UNK>\n a\n", "line 4: found ' a'"),
        (b"</S>\n<S>\n<UNK>\na\r\n", r"line 4: found 'a\\r'"),
        ("</S>\n<S>\n<UNK>\na\u3000\n".encode(), r"line 4: found 'a\\u3000'"),
        (b"</S>\n<S>\n<UNK>\ncaf\xe9\n", "found a byte that is not UTF-8 at 18, expected a words.txt"),
    ],
)
def test_a_file_that_is_no_vocabulary(tmp_path, content, message):
    (tmp_path / "words.txt").write_bytes(content)
    for read in (lambda: Words(tmp_path / "words.txt"), lambda: load_tokenizer(tmp_path)):
        with pytest.raises(InputError, match=rf"words.txt(:|, ).*{message}"):
            read()


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"words.txt: cannot be read \(No such file or directory\), expected a vocab"):
        Words(tmp_path / "words.txt")
    with pytest.raises(InputError, match=r"found nothing, expected one .* or words.txt \(whole words\)"):
        load_tokenizer(tmp_path)


def test_a_folder_with_words_and_something_else(make, tmp_path):
    make("a")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(InputError, match=r"found vocab.txt, words.txt, expected one"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"cls_token": "[CLS]"}))
    with pytest.raises(InputError, match=r"cls_token: found '\[CLS\]', expected '<S>'"):
        load_tokenizer(tmp_path)


# Counting.


def test_most_frequent_first_and_of_equals_the_first_seen(tmp_path):
    texts = ["c b, a", "b <S> d", "B a </S> , <UNK>", "e"]
    tokenizer = train_words(iter(texts), 100, tmp_path / "deep" / "folder")
    assert tokenizer.spellings() == [*MARKS, "b", ",", "a", "c", "d", "B", "e"]
    same_tokenizer(load_tokenizer(tmp_path / "deep" / "folder"), tokenizer)
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == [
        "tokenizer_config.json",
        "words.txt",
    ]


def test_most_limits(tmp_path):
    rng = random.Random(2)
    texts = [" ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(12))) for _ in range(9)]
    counts = collections.Counter(letter for text in texts for letter in text.split())
    seen = list(dict.fromkeys(letter for text in texts for letter in text.split()))
    ordered = sorted(seen, key=lambda word: (-counts[word], seen.index(word)))
    assert len(ordered) > 15
    assert len(set(counts.values())) < 8  # many are equally frequent
    for most in range(4, len(ordered) + 6):
        assert train_words(texts, most, tmp_path / str(most)).spellings() == [*MARKS, *ordered[: most - 3]]


def test_words_seen_once_are_forgotten_beyond_a_number(tmp_path, monkeypatch):
    texts = ["a a b", "c d", "b b e", "f e"]
    spellings = lambda: train_words(texts, 100, tmp_path).spellings()[3:]
    everything = ["b", "a", "e", "c", "d", "f"]
    assert spellings() == everything
    # After "c d" there are 4 words: b, c and d go, and b is counted anew; then a, b, e, f.
    monkeypatch.setattr(words_lib, "MOST_COUNTED", 3)
    assert spellings() == ["a", "b", "e"]
    monkeypatch.setattr(words_lib, "MOST_COUNTED", 4)
    assert spellings() == ["b", "a", "f", "e"]  # after the third text c, d and e go
    monkeypatch.setattr(words_lib, "MOST_COUNTED", 6)
    assert spellings() == everything


@pytest.mark.parametrize(
    ("texts", "most", "message"),
    [
        (["a"], 3, "train_words: found 3, expected at least 4: three marks and a word"),
        (["a"], -1, "train_words: found -1, expected at least 4"),
        ([], 10, "train_words: found no word in the texts"),
        ([" ", "<S> </S><UNK>"], 10, "train_words: found no word in the texts"),
        (["a", None], 10, r"texts\[1\]: found None, expected a string"),
        (["a", "b", ["c"]], 10, r"texts\[2\]: found list"),
        (["a\ud800"], 10, r"texts\[0\]: found the lone surrogate"),
    ],
)
def test_what_cannot_be_counted(tmp_path, texts, most, message):
    with pytest.raises(InputError, match=message):
        train_words(texts, most, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Corpora of whole words.

DOCUMENTS = [["The cat sat.", "It's a twenty-one_year old cat!"], ["…", "naïve 力 , the cat"], ["Zebra zebra."]]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join("\n".join(document) for document in DOCUMENTS), encoding="utf-8")
    return path


def contents(folder):
    """Every file, and the counts without the seconds that it took."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    counts = json.loads(files.pop("counts.json"))
    for split in counts["splits"].values():
        assert split.pop("seconds") >= 0
    return files, counts


def test_a_corpus_of_words(text, tmp_path, monkeypatch):
    monkeypatch.setattr(build_lib, "_TASK_CHARACTERS", 10)  # a document is a task
    sentences = [sentence for document in DOCUMENTS for sentence in document]
    tokenizer = train_words(sentences, 14, tmp_path / "vocabulary")
    for processes in (1, 2):
        out = tmp_path / f"corpus{processes}"
        build({"train": [text]}, tokenizer, out, processes=processes, record_tokens=6, show_progress=False)
    assert contents(tmp_path / "corpus1") == contents(tmp_path / "corpus2")

    corpus = Corpus(tmp_path / "corpus1")
    assert type(corpus.tokenizer) is Words
    same_tokenizer(corpus.tokenizer, tokenizer)
    kept = [[text[a:b] for a, b in scan(text)] for text in sentences]
    assert corpus.sentence_lengths.tolist() == [len(words) for words in kept]
    assert corpus.document_sentences.tolist() == [2, 2, 1]
    vocabulary = corpus.tokenizer.spellings()
    expected = [word if word in vocabulary else "<UNK>" for words in kept for word in words]
    assert corpus.tokenizer.tokens(corpus.tokens(0, corpus.num_tokens)) == expected
    assert corpus.counts.unknown_tokens == expected.count("<UNK>") > 2
    assert vocabulary[3:6] == ["cat", ".", "The"]


def test_counting_words_from_the_command_line(text, tmp_path, capsys):
    out = tmp_path / "corpus"
    words = ["data", "build", str(text), "--out", str(out), "--processes", "1", "--train-words"]
    assert cli.main([*words, "6"]) == 0
    shown = capsys.readouterr()
    assert f"wrote {out}" in shown.out
    assert "counting words, to keep 6" in shown.err
    corpus = Corpus(out)
    assert corpus.tokenizer.spellings() == [*MARKS, "cat", ".", "The"]
    assert corpus.tokens(0, 4).tolist() == [5, 3, UNK, 4]
    # The same words again, as the vocabulary.
    again = ["data", "build", str(text), "--out", str(tmp_path / "again"), "--processes", "1", "--vocab"]
    assert cli.main([*again, str(out / "tokenizer")]) == 0
    assert contents(out) == contents(tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "expected one of --vocab, --train-vocab and --train-words"),
        ("--train-words 10 --train-vocab 500", "expected one of --vocab, --train-vocab and --train-words"),
        ("--train-words 10 --vocab {vocab}", "expected one of --vocab, --train-vocab and --train-words"),
        ("--train-vocab 500 --vocab {vocab}", "expected one of --vocab, --train-vocab and --train-words"),
        (
            "--train-vocab 500 --vocab {vocab} --train-words 10",
            "expected one of --vocab, --train-vocab and --train-words",
        ),
        ("--train-words 3", "train_words: found 3, expected at least 4"),
        ("--train-words 0", "train_words: found 0, expected at least 4"),
    ],
)
def test_options_that_do_not_go_together(text, tmp_path, capsys, options, message):
    train_words(["a"], 4, tmp_path / "vocabulary")  # a good one: nothing else is wrong
    words = ["data", "build", str(text), "--out", str(tmp_path / "out"), "--processes", "1"]
    assert cli.main([*words, *options.format(vocab=tmp_path / "vocabulary").split()]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert not (tmp_path / "out").exists()
