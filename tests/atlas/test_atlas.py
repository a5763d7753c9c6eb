"""The whole atlas: made, gone on with, and told what to do, on data that the test writes."""

import dataclasses
import json
import pathlib
import sys
import types

import numpy as np
import pytest

from ctx_jax import cli
from ctx_jax.atlas.advice import advise, advise_sentences, layer_flops
from ctx_jax.atlas.cache import Cache
from ctx_jax.atlas.probes.labelling import Probing
from ctx_jax.atlas.probes.training import Training
from ctx_jax.atlas.records import Edges, Senses, Trees
from ctx_jax.atlas.results import Probe, Score, SentenceScore, Task, read_atlas, write_atlas
from ctx_jax.atlas.run import Plan, Teller, make_atlas
from ctx_jax.atlas.sampling import of_sentences, some_sentences
from ctx_jax.errors import InputError
from ctx_jax.flops.architectures import encoder_cost
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig

NOUNS, VERBS = ["class", "object", "function", "value", "name", "list"], ["returns", "binds", "calls", "raises"]


def conllu(rng, count):
    """Sentences `the NOUN VERB NOUN .`, whose tree is known."""
    blocks = []
    for _ in range(count):
        words = ["the", rng.choice(NOUNS), rng.choice(VERBS), rng.choice(NOUNS), "."]
        rows = zip(words, ["DET", "NOUN", "VERB", "NOUN", "PUNCT"], [2, 3, 0, 3, 3],
                   ["det", "nsubj", "root", "obj", "punct"], strict=True)  # fmt: skip
        blocks.append("".join(f"{i}\t{w}\t{w}\t{t}\t_\t_\t{h}\t{r}\t_\t_\n" for i, (w, t, h, r) in enumerate(rows, 1)))
    return "\n".join(blocks) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A treebank, senses of `class` and pairs of texts."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for split, count in (("train", 60), ("dev", 15), ("test", 20)):
        (root / f"tiny-{split}.conllu").write_text(conllu(rng, count))
    (root / "coarse" / "class").mkdir(parents=True)
    (root / "coarse" / "class" / "classes_map.txt").write_text(json.dumps({"0": "class_school", "1": "class_type"}))
    for split, count in (("train", 24), ("test", 12)):
        lines = ["3\tat the school class they learn\n", "1\ta class binds a name and an object\n"]
        (root / "coarse" / "class" / f"{split}.data.txt").write_text("".join(lines[n % 2] for n in range(count)))
        (root / "coarse" / "class" / f"{split}.gold.txt").write_text("".join(f"{n % 2}\n" for n in range(count)))
    (root / "sts").mkdir()
    for split, count in (("train", 40), ("test", 20)):
        rows = []
        for number in range(count):
            one = f"the {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)}"
            rows.append(f"main\tx\t2012\t{number}\t{number % 6}.000\t{one}\t{one[: 10 + number % 9]}")
        (root / "sts" / f"sts-{split}.csv").write_text("\n".join(rows) + "\n")
    return root


QUICK = Probing(("linear",), Training(epochs=8, batch_size=16, seeds=2), code=False)
PLAN = Plan(probing=QUICK, map_words=("class",), train_words=200)


class Heard(Teller):
    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def made(folder, tiny_encoders, tmp_path_factory):
    cache = Cache(tmp_path_factory.mktemp("cache"))
    return make_atlas({"one": tiny_encoders["bert"], "two": tiny_encoders["elmo"]}, folder, cache, PLAN), cache


