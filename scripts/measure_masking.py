"""What drawing the masks costs: the time of `prepare` beside that of the whole training step, interleaved, as JSON.

python scripts/measure_masking.py CONFIG [--rows 32] [--length 128] [--repeats 15]
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from ctx_jax.arrays import Batch
from ctx_jax.cli import keep_memory, load_config
from ctx_jax.models.bert import BertWithHeads
from ctx_jax.nn.parameters import Bound
from ctx_jax.objectives.masking import Vocabulary
from ctx_jax.objectives.mlm import MaskedLM, MaskedLMObjective
from ctx_jax.train.step import init_state, make_train_step


def random_batch(rng: np.random.Generator, rows: int, length: int, vocab_size: int) -> Batch:
    """Full rows of one example each."""
    ids = rng.integers(1000, vocab_size, (rows, length)).astype(np.int32)
    ids[:, 0], ids[:, -1] = 101, 102
    ones = np.ones((rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    examples = np.arange(rows, dtype=np.uint32)[:, None]
    return Batch(ids, 0 * ones, ones, positions, examples, np.zeros(rows, np.uint32), np.full((rows, 1), -1, np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    keep_memory()
    experiment = load_config(arguments.config)
    rng = np.random.default_rng(0)
    size = experiment.model.vocab_size
    batch = jax.device_put(random_batch(rng, arguments.rows, arguments.length, size))
    continues = rng.random(size) < 0.3
    bound = Bound(lambda rngs: BertWithHeads(experiment.model, rngs=rngs))
    schedule = experiment.optimizer.schedule.over(experiment.steps)
    optimizer = dataclasses.replace(experiment.optimizer, schedule=schedule).build()

    for unit in ("token", "word", "span"):
        objective = MaskedLMObjective(
            MaskedLM(unit=unit),
            Vocabulary(size, 103, (0, 100, 101, 102, 103), continues),
            length=arguments.length,
            examples_per_row=1,
        )
        counts = jnp.asarray(objective.arguments)
        draw = jax.jit(lambda batch, counts: objective.prepare(batch, jnp.int32(0), counts)[0].masked)  # noqa: B023 (called within the round)
        step = jax.jit(make_train_step(bound, objective, optimizer, mask_seed=0, dropout_seed=1), donate_argnums=0)
        state = jax.jit(lambda key: init_state(bound, optimizer, key))(jax.random.key(0))
        times: dict[str, list[float]] = {"masks": [], "step": []}
        for repeat in range(arguments.repeats + 2):
            begin = time.perf_counter()
            jax.block_until_ready(draw(batch, counts))
            middle = time.perf_counter()
            state, sums = step(state, batch, counts)
            jax.block_until_ready((state, sums))
            if repeat >= 2:
                times["masks"].append(middle - begin)
                times["step"].append(time.perf_counter() - middle)
        masks, whole = (statistics.median(times[name]) for name in ("masks", "step"))
        record = {
            "config": arguments.config.name,
            "unit": unit,
            "rows": arguments.rows,
            "length": arguments.length,
            "masks_ms": round(1000 * masks, 3),
            "step_ms": round(1000 * whole, 1),
            "share_of_step": round(masks / whole, 5),
            "device": jax.devices()[0].device_kind,
            "machine": platform.processor() or platform.machine(),
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
