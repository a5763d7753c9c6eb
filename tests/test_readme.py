"""What the README and the docs show is what happens."""

import dataclasses
import doctest
import pathlib
import re
import shlex

import pytest

from ctx_jax import cli
from ctx_jax.experiment import Evaluation, pretrain
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
SNIPPETS = [
    (f"{name} {number}", snippet)
    for name, page in PAGES.items()
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
]
COMMANDS = [
    line for page in PAGES.values() for line in re.findall(r"^    (ctx-jax .*?)(?:  +#.*)?$", page, re.MULTILINE)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory, topics_corpus, words_corpus):
    """A folder with the data and the runs that the README talks of."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "data").mkdir()
    (folder / "data" / "mine").symlink_to(topics_corpus)
    out = folder / "data" / "topics"
    build = f"data build python:topics --out {out} --train-vocab 2000 --holdout 0.12 --processes 1"
    assert cli.main(build.split()) == 0
    config = cli.load_config(ROOT / "configs" / "quickstart.py")
    optimizer = Optimizer(config.optimizer.kind, Schedule("constant", 1e-3))
    short = dataclasses.replace(config, data=str(out), steps=3, optimizer=optimizer)
    assert pretrain(short, folder / "runs" / "quickstart", show_progress=False).finished
    elmo = cli.load_config(ROOT / "configs" / "elmo_small.py")
    model = dataclasses.replace(elmo.model, lstm_dim=130, vocab_size=500)
    optimizer = Optimizer("adagrad", Schedule("constant", 0.2))
    few = Evaluation(rows=8, batch_size=8)
    short = dataclasses.replace(
        elmo, data=str(words_corpus), model=model, optimizer=optimizer, steps=2, batch_size=8, evaluation=few
    )
    assert pretrain(short, folder / "runs" / "elmo", show_progress=False).finished
    return folder


@pytest.mark.parametrize(("name", "snippet"), SNIPPETS, ids=[name for name, _ in SNIPPETS])
def test_snippets(home, monkeypatch, name, snippet):
    monkeypatch.chdir(home)
    test = doctest.DocTestParser().get_doctest(snippet, {}, name, name, 0)
    assert test.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    output = []
    runner.run(test, out=output.append)
    assert not runner.summarize(verbose=False).failed, "".join(output)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist_with_their_flags(line, capsys, monkeypatch):
    """Every `ctx-jax …` line of README and docs names a command and flags that its help knows."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)[1:]
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in cli.COMMANDS), None)
    assert name, f"no such command: {line}"
    config = [word for word in words if word.startswith("configs/") and (ROOT / word).exists()]
    with pytest.raises(SystemExit) as ended:
        cli.main([*name.split(), *config, "--help"])
    assert ended.value.code == 0
    known = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


def test_the_readme_has_commands():
    assert len([line for line in COMMANDS if line in README]) >= 5


def test_the_table_of_costs_is_what_is_counted():
    from ctx_jax.flops.architectures import encoder_cost
    from ctx_jax.models.bert import BertConfig
    from ctx_jax.models.elmo import ElmoConfig

    models = {
        "BERT-base": BertConfig(),
        "ELMo": ElmoConfig(),
        "`configs/bert_22g.py`": cli.load_config(ROOT / "configs" / "bert_22g.py").model,
    }
    rows = re.findall(r"^\| ([^,|]+), .*\| ([\d.]+) GFLOP \| ([\d.]+) GFLOP \|$", README, re.MULTILINE)
    assert {name for name, *_ in rows} == set(models)
    for name, *shown in rows:
        counted = [encoder_cost(models[name], length=length).matrix_flops / 1e9 for length in (128, 512)]
        assert shown == [f"{value:.2f}" for value in counted], name


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"`((?:ctx_jax|configs|scripts|docs)/[\w/.]*)`", README):
        assert (ROOT / name).exists(), name


def test_scripts_that_the_readme_names_exist():
    for name in re.findall(r"bash (scripts/\w+)", README):
        assert (ROOT / name).is_file()
