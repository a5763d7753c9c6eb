"""A training step of BERT beside Hugging Face's BERT in PyTorch, on the processor or a GPU: same sizes and optimizer.

python scripts/benchmark_training.py [--device cpu|gpu] [--size mini|base] [--dtypes float32 bfloat16] [--rows 32]
    [--length 128] [--repeats 9] [--steps-per-run N] [--torch-python PYTHON] [--compiled] [--gathered] [--no-loader]
    [--no-unroll] [--remat none|dots|all]

Both take a masked-LM step of AdamW with dropout 0.1 on full rows of random words, 15 % of them masked; ours draws the
masks in the step, PyTorch is given them. Hugging Face's model makes logits of all positions, ours of those to predict;
`--gathered` also measures PyTorch with a head for those alone. A run is so many steps launched one after the other, of
which the last one's loss is fetched; its seconds are divided by their number.

Each side runs in a process of its own, PyTorch with another Python if need be, with as many threads and the same
setting of malloc. All compile and take their first step at the same time, and then their runs in turn; a GPU must hold
them beside one another. A side says on standard error what its runs took; if it fails, its error is kept and the others
go on.

One JSON line for each type. `masking_share` is what drawing the masks alone takes, many launches in flight, over the
step; `share_of_peak` the products of our model, forward times 3, a second, over what square products reach here. Then
the input pipeline alone: how many rows a second the loader gives of a corpus of random words, beside what a step takes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(256 << 20)}
"""ctx_jax.cli.keep_memory, for both."""
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
SIZES = {
    "mini": {"vocab_size": 30522, "hidden_size": 256, "num_layers": 4, "num_heads": 4, "intermediate_size": 1024},
    "base": {"vocab_size": 30522, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 3072},
}
RATE = 0.15
MASK = 103
Server = tuple[Callable[[], Any], Callable[[Any], float], Callable[[], dict]]
"""Launches a step, fetches the loss of one, and says what there is to know when all are taken."""


def torch_server(settings: dict, gathered: bool) -> Server:
    """Hugging Face's model, or its encoder and its head for the chosen places alone."""
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    cuda = settings["device"] == "gpu"
    device = "cuda" if cuda else "cpu"
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32, as XLA does
    sizes, rows, length = SIZES[settings["size"]], settings["rows"], settings["length"]
    config = transformers.BertConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        intermediate_size=sizes["intermediate_size"],
        attn_implementation="sdpa",
    )
    model = transformers.BertForMaskedLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=cuda or None)
    ids = torch.randint(1000, sizes["vocab_size"], (rows, length))
    chosen = torch.rand(rows, length).argsort(1)[:, : round(RATE * length)]
    masked = ids.scatter(1, chosen, MASK).to(device)
    targets = ids.gather(1, chosen)
    labels = torch.full_like(ids, -100).scatter(1, chosen, targets).to(device)
    places, targets = (chosen + length * torch.arange(rows)[:, None]).flatten().to(device), targets.flatten().to(device)

    def whole() -> torch.Tensor:
        return forward(input_ids=masked, labels=labels).loss

    def at_places(input_ids: torch.Tensor, places: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        vectors = model.bert(input_ids=input_ids).last_hidden_state
        logits = model.cls(vectors.flatten(0, 1).index_select(0, places))
        return torch.nn.functional.cross_entropy(logits, targets)

    forward: Callable[..., Any] = at_places if gathered else model
    if settings["compiled"]:
        forward = torch.compile(forward)
    compute = (lambda: forward(masked, places, targets)) if gathered else whole
    autocast = torch.autocast(device, torch.bfloat16, enabled=settings["dtype"] == "bfloat16")

    def launch() -> torch.Tensor:
        with autocast:
            loss = compute()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def about() -> dict:
        return {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        }

    return launch, lambda loss: loss.item(), about


def our_server(settings: dict) -> Server:
    """The same by the step that `ctx-jax pretrain` compiles."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ctx_jax.arrays import Batch
    from ctx_jax.compilation import options_for
    from ctx_jax.data.plan import RowsConfig
    from ctx_jax.experiment import Experiment
    from ctx_jax.experiment.assembly import assemble
    from ctx_jax.experiment.cost import step_cost
    from ctx_jax.flops.devices import measured_peak
    from ctx_jax.models.bert import BertConfig
    from ctx_jax.objectives.masking import Vocabulary
    from ctx_jax.objectives.mlm import MaskedLM
    from ctx_jax.train.optimizer import Optimizer
    from ctx_jax.train.schedules import Schedule

    if settings["device"] == "gpu" and jax.default_backend() == "cpu":
        raise RuntimeError("JAX found no GPU")
    sizes, rows, length = SIZES[settings["size"]], settings["rows"], settings["length"]
    choices = {name: settings[name] for name in ("dtype", "unroll", "remat")}
    experiment = Experiment(
        data="none",
        model=BertConfig(**sizes, pooler=False, **choices),
        rows=RowsConfig(length=length),
        objective=MaskedLM(RATE),
        optimizer=Optimizer("adamw", Schedule("constant", 1e-4)),
        batch_size=rows,
    )
    size = sizes["vocab_size"]
    vocabulary = Vocabulary(size, MASK, (0, 100, 101, 102, MASK), np.zeros(size, bool))
    parts = assemble(experiment, vocabulary)
    ids = np.random.default_rng(0).integers(1000, size, (rows, length)).astype(np.int32)
    zeros, places = np.zeros_like(ids), np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    examples = np.arange(rows, dtype=np.uint32)[:, None]
    none = np.full((rows, 1), -1, np.int32)
    batch = jax.device_put(Batch(ids, zeros, zeros + 1, places, examples, np.zeros(rows, np.uint32), none))
    state = jax.jit(parts.init)(jax.random.key(0, impl="threefry2x32"))
    arguments = jax.device_put(parts.objective.arguments)
    options = options_for(jax.devices()[0])
    step = jax.jit(parts.step, donate_argnums=0, compiler_options=options).lower(state, batch, arguments).compile()

    def launch() -> dict:
        nonlocal state
        state, sums = step(state, batch, arguments)
        return sums

    def about() -> dict:
        device = jax.devices()[0]
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
        prepare, seed = jax.jit(parts.objective.prepare), jnp.int32(experiment.seed)
        return {
            "device": device.device_kind,
            "versions": {"jax": jax.__version__},
            "memory_bytes": memory,
            "masking_seconds": in_flight(lambda: prepare(batch, seed, arguments)),
            "model_flops": 3 * step_cost(experiment).matrix_flops,
            "peak_flops_per_s": measured_peak().flops_per_s(settings["dtype"]),
        }

    return launch, lambda sums: float(sums["mlm_loss"]) / float(sums["mlm_weight"]), about


def in_flight(run: Callable[[], Any], launches: int = 20) -> float:
    """Seconds of a run, so many launched before the first is waited for: the median of several times."""
    import jax

    jax.block_until_ready(run())
    seconds = []
    for _ in range(7):
        begin = time.perf_counter()
        jax.block_until_ready([run() for _ in range(launches)])
        seconds.append((time.perf_counter() - begin) / launches)
    return statistics.median(seconds)


def serve(which: str, settings: dict) -> None:
    """Takes as many steps as a line asks for, and answers with the seconds of one and a loss, or what it knows."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    server: Server | None = None
    for line in sys.stdin:
        try:
            if server is None:
                server = our_server(settings) if which == "ctx_jax" else torch_server(settings, which != "torch")
            launch, fetch, about = server
            if line.strip() == "about":
                answer = about()
            else:
                steps = int(line)
                begin = time.perf_counter()
                for _ in range(steps):
                    last = launch()
                loss = fetch(last)
                answer = {"seconds": (time.perf_counter() - begin) / steps, "loss": loss}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(answer), file=answers, flush=True)


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
        with contextlib.redirect_stdout(sys.stderr):
            failed = cli.main([*arguments, "--train-vocab", "2000", "--holdout", "0.01"])
        if failed:
            raise SystemExit("the corpus was not built")
        config = RowsConfig(length=length, examples_per_row=8)
        stream = Loader(Corpus(str(folder / "corpus"), "train"), config).batches(rows)
        next(stream)
        begin = time.perf_counter()
        for _ in range(batches):
            next(stream)
        return batches * rows / (time.perf_counter() - begin)


