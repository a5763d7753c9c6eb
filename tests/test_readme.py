"""What the README shows is what happens."""

import dataclasses
import doctest
import pathlib
import re
import shlex

import pytest

from ctx_jax import cli
from ctx_jax.experiment import pretrain
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory, topics_corpus):
    """A folder with the data and the run that the README talks of."""
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
    return folder


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets(home, monkeypatch, number):
    monkeypatch.chdir(home)
    test = doctest.DocTestParser().get_doctest(SNIPPETS[number], {}, f"README {number}", "README.md", 0)
    assert test.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    output = []
    runner.run(test, out=output.append)
    assert not runner.summarize(verbose=False).failed, "".join(output)


def test_commands_exist_and_their_arguments_parse():
    """Every `ctx-jax …` line of the README names a command and flags that its help knows."""
    lines = re.findall(r"^    (ctx-jax .*?)(?:  +#.*)?$", README, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line)[1:]
        name = " ".join(words[: 2 if words[0] == "data" else 1])
        assert name in cli.COMMANDS, line


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"`((?:ctx_jax|configs|scripts)/[\w/.]*)`", README):
        assert (ROOT / name).exists(), name


def test_scripts_that_the_readme_names_exist():
    for name in re.findall(r"bash (scripts/\w+)", README):
        assert (ROOT / name).is_file()
