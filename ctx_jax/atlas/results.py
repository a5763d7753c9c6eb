"""What an atlas says: the numbers behind the report, as they stand in atlas.json."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from ctx_jax.errors import InputError

FORMAT = 1


@dataclass(frozen=True)
class Score:
    """A number with its 95 % confidence interval over seeds, or over a bootstrap of the examples.

    Accuracies, F1 and correlations are of 1, here and in all records but `SentenceScore`; the report shows hundredths.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Probe:
    """One probe on every layer for one task.

    Attributes:
      kind: `linear`, `mlp`, `edge`, `distance`, `depth`.
      metric: `accuracy`, `micro-F1`, `UUAS`, `UAS`, `LAS`, `Spearman`, `root accuracy`.
      layers: L + 1 scores, layer 0 first.
      mix: of the probe on a learnt mix of all layers; None where none was trained.
      mix_weights: softmax of the mix, L + 1 numbers.
      control: of the same probe on labels drawn for each word type (Hewitt and Liang 2019); None without.
      bits: description length of the labels by online code, in bits a label, for each layer (Voita and Titov 2020).
      uniform_bits: of a uniform code; bits / uniform_bits is one over the compression.
      cumulative: of mixes of layers 0 to l (Tenney et al. 2019b, section 4).
      expected_layer: see there, equation 3.
      center_of_gravity: of `mix_weights`, equation 2.
    """

    kind: str
    metric: str
    layers: list[Score]
    mix: Score | None = None
    mix_weights: list[float] | None = None
    control: list[Score] | None = None
    bits: list[float] | None = None
    uniform_bits: float | None = None
    cumulative: list[Score] | None = None
    expected_layer: float | None = None
    center_of_gravity: float | None = None


@dataclass(frozen=True)
class Task:
    """A task that probes learn.

    Attributes:
      name: of the corpus and what is asked of it: `en_ewt-ud/pos`.
      title: for people.
      train: examples.
      test: examples.
      classes: 0 where there are none.
      baselines: name → score of what knows no model: `majority`, `word type`, `chance`, `neighbours (UUAS)`; a metric
        in brackets is the one probe metric that it goes with.
      probes: by kind, the one to look at first.
      seeds: of each.
      seconds: what it took.
    """

    name: str
    title: str
    train: int
    test: int
    classes: int
    baselines: dict[str, float]
    probes: list[Probe]
    seeds: int
    seconds: float


@dataclass(frozen=True)
class Geometry:
    """The shape of each layer's space over a corpus; every list has L + 1 values, layer 0 first.

    All are raw. Adjusted ones are less the anisotropy of their layer, `explained_uncentred` less `explained_anisotropy`
    (Ethayarajh 2019, section 4).

    Attributes:
      corpus: name.
      words: occurrences that were looked at.
      anisotropy: mean cosine of two random occurrences.
      self_similarity: mean cosine of a word type's occurrences, over types.
      intra_sentence: mean cosine of a sentence's words with their mean, over sentences.
      explained_uncentred: share of a type's variance along its first singular vector, over types.
      explained_centred: the same about the type's mean.
      explained_anisotropy: of random occurrences, uncentred: what is taken off `explained_uncentred`.
      norm: mean length of a vector.
      effective_rank: exp of the entropy of the covariance's spectrum (Roy and Vetterli 2007).
      participation_ratio: (Σλ)² / Σλ².
      outliers: dimensions whose mean lies more than 3 standard deviations of all means from theirs: [dimension, z].
      cka: linear CKA of each layer with each (Kornblith et al. 2019).
    """

    corpus: str
    words: int
    anisotropy: list[float]
    self_similarity: list[float]
    intra_sentence: list[float]
    explained_uncentred: list[float]
    explained_centred: list[float]
    explained_anisotropy: list[float]
    norm: list[float]
    effective_rank: list[float]
    participation_ratio: list[float]
    outliers: list[list[tuple[int, float]]]
    cka: list[list[float]]


@dataclass(frozen=True)
class SenseTask:
    """Disambiguation without training: each occurrence by the nearest vector of a sense.

    Attributes:
      name: of the corpus.
      train: occurrences that the vectors are made of.
      test: occurrences.
      lemmas: how many words.
      centroid: accuracy by the nearest sense's mean, layers from 0.
      one_nn: accuracy by the nearest occurrence.
      most_frequent: accuracy of always the commonest sense of the word.
      by_frequency: how often the sense occurs in training (`0`, `1-4`, `5-19`, `20+`) → accuracy by the nearest mean;
        parts without a test occurrence are left out.
      macro_f1: by the nearest mean, over senses of a word and then over words; CoarseWSD-20's second figure.
    """

    name: str
    train: int
    test: int
    lemmas: int
    centroid: list[float]
    one_nn: list[float]
    most_frequent: float
    by_frequency: dict[str, list[float]]
    macro_f1: list[float]


@dataclass(frozen=True)
class SenseMap:
    """Occurrences of a word as points, for some layers.

    Attributes:
      word: as it is written.
      method: `PCA` or `UMAP`.
      senses: names of them.
      sense: of each point, a place in `senses`.
      contexts: of each point, some words with the word itself between « and ».
      layers: layer → a pair of coordinates for each point.
    """

    word: str
    method: str
    senses: list[str]
    sense: list[int]
    contexts: list[str]
    layers: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class SentenceScore:
    """Spearman's correlation with people of the cosine of two texts' vectors, times 100."""

    corpus: str
    layer: str
    pooling: str
    repair: str
    spearman: float


