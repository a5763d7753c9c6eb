"""What a forward pass costs, part by part, and the formulas of the layers that every architecture is made of.

1 multiply-add = 2 FLOP; every figure is in FLOP, none in MAC. Of N vectors:

    affine map K → M              2·N·K·M in the product, N·M for the bias
    LayerNorm of width D          N·(7·D + 2): mean D, centring D, squares D, their mean D, ε 1, root 1, and D each for
                                  the root, scale and bias
    softmax over T values         5·T - 1: maximum T (JAX begins at -∞), subtraction T, exp T, sum T-1, division T
    activation                    ACTIVATION_FLOPS a value, as JAX writes it

Matrix products are kept apart from the rest: they are what a device's peak counts, 97 to 99.9 % of the work of a model
of ordinary size, and what `count` (jaxpr.py) must confirm to the last FLOP. In a forward pass it confirms the rest to
the last FLOP too. Left out are look-ups, comparisons, casts and copies, which compute nothing.

A backward pass takes two products for each product of the forward pass, one for either operand: training is three times
forward, and whatever is computed again (remat) on top.

Bytes are the least that must cross the memory's bus when every product reads its operands and writes its result once,
parameters as stored (float32), and everything else is fused into its neighbours; attention scores never leave the chip.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

PARAMETER_BYTES = 4
"""Parameters are float32 whatever the computation's type."""

OPTIMIZER_BYTES = 7 * PARAMETER_BYTES
"""Adam's update of one parameter: reads it, its gradient and two moments, writes all but the gradient."""

ACTIVATION_FLOPS = {"gelu": 5, "gelu_tanh": 9, "relu": 1, "silu": 2, "tanh": 1}
"""Operations on one value: exact GELU is ½·x·erfc(-x/√2)."""


class Part(NamedTuple):
    """One part of a forward pass, summed over layers and rows.

    Attributes:
      name: as the field calls it.
      matrix_flops: in matrix products and convolutions.
      other_flops: in element-wise operations and reductions.
      parameters: learnt values that belong to it; tied tables belong to the embeddings.
      bytes_moved: at least so many, see above.
      again_flops: matrix products that the backward pass computes again.
    """

    name: str
    matrix_flops: int = 0
    other_flops: int = 0
    parameters: int = 0
    bytes_moved: int = 0
    again_flops: int = 0

    @property
    def training_matrix_flops(self) -> int:
        """Forward, backward and what is computed again."""
        return 3 * self.matrix_flops + self.again_flops

    @property
    def training_bytes(self) -> int:
        """Forward and twice as much backward, and Adam's update."""
        return 3 * self.bytes_moved + OPTIMIZER_BYTES * self.parameters


@dataclass(frozen=True)
class Cost:
    """A forward pass over `rows` rows of `length` tokens (words, for ELMo)."""

    rows: int
    length: int
    parts: tuple[Part, ...]

    def _sum(self, name: str) -> int:
        return sum(getattr(part, name) for part in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens, padding counted: the device computes it."""
        return self.rows * self.length

    @property
    def matrix_flops(self) -> int:
        """Of the forward pass, in matrix products."""
        return self._sum("matrix_flops")

    @property
    def other_flops(self) -> int:
        """Of the forward pass, in everything else."""
        return self._sum("other_flops")

    @property
    def training_matrix_flops(self) -> int:
        """Of forward, backward and what is computed again, in matrix products."""
        return self._sum("training_matrix_flops")

    @property
    def parameters(self) -> int:
        """Learnt values."""
        return self._sum("parameters")

    @property
    def bytes_moved(self) -> int:
        """Of the forward pass, at least."""
        return self._sum("bytes_moved")

    @property
    def training_bytes(self) -> int:
        """Of a training step, at least."""
        return self._sum("training_bytes")


def merge(name: str, parts: Iterable[Part], *, again: bool = False) -> Part:
    """Several parts as one; with `again` the backward pass computes their products again."""
    sums = [sum(values) for values in zip(*(part[1:] for part in parts), strict=True)]
    merged = Part(name, *sums)
    return merged._replace(again_flops=merged.matrix_flops) if again else merged


def times(part: Part, count: int) -> Part:
    """The same part so many times: layers."""
    return Part(part.name, *(count * value for value in part[1:]))


def affine(vectors: int, inputs: int, outputs: int, *, size: int, bias: bool = True) -> Part:
    """Affine map of vectors whose values have `size` bytes."""
    parameters = inputs * outputs + bias * outputs
    return Part(
        "affine",
        matrix_flops=2 * vectors * inputs * outputs,
        other_flops=bias * vectors * outputs,
        parameters=parameters,
        bytes_moved=size * vectors * (inputs + outputs) + PARAMETER_BYTES * parameters,
    )


def elementwise(values: int, flops: int = 1) -> Part:
    """`flops` operations on each of so many values, fused into what comes before or after."""
    return Part("element-wise", other_flops=flops * values)


def layer_norm(vectors: int, width: int) -> Part:
    """LayerNorm."""
    parameters = 2 * width
    return Part("LayerNorm", 0, vectors * (7 * width + 2), parameters, PARAMETER_BYTES * parameters)


def softmax(rows: int, values: int) -> Part:
    """Softmax of so many rows of values."""
    return Part("softmax", other_flops=rows * (5 * values - 1))


def table(vectors: int, count: int, width: int) -> Part:
    """A table of learnt vectors of which some are looked up: no FLOP, only the rows are read."""
    return Part("table", parameters=count * width, bytes_moved=PARAMETER_BYTES * vectors * width)