class Side:
    """One of those measured, in a process of its own.

    Attributes:
      name: `ctx_jax`, `torch` or `torch_gathered`.
      answers: to the runs it has taken: the first, one to warm up, and those that count.
      known: what it says of itself at the end.
      error: why it ended; None while it has not.
    """

    def __init__(self, name: str, python: str, settings: dict):
        self.name, self.answers, self.known = name, [], {}
        self.error: str | None = None
        command = [python, __file__, "--serve", name, "--settings", json.dumps(settings)]
        gpu = {"JAX_PLATFORMS": "cuda,cpu", PREALLOCATE: os.environ.get(PREALLOCATE, "false")}
        device = gpu if settings["device"] == "gpu" else {"JAX_PLATFORMS": "cpu"}
        environment = os.environ | KEEP_MEMORY | device
        self._process: subprocess.Popen[str] | None = None
        try:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        except OSError as error:
            self.error = str(error)

    def run(self, steps: int) -> None:
        """Takes so many steps."""
        answer = self._ask(str(steps))
        if self.error is None:
            self.answers.append(answer)

    def finish(self) -> None:
        """Asks what it knows, and ends it."""
        self.known = self._ask("about")
        self.close()

    def close(self) -> None:
        """Ends it."""
        if self._process and self._process.poll() is None:
            self._process.stdin.close()
            self._process.wait()

    @property
    def seconds(self) -> list[float]:
        """Of a step, in each run that counts."""
        return [answer["seconds"] for answer in self.answers[2:]]

    def _ask(self, line: str) -> dict:
        if self.error is not None:
            return {}
        try:
            print(line, file=self._process.stdin, flush=True)
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            answer = {"error": f"ended with {self._process.wait()}; see above"}
        self.error = answer.pop("error", None)
        return answer


