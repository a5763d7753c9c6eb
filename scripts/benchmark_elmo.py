"""ELMo on the processor beside PyTorch: same weights, equal outputs, runs in turn, ratios of medians, as JSON lines.

python scripts/benchmark_elmo.py [--dtypes float32 bfloat16] [--repeats 9] [--sentences 1000] [--cores N]
    [--torch-python PYTHON]

The floor comes first: the products' FLOPs over the measured peak, and the weights' bytes over the measured bandwidth.
Then, at 8 × 64 words from word vectors: PyTorch's `nn.LSTM(proj_size=…)`, which has neither clips nor skip connections
(nor has ours beside it), and AllenNLP's loop over steps, which has both. Then real sentences, from characters to all
layers: the library's encoder beside AllenNLP's model on padded batches in the order of the text. PyTorch runs in a
process of its own, with another Python if need be, and with the same setting of malloc.

On a machine that others use too, `--cores 1` is the comparison to trust: times are then those of the processor, and the
others' work does not count. PyTorch's threads wait for each other, and lose more than their share to others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import lzma
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

ROWS, STEPS, PEER_BATCH = 8, 64, 32
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.1}
"""Of the largest difference, beside the largest value."""
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(256 << 20)}
"""ctx_jax.cli.keep_memory, for the peer."""


def clock() -> Callable[[], float]:
    """Of the processor where there is one core, so that no other process is measured; else of the wall."""
    return time.process_time if len(os.sched_getaffinity(0)) == 1 else time.perf_counter


def read_bytes_per_s(values: int = 1 << 25, seconds: float = 1.0) -> float:
    """Memory that is read and not written, as weights are."""
    x, now = np.ones(values, np.float32), clock()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = now()
        np.dot(x, x)
        best = min(best, now() - begin)
    return x.nbytes / best


def serve(folder: pathlib.Path) -> None:
    """The peer: reads the weights once, then runs what each line asks for and answers with the seconds it took."""
    import torch
    from torch.nn import functional as F

    weights = {name: torch.from_numpy(value) for name, value in np.load(folder / "weights.npz").items()}
    given = {name: torch.from_numpy(value) for name, value in np.load(folder / "inputs.npz").items()}
    options = json.loads((folder / "options.json").read_text())
    clips, layers = options["clips"], range(options["layers"])

    def linear(name: str, dtype: torch.dtype) -> torch.Tensor:
        """As PyTorch keeps it: outputs first."""
        value = weights[f"{name}"]
        return value.reshape(value.shape[0], -1).T.contiguous().to(dtype)

    def cells(dtype: torch.dtype) -> dict[tuple[str, int], tuple[torch.Tensor, ...]]:
        """Input, recurrent, bias with the forget gate's 1, projection of each LSTM; gates i, j, f, o as they stand."""
        found = {}
        for direction in ("forward", "backward"):
            for layer in layers:
                name = f"encoder/{direction}/{layer}"
                bias = weights[f"{name}/bias"].clone()
                bias[2] += 1
                kernels = [linear(f"{name}/{kernel}_kernel", dtype) for kernel in ("input", "recurrent")]
                found[direction, layer] = (*kernels, bias.reshape(-1).to(dtype), linear(f"{name}/projection", dtype))
        return found

    def nn_lstm(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        modules = []
        for direction in ("forward", "backward"):
            first = cells(dtype)[direction, 0]
            size, width = first[3].shape
            module = torch.nn.LSTM(size, width, len(layers), batch_first=True, proj_size=size).to(dtype)
            swap = lambda x: torch.cat([x.chunk(4)[gate] for gate in (0, 2, 1, 3)])  # i, f, j, o
            for layer in layers:
                kernel, recurrent, bias, projection = cells(dtype)[direction, layer]
                values = (swap(kernel), swap(recurrent), swap(bias), torch.zeros_like(bias), projection)
                for parameter, value in zip(module.all_weights[layer], values, strict=True):
                    parameter.data.copy_(value)
            modules.append(module)
        x = given["vectors"].to(dtype)
        return lambda: torch.cat([modules[0](x)[0], modules[1](x.flip(1))[0].flip(1)], dim=-1)

    def allennlp_lstm(x: torch.Tensor, lengths: list[int], forward: bool, cell: tuple[torch.Tensor, ...]):
        """allennlp/modules/lstm_cell_with_projection.py, line by line; rows stand longest first."""
        kernel, recurrent, bias, projection = cell
        rows, steps, size = x.shape
        width = projection.shape[1]
        outputs, all_memory, all_state = (
            x.new_zeros(rows, steps, size),
            x.new_zeros(rows, width),
            x.new_zeros(rows, size),
        )
        last = rows - 1 if forward else 0
        for step in range(steps):
            index = step if forward else steps - step - 1
            if forward:
                while lengths[last] <= index:
                    last -= 1
            else:
                while last < rows - 1 and lengths[last + 1] > index:
                    last += 1
            memory, state = all_memory[: last + 1].clone(), all_state[: last + 1].clone()
            of_input, of_state = F.linear(x[: last + 1, index], kernel), F.linear(state, recurrent, bias)
            i, j, f, o = (a + b for a, b in zip(of_input.chunk(4, 1), of_state.chunk(4, 1), strict=True))
            memory = torch.sigmoid(i) * torch.tanh(j) + torch.sigmoid(f) * memory
            memory = torch.clamp(memory, -clips[0], clips[0])
            state = F.linear(torch.sigmoid(o) * torch.tanh(memory), projection)
            state = torch.clamp(state, -clips[1], clips[1])
            all_memory, all_state = all_memory.clone(), all_state.clone()
            all_memory[: last + 1], all_state[: last + 1] = memory, state
            outputs[: last + 1, index] = state
        return outputs

    def allennlp_layers(x: torch.Tensor, lengths: list[int], lstms: dict) -> torch.Tensor:
        forward = backward = x
        found = [torch.cat([x, x], dim=-1)]
        for layer in layers:
            before = forward, backward
            forward = allennlp_lstm(forward, lengths, True, lstms["forward", layer])
            backward = allennlp_lstm(backward, lengths, False, lstms["backward", layer])
            if layer:
                forward, backward = forward + before[0], backward + before[1]
            found.append(torch.cat([forward, backward], dim=-1))
        return torch.stack(found)

    def loop(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        lstms, x = cells(dtype), given["vectors"].to(dtype)
        return lambda: allennlp_layers(x, [x.shape[1]] * x.shape[0], lstms)

    def sentences(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """allennlp/modules/elmo.py: _ElmoCharacterEncoder, then sort_and_run_forward over _lstm_forward."""
        lstms = cells(dtype)
        table = torch.cat([torch.zeros(1, weights["encoder/words/table"].shape[1]), weights["encoder/words/table"]])
        name = "encoder/words"
        count = sum(key.startswith(f"{name}/kernels/") for key in weights)
        kernels = [weights[f"{name}/kernels/{n}"].permute(2, 1, 0).contiguous().to(dtype) for n in range(count)]
        biases = [weights[f"{name}/biases/{n}"].to(dtype) for n in range(count)]
        affine = lambda key: (linear(f"{key}/kernel", dtype), weights[f"{key}/bias"].reshape(-1).to(dtype))
        highway = [affine(f"{name}/highway/{n}") for n in range(options["highway"])]
        projection, table = affine(f"{name}/projection"), table.to(dtype)
        ids, lengths = given["ids"], given["lengths"]

        def batch(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            characters = F.embedding(ids.reshape(-1, ids.shape[-1]).long(), table).transpose(1, 2)
            found = [
                torch.relu(F.conv1d(characters, *kernel).max(-1)[0]) for kernel in zip(kernels, biases, strict=True)
            ]
            x = torch.cat(found, dim=-1)
            for layer in highway:
                transform, gate = F.linear(x, *layer).chunk(2, dim=-1)
                gate = torch.sigmoid(gate)
                x = gate * torch.relu(transform) + (1 - gate) * x
            x = F.linear(x, *projection).reshape(*ids.shape[:2], -1)
            x = x * (ids != 0).any(-1, keepdim=True)
            order = torch.argsort(lengths, descending=True, stable=True)
            return allennlp_layers(x[order], lengths[order].tolist(), lstms)[:, torch.argsort(order)]

        def run() -> torch.Tensor:
            found = []
            for begin in range(0, len(ids), PEER_BATCH):
                some = slice(begin, begin + PEER_BATCH)
                longest = int(lengths[some].max())
                layers = batch(ids[some, :longest], lengths[some])
                found += [row[:, 1 : length - 1] for row, length in zip(layers.unbind(1), lengths[some], strict=True)]
            return torch.cat(found, dim=1)

        return run

    made: dict[str, Callable[[], torch.Tensor]] = {}
    now = clock()
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            kind, dtype, out = json.loads(line)
            if f"{kind} {dtype}" not in made:
                made.clear()
                make = {"nn.LSTM": nn_lstm, "AllenNLP's loop": loop, "AllenNLP's ELMo": sentences}[kind]
                made[f"{kind} {dtype}"] = make(getattr(torch, dtype))
            begin = now()
            result = made[f"{kind} {dtype}"]()
            seconds = now() - begin
            if out:
                np.save(out, result.float().numpy())
            print(json.dumps(seconds), flush=True)


class Peer:
    """The process in which PyTorch runs; it waits while we run."""

    def __init__(self, python: str, folder: pathlib.Path):
        command, environment = [python, __file__, "--serve", str(folder)], {**os.environ, **KEEP_MEMORY}
        pipe = subprocess.PIPE
        self._folder = folder
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.about = self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the peer ended; is torch installed in the Python of --torch-python?")
        return json.loads(line)

    def run(self, kind: str, dtype: str, out: str | None = None) -> float:
        print(json.dumps([kind, dtype, out]), file=self._process.stdin, flush=True)
        return self._answer()

    def result(self, kind: str, dtype: str) -> np.ndarray:
        self.run(kind, dtype, str(self._folder / "out.npy"))
        return np.load(self._folder / "out.npy")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def wikipedia(count: int) -> list[list[str]]:
    """So many sentences of the test text, or none where the text is not at hand."""
    from ctx_jax.text.words import split_words

    shared = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    file = pathlib.Path(os.environ.get("CTX_JAX_DATA", shared)) / "wikipedia_en" / "wiki.test.txt.xz"
    if not file.is_file():
        print(f"{file} is not there: no sentences are measured", file=sys.stderr)
        return []
    found: list[list[str]] = []
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith(("<doc ", "</doc>")):
                found += filter(None, map(split_words, re.split(r"(?<=[.!?])\s+", line)))
            if len(found) >= count:
                break
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(TOLERANCE))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--sentence-repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of the library's encoder")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--serve", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    # Before anything counts them.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.cores :])
    now = clock()

    import jax
    import jax.numpy as jnp

    from ctx_jax.cli import keep_memory
    from ctx_jax.encoder.elmo import ElmoEncoder
    from ctx_jax.flops.devices import measured_cpu_peak
    from ctx_jax.flops.elmo import elmo_cost
    from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining
    from ctx_jax.nn.parameters import Bound, flat_paths
    from ctx_jax.text.characters import Characters

    keep_memory()
    # No word is predicted here.
    config = ElmoConfig(vocab_size=4)
    plain = {"cell_clip": None, "projection_clip": None, "skip_connections": False}
    params = Bound(lambda rngs: ElmoForPreTraining(config, rngs=rngs)).init(jax.random.key(0))
    vectors = np.random.default_rng(0).standard_normal((ROWS, STEPS, config.projection_dim), np.float32)
    sentences = wikipedia(arguments.sentences)
    ids, lengths = Characters().batch(sentences or [["none"]])

    def ours(kind: str, dtype: str) -> Callable[[], np.ndarray]:
        """What stands beside the peer's run of this name, weights in the type of the computation."""
        size = dataclasses.replace(config, dtype=dtype, **(plain if kind == "nn.LSTM" else {}))
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)
        if kind == "AllenNLP's ELMo":

            def encode() -> np.ndarray:
                # A new encoder every time: it knows no word yet.
                encoder = ElmoEncoder(size, cast)
                encoder._words, encoder._contextualise = compiled._words, compiled._contextualise
                found = encoder.encode(sentences, batch_tokens=arguments.batch_tokens)
                return found.layers[:, found.mask]

            compiled = ElmoEncoder(size, cast)
            return encode
        bound = Bound(lambda rngs: ElmoForPreTraining(size, rngs=rngs))

        @jax.jit
        def forward(params: Any, vectors: jax.Array) -> jax.Array:
            full = jnp.full(ROWS, STEPS, jnp.int32)
            found, _ = bound(params).encoder.contextualise(vectors, full, all_layers=kind != "nn.LSTM")
            return found.last if found.layers is None else found.layers

        x = jnp.asarray(vectors, dtype)
        return lambda: forward(cast, x).block_until_ready()

    def floor(dtype: str, rows: int, steps: int, words: float = 1.0) -> dict[str, Any]:
        """The least time of the LSTMs, and of the word parts for a share of the words.

        A step reads the recurrent kernel and the projection of one LSTM anew, which is what counts while a batch is
        small; that some of it may stay in the cache is not counted.
        """
        cost, peak = elmo_cost(dataclasses.replace(config, dtype=dtype), rows=rows, length=steps), measured_cpu_peak()
        lstms = sum(part.matrix_flops for part in cost.parts if part.name == "LSTMs")
        flops = lstms + words * (cost.matrix_flops - lstms)
        width, cells = config.projection_dim, config.lstm_dim
        size = 4 if dtype == "float32" else 2
        moved = 2 * config.num_layers * size * (steps * 5 * width * cells + 4 * width * cells)
        return {
            "GFLOP": round(flops / 1e9, 1),
            "weights_GB": round(moved / 1e9, 1),
            "peak_GFLOP_per_s": round(peak.flops_per_s(dtype) / 1e9),
            "GB_per_s": round(bandwidth / 1e9, 1),
            "compute_ms": round(1000 * flops / peak.flops_per_s(dtype)),
            "memory_ms": round(1000 * moved / bandwidth),
        }

    bandwidth = read_bytes_per_s()

    def compare(kind: str, dtype: str, repeats: int) -> dict[str, Any]:
        run = ours(kind, dtype)
        mine, theirs = np.asarray(run(), np.float32), peer.result(kind, dtype)
        difference = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
        if not difference < TOLERANCE[dtype]:
            sys.exit(f"{kind} in {dtype}: outputs differ by {difference:.1e}, expected {TOLERANCE[dtype]} at most")
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(repeats):
            begin = now()
            run()
            times["ours"].append(now() - begin)
            times["theirs"].append(peer.run(kind, dtype))
        medians = {name: statistics.median(values) for name, values in times.items()}
        best = {name: min(values) for name, values in times.items()}
        return {
            "beside": kind,
            "dtype": dtype,
            "ours_ms": round(1000 * medians["ours"]),
            "theirs_ms": round(1000 * medians["theirs"]),
            "ratio": round(medians["theirs"] / medians["ours"], 2),
            "ratio_of_shortest": round(best["theirs"] / best["ours"], 2),
            "difference": float(f"{difference:.1e}"),
        }

    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        np.savez(folder / "weights.npz", **{path: np.asarray(leaf) for path, leaf in flat_paths(params).items()})
        np.savez(folder / "inputs.npz", vectors=vectors, ids=ids, lengths=lengths)
        options = {"clips": [config.cell_clip, config.projection_clip], "layers": config.num_layers}
        (folder / "options.json").write_text(json.dumps({**options, "highway": config.num_highway}))
        peer = Peer(arguments.torch_python, folder)
        stack.callback(peer.close)
        about = {"jax": jax.__version__, **peer.about, "date": datetime.date.today().isoformat()}
        distinct = len({word for sentence in sentences for word in sentence}) + 2
        print(json.dumps({**about, "sentences": len(sentences), "words": int(lengths.sum()), "distinct": distinct}))
        for dtype in arguments.dtypes:
            print(
                json.dumps({"floor": f"{ROWS} × {STEPS}", "dtype": dtype, **floor(dtype, ROWS, STEPS, 0)}), flush=True
            )
            for kind in ("nn.LSTM", "AllenNLP's loop"):
                print(json.dumps(compare(kind, dtype, arguments.repeats)), flush=True)
            if sentences:
                share = distinct / lengths.sum()
                # Rows as long as the longest sentence, as full as they may be.
                rows = max(arguments.batch_tokens // int(lengths.max()), 1)
                batches = -(-int(lengths.sum()) // arguments.batch_tokens)
                least = floor(dtype, rows, round(lengths.sum() / rows), share)
                print(json.dumps({"floor": f"{len(sentences)} sentences in {batches}", "dtype": dtype, **least}))
                print(json.dumps(compare("AllenNLP's ELMo", dtype, arguments.sentence_repeats)), flush=True)


if __name__ == "__main__":
    main()
