"""Serves one peer: reads requests as JSON lines and answers each with a JSON line. Standard library and NumPy only.

    python worker.py PEER.py CORES          CORES is a JSON list, [] to leave them as they are

    {"do": "load", "folder": …, "options": {…}, "inputs": FILE, "pool": "mean" or null}
                                                                  -> {"device": …, "versions": {…}}
    {"do": "run", "out": FILE or null}                            -> {"seconds": …}
    {"do": "memory"}                                              -> {"peak_bytes": …}
    {"do": "peak"}                                                -> what the device can do; only `ours.py` tells

Inputs are an .npz of ids and mask, of whose vectors `pool` makes one a row, or a JSON list of texts. Answers go out by
the standard output that the process began with; whatever else is printed goes to standard error.
"""

import importlib.util
import json
import os
import pathlib
import resource
import sys
import time
from typing import Any

import numpy as np


def _peer(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _inputs(file: str, pool: str | None) -> tuple[str, tuple[Any, ...]]:
    """The method that takes them, and its arguments."""
    if file.endswith(".npz"):
        with np.load(file) as arrays:
            return pool or "forward", (arrays["ids"], arrays["mask"])
    return "embed", (json.loads(pathlib.Path(file).read_text(encoding="utf-8")),)


def _peak_bytes() -> int:
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in units of 1024 bytes, macOS in bytes.
    return found if sys.platform == "darwin" else found * 1024


def main(file: str, cores: list[int]) -> None:
    """Answers until there are no more requests."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if cores:
        # Before any library counts them.
        os.sched_setaffinity(0, cores)
    peer = model = None
    method, arguments = "", ()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "load":
            peer = _peer(file)
            model = peer.load(request["folder"], request["options"])
            method, arguments = _inputs(request["inputs"], request["pool"])
            answer = model.about
        elif request["do"] == "run":
            begin = time.perf_counter()
            result = getattr(model, method)(*arguments)
            answer = {"seconds": time.perf_counter() - begin}
            if request["out"]:
                np.save(request["out"], result)
        elif request["do"] == "memory":
            answer = {"peak_bytes": _peak_bytes()}
        else:
            answer = peer.peak()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
