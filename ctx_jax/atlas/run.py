"""The whole atlas of some models on a folder of data."""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import functools
import hashlib
import itertools
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import jax
import numpy as np
from jaxtyping import Float

from ctx_jax.atlas.advice import advise, advise_sentences, layer_flops
from ctx_jax.atlas.cache import Cache, text_hash
from ctx_jax.atlas.features import Features, span_features, windows, word_features
from ctx_jax.atlas.formats.discover import discover, inventory
from ctx_jax.atlas.geometry import geometry, linear_cka
from ctx_jax.atlas.probes.labelling import Probing, label_task
from ctx_jax.atlas.probes.trees import tree_task
from ctx_jax.atlas.records import Corpus, Edges, Senses, TextPairs, Trees, WordPairs, Words
from ctx_jax.atlas.results import (
    Atlas,
    Geometry,
    ModelAtlas,
    Probe,
    Score,
    SenseMap,
    SenseTask,
    SentenceScore,
    Task,
    from_json,
)
from ctx_jax.atlas.sampling import of_sentences, some_sentences
from ctx_jax.atlas.senses import sense_task, wic_threshold
from ctx_jax.atlas.sentences import sts_scores
from ctx_jax.atlas.word_senses import LEAST, context, map_methods, sense_maps
from ctx_jax.encoder.base import Encoder
from ctx_jax.encoder.shards import fingerprint
from ctx_jax.encoder.vectors import unit
from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.flops.architectures import describe
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.memory import give_back_memory
from ctx_jax.nn.parameters import count_parameters


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
      tasks: patterns of names, `en_ewt-ud/*` or `*/pos`; those of none are left out. None of them: all.
      probing: of the tasks that probes learn.
      train_words: of a corpus that probes learn from; sentences beyond are left out, by chance.
      held_out_words: of one that epochs are chosen by, likewise.
      geometry: the shape of the space, on the training words of the first corpus that has words.
      map_words: whose occurrences are drawn, of the first corpus of senses that has them.
      map_points: of each, at most.
      umap: draw them by UMAP, too, which has to be installed.
      fit_texts: texts that repairs are fitted on, of the training pairs.
      dtype: of vectors on the disk.
    """

    tasks: tuple[str, ...] = ()
    probing: Probing = field(default_factory=Probing)
    train_words: int = 60_000
    held_out_words: int = 12_000
    geometry: bool = True
    map_words: tuple[str, ...] = ("bank", "apple")
    map_points: int = 300
    umap: bool = False
    fit_texts: int = 5_000
    dtype: str = "float16"


class Teller:
    """Says what is done: a line, or a bar while something long goes on. The default says nothing."""

    def line(self, text: str) -> None:
        """One line."""

    @contextlib.contextmanager
    def bar(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """A function that counts."""
        yield lambda count: None


def make_atlas(
    models: Mapping[str, Encoder],
    data: str | os.PathLike[str],
    cache: Cache,
    plan: Plan = Plan(),
    teller: Teller | None = None,
    command: str = "",
) -> Atlas:
    """Everything that the plan asks for, of all models on the same sentences; what the cache has is not done again.

    Raises:
      InputError: nothing in the folder is known, a pattern matches nothing, or as the parts of the atlas.
    """
    begun, teller = time.monotonic(), teller or Teller()
    corpora = chosen(discover(data), plan.tasks)
    first_senses = functools.cache(lambda: inventory(data))  # of 200,000 lines: read where it is asked for
    rooms = [_Room(name, encoder, cache, plan, teller, first_senses) for name, encoder in models.items()]
    found = [room.atlas(corpora) for room in rooms]
    return Atlas(
        models=found,
        cka=_between(rooms),
        command=command,
        machine=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        date=datetime.date.today().isoformat(),
        seconds=time.monotonic() - begun,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def untrained(encoder: Encoder, seed: int = 0) -> Encoder:
    """The same model as it was born: what its architecture and its tokenizer give without any learning."""
    params = bound_model(encoder.config).init(jax.random.key(seed))
    return type(encoder)(encoder.config, params, encoder.tokenizer, encoder.pooling)


def chosen(corpora: Sequence[Corpus], patterns: Sequence[str]) -> list[Corpus]:
    """Those that a pattern matches, in their order.

    Raises:
      InputError: a pattern that matches none.
    """
    names = [corpus.name for corpus in corpora]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            hint = did_you_mean(pattern, names)
            raise InputError(f"tasks: found nothing called {pattern!r}{hint}, expected one of {', '.join(names)}")
    return [c for c in corpora if not patterns or any(fnmatch.fnmatch(c.name, pattern) for pattern in patterns)]


class _Room:
    """One model at work."""

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        cache: Cache,
        plan: Plan,
        teller: Teller,
        first_senses: Callable[[], Mapping[str, str]],
    ):
        self.name, self.encoder, self.cache, self.plan, self.teller = name, encoder, cache, plan, teller
        self.first_senses = first_senses
        self.fingerprint = fingerprint(encoder)
        self.compared: tuple[str, Features] | None = None

    def atlas(self, corpora: Sequence[Corpus]) -> ModelAtlas:
        config = self.encoder.config
        flops = layer_flops(config)
        tasks, shapes, senses, maps, sentences = [], [], [], [], []
        for number, corpus in enumerate(corpora, 1):
            self.teller.line(f"{self.name} [{number}/{len(corpora)}] {corpus.name}: {corpus.title}")
            kind = type(next(iter(corpus.splits.values())))
            if kind in (Edges, Trees):
                made = self._probes(corpus)
                if made is not None:
                    tasks.append(made)
                if self.plan.geometry and not shapes and "train" in corpus.splits:
                    shapes.append(self._geometry(corpus))
            elif kind is Senses:
                made, drawn = self._senses(corpus, corpora, {each.word for each in maps})
                senses += made
                maps += drawn
            elif kind is WordPairs:
                tasks += self._same_sense(corpus)
            elif kind is TextPairs:
                sentences += self._sentences(corpus)
        advice = [advise(task, flops) for task in tasks]
        advice += [
            advise_sentences(name, sentences, flops) for name in dict.fromkeys(each.corpus for each in sentences)
        ]
        return ModelAtlas(
            name=self.name,
            fingerprint=self.fingerprint,
            architecture=describe(config),
            num_layers=config.num_layers,
            width=self.encoder.width,
            parameters=count_parameters(self.encoder.params),
            layer_flops=flops,
            tasks=tasks,
            geometry=shapes,
            senses=senses,
            maps=maps,
            sentences=sentences,
            advice=[each for each in advice if each is not None],
        )

    def _split(self, corpus: Corpus, split: str) -> Edges | Trees:
        """Of a split so many sentences as the plan says; all of the test."""
        record = corpus.splits[split]
        most = {"train": self.plan.train_words, "dev": self.plan.held_out_words}.get(split)
        if most is None:
            return record
        numbers = some_sentences(record.sentences, most, self.plan.probing.seed)
        return of_sentences(record, numbers)

    @contextlib.contextmanager
    def _encoding(self, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """A bar; batches of many shapes leave holes that no probe fits into."""
        with self.teller.bar("vectors", total, unit) as done:
            yield done
        give_back_memory()

    def _said(self, text: str) -> None:
        """What is done next; what was done before leaves holes of other shapes."""
        give_back_memory()
        self.teller.line(f"  {text}")

    def _words(self, sentences: Sequence[Words]) -> Features:
        with self._encoding(len(sentences), "sentence") as done:
            return word_features(self.encoder, sentences, self.cache, dtype=self.plan.dtype, done=done)

    def _spans(self, record: Senses | WordPairs, sentence: np.ndarray, spans: np.ndarray) -> np.ndarray:
        with self._encoding(len(np.unique(sentence)), "sentence") as done:
            found = span_features(
                self.encoder, record.sentences, sentence, spans, self.cache, dtype=self.plan.dtype, done=done
            )
        return found.transpose(1, 0, 2)

    def _kept(self, what: str, of: dict, kind: type, make: Callable[[], object]):
        """What `make` gives, from the cache where it was made before."""
        key = {"what": what, "model": self.fingerprint, "dtype": self.plan.dtype, **of}
        return from_json(kind, self.cache.value(key, lambda: _plain(make())))

    def _probes(self, corpus: Corpus) -> Task | None:
        if not {"train", "test"} <= set(corpus.splits):
            self.teller.line(f"  left out: it has no {'train' if 'test' in corpus.splits else 'test'} split")
            return None
        records = {split: self._split(corpus, split) for split in corpus.splits}

        def make() -> Task:
            splits = {split: (self._words(record.sentences), record) for split, record in records.items()}
            run = label_task if isinstance(records["train"], Edges) else tree_task
            return run(corpus.name, corpus.title, splits, self.plan.probing, self._said)

        of = {"records": {split: _content(record) for split, record in records.items()},
              "probing": asdict(self.plan.probing), "name": corpus.name}  # fmt: skip
        return self._kept("task", of, Task, make)

    def _geometry(self, corpus: Corpus) -> Geometry:
        sentences = self._split(corpus, "train").sentences
        words = [word for sentence in sentences for word in sentence]
        types = np.unique(np.array(words), return_inverse=True)[1]
        numbers = np.repeat(np.arange(len(sentences)), [len(sentence) for sentence in sentences])
        name = corpus.name.rsplit("/", 1)[0]
        features = self._words(sentences)
        self.compared = text_hash(sentences), features

        def make() -> Geometry:
            self._said(f"the shape of the space, {len(words):,} words")
            return geometry(features.layers(), types, numbers, corpus=name)

        return self._kept("geometry", {"texts": text_hash(sentences), "name": name}, Geometry, make)

    def _senses(
        self, corpus: Corpus, corpora: Sequence[Corpus], drawn: set[str]
    ) -> tuple[list[SenseTask], list[SenseMap]]:
        train, test = _sense_splits(corpus, corpora)
        if train is None or test is None:
            self.teller.line("  left out: nothing to learn senses from, or no test")
            return [], []
        # What training does not know gets WordNet's first sense, as the data sets' own evaluation has it.
        unseen = set(test.lemmas) - set(train.lemmas)
        senses = self.first_senses() if any("%" in lemma for lemma in unseen) else {}
        fallback = {lemma: senses[lemma] for lemma in sorted(unseen) if lemma in senses}
        of = {"train": _content(train), "test": _content(test), "name": corpus.name, "fallback": fallback}

        def make() -> SenseTask:
            vectors = [self._spans(record, record.sentence, record.span) for record in (train, test)]
            self._said("nearest senses")
            return sense_task(corpus.name, train, vectors[0], test, vectors[1], fallback)

        task = self._kept("senses", of, SenseTask, make)
        lemmas = {_plain_lemma(lemma) for lemma in test.lemmas}
        words = [word for word in self.plan.map_words if word not in drawn and word in lemmas]
        return [task], [each for word in words for each in self._maps(word, test, task)]

    def _maps(self, word: str, test: Senses, task: SenseTask) -> list[SenseMap]:
        """Of the embeddings, the layer that tells senses apart best, and the last."""
        own = np.array([place for place, lemma in enumerate(test.lemmas) if _plain_lemma(lemma) == word])
        if len(own) > self.plan.map_points:
            own = np.sort(np.random.default_rng(0).permutation(own)[: self.plan.map_points])
        vectors = self._spans(test, test.sentence, test.span)
        senses = sorted({test.keys[place][0] for place in own})
        last = len(task.one_nn) - 1
        layers = sorted({0, int(np.argmax(task.one_nn)), last})
        contexts = [context(test.sentences[test.sentence[place]], test.span[place]) for place in own]
        colours = [senses.index(test.keys[place][0]) for place in own]
        drawn = {layer: np.float64(vectors[layer][own]) for layer in layers}
        methods = map_methods(0, len(own), self.plan.umap and len(own) >= LEAST)
        return sense_maps(word, senses, colours, contexts, drawn, methods)

    def _same_sense(self, corpus: Corpus) -> list[Task]:
        """By a threshold on the cosine, fitted on what is held out, or trained on."""
        fitted_on = "dev" if "dev" in corpus.splits else "train"
        if "test" not in corpus.splits or fitted_on not in corpus.splits:
            self.teller.line("  left out: it has no test split, or none to fit the threshold on")
            return []
        records = {split: corpus.splits[split] for split in (fitted_on, "test")}

        def cosines(pairs: WordPairs) -> Float[np.ndarray, "L N"]:
            vectors = self._spans(pairs, np.arange(len(pairs.sentences)), pairs.spans)
            layers = []
            for layer in vectors:
                directions = unit(np.float64(layer))
                layers.append((directions[::2] * directions[1::2]).sum(1))
            return np.stack(layers)

        def make() -> Task:
            begun = time.monotonic()
            held, test = records[fitted_on], records["test"]
            scores = []
            for ours, theirs in zip(cosines(held), cosines(test), strict=True):
                same = wic_threshold(ours, held.same, theirs).same
                accuracy = float((same == test.same).mean())
                scores.append(Score(accuracy, accuracy, accuracy))
            baseline = {"majority": float(max(test.same.mean(), 1 - test.same.mean()))}
            probe = Probe("threshold", "accuracy", scores)
            return Task(corpus.name, corpus.title, len(held.same), len(test.same), 2, baseline, [probe], 1,
                        time.monotonic() - begun)  # fmt: skip

        of = {"records": {split: _content(record) for split, record in records.items()}, "name": corpus.name}
        return [self._kept("same-sense", of, Task, make)]

    def _sentences(self, corpus: Corpus) -> list[SentenceScore]:
        if "test" not in corpus.splits:
            self.teller.line("  left out: it has no test split")
            return []
        test, train = corpus.splits["test"], corpus.splits.get("train", corpus.splits["test"])
        fit = list(dict.fromkeys([*train.first, *train.second]))[: self.plan.fit_texts]
        self_fitted = "train" not in corpus.splits

        def make() -> list[SentenceScore]:
            sides = [self._pooled(texts) for texts in (test.first, test.second, fit)]
            name = corpus.name + (" (repairs fitted on the test texts)" if self_fitted else "")
            return sts_scores(*sides[:2], np.asarray(test.scores), sides[2], corpus=name)

        of = {"test": _content(test), "fit": text_hash([[text] for text in fit]), "name": corpus.name}
        return self._kept("sentences", of, list[SentenceScore], make)

    def _pooled(self, texts: Sequence[str]) -> dict[str, Float[np.ndarray, "L N D"]]:
        """Each way of pooling, of one pass over the texts. An ELMo has no first token that stands for the text."""
        poolings = ("mean", "max") if self.encoder.tokenizer is None else ("cls", "mean", "max")
        layers = self.encoder.config.num_layers + 1
        found = {pooling: np.empty((layers, len(texts), self.encoder.width), np.float32) for pooling in poolings}
        with self._encoding(len(texts), "text") as done:
            for numbers in windows(self.encoder, texts):
                some = self.encoder.encode([texts[number] for number in numbers], on_too_long="truncate")
                for pooling, vectors in found.items():
                    for layer in range(layers):
                        vectors[layer, numbers] = some.sentences(pooling, layer=layer)
                done(len(numbers))
        return found


def _between(rooms: Sequence[_Room]) -> dict[str, list[list[float]]]:
    """CKA of the layers of each model and the next, over the words of the geometry."""
    found = {}
    for one, other in itertools.pairwise(rooms):
        if one.compared is None or other.compared is None or one.compared[0] != other.compared[0]:
            continue
        pair = [room.compared[1].layers() for room in (one, other)]
        rows = np.sort(np.random.default_rng(0).permutation(pair[0].shape[1])[:10_000])
        key = {"what": "cka", "models": [one.fingerprint, other.fingerprint], "texts": one.compared[0]}
        found[f"{one.name} × {other.name}"] = one.cache.value(
            key, lambda pair=pair, rows=rows: [[linear_cka(a[rows], b[rows]) for b in pair[1]] for a in pair[0]]
        )
    return found


def _sense_splits(corpus: Corpus, corpora: Sequence[Corpus]) -> tuple[Senses | None, Senses | None]:
    """What senses are learnt from and what they are asked of: the corpus's own, or, for a test without training, the
    first other corpus of senses that has nothing else; of training alone the last tenth of its sentences is the test.
    """
    splits = corpus.splits
    test = splits.get("test") or splits.get("dev")
    if "train" in splits and test is not None:
        return splits["train"], test
    if "train" in splits:
        count = len(splits["train"].sentences)
        parts = np.arange(count - count // 10), np.arange(count - count // 10, count)
        train, test = (of_sentences(splits["train"], part) for part in parts)
        return train, test if test.lemmas else None
    others = [each for each in corpora if each.name.endswith("/senses") and set(each.splits) == {"train"}]
    return (others[0].splits["train"] if others else None), test


def _plain_lemma(lemma: str) -> str:
    return lemma.split("%")[0]


def _content(record: Edges | Trees | Senses | WordPairs | TextPairs) -> str:
    """A hash of all that a record says."""
    found = hashlib.sha256()
    for name, column in zip(record._fields, record, strict=True):
        found.update(name.encode())
        if isinstance(column, np.ndarray):
            found.update(np.ascontiguousarray(column).tobytes())
        elif name == "sentences":
            found.update(text_hash(column).encode())
        elif column is not None:
            for value in column:
                plain = value.tolist() if isinstance(value, np.ndarray) else value
                found.update(repr(plain).encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:20]


def _plain(value: object) -> object:
    return [asdict(each) for each in value] if isinstance(value, list) else asdict(value)
