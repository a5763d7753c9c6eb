"""A second process compiles nothing, and encoding loads only what encoding needs."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from ctx_jax.compilation import keep_compiled
from ctx_jax.encoder import BertEncoder
from ctx_jax.interop.pretrained import Pretrained
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.interop.save import save
from ctx_jax.models.bert import BertConfig
from ctx_jax.text.load import load_tokenizer

CONFIG = BertConfig(
    vocab_size=600, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, max_position_embeddings=48
)
TEXTS = ["A set is empty.", "Names refer to objects."]
ENCODE = """
import json, sys
import jax
events = []
jax.monitoring.register_event_listener(lambda name, **about: events.append(name.rsplit("/", 1)[-1]))
from ctx_jax import Encoder
from ctx_jax.compilation import keep_compiled
folder = keep_compiled()
vectors = Encoder.from_pretrained(sys.argv[1]).encode(sys.argv[2:], pool="mean")
counts = {name: events.count(name) for name in ("cache_hits", "cache_misses")}
print(json.dumps({"folder": folder, "vectors": vectors.tolist(), "modules": sorted(sys.modules), **counts}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, topics_corpus):
    """A folder of Hugging Face's, and what it makes of the texts."""
    folder = tmp_path_factory.mktemp("model") / "model"
    params, tokenizer = bound_model(CONFIG).init(jax.random.key(0)), load_tokenizer(topics_corpus / "tokenizer")
    save(Pretrained(CONFIG, params, tokenizer), folder, "hugging-face", certificate=False)
    return folder, BertEncoder(CONFIG, params, tokenizer).encode(TEXTS, pool="mean")


def encode(model, *, warnings="error", **environment):
    """What a process of its own finds, and what it says on standard error."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", ENCODE, str(model), *TEXTS],
        env=own | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def home(model, tmp_path_factory):
    """A cache folder that one process has filled, and what that process found."""
    home = tmp_path_factory.mktemp("cache")
    return home, *encode(model[0], XDG_CACHE_HOME=str(home))


def test_a_second_process_compiles_nothing(model, home):
    home, first, said = home
    assert not said
    assert first["folder"] == str(home / "ctx_jax" / "compiled")
    assert first["cache_misses"] == len(list(pathlib.Path(first["folder"]).glob("*-cache"))) > 0
    assert first["cache_hits"] == 0
    second, said = encode(model[0], XDG_CACHE_HOME=str(home))
    assert not said
    assert second["cache_hits"] == first["cache_misses"]
    assert second["cache_misses"] == 0
    assert second["vectors"] == first["vectors"]  # bit for bit
    np.testing.assert_allclose(first["vectors"], model[1], rtol=1e-5, atol=2e-6)


def test_an_entry_that_was_cut_short_is_compiled_again(model, home):
    home, first, _ = home
    whole = {entry: entry.read_bytes() for entry in pathlib.Path(first["folder"]).glob("*-cache")}
    for entry, content in whole.items():
        entry.write_bytes(content[: len(content) // 2])
    found, said = encode(model[0], warnings="always", XDG_CACHE_HOME=str(home))
    for entry, content in whole.items():
        entry.write_bytes(content)
    assert found["vectors"] == first["vectors"]
    assert said.count("Error reading persistent compilation cache entry") == len(whole)


def test_encoding_loads_only_what_encoding_needs(home):
    loaded = {name.split(".")[0] for name in home[1]["modules"]}
    assert not loaded & {"orbax", "tensorflow_datasets", "tensorflow", "grain", "h5py", "torch", "transformers"}
    ours = {".".join(name.split(".")[:2]) for name in home[1]["modules"] if name.startswith("ctx_jax.")}
    assert "ctx_jax.encoder" in ours
    # No training, whose optax Flax itself imports; and no writing of models, with their cost on their cards.
    assert not ours & {"ctx_jax.train", "ctx_jax.experiment", "ctx_jax.data", "ctx_jax.flops", "ctx_jax.cli"}
    assert "ctx_jax.interop.save" not in home[1]["modules"]


def test_what_jax_was_told_holds(model, tmp_path):
    told = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "told"), "XDG_CACHE_HOME": str(tmp_path / "home")}
    assert encode(model[0], **told)[0]["folder"] == told["JAX_COMPILATION_CACHE_DIR"]
    assert list((tmp_path / "told").glob("*-cache"))
    off = encode(model[0], JAX_ENABLE_COMPILATION_CACHE="false", XDG_CACHE_HOME=str(tmp_path / "home"))[0]
    assert off["folder"] is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["told"]


@pytest.fixture
def settings(monkeypatch):
    """JAX's settings of the cache, as they are without any; put back afterwards."""
    from jax.experimental.compilation_cache import compilation_cache

    names = ("enable_compilation_cache", "compilation_cache_dir", "persistent_cache_min_compile_time_secs")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_one(number):
    jax.jit(lambda x: x * number + 1)(np.float32(1)).block_until_ready()


def test_where_it_is_kept(settings, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    own = str(tmp_path / "home" / "ctx_jax" / "compiled")
    assert keep_compiled() == own
    compile_one(3)
    assert len(os.listdir(own)) == 1
    assert os.stat(own).st_mode & 0o077 == 0
    # Another folder, from now on; and what JAX was told is not changed by asking again.
    assert keep_compiled(tmp_path / "other") == keep_compiled() == str(tmp_path / "other")
    compile_one(4)
    assert (len(os.listdir(own)), len(os.listdir(tmp_path / "other"))) == (1, 1)
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, "ctx_jax.compilation"):
        assert keep_compiled(tmp_path / "file" / "within") is None
    assert "within: cannot be written (Not a directory)" in caplog.text
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_compiled(tmp_path / "third") is None
    assert not (tmp_path / "third").exists()


def test_the_least_time_that_jax_was_told_holds(settings, tmp_path, monkeypatch):
    assert keep_compiled(tmp_path)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "2")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)
    assert keep_compiled(tmp_path)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 2
