"""What the kernels for NVIDIA's GPUs take, by the blocks they cut, and BERT-base with them; a JSON line for each.

python scripts/measure_gpu.py [attention] [norms] [gelu] [forward] [step]

`attention`, `norms` and `gelu`: each kernel of ctx_jax.kernels for GPUs, at shapes of BERT-base with 32,768 tokens,
beside cuDNN's attention, which has no dropout here, and XLA's product and GELU. `forward` and `step`: the encoder and a
step of masked LM, time by kernel, share of what square products reach on this card. Times are the best of three rounds
of launches in flight.
"""

import argparse
import collections
import functools
import glob
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData

from ctx_jax.arrays import Batch
from ctx_jax.compilation import options_for
from ctx_jax.data.plan import RowsConfig
from ctx_jax.encoder import BertEncoder
from ctx_jax.experiment import Experiment
from ctx_jax.experiment.assembly import assemble
from ctx_jax.experiment.cost import step_cost
from ctx_jax.flops.architectures import encoder_cost
from ctx_jax.flops.devices import measured_peak
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.kernels import gpu_attention, gpu_norm, hopper_gelu
from ctx_jax.kernels.packed import heads_of
from ctx_jax.models.bert import BertConfig
from ctx_jax.nn import feed_forward
from ctx_jax.nn.linear import affine
from ctx_jax.objectives.masking import Vocabulary
from ctx_jax.objectives.mlm import MaskedLM
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

SHAPES = ((64, 512), (256, 128))
BASE = BertConfig(dtype="bfloat16", pooler=False)
FORWARD = ((128, 64, 4, 3), (128, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 128, 4, 2), (128, 128, 8, 2))
BACKWARD = ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (32, 64, 4, 2), (128, 64, 8, 2))
NORM_FORWARD = ((32, 4, 1), (64, 4, 1), (32, 8, 1), (16, 4, 1))
NORM_BACKWARD = ((32, 4, 32), (32, 1, 16), (16, 4, 32), (32, 4, 64), (32, 8, 32))
GELU = ((128, 128, 64, 8, (128, 32)), (128, 128, 64, 8, (64, 64)), (128, 128, 64, 4, (128, 32)))

Record = dict[str, Any]


def seconds(run: Callable[[], Any], launches: int = 20) -> float:
    """Of one launch."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(launches):
            out = run()
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - begin) / launches)
    return best


def by_kernel(run: Callable[[], Any], calls: int = 3) -> dict[str, float]:
    """Milliseconds of one call that the device spends in each kernel, the longest first."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                out = run()
            jax.block_until_ready(out)
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = [plane for plane in ProfileData.from_file(path).planes if "GPU" in plane.name]
    found: collections.Counter[str] = collections.Counter()
    for line in (line for plane in planes for line in plane.lines if "Stream" in line.name):
        for event in line.events:
            found[event.name] += event.duration_ns / calls / 1e6
    return {name: round(taken, 3) for name, taken in found.most_common(20)}


def random(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)


def tried(what: str, run: Callable[..., Any], args: tuple[Any, ...], **about: Any) -> Record:
    """What one variant takes; a variant that the card cannot have is no reason to stop."""
    program = jax.jit(run, compiler_options=options_for(jax.devices()[0]))
    try:
        return {"what": what, **about, "us": round(1e6 * seconds(functools.partial(program, *args)), 1)}
    except jax.errors.JaxRuntimeError as error:
        return {"what": what, **about, "error": str(error).splitlines()[0][:200]}


cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def summed(*qkv: jax.Array) -> jax.Array:
    return cudnn(*qkv).astype(jnp.float32).sum()


