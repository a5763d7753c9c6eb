"""Probes of all layers and seeds trained together, beside the same layer by layer and each by itself, in turn, as JSON.

python scripts/measure_probes.py [--layers 13] [--width 768] [--classes 17] [--examples 20000] [--seeds 5]
    [--epochs 5] [--repeats 5]

Vectors are random; all ways end with the same held-out losses, which is checked first. By itself every probe is the
first seed's: the same work.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import time

import jax
import numpy as np

from ctx_jax.atlas.features import Features
from ctx_jax.atlas.probes.kinds import MLP, Linear
from ctx_jax.atlas.probes.sources import SpanSource
from ctx_jax.atlas.probes.training import Fitted, Training, fit

WITHIN = 1e-4
"""Nats of held-out loss. The tests ask more, of parameters too, on the processor and of few steps; after hundreds, with
sums in another order, some ReLU of an MLP may have been on the other side of 0 for an example, and a weight is a step
apart.
"""


def source(vectors: np.ndarray, labels: np.ndarray) -> SpanSource:
    """Of words, each an example."""
    count = len(vectors)
    spans = np.stack([np.arange(count), np.arange(count) + 1], 1)
    return SpanSource(Features(vectors, np.array([0, count])), (spans,), labels)


def ratio(own: list[float], others: list[float]) -> float:
    """The median of theirs over ours, pair by pair."""
    return round(statistics.median(theirs / ours for ours, theirs in zip(own, others, strict=True)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"layers": 13, "width": 768, "classes": 17, "examples": 20000, "seeds": 5, "epochs": 5, "repeats": 5}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(given.examples, given.layers, given.width)).astype(np.float32)
    labels = rng.integers(0, given.classes, given.examples)
    training, key, held = Training(epochs=given.epochs, seeds=given.seeds), jax.random.key(0), given.examples // 10
    whole = source(vectors, labels), source(vectors[:held], labels[:held])
    single = [[source(np.ascontiguousarray(vectors[:count, layer : layer + 1]), labels[:count])
               for count in (given.examples, held)] for layer in range(given.layers)]  # fmt: skip
    for kind in (Linear, MLP):
        probe = kind(given.width, given.classes)

        def together(probe: Linear | MLP = probe) -> Fitted:
            return jax.block_until_ready(fit(probe, *whole, training, key))

        def alone(probe: Linear | MLP = probe) -> list[Fitted]:
            return [jax.block_until_ready(fit(probe, *pair, training, key)) for pair in single]

        def each(probe: Linear | MLP = probe) -> list[Fitted]:
            first = dataclasses.replace(training, seeds=1)
            fits = [jax.block_until_ready(fit(probe, *pair, first, key)) for _ in range(given.seeds) for pair in single]
            return fits[: given.layers]

        one, others, firsts = together(), alone(), each()
        pairs = [(layer, other) for ways in (others, firsts) for layer, other in enumerate(ways)]
        apart = max(
            float(np.abs(np.asarray(leaf)[: len(found), layer] - found[:, 0]).max())
            for layer, other in pairs
            for name, leaf in one.params.items()
            for found in [np.asarray(other.params[name])]
        )
        losses = max(
            float(np.abs(one.loss[: len(other.loss), layer] - other.loss[:, 0]).max()) for layer, other in pairs
        )
        runs = {"together": together, "layer by layer": alone, "each by itself": each}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(given.repeats):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
        record = {
            "date": datetime.date.today().isoformat(),
            "device": jax.devices()[0].device_kind,
            "probe": kind.__name__,
            **{name: getattr(given, name) for name in ("layers", "width", "classes", "examples", "seeds", "epochs")},
            "largest_difference": apart,
            "largest_difference_of_losses": float(losses),
            "median_s": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
            "times_as_fast": {name: ratio(seconds["together"], times) for name, times in seconds.items()},
        }
        print(json.dumps(record), flush=True)
        if not losses < WITHIN:
            raise SystemExit(f"{kind.__name__}: losses differ by {losses:.1e} nats, expected {WITHIN:g} at most")


if __name__ == "__main__":
    main()
