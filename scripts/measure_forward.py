"""What each choice of the forward pass gains: one way and the other in turn, outputs compared first, as JSON lines.

python scripts/measure_forward.py [CONFIG] [--dtypes float32 bfloat16] [--choices gelu kernels] [--repeats 9]

- `attention`: query, key and value transposed together, as `SelfAttention` does it, or each cut out first.
- `mask`: scores cut to the mask by a minimum, or chosen by `where`.
- `gelu`: with erf in float32, as `nn.feed_forward` has it, or `jax.nn.gelu`, with erfc.
- `layers`: weights of the layers in a list, as the encoder keeps them on a processor, or cut out of a stack.
- `kernels`: each with its outputs in front, as the encoder keeps them on a processor in bfloat16, or behind.
- `batch`: so many tokens at once, beside what the encoder takes by default, for texts of any length.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctx_jax.cli import keep_memory, load_config
from ctx_jax.encoder import BertEncoder
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.models.bert import BertConfig
from ctx_jax.nn.attention import Mask, attention_mask, dot_product_attention
from ctx_jax.nn.feed_forward import gelu

SHAPES = ((1, 16), (1, 128), (8, 128), (1, 512), (4, 512))
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
Run = Callable[[], Any]


def attention(config: BertConfig, dtype: str, rows: int, length: int) -> tuple[Run, Run]:
    """From the product that makes query, key and value to the context."""
    heads, width = config.num_heads, config.hidden_size
    shape = (rows, length, 3, heads, width // heads)
    qkv = jnp.asarray(np.random.default_rng(0).standard_normal((rows, length, 3 * width)), dtype)
    mask = attention_mask(jnp.ones((rows, length), jnp.int32))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        context = dot_product_attention(query, key, value, mask)
        return context.transpose(0, 2, 1, 3).reshape(rows, length, width)

    together = jax.jit(lambda qkv: attend(*qkv.reshape(shape).transpose(2, 0, 3, 1, 4)))
    apart = jax.jit(lambda qkv: attend(*(qkv.reshape(shape)[:, :, i].transpose(0, 2, 1, 3) for i in range(3))))
    return lambda: together(qkv), lambda: apart(qkv)


def mask(config: BertConfig, dtype: str, rows: int, length: int) -> tuple[Run, Run]:
    """From query, key and value to the context."""
    heads, width = config.num_heads, config.hidden_size // config.num_heads
    query, key, value = jnp.asarray(np.random.default_rng(0).standard_normal((3, rows, heads, length, width)), dtype)
    mask = attention_mask(jnp.ones((rows, length), jnp.int32))

    def choose(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> jax.Array:
        dot = lambda how, a, b: jnp.einsum(how, a, b, preferred_element_type=jnp.float32)
        scores = dot("bhqk,bhtk->bhqt", query, key) * jnp.float32(width**-0.5)
        weights = jax.nn.softmax(jnp.where(mask.allowed, scores, mask.low)).astype(dtype)
        return dot("bhqt,bhtk->bhqk", weights, value).astype(dtype)

    ours, theirs = jax.jit(dot_product_attention), jax.jit(choose)
    return lambda: ours(query, key, value, mask), lambda: theirs(query, key, value, mask)


def activation(config: BertConfig, dtype: str, rows: int, length: int) -> tuple[Run, Run]:
    """Of what the first product of the feed-forward gives."""
    shape = (rows * length, config.intermediate_size)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    ours, theirs = jax.jit(gelu), jax.jit(lambda x: jax.nn.gelu(x, approximate=False))
    return lambda: ours(x), lambda: theirs(x)


def layers(config: BertConfig, dtype: str, rows: int, length: int) -> tuple[Run, Run]:
    """The whole forward pass."""
    return forward_passes(config, dtype, rows, length, {}, {"_by_layer": False})


def kernels(config: BertConfig, dtype: str, rows: int, length: int) -> tuple[Run, Run]:
    """The whole forward pass."""
    return forward_passes(config, dtype, rows, length, {"_turned": True}, {"_turned": False})


def forward_passes(
    config: BertConfig, dtype: str, rows: int, length: int, ours: dict[str, bool], other: dict[str, bool]
) -> tuple[Run, Run]:
    """Of encoders that differ in what they keep."""
    params = bound_model(config).init(jax.random.key(0))
    runs = []
    for choice in (ours, other):
        encoder = BertEncoder(replace(config, dtype=dtype, unroll=choice.get("_by_layer", True)), params)
        vars(encoder).update(choice)
        runs.append(encoder.compiled(rows, length, layers="last"))
    ids = np.random.default_rng(0).integers(config.vocab_size // 2, config.vocab_size, (rows, length))
    return lambda: runs[0](ids), lambda: runs[1](ids)


def batches(config: BertConfig, dtype: str, batch_tokens: int) -> tuple[Run, Run]:
    """About 8,000 tokens of texts of any length, most of them short, to the mean of each."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 60, 8000 // 60) + 4, config.max_length)
    mask = np.arange(config.max_length) < lengths[:, None]
    ids = rng.integers(config.vocab_size // 2, config.vocab_size, mask.shape)
    encoder = BertEncoder(replace(config, dtype=dtype), bound_model(config).init(jax.random.key(0)))
    encode = lambda **options: encoder.encode_ids(ids, mask.astype(int), layers="last", **options).last
    return encode, lambda: encode(batch_tokens=batch_tokens)


def compare(ours: Run, other: Run, dtype: str, repeats: int) -> dict[str, Any]:
    """Medians of runs in turn, in ms."""
    first, second = (np.asarray(run(), np.float32) for run in (ours, other))
    difference = float(np.abs(first - second).max() / np.abs(second).max())
    if not difference <= TOLERANCE[dtype]:
        raise SystemExit(f"outputs differ by {difference:.1e}, expected {TOLERANCE[dtype]} at most")
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, found in zip((ours, other), times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(run())
            found.append(time.perf_counter() - begin)
    mine, theirs = map(statistics.median, times)
    return {"ours_ms": round(1e3 * mine, 3), "other_ms": round(1e3 * theirs, 3), "ratio": round(theirs / mine, 3)}


CHOICES = {"attention": attention, "mask": mask, "gelu": activation, "layers": layers, "kernels": kernels}
"""By name, those that are measured at each of the shapes."""


def choices(config: BertConfig, dtype: str, names: list[str]) -> Iterator[tuple[str, str, tuple[Run, Run]]]:
    """Each choice with its name, its shape and its two ways."""
    for name in names:
        if name == "batch":
            for batch_tokens in (512, 2048, 8192):
                yield name, f"{batch_tokens} tokens", batches(config, dtype, batch_tokens)
            continue
        for rows, length in SHAPES:
            if length <= config.max_length:
                yield name, f"{rows} × {length}", CHOICES[name](config, dtype, rows, length)


def main() -> None:
    root = pathlib.Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=pathlib.Path, nargs="?", default=root / "configs" / "bert_base.py")
    parser.add_argument("--dtypes", nargs="+", default=list(TOLERANCE), choices=list(TOLERANCE))
    every = [*CHOICES, "batch"]
    parser.add_argument("--choices", nargs="+", default=every, choices=every)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    keep_memory()
    config = replace(load_config(arguments.config).model, heads=())
    device = jax.devices()[0].device_kind
    print(json.dumps({"jax": jax.__version__, "device": device, "date": datetime.date.today().isoformat()}))
    for dtype in arguments.dtypes:
        for name, shape, runs in choices(config, dtype, arguments.choices):
            about = {"choice": name, "dtype": dtype, "shape": shape}
            print(json.dumps(about | compare(*runs, dtype, arguments.repeats), ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