def test_every_part_is_there_for_every_model(made, tiny_encoders):
    atlas, _ = made
    assert [model.name for model in atlas.models] == ["one", "two"]
    for model, layers in zip(atlas.models, (4, 3), strict=True):
        assert [task.name for task in model.tasks] == ["tiny/dep", "tiny/pos", "tiny/tree"]
        for task in model.tasks:
            assert all(len(probe.layers) == layers for probe in task.probes)
            assert all(
                0 <= score.mean <= 1 for probe in task.probes for score in probe.layers if probe.metric[-1] != "."
            )
        pos = model.tasks[1]
        assert (pos.train, pos.test, pos.classes) == (200, 100, 4)
        assert pos.baselines["word type"] == 1.0
        # Words say it all: embeddings alone are as good, but those of an ELMo of six values.
        assert pos.probes[0].layers[0].mean > (0.9 if model.name == "one" else 0.6)
        assert len(model.geometry) == 1
        assert model.geometry[0].words == 200
        assert (model.senses[0].train, model.senses[0].test) == (24, 12)
        assert len(model.maps[0].sense) == 12
        assert "« class »" in model.maps[0].contexts[0]
        assert {score.pooling for score in model.sentences} >= {"mean", "max"}
        assert [advice.task for advice in model.advice] == ["tiny/dep", "tiny/pos", "tiny/tree", "sts/similarity"]
    assert {score.pooling for score in atlas.models[1].sentences} == {"mean", "max", "first+last"}  # no first token
    (between,) = atlas.cka.values()
    assert np.shape(between) == (4, 3)


def test_a_second_run_takes_all_from_the_cache_and_a_new_task_costs_itself(made, folder, tiny_encoders):
    atlas, cache = made
    files = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}

    class Still:
        """Nobody may ask it for anything."""

        def __init__(self, encoder):
            self.config, self.params, self.tokenizer, self.width = (
                encoder.config, encoder.params, encoder.tokenizer, encoder.width,
            )  # fmt: skip

    models = {"one": Still(tiny_encoders["bert"]), "two": Still(tiny_encoders["elmo"])}
    again = make_atlas(models, folder, cache, PLAN)
    assert again.models == atlas.models
    assert again.cka == atlas.cka
    assert {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()} == files
    heard = Heard()
    fewer = make_atlas({"one": models["one"]}, folder, cache, Plan(("*/pos",), PLAN.probing, 200), heard)
    assert [task.name for task in fewer.models[0].tasks] == ["tiny/pos"]
    assert fewer.models[0].tasks[0] == atlas.models[0].tasks[1]
    assert heard.lines == ["one [1/1] tiny/pos: part of speech"]


def test_an_atlas_comes_back_from_its_file(made, tmp_path):
    write_atlas(made[0], tmp_path / "atlas.json")
    assert read_atlas(tmp_path / "atlas.json") == made[0]


