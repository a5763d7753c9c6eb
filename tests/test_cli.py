"""The command as people type it: help, exit codes, one clear line for bad input."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from ctx_jax import cli
from ctx_jax.experiment import pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory, topics_corpus):
    """A run of two steps."""
    from ctx_jax.data.plan import RowsConfig
    from ctx_jax.experiment import Evaluation, Experiment
    from ctx_jax.models.bert import BertConfig

    workdir = tmp_path_factory.mktemp("run")
    experiment = Experiment(
        data=str(topics_corpus),
        model=BertConfig(
            vocab_size=600, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_position_embeddings=32
        ),
        rows=RowsConfig(length=32),
        steps=2,
        batch_size=8,
        evaluation=Evaluation(rows=8, batch_size=8),
    )
    assert pretrain(experiment, workdir, show_progress=False).finished
    return workdir


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"ctx-jax {name}" in shown for name in cli.COMMANDS)
    assert all(len(line) <= 120 for line in shown.splitlines())
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_help_says_what_each_argument_is(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.main([*name.split(), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: ctx-jax {name}" in shown
    lines = [line.strip("│ ") for line in shown.splitlines()]
    for line, following in itertools.pairwise(lines):
        if line.startswith("--") and not line.startswith("--help"):
            text = line.split("  ", 1)[1].strip() if "  " in line else following
            assert text, line
            assert not text.startswith("(default"), f"{line} is not explained"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretran"], "did you mean 'pretrain'"),
        (["data", "bild"], "did you mean 'data build'"),
        (["pretrain", "nowhere.py", "--workdir", "x"], "nowhere.py: no such config file"),
        (["data", "build", "python:topics", "--out", "x"], "one of --vocab, --train-vocab and --train-words"),
        (["data", "build", "--out", "x", "--train-vocab", "500"], "at least one SOURCE"),
        (["data", "build", "nowhere.txt", "--out", "x", "--train-vocab", "500"], "nowhere.txt"),
        (["data", "audit", "nowhere"], "nowhere"),
        (["encode", "nowhere", "text"], "nowhere"),
        (["encode", "nowhere"], "either texts or --file"),
        (["fill-mask", "nowhere", "[MASK]"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    line = [line for line in shown.err.splitlines() if line.startswith("ctx-jax: ")]
    assert len(line) == 1
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_unknown_flags_exit_2():
    with pytest.raises(SystemExit) as ended:
        cli.main(["fill-mask", "--topp", "3"])
    assert ended.value.code == 2


def test_pretrain_overrides_and_refuses(tmp_path, capsys, topics_corpus):
    words = ["pretrain", "configs/quickstart.py", "--workdir", str(tmp_path / "run"), "--data", str(topics_corpus)]
    import pathlib

    words[1] = str(pathlib.Path(__file__).parent.parent / words[1])
    assert cli.main([*words, "--batch-size", "16"]) == 2  # 2000 pieces in the config, 600 in the data
    assert "model.vocab_size is 2000" in capsys.readouterr().err
    assert cli.main([*words, "--steps", "0"]) == 2
    assert "Experiment.steps is 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--model.activation", "gellu"])
    assert ended.value.code == 2
    assert "did you mean 'gelu'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_encode_into_shards(run, tmp_path, capsys, monkeypatch):
    """Killed between shards, it goes on with the one that is missing; other texts or options are refused."""
    import numpy as np

    from ctx_jax import Encoder, InputError
    from ctx_jax.encoder.shards import read_shards, write_shards

    lines = [f"A set of {number} names is empty." for number in range(11)]
    text = tmp_path / "texts.txt"
    text.write_text("\n".join(lines))
    out = tmp_path / "vectors"
    words = ["encode", str(run), "--file", str(text), "--out", str(out), "--pool", "mean", "--rows", "4"]
    assert cli.main(words) == 0
    assert "11 texts" in capsys.readouterr().out
    encoder = Encoder.from_pretrained(run)
    expected = encoder.encode(lines, pool="mean")
    np.testing.assert_allclose(np.concatenate(list(read_shards(out))), expected, rtol=1e-5, atol=2e-6)
    (out / "00001.npy").unlink()
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("is there already") == 2
    np.testing.assert_allclose(np.concatenate(list(read_shards(out))), expected, rtol=1e-5, atol=2e-6)
    assert cli.main([*words, "--layers", "all"]) == 2
    assert "was begun with layers 'last', expected 'all'" in capsys.readouterr().err
    text.write_text("\n".join(["Another text.", *lines[1:]]))
    assert cli.main(words) == 2
    assert "was made of other texts" in capsys.readouterr().err
    assert cli.main(["encode", str(run), *lines[:2], "--pool", "cls"]) == 0
    assert "cls [2, 16] float32" in capsys.readouterr().out
    assert cli.main(["encode", str(run), "--file", str(tmp_path / "none"), "--pool", "cls"]) == 2
    other = Encoder.from_pretrained(run)
    table = other.params["encoder"]["embeddings"]["token"]["table"]
    other.params["encoder"]["embeddings"]["token"]["table"] = table * 1.01
    with pytest.raises(InputError, match="was begun with model"):
        write_shards(other, lines, out, rows=4, batch_tokens=8192)
    (tmp_path / "mine").mkdir()
    assert cli.main(["encode", str(run), *lines[:2], "--pool", "cls", "--out", str(tmp_path / "mine")]) == 2
    assert "expected a folder of shards" in capsys.readouterr().err


def test_encode(run, tmp_path, capsys):
    text = tmp_path / "texts.txt"
    text.write_text("A set is empty.\nNames refer to objects.\n")
    assert cli.main(["encode", str(run), "--file", str(text), "--out", str(tmp_path / "v.npz")]) == 0
    found = np.load(tmp_path / "v.npz")
    assert found["layers"].shape == (3, *found["mask"].shape, 16)
    assert found["tokens"].shape == found["mask"].shape
    assert (found["tokens"] != "").sum() == found["mask"].sum()
    assert found["texts"].tolist() == [0, 1]
    assert cli.main(["encode", str(run), "A set.", "--layers", "last"]) == 0
    assert "[CLS]" in capsys.readouterr().out
    assert cli.main(["encode", str(run), "word " * 100]) == 2
    assert "on_too_long" in capsys.readouterr().err
    assert cli.main(["encode", str(run), "word " * 100, "--on-too-long", "truncate"]) == 0
    assert cli.main(["encode", str(run), "text", "--out", str(tmp_path / "no" / "v.npz")]) == 2
    text.write_bytes(b"\xff\xfe broken")
    assert cli.main(["encode", str(run), "--file", str(text)]) == 2
    assert "texts.txt" in capsys.readouterr().err


def test_fill_mask(run, capsys):
    assert cli.main(["fill-mask", str(run), "A [MASK] is a [MASK].", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(len(line.split("  ")) == 3 for line in lines)


def test_audit(topics_corpus, capsys):
    assert cli.main(["data", "audit", str(topics_corpus), "--length", "64", "--kind", "pairs"]) == 0
    assert "next" in capsys.readouterr().out
    assert cli.main(["data", "audit", str(topics_corpus), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_config_that_is_none_is_named(tmp_path, capsys):
    (tmp_path / "odd.py").write_text("config = 3\n")
    assert cli.main(["pretrain", str(tmp_path / "odd.py"), "--workdir", str(tmp_path / "run")]) == 2
    assert "`config` is int" in capsys.readouterr().err


def test_every_config_shows_its_values_as_defaults(capsys):
    import pathlib

    for path in sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py")):
        config = cli.load_config(path)
        with pytest.raises(SystemExit):
            cli.main(["pretrain", str(path), "--help"])
        shown = capsys.readouterr().out
        assert f"(default: {config.steps})" in shown
        assert dataclasses.is_dataclass(config)
