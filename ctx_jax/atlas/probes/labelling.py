"""Tasks that label spans: probes on every layer, on mixes, on control labels, and how short they make the labels."""

from __future__ import annotations

import itertools
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float, Int, Key
from scipy import stats

from ctx_jax.atlas.features import Features
from ctx_jax.atlas.probes.kinds import MLP, Edge, Linear
from ctx_jax.atlas.probes.sources import SpanSource, SpanWords
from ctx_jax.atlas.probes.training import Fitted, Training, fit, mean_loss, predict
from ctx_jax.atlas.records import Edges
from ctx_jax.atlas.results import Probe, Score, Task
from ctx_jax.errors import InputError

Kind = Literal["linear", "mlp", "edge"]
FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Of the training examples, at which the online code trains anew (Voita and Titov 2020, section 3.2)."""


@dataclass(frozen=True)
class Probing:
    """What is asked of a task.

    Attributes:
      kinds: of probe; of the first one more is asked.
      training: how each is trained.
      controls: train the first kind on control labels, too.
      mixes: train it on mixes of layers, too, and every edge probe, which is made for them.
      code: measure its description length, too.
      seed: of all that is random.
    """

    kinds: tuple[Kind, ...] = ("linear", "mlp")
    training: Training = Training()
    controls: bool = True
    mixes: bool = True
    code: bool = True
    seed: int = 0


def label_task(
    name: str,
    title: str,
    splits: Mapping[str, tuple[Features, Edges]],
    probing: Probing = Probing(),
    told: Callable[[str], object] = lambda line: None,
) -> Task:
    """Trains and scores the probes of a task.

    Args:
      name: of the task.
      title: for people.
      splits: `train` and `test`, and `dev` to choose epochs by; without it a tenth of the training sentences.
      probing: what to do.
      told: is told what is done next.

    Raises:
      InputError: a split is missing or empty, or there is one class.
    """
    begun = time.monotonic()
    if missing := {"train", "test"} - splits.keys():
        raise InputError(f"{name}: found no {min(missing)} split, expected train and test")
    train, dev = splits["train"], splits.get("dev")
    kept = np.arange(len(train[1].labels))
    if dev is None:
        number = np.asarray(train[1].sentence) % 10
        dev, kept, held_out = train, kept[number != 0], kept[number == 0]
    else:
        held_out = np.arange(len(dev[1].labels))
    labels = sorted({train[1].labels[example] for example in kept})
    if len(labels) < 2:
        raise InputError(f"{name}: found {len(labels)} classes in training, expected at least 2")
    task = _Task(train, dev, splits["test"], kept, held_out, labels)
    probes = []
    for place, kind in enumerate(probing.kinds):
        told(f"{name}: {kind}")
        probes.append(task.probe(kind, probing, whole=place == 0))
    return Task(
        name, title, len(kept), len(task.test[1].labels), len(labels), task.baselines(), probes,
        probing.training.seeds, time.monotonic() - begun,
    )  # fmt: skip


class _Task:
    """Examples with their classes, of the real labels or of control labels."""

    def __init__(self, train, dev, test, kept, held_out, labels):
        self.train, self.dev, self.test = train, dev, test
        self.kept, self.held_out, self.labels = kept, held_out, labels
        self.everything = np.arange(len(test[1].labels))

    def classes(self, split: tuple[Features, Edges], examples: np.ndarray) -> Int[np.ndarray, "N"]:
        """-1 where a label does not occur in training."""
        number = {label: place for place, label in enumerate(self.labels)}
        return np.array([number.get(split[1].labels[example], -1) for example in examples], np.int32)

    def source(
        self, split: tuple[Features, Edges], examples: np.ndarray, classes: np.ndarray, of: type[SpanSource]
    ) -> SpanSource:
        features, edges = split
        begins = features.starts[np.asarray(edges.sentence)[examples]][:, None]
        spans = tuple(begins + span[examples] for span in (edges.first, edges.second) if span is not None)
        return of(features, spans, classes)

    def sources(
        self, of: type[SpanSource] = SpanSource, control: int | None = None
    ) -> tuple[SpanSource, SpanSource, SpanSource]:
        """Training, held-out and test examples."""
        found = []
        drawn = None if control is None else Controls(self.classes(self.train, self.kept), control)
        for split, examples in ((self.train, self.kept), (self.dev, self.held_out), (self.test, self.everything)):
            classes = self.classes(split, examples) if drawn is None else drawn(split[1], examples)
            if split is not self.test:
                # What no training example has cannot be learnt, and its loss says nothing.
                examples, classes = examples[classes >= 0], classes[classes >= 0]
            found.append(self.source(split, examples, classes, of))
        return tuple(found)

    def probe(self, kind: Kind, probing: Probing, *, whole: bool) -> Probe:
        """One kind on all layers; with all that is asked of the first kind if `whole`."""
        reads, metric, scores = (
            (SpanWords, "micro-F1", micro_f1) if kind == "edge" else (SpanSource, "accuracy", accuracies)
        )
        train, dev, test = self.sources(reads)
        width = train.features.vectors.shape[2]
        probe = {"linear": Linear, "mlp": MLP, "edge": Edge}[kind](width, len(self.labels), len(train.spans))
        key = jax.random.key(probing.seed)
        layers = scores(fit(probe, train, dev, probing.training, key), test)
        control = mix = shares = cumulative = expected = center = bits = None
        if probing.controls and whole:
            sources = self.sources(reads, probing.seed)
            control = scores(fit(probe, sources[0], sources[1], probing.training, key), sources[2])
        if probing.mixes and (whole or kind == "edge"):
            mixes = np.tril(np.ones((train.features.num_layers,) * 2, bool))
            fitted = fit(probe, train, dev, probing.training, key, allowed=mixes)
            cumulative = scores(fitted, test)
            shares = mix_shares(fitted)[-1].tolist()
            mix, center = cumulative[-1], center_of_gravity(shares)
            expected = expected_layer([score.mean for score in cumulative])
        if probing.code and whole and kind != "edge":  # whose labels are coded one by one
            bits = online_code(probe, train, probing.training, key)
        return Probe(
            kind, metric, layers, mix, shares, control, bits,
            float(np.log2(len(self.labels))) if bits else None, cumulative, expected, center,
        )  # fmt: skip

    def baselines(self) -> dict[str, float]:
        """What needs no model: the commonest class, and that of the same words."""
        classes = self.classes(self.train, self.kept)
        gold = self.classes(self.test, self.everything)
        commonest = Counter(classes.tolist()).most_common(1)[0][0]
        by_words: dict[tuple, Counter] = {}
        for words, label in zip(span_words(self.train[1], self.kept), classes.tolist(), strict=True):
            by_words.setdefault(words, Counter())[label] += 1
        guesses = [
            by_words[words].most_common(1)[0][0] if words in by_words else commonest
            for words in span_words(self.test[1], self.everything)
        ]
        return {"majority": float((gold == commonest).mean()), "word type": float((gold == np.array(guesses)).mean())}


def span_words(edges: Edges, examples: Int[np.ndarray, "N"]) -> list[tuple[str, ...]]:
    """Of each example: the words of its spans."""
    found = []
    for example in examples:
        words = edges.sentences[edges.sentence[example]]
        spans = [span[example] for span in (edges.first, edges.second) if span is not None]
        found.append(tuple(" ".join(words[begin:end]) for begin, end in spans))
    return found


class Controls:
    """Labels that only memory can give: each word type has one, drawn as often as the real ones occur (Hewitt and
    Liang 2019, section 2); of a pair of spans the first one's words say which.
    """

    def __init__(self, classes: Int[np.ndarray, "N"], seed: int):
        """
        Args:
          classes: real ones of the training examples.
          seed: of the draw.
        """
        self.shares = np.cumsum(np.bincount(classes)) / len(classes)
        self.seed = seed

    def __call__(self, edges: Edges, examples: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        """Classes of examples of any split: a word has the same one in all."""
        drawn = [zlib.crc32(f"{self.seed} {words[0]}".encode("utf-8", "surrogatepass")) for words in
                 span_words(edges, examples)]  # fmt: skip
        return np.searchsorted(self.shares, np.array(drawn) / 2**32, side="right").astype(np.int32)


def accuracies(fitted: Fitted, test: SpanSource) -> list[Score]:
    """Of each member, over seeds."""
    right = np.concatenate(list(predict(fitted, test)), axis=2) == test.classes
    return [interval(seeds) for seeds in right.mean(-1).T]


def micro_f1(fitted: Fitted, test: SpanSource) -> list[Score]:
    """Of each member, over seeds: 2 · right / (said + true) over all labels of all examples (Tenney et al. 2019,
    section 3.2). A label that training lacks is true and never said.
    """
    right, said, begin = 0, 0, 0
    for labels in predict(fitted, test):
        gold = np.arange(labels.shape[-1]) == test.classes[begin : begin + labels.shape[2], None]
        right, said = right + (labels & gold).sum((2, 3)), said + labels.sum((2, 3))
        begin += labels.shape[2]
    return [interval(seeds) for seeds in (2 * right / (said + len(test))).T]


def interval(values: Float[np.ndarray, "S"] | Sequence[float]) -> Score:
    """Mean and 95 % interval of Student's t over seeds; of one seed the interval is the number."""
    values = np.asarray(values, np.float64)
    half = 0.0
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Score(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def mix_shares(fitted: Fitted) -> Float[np.ndarray, "M L"]:
    """Softmax of the mixes' weights, the mean over seeds."""
    weights = np.where(np.asarray(fitted.allowed), np.asarray(fitted.params["mix"], np.float64), -np.inf)
    shares = np.exp(weights - weights.max(-1, keepdims=True))
    return (shares / shares.sum(-1, keepdims=True)).mean(0)


def center_of_gravity(shares: Sequence[float]) -> float:
    """Σ l · share of layer l (Tenney et al. 2019b, equation 2)."""
    return float(np.arange(len(shares)) @ np.asarray(shares))


def expected_layer(scores: Sequence[float]) -> float | None:
    """Σ l · Δ(l) / Σ Δ(l), Δ(l) what layer l adds to the layers below it (Tenney et al. 2019b, equations 3 and 4); None
    where all the layers add nothing, or so little that what some take away leads out of the model.
    """
    gains = np.diff(scores)
    if gains.sum() <= 0:
        return None
    expected = float(np.arange(1, len(scores)) @ gains / gains.sum())
    return expected if 0 <= expected <= len(gains) else None


def online_code(
    probe: Linear, train: SpanSource, training: Training, key: Key[jax.Array, ""]
) -> Float[np.ndarray, "L"] | list[float]:
    """Bits a label of the training labels, sent in portions, each coded by a probe that has learnt from those before
    (Voita and Titov 2020, equation 2); the first by a uniform code. One seed.

    A portion's probe chooses its epoch on a tenth of what it may see.
    """
    once = Training(training.epochs, training.batch_size, training.learning_rate, seeds=1)
    count = len(train)
    order = np.random.default_rng(0).permutation(count)
    ends = sorted({max(int(np.ceil(fraction * count)), 1) for fraction in FRACTIONS})
    ends = [end for end in ends if end >= min(20, count)]
    nats = np.full(train.features.num_layers, ends[0] * np.log(probe.classes))
    for known, end in itertools.pairwise(ends):
        seen, new = order[:known], order[known:end]
        fitted = fit(probe, train.some(seen[known // 10 :]), train.some(seen[: max(known // 10, 1)]), once, key)
        nats += mean_loss(fitted, train.some(new))[0] * len(new)
    return (nats / np.log(2) / count).tolist()
