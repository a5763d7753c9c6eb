"""Peers of a few lines, which need no other library, and a model for them."""

import pathlib

import numpy as np
import pytest

from ctx_jax.benchmark.peers import Peer
from ctx_jax.benchmark.race import Setting
from ctx_jax.benchmark.subjects import Subject
from ctx_jax.models.bert import BertConfig

PEER = """
import pathlib
import sys

import numpy as np


class Model:
    about = {{"device": "{device}", "versions": {{"numpy": np.__version__}}}}

    def __init__(self, folder):
        self.table = np.load(pathlib.Path(folder) / "table.npy") * {scale}
        self.log = pathlib.Path(folder) / "log.txt"
        self.runs = 0

    def forward(self, ids, mask):
        self.runs += 1
        if self.runs > {runs}:
            sys.exit("no more runs")
        with open(self.log, "a") as log:
            log.write("{name}\\n")
        print("talk that is no answer")
        return (self.table[ids] * mask[:, :, None]).astype(np.float32)

    def mean(self, ids, mask):
        return self.forward(ids, mask).mean(1)


def load(folder, options):
    return Model(folder)


def peak():
    names = ("bfloat16_flops_per_s", "float32_flops_per_s", "bytes_per_s", "memory_bytes", "tile")
    return dict.fromkeys(names, 1e9) | {{"source": "said here"}}
"""


@pytest.fixture
def make_peer(tmp_path):
    """A peer that looks vectors up, in a process of its own."""

    def make(name, *, scale=1.0, runs=1000, device="cpu", **fields) -> Peer:
        file = tmp_path / f"{name}.py"
        file.write_text(PEER.format(name=name, scale=scale, runs=runs, device=device))
        return Peer(name, file, **fields)

    return make


@pytest.fixture
def subject(tmp_path) -> Subject:
    config = BertConfig(
        vocab_size=40, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, max_position_embeddings=16
    )
    folder = tmp_path / "model"
    folder.mkdir()
    np.save(folder / "table.npy", np.random.default_rng(0).standard_normal((40, 8)))
    return Subject("tiny", config, folder, None)


@pytest.fixture
def setting(make_peer):
    import sys

    return Setting(sys.executable, sys.executable, (), 1, repeats=4, ours=make_peer("ours"))


@pytest.fixture
def log(subject):
    """Who ran, in order."""
    return lambda: pathlib.Path(subject.folder / "log.txt").read_text().split()