def attention() -> Iterator[Record]:
    rng, heads = np.random.default_rng(0), heads_of(BASE.num_heads, 64)
    for rows, length in SHAPES:
        packed, cotangent = random(rng, rows, length, 3 * 768), random(rng, rows, length, 768)
        segments, seeds = jnp.ones((rows, length), jnp.int32), jnp.asarray(rng.integers(0, 2**32, (rows, 2), np.uint32))
        about: Record = {"rows": rows, "length": length}
        for rate in (0.0, 0.1):
            options: Record = {"heads": heads, "rate": rate}
            forward = functools.partial(gpu_attention.forward, **options)
            backward = functools.partial(gpu_attention.backward, **options)
            context, sums = jax.jit(forward)(packed, segments, seeds)
            given = packed, segments, seeds
            for what, run, args, tries in (
                ("attention forward", forward, given, FORWARD),
                ("attention backward", backward, (*given, context, sums, cotangent), BACKWARD),
            ):
                for blocks in tries:
                    one = functools.partial(run, blocks=gpu_attention.Blocks(*blocks))
                    yield tried(what, one, args, rate=rate, blocks=blocks, **about)
        qkv = tuple(random(rng, rows, length, 12, 64) for _ in range(3))
        yield tried("cuDNN's forward, no mask", cudnn, qkv, **about)
        lengths = jnp.full(rows, length)
        padded = functools.partial(cudnn, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
        yield tried("cuDNN's forward, lengths", padded, qkv, **about)
        masked = functools.partial(cudnn, mask=jnp.ones((rows, 1, length, length), bool))
        yield tried("cuDNN's forward, mask", masked, qkv, **about)
        yield tried("cuDNN's forward and backward, no mask", jax.grad(summed, (0, 1, 2)), qkv, **about)


def norms() -> Iterator[Record]:
    rng, (rows, length) = np.random.default_rng(0), SHAPES[0]
    x, branch, cotangent = (random(rng, rows, length, 768) for _ in range(3))
    scale, bias, seeds = jnp.ones(768), jnp.zeros(768), jnp.asarray(rng.integers(0, 2**32, (rows, 2), np.uint32))
    for what, run, args, tries in (
        ("norm forward", gpu_norm.forward, (x, branch, scale, bias, seeds), NORM_FORWARD),
        ("norm backward", gpu_norm.backward, (x, scale, seeds, cotangent), NORM_BACKWARD),
    ):
        for blocks in tries:
            one = functools.partial(run, eps=1e-12, rate=0.1, blocks=gpu_norm.Blocks(*blocks))
            yield tried(what, one, args, blocks=blocks, rows=rows, length=length)


def gelu() -> Iterator[Record]:
    rng, (rows, length) = np.random.default_rng(0), SHAPES[0]
    args = random(rng, rows, length, 768), random(rng, 768, 3072), random(rng, 3072)
    about: Record = {"rows": rows, "length": length}
    for blocks in GELU:
        one = functools.partial(hopper_gelu.forward, blocks=hopper_gelu.Blocks(*blocks))
        yield tried("gelu of a product", one, args, blocks=blocks, **about)
    by_xla = lambda x, kernel, bias: feed_forward.gelu(affine(x, kernel, bias))
    yield tried("gelu of a product, by XLA and cuBLAS", by_xla, args, **about)
    product = lambda x, kernel, bias: affine(x, kernel, bias, written=True)
    yield tried("product and bias, by cuBLAS", product, args, **about)


def whole(what: str, run: Callable[[], Any], flops: float, **about: Any) -> Record:
    """A model's run, the peak beside it."""
    taken, peak = seconds(run, 10), measured_peak().bfloat16_flops_per_s
    record = {"what": what, **about, "ms": round(1e3 * taken, 3), "peak_tflops_per_s": round(peak / 1e12, 1)}
    return record | {"share_of_peak": round(flops / taken / peak, 3), "ms_by_kernel": by_kernel(run)}


def forward() -> Iterator[Record]:
    encoder = BertEncoder(BASE, jax.jit(bound_model(BASE).init)(jax.random.key(0)))
    for rows, length in (*SHAPES, (1, 128)):
        function, arguments = encoder.forward(rows, length, pool="mean")
        program = function.lower(*arguments).compile()
        params, inputs, *_, affine = arguments
        flops = encoder_cost(BASE, rows=rows, length=length).matrix_flops
        yield whole("forward", lambda: program(params, inputs, affine), flops, rows=rows, length=length)  # noqa: B023 (called at once)


def step() -> Iterator[Record]:
    for rows, length in SHAPES:
        size = BASE.vocab_size
        experiment = Experiment(
            data="none",
            model=BertConfig(dtype="bfloat16", pooler=False, unroll=True),
            rows=RowsConfig(length=length),
            objective=MaskedLM(),
            optimizer=Optimizer("adamw", Schedule("constant", 1e-4)),
            batch_size=rows,
        )
        parts = assemble(experiment, Vocabulary(size, 103, (0, 100, 101, 102, 103), np.zeros(size, bool)))
        ids = np.random.default_rng(0).integers(1000, size, (rows, length)).astype(np.int32)
        zeros, places = np.zeros_like(ids), np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
        examples, none = np.arange(rows, dtype=np.uint32)[:, None], np.full((rows, 1), -1, np.int32)
        batch = jax.device_put(Batch(ids, zeros, zeros + 1, places, examples, np.zeros(rows, np.uint32), none))
        state = jax.jit(parts.init)(jax.random.key(0, impl="threefry2x32"))
        arguments, options = jax.device_put(parts.objective.arguments), options_for(jax.devices()[0])
        program = jax.jit(parts.step, donate_argnums=0, compiler_options=options)
        program, held = program.lower(state, batch, arguments).compile(), [state]
        del state

        def run(program: Any = program, held: list[Any] = held, given: Any = (batch, arguments)) -> Any:
            held[0], sums = program(held[0], *given)
            return sums

        yield whole("step", run, 3 * step_cost(experiment).matrix_flops, rows=rows, length=length)


def main() -> None:
    every = {function.__name__: function for function in (attention, norms, gelu, forward, step)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help=", ".join(every))
    given = parser.parse_args()
    for name in given.which:
        if name not in every:
            parser.error(f"found {name!r}, expected some of {', '.join(every)}")
    if jax.default_backend() != "gpu":
        parser.error(f"found a {jax.default_backend()}, expected a GPU: the kernels are for those alone")
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)
    for name in given.which or every:
        for record in every[name]():
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