@dataclass(frozen=True)
class Advice:
    """What to use for one task, of what was measured.

    Attributes:
      task: name.
      metric: what is compared.
      best_layer: number; of layers within the best one's interval the lowest.
      best_score: of it.
      last_score: of the last layer.
      mix_score: of the mix; None where none was trained.
      shorter: fewest layers whose best is within one point of the best of all.
      shorter_score: of it.
      shorter_flops: its share of the whole model's FLOPs a token.
      text: a sentence that says it.
    """

    task: str
    metric: str
    best_layer: int
    best_score: float
    last_score: float
    mix_score: float | None
    shorter: int
    shorter_score: float
    shorter_flops: float
    text: str


@dataclass(frozen=True)
class ModelAtlas:
    """Of one model.

    Attributes:
      name: of its folder.
      fingerprint: of its configuration and weights.
      architecture: for people: "BERT, 6 layers of 384".
      num_layers: L.
      width: D of the vectors.
      parameters: how many.
      layer_flops: FLOPs a token, in a row of 128, up to each layer, from layer 0.
    """

    name: str
    fingerprint: str
    architecture: str
    num_layers: int
    width: int
    parameters: int
    layer_flops: list[float]
    tasks: list[Task] = field(default_factory=list)
    geometry: list[Geometry] = field(default_factory=list)
    senses: list[SenseTask] = field(default_factory=list)
    maps: list[SenseMap] = field(default_factory=list)
    sentences: list[SentenceScore] = field(default_factory=list)
    advice: list[Advice] = field(default_factory=list)


@dataclass(frozen=True)
class Atlas:
    """One or more models on the same data.

    Attributes:
      models: side by side.
      cka: of layers of one model with those of the next, by "A × B"; empty with one model.
      command: what made it.
      machine: where.
      date: when, ISO.
      seconds: how long it took, all parts that were not in the cache.
      peak_memory: of the process, in bytes.
    """

    models: list[ModelAtlas]
    cka: dict[str, list[list[float]]] = field(default_factory=dict)
    command: str = ""
    machine: str = ""
    date: str = ""
    seconds: float = 0.0
    peak_memory: int = 0
    format: int = FORMAT


def write_atlas(atlas: Atlas, path: str | os.PathLike[str]) -> None:
    """As JSON."""
    pathlib.Path(path).write_text(json.dumps(dataclasses.asdict(atlas), indent=1) + "\n", encoding="utf-8")


def read_atlas(path: str | os.PathLike[str]) -> Atlas:
    """What `write_atlas` wrote.

    Raises:
      InputError: it is no such file.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        got = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path}: found format {got!r}, expected {FORMAT}")
    try:
        return from_json(Atlas, found)
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: {error}, expected the fields of an atlas") from error


def from_json(kind: Any, value: Any) -> Any:
    """A record of `kind` from what `dataclasses.asdict` and JSON made of it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else from_json(next(a for a in arguments if a is not type(None)), value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if unknown := value.keys() - hints.keys():
            raise TypeError(f"{kind.__name__}: found unknown field {min(unknown)!r}")
        return kind(**{name: from_json(hints[name], item) for name, item in value.items()})
    if origin is list:
        return [from_json(arguments[0], item) for item in value]
    if origin is tuple:
        return tuple(from_json(one, item) for one, item in zip(arguments, value, strict=True))
    if origin is dict:
        return {key: from_json(arguments[1], item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class SenseCluster:
    """A cluster of a word's occurrences on one layer.

    Attributes:
      share: of the occurrences.
      contexts: those nearest to the mean of the unit vectors, the nearest first: words with the word between « and ».
      words: other words of the sentences, by their occurrence nearest to that mean, with its cosine, the nearest first.
      senses: how many occurrences have each, the most frequent first; empty where senses are not known.
    """

    share: float
    contexts: list[str]
    words: list[tuple[str, float]]
    senses: dict[str, int]


@dataclass(frozen=True)
class LayerSenses:
    """A word's occurrences on one layer.

    Attributes:
      layer: number, from 0.
      silhouette: of the clusters, by cosine; 0 where there is one.
      self_similarity: mean cosine of two occurrences (Ethayarajh 2019, equation 1).
      ari: adjusted Rand index of clusters and senses; None where fewer than two senses are known.
      v_measure: V of them, where `ari` is known.
      labels: which cluster each occurrence is in, from 0.
      clusters: the largest first.
    """

    layer: int
    silhouette: float
    self_similarity: float
    ari: float | None
    v_measure: float | None
    labels: list[int]
    clusters: list[SenseCluster]


@dataclass(frozen=True)
class WordSenses:
    """What one model makes of one word, as it stands in senses.json.

    Attributes:
      word: as it was asked for.
      model: name of its folder.
      fingerprint: of its configuration and weights.
      corpus: where occurrences were looked for.
      sentences: how many were read.
      occurrences: how many there are in them.
      cut: how many of those looked at are in a sentence that was cut for its length.
      best: the layer with the largest ARI, or silhouette where `ari` is not known; of equals the lowest. Layer 0, which
        knows no context, only where no other was asked for.
      layers: in the order of their numbers.
      maps: of the occurrences looked at, all layers; by sense, or by cluster of the best layer.
    """

    word: str
    model: str
    fingerprint: str
    corpus: str
    sentences: int
    occurrences: int
    cut: int
    best: int
    layers: list[LayerSenses]
    maps: list[SenseMap]
