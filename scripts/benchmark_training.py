"""A training step of BERT-mini on the processor beside Hugging Face's BERT in PyTorch: same sizes, rows and optimizer.

python scripts/benchmark_training.py [--dtypes float32 bfloat16] [--rows 32] [--length 128] [--repeats 9]
    [--torch-python PYTHON] [--compiled]

Both take a masked-LM step of AdamW with dropout 0.1 on rows of random words, 15 % of them masked; ours draws the masks
in the step, PyTorch is given them. Each runs in a process of its own, PyTorch with another Python if need be, with as
many threads and the same setting of malloc; the steps are taken in turn. Then the input pipeline alone: how many rows a
second the loader gives of a corpus of random words, beside what a step takes. One JSON line for each type.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(256 << 20)}
"""ctx_jax.cli.keep_memory, for both."""
PROCESSOR = {"JAX_PLATFORMS": "cpu"}
SIZES = {"vocab_size": 30522, "hidden_size": 256, "num_layers": 4, "num_heads": 4, "intermediate_size": 1024}
RATE = 0.15


def serve_torch(settings: dict) -> None:
    """Takes a step for every line that comes, and answers with its seconds and loss."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=SIZES["hidden_size"],
        num_hidden_layers=SIZES["num_layers"],
        num_attention_heads=SIZES["num_heads"],
        intermediate_size=SIZES["intermediate_size"],
    )
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    shape = settings["rows"], settings["length"]
    ids = torch.randint(1000, SIZES["vocab_size"], shape)
    chosen = torch.rand(shape) < RATE
    labels = torch.where(chosen, ids, -100)
    masked = torch.where(chosen, 103, ids)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings["dtype"] == "bfloat16")
    forward = torch.compile(model) if settings["compiled"] else model

    def step() -> float:
        with autocast:
            loss = forward(input_ids=masked, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = step()
        print(json.dumps({"seconds": time.perf_counter() - begin, "loss": loss}), flush=True)


def serve_ours(settings: dict) -> None:
    """The same by the step that `ctx-jax pretrain` compiles."""
    import jax
    import numpy as np

    from ctx_jax.arrays import Batch
    from ctx_jax.data.plan import RowsConfig
    from ctx_jax.experiment import Experiment
    from ctx_jax.experiment.assembly import assemble
    from ctx_jax.models.bert import BertConfig
    from ctx_jax.objectives.masking import Vocabulary
    from ctx_jax.objectives.mlm import MaskedLM
    from ctx_jax.train.optimizer import Optimizer
    from ctx_jax.train.schedules import Schedule

    rows, length = settings["rows"], settings["length"]
    experiment = Experiment(
        data="none",
        model=BertConfig(**SIZES, pooler=False, dtype=settings["dtype"]),
        rows=RowsConfig(length=length),
        objective=MaskedLM(),
        optimizer=Optimizer("adamw", Schedule("constant", 1e-4)),
        batch_size=rows,
    )
    vocabulary = Vocabulary(SIZES["vocab_size"], 103, (0, 100, 101, 102, 103), np.zeros(SIZES["vocab_size"], bool))
    parts = assemble(experiment, vocabulary)
    ids = np.random.default_rng(0).integers(1000, SIZES["vocab_size"], (rows, length)).astype(np.int32)
    zeros, places = np.zeros_like(ids), np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    examples = np.arange(rows, dtype=np.uint32)[:, None]
    none = np.full((rows, 1), -1, np.int32)
    batch = jax.device_put(Batch(ids, zeros, zeros + 1, places, examples, np.zeros(rows, np.uint32), none))
    state = jax.jit(parts.init)(jax.random.key(0, impl="threefry2x32"))
    arguments = jax.device_put(parts.objective.arguments)
    step = jax.jit(parts.step, donate_argnums=0)

    for _ in sys.stdin:
        begin = time.perf_counter()
        state, sums = step(state, batch, arguments)
        loss = float(sums["mlm_loss"]) / float(sums["mlm_weight"])
        print(json.dumps({"seconds": time.perf_counter() - begin, "loss": loss}), flush=True)


def loader_rows_per_s(rows: int, length: int, batches: int = 200) -> float:
    """Of the loader alone, with its threads, on a corpus of random words."""
    import numpy as np

    from ctx_jax import cli
    from ctx_jax.data.corpus import Corpus
    from ctx_jax.data.loader import Loader
    from ctx_jax.data.plan import RowsConfig

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        letters = np.array(list("etaoinshrdlu"))
        words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 9, 5000)]
        text = "\n\n".join("\n".join(" ".join(rng.choice(words, 20)) + "." for _ in range(10)) for _ in range(2000))
        (folder / "text.txt").write_text(text)
        arguments = ["data", "build", str(folder / "text.txt"), "--out", str(folder / "corpus")]
        if cli.main([*arguments, "--train-vocab", "2000", "--holdout", "0.01"]):
            raise SystemExit("the corpus was not built")
        config = RowsConfig(length=length, examples_per_row=8)
        stream = Loader(Corpus(str(folder / "corpus"), "train"), config).batches(rows)
        next(stream)
        begin = time.perf_counter()
        for _ in range(batches):
            next(stream)
        return batches * rows / (time.perf_counter() - begin)


class Side:
    """One of the two, in a process of its own."""

    def __init__(self, python: str, which: str, settings: dict):
        command = [python, __file__, "--serve", which, "--settings", json.dumps(settings)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | KEEP_MEMORY | PROCESSOR
        )

    def step(self) -> dict:
        """Takes one."""
        print("step", file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a side ended; see above")
        return json.loads(line)

    def close(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Measures, and prints a line for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--compiled", action="store_true", help="torch.compile the peer")
    parser.add_argument("--serve", choices=["torch", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        (serve_torch if given.serve == "torch" else serve_ours)(json.loads(given.settings))
        return
    threads = len(os.sched_getaffinity(0))
    rate = loader_rows_per_s(given.rows, given.length)
    for dtype in given.dtypes:
        settings = {
            "dtype": dtype, "rows": given.rows, "length": given.length, "threads": threads, "compiled": given.compiled
        }  # fmt: skip
        sides = {
            "ctx_jax": Side(sys.executable, "ours", settings), "torch": Side(given.torch_python, "torch", settings)
        }  # fmt: skip
        try:
            for _ in range(2):
                first = {name: side.step() for name, side in sides.items()}
            taken = {name: [] for name in sides}
            for _ in range(given.repeats):
                for name, side in sides.items():
                    taken[name].append(side.step()["seconds"])
        finally:
            for side in sides.values():
                side.close()
        medians = {name: statistics.median(times) for name, times in taken.items()}
        record = {
            "date": datetime.date.today().isoformat(),
            "dtype": dtype,
            "rows": given.rows,
            "length": given.length,
            "threads": threads,
            "torch_compiled": given.compiled,
            "median_ms": {name: round(1e3 * seconds, 1) for name, seconds in medians.items()},
            "spread_ms": {name: [round(1e3 * t, 1) for t in (min(times), max(times))] for name, times in taken.items()},
            "torch_over_ctx_jax": round(medians["torch"] / medians["ctx_jax"], 2),
            "first_losses": {name: round(step["loss"], 3) for name, step in first.items()},
            "loader_rows_per_s": round(rate),
            "loader_over_step": round(rate * medians["ctx_jax"] / given.rows, 1),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
