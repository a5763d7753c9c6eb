"""Loading takes little more memory than the weights: a mapped file's pages go as soon as they are copied."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from ctx_jax.interop import hugging_face
from ctx_jax.interop.files.safetensors_file import write_safetensors
from ctx_jax.interop.names import FAMILIES, PYTORCH, bert_table
from ctx_jax.models.bert import BertConfig, BertWithHeads
from ctx_jax.nn.parameters import Bound, flat_paths

MEASURE = """
import pathlib, sys

def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

import jax
import jax.numpy as jnp
from ctx_jax.interop.load import load

jnp.ones(3).block_until_ready()
before = peak()
params = load(sys.argv[1]).params
jax.block_until_ready(params)
print(peak() - before)
"""


def peak_over_size(config, folder):
    """A file of zeros is as large as any other."""
    leaves = flat_paths(Bound(lambda rngs: BertWithHeads(config, rngs=rngs)).shapes)
    tensors = {}
    for entry in bert_table(config, FAMILIES["bert"], PYTORCH, prefix="bert."):
        leaf = np.broadcast_to(np.float32(0), leaves[entry.ours].shape)
        tensors |= {part.theirs: part.view(leaf) for part in entry.parts}
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hugging_face.write_config(config)))
    size = (folder / "model.safetensors").stat().st_size
    # Measured as users run it, without the tests' flags.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"},
    )
    return int(done.stdout) / size, size


@pytest.fixture(autouse=True)
def linux():
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("peaks are read from /proc")


def test_a_small_model_peaks_below_1_3_of_its_size(tmp_path):
    ratio, size = peak_over_size(BertConfig(20_000, 1024, 4, 16, 4096), tmp_path / "model")
    assert 2e8 < size < 4e8
    assert ratio < 1.3


@pytest.mark.slow
def test_bert_large_peaks_below_1_3_of_its_size(tmp_path):
    ratio, size = peak_over_size(BertConfig(30_522, 1024, 24, 16, 4096), tmp_path / "model")
    assert size > 1.3e9
    assert ratio < 1.3
