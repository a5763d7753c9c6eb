"""Strict JAX for every test, eight devices on the host, and the way to the reference numbers."""

import os
import pathlib

# Nearly all the time of the tests is compilation; without LLVM's optimisations it takes a third.
QUICK_COMPILE = "--xla_backend_optimization_level=0"
# Eight devices on a busy machine wait for each other longer than the 40 seconds after which XLA ends the process.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
FLAGS = f"--xla_force_host_platform_device_count=8 {QUICK_COMPILE} {PATIENCE}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The command keeps what it compiles; tests write into nobody's home.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def _shared(variable: str, folder: str) -> pathlib.Path:
    path = pathlib.Path(os.environ.get(variable, ROOT.parent / "shared" / folder))
    if not path.is_dir():
        pytest.skip(f"{variable} is not set and {path} does not exist")
    return path


@pytest.fixture(scope="session")
def reference() -> pathlib.Path:
    """Folder of the numbers that the original implementations gave."""
    return _shared("CTX_JAX_REFERENCE", "reference")


@pytest.fixture(scope="session")
def data() -> pathlib.Path:
    """Folder of real text, labels and vocabularies."""
    return _shared("CTX_JAX_DATA", "data")


@pytest.fixture(scope="session")
def topics_corpus(tmp_path_factory) -> pathlib.Path:
    """The text that every CPython carries, tokenised with a vocabulary of 600 trained on it."""
    from ctx_jax.data.build import build
    from ctx_jax.data.sources import find_sources, read_documents
    from ctx_jax.text.sentencepiece_training import train_sentencepiece

    folder = tmp_path_factory.mktemp("topics")
    (source,) = find_sources(["python:topics"])
    texts = (sentence for document in read_documents(source) for sentence in document.sentences)
    tokenizer = train_sentencepiece(texts, 600, folder / "tokenizer")
    build({"train": ["python:topics"]}, tokenizer, folder / "corpus", processes=1, holdout=0.1, show_progress=False)
    return folder / "corpus"


@pytest.fixture(scope="session")
def words_corpus(tmp_path_factory) -> pathlib.Path:
    """The same text as whole words, every one of them in the vocabulary."""
    from ctx_jax import cli

    out = tmp_path_factory.mktemp("words") / "corpus"
    words = ["data", "build", "python:topics", "--out", str(out), "--train-words", "1000000", "--holdout", "0.1"]
    assert cli.main([*words, "--processes", "1"]) == 0
    return out
