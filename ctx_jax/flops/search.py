"""Which architectures fit a budget.

For every shape of a layer (width, head size, feed-forward ratio, gated or not, local attention or not) the deepest
encoder that keeps to the budget, if it uses most of it. What each would cost on a device is predicted, not measured:

- time at best is the roofline's, with every dimension of a product filled up to the device's tile, because that is what
  a matrix unit computes: a width of 320 costs a TPU as much as 384, a head of 64 as much as one of 128;
- memory is that of training in bfloat16: float32 parameters, gradients and Adam's two moments, and what the forward
  pass keeps for the backward one, by JAX's own account (the residuals of `jax.vjp`, before XLA fuses any of it away).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from ctx_jax.errors import InputError
from ctx_jax.flops.architectures import encoder_cost
from ctx_jax.flops.budget import FlopBudget
from ctx_jax.flops.devices import Peak, Roofline, roofline
from ctx_jax.models.bert import Bert, BertConfig
from ctx_jax.nn.parameters import Bound

TRAINING_BYTES = 16
"""A parameter in training: float32 value, gradient and two moments."""


@dataclass(frozen=True)
class SearchSpace:
    """What may vary."""

    vocab_size: int = 30522
    """V: costs the encoder no FLOP, but parameters."""
    multiple: int = 64
    """Widths are multiples of it: 64 suits tensor cores, 128 the matrix units of TPUs."""
    head_sizes: tuple[int, ...] = (64,)
    """Width of a head."""
    ratios: tuple[float, ...] = (4.0,)
    """Feed-forward width over width; a gated one gets two thirds of it, and so as many parameters."""
    gated: tuple[bool, ...] = (False, True)
    """Without and with a gate in the feed-forward."""
    windows: tuple[int | None, ...] = (None, 64)
    """Local attention to so many tokens on either side; None is attention to the whole row."""
    least_layers: int = 4
    """Shallower ones are not listed."""
    most_layers: int = 48
    """Nor deeper ones."""
    least_share: float = 0.95
    """Of the budget that must be used."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "multiple", "least_layers", "most_layers"):
            if getattr(self, name) < 1:
                raise InputError(f"SearchSpace.{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.least_share <= 1:
            raise InputError(f"SearchSpace.least_share is {self.least_share}, expected above 0 and at most 1")
        for name in ("head_sizes", "ratios", "gated", "windows"):
            if not getattr(self, name):
                raise InputError(f"SearchSpace.{name} is empty, expected at least one value")


@dataclass(frozen=True)
class Candidate:
    """An encoder on the budget.

    Attributes:
      config: its sizes.
      forward_flops: matrix products of one row, FLOP.
      parameters: of the encoder with its tables.
      layer_parameters: of the layers alone, which are what the FLOPs are spent on.
    """

    config: BertConfig
    forward_flops: int
    parameters: int
    layer_parameters: int

    def time_at_best(self, peak: Peak, *, rows: int, length: int) -> Roofline:
        """A forward pass over so many rows on one device, see the module."""
        cost = encoder_cost(self.config, rows=rows, length=length)
        computed = tiled_flops(self.config, peak.tile, rows=rows, length=length)
        return roofline(computed, cost.bytes_moved, peak, self.config.dtype)

    def training_bytes(self, *, rows: int, length: int) -> int:
        """Memory of a training step over so many rows, see the module."""
        return TRAINING_BYTES * self.parameters + kept_bytes(self.config, rows=rows, length=length)


def search(budget: FlopBudget, space: SearchSpace = SearchSpace()) -> list[Candidate]:
    """Every encoder of the space that is on the budget, most parameters first.

    Raises:
      InputError: the budget states no number.
    """
    if budget.forward_flops is None:
        raise InputError("FlopBudget.forward_flops is None, expected a number to search for")
    found = []
    for shape in _layer_shapes(budget, space):
        one, two = (encoder_cost(replace(shape, num_layers=n), length=budget.length).matrix_flops for n in (1, 2))
        layers = 1 + int((budget.forward_flops - one) // (two - one))
        if not space.least_layers <= layers <= space.most_layers:
            continue
        config = replace(shape, num_layers=layers)
        cost = encoder_cost(config, length=budget.length)
        if cost.matrix_flops >= space.least_share * budget.forward_flops:
            tables = next(part for part in cost.parts if part.name == "embeddings").parameters
            found.append(Candidate(config, cost.matrix_flops, cost.parameters, cost.parameters - tables))
    return sorted(found, key=lambda candidate: -candidate.layer_parameters)


def _layer_shapes(budget: FlopBudget, space: SearchSpace) -> Iterable[BertConfig]:
    """One layer of every shape that could be repeated often enough."""
    windows = dict.fromkeys(None if w is not None and 3 * w >= budget.length else w for w in space.windows)
    for head_size in space.head_sizes:
        step = math.lcm(space.multiple, head_size)
        # Four projections alone cost 8·T·D² a layer.
        widest = math.isqrt(int(budget.forward_flops / (8 * budget.length * space.least_layers)))
        for width in range(step, widest + 1, step):
            for ratio in space.ratios:
                for gated in space.gated:
                    inner = _rounded(ratio * width * (2 / 3 if gated else 1), space.multiple)
                    for window in windows:
                        yield BertConfig(
                            vocab_size=space.vocab_size,
                            hidden_size=width,
                            num_layers=1,
                            num_heads=width // head_size,
                            intermediate_size=inner,
                            max_position_embeddings=budget.length,
                            gated=gated,
                            attention_window=window,
                            pooler=False,
                            dtype="bfloat16",
                        )


def _rounded(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)


def tiled_flops(config: BertConfig, tile: int, *, rows: int, length: int) -> int:
    """Matrix FLOPs with every dimension filled up to a multiple of the tile, and in attention every head."""
    up = lambda value: -(-value // tile) * tile
    width, heads = up(config.hidden_size), config.num_heads * up(config.hidden_size // config.num_heads)
    filled = replace(config, hidden_size=width, num_heads=1, intermediate_size=up(config.intermediate_size))
    cost = encoder_cost(filled, rows=rows, length=length)
    scores = next(part for part in cost.parts if part.name == "attention scores").matrix_flops
    return cost.matrix_flops - scores + scores * heads // width


def kept_bytes(config: BertConfig, *, rows: int, length: int) -> int:
    """What the forward pass keeps for the backward one, parameters left out."""
    bound = Bound(lambda rngs: Bert(config, rngs=rngs))
    forward = lambda params, input_ids: jax.vjp(lambda p: bound(p)(input_ids).last, params)[1]

    def size(count: int) -> int:
        ids = jax.ShapeDtypeStruct((count, length), jnp.int32)
        kept = jax.tree.leaves(jax.eval_shape(forward, bound.shapes, ids))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept)

    # What does not grow with the rows is parameters.
    return rows * (size(2) - size(1))


def config_file(candidate: Candidate, budget: FlopBudget, *, data: str = "data/text") -> str:
    """A config that trains the candidate, as Python source; parameters that differ from the defaults are written."""
    config = candidate.config
    given = {
        name: value
        for name, value in vars(config).items()
        if value != getattr(BertConfig(), name) or name in ("hidden_size", "num_layers", "num_heads")
    }
    fields = "\n".join(f"        {name}={value!r}," for name, value in given.items())
    spent = f"{candidate.forward_flops / 1e9:.2f} of {budget.forward_flops / 1e9:.2f} GFLOP forward"
    return f'''"""{config.num_layers} layers of width {config.hidden_size}, found by `ctx-jax flops search`.

{spent} at {budget.length} tokens, {candidate.parameters / 1e6:.1f} M parameters.
The schedule is a beginning: not run yet.
"""

from ctx_jax.data.plan import RowsConfig
from ctx_jax.experiment import Experiment
from ctx_jax.flops.budget import FlopBudget
from ctx_jax.models.bert import BertConfig
from ctx_jax.objectives.mlm import MaskedLM
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

config = Experiment(
    data={data!r},
    model=BertConfig(
{fields}
    ),
    rows=RowsConfig(length={budget.length}, examples_per_row=8),
    objective=MaskedLM(),
    optimizer=Optimizer("adamw", Schedule("linear", 1e-3, warmup_steps=1000), b2=0.98, eps=1e-6),
    steps=20_000,
    batch_size=256,
    flop_budget=FlopBudget({budget.forward_flops!r}, {budget.length}),
)
'''


def picked(candidates: Sequence[Candidate], pick: int) -> Candidate:
    """The candidate of a number as listed, from 1.

    Raises:
      InputError: there are not so many.
    """
    if not 1 <= pick <= len(candidates):
        raise InputError(f"pick is {pick}, expected 1 to {len(candidates)}")
    return candidates[pick - 1]