def test_the_command_writes_a_report(folder, tiny_encoders, tmp_path, capsys):
    tiny_encoders["bert"].save_pretrained(tmp_path / "model")
    words = ["atlas", str(tmp_path / "model"), "--data", str(folder), "--out", str(tmp_path / "out")]
    words += ["--tasks", "*/pos", "--epochs", "1", "--seeds", "1", "--no-code", "--no-mixes", "--probes", "linear"]
    words += ["--twins"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "model: BERT 3 × 32" in out
    assert "index.html" in out
    assert {"index.html", "atlas.json", "plots", "cache"} == {path.name for path in (tmp_path / "out").iterdir()}
    found = read_atlas(tmp_path / "out" / "atlas.json")
    assert [model.name for model in found.models] == ["model", "model, untrained"]
    assert found.models[0].fingerprint != found.models[1].fingerprint
    assert found.models[0].parameters == found.models[1].parameters
    rest = "--probes linear --seeds 1 --epochs 1 --no-mixes --no-code --twins"
    assert found.command == f"ctx-jax atlas model --data {folder.name} --tasks '*/pos' {rest}"
    assert str(tmp_path) not in (tmp_path / "out" / "atlas.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "tiny/poss"], "nothing called 'tiny/poss' (did you mean"),
        (["--epochs", "0"], "Training.epochs: found 0"),
        (["--data", "nowhere"], "nowhere: no folder"),
    ],
)
def test_bad_words_end_with_two(folder, tiny_encoders, tmp_path, capsys, words, message):
    tiny_encoders["bert"].save_pretrained(tmp_path / "model")
    given = ["atlas", str(tmp_path / "model"), "--data", str(folder), "--out", str(tmp_path / "out"), *words]
    assert cli.main(given) == 2
    assert message in capsys.readouterr().err


def test_a_corpus_without_a_test_is_left_out_and_said(tmp_path, tiny_encoders):
    (tmp_path / "only-train.conllu").write_text(conllu(np.random.default_rng(0), 3))
    heard = Heard()
    atlas = make_atlas({"m": tiny_encoders["bert"]}, tmp_path, Cache(tmp_path / "c"), Plan(geometry=False), heard)
    assert atlas.models[0].tasks == []
    assert "  left out: it has no test split" in heard.lines


# Advice.


def task_of(means, half=0.0, mix=None):
    layers = [Score(mean, mean - half, mean + half) for mean in means]
    probe = Probe("linear", "accuracy", layers, None if mix is None else Score(mix, mix, mix))
    return Task("a/pos", "", 1, 1, 2, {}, [probe], 1, 0.0)


def test_maps_are_drawn_by_umap_too_where_it_is_asked(folder, tiny_encoders, tmp_path, monkeypatch, capsys):
    class UMAP:
        def __init__(self, **options):
            assert options["n_neighbors"] == 11

        def fit_transform(self, vectors):
            return vectors[:, 3:5]

    plan = Plan(("coarse/*",), QUICK, map_words=("class",), umap=True)
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    maps = make_atlas({"one": tiny_encoders["bert"]}, folder, Cache(tmp_path / "cache"), plan).models[0].maps
    assert [each.method for each in maps] == ["PCA", "UMAP"]
    assert maps[0].layers != maps[1].layers
    assert dataclasses.replace(maps[0], method="UMAP", layers=maps[1].layers) == maps[1]
    monkeypatch.setitem(sys.modules, "umap", None)
    tiny_encoders["bert"].save_pretrained(tmp_path / "model")
    words = ["atlas", str(tmp_path / "model"), "--data", str(folder), "--out", str(tmp_path / "out"), "--umap"]
    assert cli.main(words) == 2
    assert "pip install umap-learn" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_word_that_training_lacks_gets_wordnets_first_sense(tmp_path, tiny_encoders):
    words = {"semcor": ["class%1:09:00::"] * 3, "senseval2": ["class%1:09:00::", "name%1:10:00::", "list%1:10:00::"]}
    for name, keys in words.items():
        lemmas = [key.partition("%")[0] for key in keys]
        lines = [f'<sentence><wf>a</wf><instance id="i{n}" lemma="{lemma}">{lemma}</instance></sentence>'
                 for n, lemma in enumerate(lemmas)]  # fmt: skip
        (tmp_path / f"{name}.data.xml").write_text(f"<corpus>{''.join(lines)}</corpus>")
        (tmp_path / f"{name}.gold.key.txt").write_text("".join(f"i{n} {key}\n" for n, key in enumerate(keys)))

    def accuracies(folder):
        atlas = make_atlas({"one": tiny_encoders["bert"]}, tmp_path, Cache(folder), Plan(probing=QUICK))
        (task,) = [task for task in atlas.models[0].senses if task.name == "senseval2/senses"]
        return {*task.centroid, *task.one_nn, task.most_frequent}

    assert accuracies(tmp_path / ".cache") == {1 / 3}
    (tmp_path / "index.sense").write_text("name%1:10:00:: 1 1 9\nlist%1:11:00:: 1 1 9\nlist%1:10:00:: 1 2 9\n")
    assert accuracies(tmp_path / ".cache") == {2 / 3}


def test_advice_names_the_planted_layer_and_the_cheapest_within_a_point():
    flops = [0.0, 10.0, 20.0, 30.0, 40.0]
    found = advise(task_of([0.5, 0.7, 0.895, 0.9, 0.8], mix=0.91), flops)
    assert (found.best_layer, found.best_score, found.last_score, found.mix_score) == (3, 0.9, 0.8, 0.91)
    assert (found.shorter, found.shorter_score, found.shorter_flops) == (2, 0.895, 0.5)
    assert found.text == (
        "Layer 3 knows most (90.0); the last one has -10.0. Layers 0 to 2: 50% of the FLOPs, -0.5. A mix of all: 91.0."
    )
    # Within the best one's interval the lowest layer is as good.
    assert advise(task_of([0.5, 0.7, 0.895, 0.9, 0.8], half=0.006), flops).best_layer == 2
    assert advise(task_of([0.1, 0.2, 0.3, 0.4, 0.9]), flops).shorter == 4
    assert advise(Task("a", "", 1, 1, 2, {}, [], 1, 0.0), flops) is None


def test_advice_on_sentences_takes_each_layers_best_recipe():
    scores = [
        SentenceScore("s", layer, pooling, repair, value)
        for layer, pooling, repair, value in [
            ("0", "mean", "raw", 40.0), ("0", "mean", "zca", 79.5), ("1", "max", "raw", 80.0),
            ("1", "mean", "raw", 70.0), ("1+2", "first+last", "raw", 99.0), ("2", "cls", "raw", 60.0),
        ]
    ]  # fmt: skip
    found = advise_sentences("s", scores, [1.0, 2.0, 4.0])
    assert (found.best_layer, found.shorter, found.shorter_flops) == (1, 0, 0.25)
    assert found.text.startswith(
        "Layer 1, max, raw: 80.0; the last one has -20.0. Layers 0 to 0: 25% of the FLOPs, -0.5"
    )
    assert advise_sentences("other", scores, [1.0, 2.0, 4.0]) is None


@pytest.mark.parametrize("config", [BertConfig(num_layers=5), ElmoConfig(num_layers=3)])
def test_flops_up_to_each_layer_are_those_of_the_shorter_models(config):
    from dataclasses import replace

    found = layer_flops(config)
    for layers in range(1, config.num_layers + 1):
        expected = encoder_cost(replace(config, num_layers=layers), length=128).matrix_flops / 128
        assert found[layers] == pytest.approx(expected)
    assert found[0] == pytest.approx(0 if isinstance(config, BertConfig) else found[1] - (found[2] - found[1]), abs=1)


# Sampling.


def test_sentences_are_drawn_whole_up_to_so_many_words():
    sentences = [["w"] * count for count in np.random.default_rng(0).integers(1, 20, 300)]
    found = some_sentences(sentences, 500, seed=1)
    assert (np.diff(found) > 0).all()
    assert 450 < sum(len(sentences[number]) for number in found) <= 500
    assert (some_sentences(sentences, 10**6, 1) == np.arange(300)).all()
    assert not np.array_equal(found, some_sentences(sentences, 500, seed=2))


def test_what_is_said_of_drawn_sentences_stays_with_them():
    rng = np.random.default_rng(0)
    sentences = [[f"{number}.{word}" for word in range(4)] for number in range(30)]
    sentence = np.sort(rng.integers(0, 30, 80))
    first = np.stack([rng.integers(0, 2, 80), rng.integers(2, 5, 80)], 1)
    word = lambda record, place: record.sentences[record.sentence[place]][0].split(".")[0]
    edges = Edges(sentences, sentence, first, None, [str(number) for number in sentence])
    senses = Senses(sentences, sentence, first, ["l"] * 80, [(str(n),) for n in sentence], [f"{n}" for n in range(80)])
    numbers = np.array([3, 7, 8, 21])
    for record in (edges, senses):
        found = of_sentences(record, numbers)
        assert len(found.sentence) == np.isin(sentence, numbers).sum() > 0
        labels = found.labels if isinstance(found, Edges) else [key for (key,) in found.keys]
        assert [word(found, place) for place in range(len(labels))] == list(labels)
    trees = Trees(sentences, list(range(30)), list(range(100, 130)))
    assert of_sentences(trees, numbers) == Trees([sentences[n] for n in numbers], [3, 7, 8, 21], [103, 107, 108, 121])


def test_a_file_that_is_no_atlas_is_refused(tmp_path):
    path = pathlib.Path(tmp_path / "atlas.json")
    for text, message in (("[]", "expected 1"), ('{"format": 9}', "found format 9"), ("{", "atlas.json"),
                          ('{"format": 1, "model": []}', "unknown field 'model'")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_atlas(path)