def measure(pythons: dict[str, str], settings: dict, repeats: int, steps: int) -> list[Side]:
    """Starts sides, which take their runs in turn, and ends them."""
    sides = []
    try:
        for name, python in pythons.items():
            sides.append(Side(name, python, settings))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda side: side.run(1), sides))
        for _ in range(1 + repeats):
            for side in sides:
                side.run(steps)
        for side in sides:
            print(json.dumps({"side": side.name, "answers": side.answers}), file=sys.stderr, flush=True)
            side.finish()
    finally:
        for side in sides:
            side.close()
    return sides


def report(sides: list[Side]) -> dict:
    """What was found, by the names of the sides."""
    found = [side for side in sides if side.seconds]
    medians = {side.name: statistics.median(side.seconds) for side in found}
    ours = next((side.known for side in found if side.name == "ctx_jax"), {})
    flops, peak, masking = (ours.get(name) for name in ("model_flops", "peak_flops_per_s", "masking_seconds"))
    spread = lambda side: [round(1e3 * pick(side.seconds), 2) for pick in (min, max)]
    record = {
        "devices": {side.name: side.known.get("device") for side in found},
        "versions": {name: version for side in found for name, version in side.known.get("versions", {}).items()},
        "median_ms": {name: round(1e3 * seconds, 2) for name, seconds in medians.items()},
        "spread_ms": {side.name: spread(side) for side in found},
        "first_losses": {side.name: round(side.answers[0]["loss"], 3) for side in found},
        "memory_bytes": {side.name: side.known.get("memory_bytes") for side in found},
        "model_flops": flops,
        "peak_flops_per_s": peak,
    }
    if "ctx_jax" in medians:
        mine = medians["ctx_jax"]
        record["over_ctx_jax"] = {name: round(t / mine, 3) for name, t in medians.items() if name != "ctx_jax"}
        record["masking_share"] = masking and round(masking / mine, 5)
    if flops and peak:
        record["share_of_peak"] = {name: round(flops / seconds / peak, 4) for name, seconds in medians.items()}
    return record | {"errors": {side.name: side.error for side in sides if side.error}}


def main() -> None:
    """Measures, and prints a line for each type and one for the loader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--size", default="mini", choices=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps-per-run", type=int, help="1 on the processor, 5 on a GPU, if not given")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--compiled", action="store_true", help="torch.compile the peer")
    parser.add_argument("--gathered", action="store_true", help="also PyTorch with a head for the chosen places alone")
    parser.add_argument(
        "--unroll", action=argparse.BooleanOptionalAction, help="write our layers out; as a rule on a GPU alone"
    )
    parser.add_argument("--remat", default="none", choices=["none", "dots", "all"])
    parser.add_argument("--no-loader", action="store_true", help="leave the input pipeline out")
    parser.add_argument("--serve", choices=["ctx_jax", "torch", "torch_gathered"], help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, json.loads(given.settings))
        return
    gpu = given.device == "gpu"
    settings = {name: getattr(given, name) for name in ("device", "size", "rows", "length", "compiled", "remat")}
    settings["threads"] = len(os.sched_getaffinity(0))
    settings["unroll"] = gpu if given.unroll is None else given.unroll
    steps = given.steps_per_run or (5 if gpu else 1)
    pythons = {"ctx_jax": sys.executable, "torch": given.torch_python}
    if given.gathered:
        pythons["torch_gathered"] = given.torch_python
    mine = {}
    for dtype in given.dtypes:
        sides = measure(pythons, settings | {"dtype": dtype}, given.repeats, steps)
        about = {"date": datetime.date.today().isoformat(), "dtype": dtype, **settings, "steps_per_run": steps}
        record = about | report(sides)
        print(json.dumps(record), flush=True)
        if "ctx_jax" in record["median_ms"]:
            mine[dtype] = record["median_ms"]["ctx_jax"] / 1e3
    if not given.no_loader:
        os.environ["JAX_PLATFORMS"] = "cpu"
        rate = loader_rows_per_s(given.rows, given.length)
        over = {dtype: round(rate * seconds / given.rows, 1) for dtype, seconds in mine.items()}
        print(json.dumps({"loader_rows_per_s": round(rate), "loader_over_step": over}), flush=True)


if __name__ == "__main__":
    main()
