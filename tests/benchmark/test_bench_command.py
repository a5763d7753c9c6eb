"""`ctx-jax bench` as people type it, and our own process; with peers where they are installed."""

import ast
import json
import os
import sys

import numpy as np
import pytest

from ctx_jax import cli
from ctx_jax.benchmark import peers as registry
from ctx_jax.benchmark import race
from ctx_jax.benchmark.bench import bench, find_peers
from ctx_jax.benchmark.peers import OURS, PEERS, Peer
from ctx_jax.benchmark.race import BOUND, Setting
from ctx_jax.benchmark.subjects import lay_out, static_of, with_random_weights
from ctx_jax.benchmark.work import Shape, rows, texts
from ctx_jax.errors import InputError
from ctx_jax.interop.pretrained import Pretrained
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.text.load import load_tokenizer

CONFIG = """
from ctx_jax.data.plan import RowsConfig
from ctx_jax.experiment import Experiment
from ctx_jax.models.bert import BertConfig

config = Experiment(
    data="none",
    rows=RowsConfig(length=32),
    model=BertConfig(
        vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_position_embeddings=32
    ),
)
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG)
    return str(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected at least one MODEL"),
        (["nowhere"], "nowhere: found nothing, expected a folder"),
        (["nowhere.py"], "nowhere.py: no such config file"),
        (["static"], "static: found no model before it"),
        (["CONFIG", "--lengths", "33"], "--lengths: found 33, tiny takes 32 tokens at most"),
        (["CONFIG", "--lengths", "0"], "--lengths: found 0, expected at least 1"),
        (["CONFIG", "--batch", "2", "0"], "--batch: found 0, expected at least 1"),
        (["CONFIG", "--repeats", "0"], "--repeats: found 0, expected at least 1"),
        (["CONFIG", "--peer-batch", "0"], "--peer-batch: found 0, expected at least 1"),
        (["CONFIG", "--threads", "0"], "--threads: found 0, expected 1 to"),
        (["CONFIG", "--threads", "100000"], "--threads: found 100000, expected 1 to"),
        (["CONFIG", "--peers", "tranformers"], "found 'tranformers' (did you mean 'transformers'?)"),
        (["CONFIG", "--peer-python", "no-python"], "--peer-python no-python"),
        (["CONFIG", "--texts", "empty.txt"], "empty.txt: found no text"),
        (["CONFIG", "--texts", "nowhere.txt"], "nowhere.txt"),
        (["CONFIG", "--texts", "some.txt"], "tiny has no tokenizer"),
        (["CONFIG", "--texts", "some.txt", "--lengths", "8"], "expected --lengths or --texts, found both"),
        (["CONFIG", "--texts", "some.txt", "--pool", "mean"], "--pool: found --texts with it"),
        (["CONFIG", "--profile", "trace", "--pool", "mean"], "--profile: found --texts, --pool"),
    ],
)
def test_bad_input(words, message, config, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "some.txt").write_text("Some text.\n")
    assert cli.main(["bench", *(config if word == "CONFIG" else word for word in words)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err


def test_peers_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(PEERS, "absent", Peer("absent", OURS.file, ("no_such_module",)))
    monkeypatch.setitem(PEERS, "there", Peer("there", OURS.file, ("json",)))
    found, missing = find_peers(["absent", "there", "there"], sys.executable)
    assert [peer.name for peer in found] == ["there"]
    assert [peer.name for peer in missing] == ["absent"]
    with pytest.raises(InputError, match="found none of absent"):
        find_peers(["absent"], sys.executable)
    assert "there" in {peer.name for peer in find_peers(None, sys.executable)[0]}


def test_the_command(config, make_peer, capsys, monkeypatch):
    """Us beside a peer that computes something else: a table, a line of JSON and exit code 1."""
    peer = make_peer("odd", needs=("numpy",))
    peer.file.write_text(
        peer.file.read_text().replace('np.load(pathlib.Path(folder) / "table.npy")', "np.ones((60, 16))")
    )
    for name in list(PEERS):
        monkeypatch.delitem(PEERS, name)
    monkeypatch.setitem(PEERS, "odd", peer)
    monkeypatch.setitem(PEERS, "absent", Peer("absent", OURS.file, ("no_such_module",)))
    words = ["bench", config, "static", "--lengths", "16", "--batch", "2", "--threads", "1", "--repeats", "2"]
    assert cli.main(words) == 1
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    model, static = record["races"]
    assert [row["who"] for row in model["rows"]] == ["ctx_jax", "odd", "absent"]
    assert [row["status"] for row in model["rows"]] == ["measured", "differs", "left out"]
    assert [row["who"] for row in static["rows"]] == ["ctx_jax", "peers"]
    assert model["peak"]["float32_flops_per_s"] > 1e8
    assert model["rows"][0]["about"]["versions"].keys() == {"jax", "numpy"}
    assert record["machine"]["threads"] == 1
    assert all(len(line) <= 120 for line in table)
    assert any("outputs differ" in line for line in table)
    assert sum("median" in line for line in table) == 1, "one table a shape"


def test_means_of_our_own(config, capsys, monkeypatch):
    """With `--pool mean` we fetch one vector a row, the mean of those that we fetch without it."""
    words = ["bench", config, "static", "--lengths", "16", "--batch", "2", "--repeats", "1", "--pool", "mean"]
    for name in list(PEERS):
        monkeypatch.delitem(PEERS, name)
    fetched = []
    compare = race.np.load
    monkeypatch.setattr(race.np, "load", lambda *args: fetched.append(compare(*args)) or fetched[-1])
    assert cli.main(words) == 0
    assert cli.main(words[:-2]) == 0
    shown = capsys.readouterr().out.splitlines()
    pooled, whole = (json.loads(line)["races"] for line in shown if line.startswith("{"))
    assert [one["pool"] for one in (*pooled, *whole)] == ["mean", "mean", None, None]
    assert {"2 × 16, float32, mean of each row", "2 × 16, float32, all vectors"} <= set(shown)
    for mean, vectors in zip(fetched[:2], fetched[2:], strict=True):
        np.testing.assert_allclose(mean, vectors.mean(1), rtol=0, atol=1e-6)


def test_only_we_know_the_library():
    for file in registry.WORKER.parent.glob("*.py"):
        names = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert ("ctx_jax" in names) == (file == OURS.file), file
        if file == registry.WORKER:
            assert names - set(sys.stdlib_module_names) == {"numpy"}


def wordpiece(folder):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.", "##a", "##e", "##s", "the"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return load_tokenizer(folder / "vocab.txt"), len(pieces)


def test_profile_has_a_table_and_keeps_the_trace(config, tmp_path, capsys):
    assert cli.main(["bench", config, "--lengths", "16", "--batch", "2", "--profile", str(tmp_path / "trace")]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    (found,) = json.loads(last)
    assert (found["batch"], found["length"], found["dtype"]) == (2, 16, "float32")
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)
    assert {"projections", "feed-forward", "scores"} <= {part["name"] for part in found["parts"]}
    assert any(line.startswith("a call") for line in table)
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_elmo_is_measured_alone(tmp_path):
    config = ElmoConfig(vocab_size=20, lstm_dim=16, projection_dim=8, filters=((1, 4), (2, 4)), num_highway=1)
    subject = lay_out("elmo", with_random_weights(config), tmp_path / "elmo")
    setting = Setting(sys.executable, sys.executable, (), 1, repeats=2)
    for work in ([Shape(2, 7)], ["A text.", "And a longer one."]):
        (found,) = bench([subject], work, ["float32"], [], [], setting)
        assert [row.status for row in found.rows] == ["measured"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(BOUND))
def test_peers_compute_the_same(dtype, tmp_path):
    """Rows and texts of a tiny model, by everybody who is installed, here or in the Python of CTX_JAX_PEER_PYTHON."""
    python = os.environ.get("CTX_JAX_PEER_PYTHON", sys.executable)
    peers, _ = find_peers(None, python)
    if not peers:
        pytest.skip(f"{python} has no peers; CTX_JAX_PEER_PYTHON names one that has")
    tokenizer, size = wordpiece(tmp_path)
    config = BertConfig(
        vocab_size=size, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_position_embeddings=32
    )
    made = with_random_weights(config)
    subject = lay_out("tiny", Pretrained(config, made.params, tokenizer), tmp_path / "tiny")
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("abcd es."), rng.integers(1, 60))) + "a" for _ in range(40)]
    setting = Setting(sys.executable, python, (), 1, repeats=2, peer_batch=8)
    for work, pool in (([Shape(3, 20)], None), ([Shape(3, 20)], "mean"), (lines, None)):
        (found,) = bench([subject], work, [dtype], peers, [], setting, pool=pool)
        assert {row.status for row in found.rows} <= {"measured", "left out"}, found.rows
        assert sum(row.status == "measured" for row in found.rows) >= 2
    static = static_of(subject)
    for work in (rows(static, Shape(2, 4), tmp_path), texts(static, lines, tmp_path)):
        assert work.tokens > 0
