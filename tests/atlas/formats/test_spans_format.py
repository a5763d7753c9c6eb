"""Spans as JSON: what is written is read, and what is wrong is said with its line."""

import json
import random

import pytest

from ctx_jax.atlas.formats import spans
from ctx_jax.errors import InputError


@pytest.mark.parametrize("pairs", [True, False])
def test_random_files_come_back(pairs, write):
    rng = random.Random(0)
    truth, sentences, lines = [], [], []
    for sentence in range(100):
        words = rng.choices(["a", "ü", "don't", '"'], k=rng.randint(1, 9))
        span = lambda words=words: sorted(rng.sample(range(len(words) + 1), 2))
        targets = []
        for _ in range(rng.randint(0, 4)):
            labels = rng.sample(["A0", "A1", "0"], k=rng.randint(0, 3))
            target = {"span1": span(), "label": labels[0] if len(labels) == 1 else labels, "info": {}}
            if pairs:
                target["span2"] = span()
            targets.append(target)
            truth += [(sentence, target["span1"], target.get("span2"), label) for label in labels]
        text = {"tokens": words} if sentence % 2 else {"text": "  ".join(words)}
        lines.append(json.dumps({**text, "targets": targets}, ensure_ascii=sentence % 3 == 0))
        sentences.append(words)
    path = write("x.jsonl", "\n\n".join(lines))
    edges = spans.edges(path)
    assert spans.is_spans(path)
    assert edges.sentences == sentences
    second = edges.second.tolist() if pairs else [None] * len(truth)
    assert list(zip(edges.sentence.tolist(), edges.first.tolist(), second, edges.labels, strict=True)) == truth
    assert pairs or edges.second is None


def test_the_example_of_jiant(write):
    record = {
        "text": "Ian ate strawberry ice cream",
        "targets": [
            {"span1": [1, 2], "span2": [0, 1], "label": "A0"},
            {"span1": [1, 2], "span2": [2, 5], "label": "A1"},
        ],
        "info": {"source": "PropBank"},
    }
    edges = spans.edges(write("x.jsonl", json.dumps(record)))
    assert (edges.second.tolist(), edges.labels) == ([[0, 1], [2, 5]], ["A0", "A1"])


def test_nothing(write):
    empty = json.dumps({"text": " ", "targets": []})
    word = json.dumps({"text": "a", "targets": []})
    edges = spans.edges(write("x.jsonl", f"{empty}\n{word}\n"))
    assert (edges.sentences, edges.first.shape, edges.second) == ([["a"]], (0, 2), None)
    assert not spans.is_spans(write("y.jsonl", ""))
    assert not spans.is_spans(write("y.jsonl", '{"text": "a"}'))
    assert not spans.is_spans(write("y.jsonl", "[" * 100_000))


TARGET = '{"span1": [0, 1], "label": "X"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "'[]'; expected an object"),
        ('{"targets": []}', '\'{"targets": []}\'; expected "text"'),
        ('{"text": ["a"], "targets": []}', '\'{"text"'),
        ('{"tokens": "a", "targets": []}', '\'{"tokens"'),
        ('{"tokens": ["a", " "], "targets": []}', '\'{"tokens"'),
        ('{"text": "a"}', "targets 'None'"),
        ('{"text": "a", "targets": {}}', "targets '{}'"),
        ('{"text": "a", "targets": [[]]}', "targets '[[]]'"),
        ('{"text": "a", "targets": [{"label": "X"}]}', "span1 'None'"),
        (
            '{"text": "a", "targets": [{"span1": [0, 2], "label": "X"}]}',
            "span1 '[0, 2]'; expected [begin, end), within 1",
        ),
        ('{"text": "a", "targets": [{"span1": [-1, 1], "label": "X"}]}', "span1"),
        ('{"text": "a", "targets": [{"span1": [1, 1], "label": "X"}]}', "span1"),
        ('{"text": "a", "targets": [{"span1": [false, true], "label": "X"}]}', "span1"),
        ('{"text": "a", "targets": [{"span1": [0, 1.0], "label": "X"}]}', "span1"),
        ('{"text": "a", "targets": [{"span1": [0, 1], "span2": [0], "label": "X"}]}', "span2 '[0]'"),
        ('{"text": "a", "targets": [{"span1": [0, 1], "label": 1}]}', "label '1'; expected a text, or a list of texts"),
        ('{"text": "a", "targets": [{"span1": [0, 1]}]}', "label 'None'"),
        ('{"text": "a", "targets": [{"span1": [0, 1], "span2": [0, 1], "label": "X"}]}', "target"),
    ],
)
def test_what_is_wrong_is_said(line, message, write):
    path = write("x.jsonl", f'{{"text": "a", "targets": [{TARGET}]}}\n\n{line}\n')
    with pytest.raises(InputError) as error:
        spans.edges(path)
    assert str(error.value).startswith(f"{path}, line 3: {message}")
