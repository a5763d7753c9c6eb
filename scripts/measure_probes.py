"""Probes of all layers trained together beside the same trained one layer after the other, in turn, as JSON.

python scripts/measure_probes.py [--layers 13] [--width 768] [--classes 17] [--examples 20000] [--seeds 5] [--repeats 5]

Vectors are random; both ways end with the same probes, which is checked first.
"""

import argparse
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
"""Of parameters, which on a GPU are sums in another order; the tests, on the processor, ask for less."""


def source(vectors: np.ndarray, labels: np.ndarray) -> SpanSource:
    """Of words, each an example."""
    count = len(vectors)
    spans = np.stack([np.arange(count), np.arange(count) + 1], 1)
    return SpanSource(Features(vectors, np.array([0, count])), (spans,), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"layers": 13, "width": 768, "classes": 17, "examples": 20000, "seeds": 5, "repeats": 5}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(given.examples, given.layers, given.width)).astype(np.float32)
    labels = rng.integers(0, given.classes, given.examples)
    training, key, held = Training(epochs=2, seeds=given.seeds), jax.random.key(0), given.examples // 10
    whole = source(vectors, labels), source(vectors[:held], labels[:held])
    single = [[source(np.ascontiguousarray(vectors[:count, layer : layer + 1]), labels[:count])
               for count in (given.examples, held)] for layer in range(given.layers)]  # fmt: skip
    for kind in (Linear, MLP):
        probe = kind(given.width, given.classes)

        def together(probe: Linear | MLP = probe) -> Fitted:
            return jax.block_until_ready(fit(probe, *whole, training, key))

        def alone(probe: Linear | MLP = probe) -> list[Fitted]:
            return [jax.block_until_ready(fit(probe, *pair, training, key)) for pair in single]

        one, others = together(), alone()
        apart = max(
            float(np.abs(np.asarray(leaf)[:, layer] - np.asarray(other.params[name])[:, 0]).max())
            for layer, other in enumerate(others)
            for name, leaf in one.params.items()
        )
        if not apart < WITHIN:
            raise SystemExit(f"{kind.__name__}: parameters differ by {apart:.1e}, expected {WITHIN:g} at most")
        seconds: dict[str, list[float]] = {"together": [], "alone": []}
        for _ in range(given.repeats):
            for name, run in (("together", together), ("alone", alone)):
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
        record = {
            "date": datetime.date.today().isoformat(),
            "device": jax.devices()[0].device_kind,
            "probe": kind.__name__,
            **{name: getattr(given, name) for name in ("layers", "width", "classes", "examples", "seeds")},
            "largest_difference": apart,
            "median_s": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
            "times_as_fast": round(statistics.median(a / t for t, a in zip(*seconds.values(), strict=True)), 2),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
