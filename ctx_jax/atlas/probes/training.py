"""Trains the probes of a task together: one for each layer and seed, in one compiled loop.

Every probe sees the examples in an order of its seed, and keeps the parameters of its best epoch on held-out examples.
What a probe learns does not depend on who is trained beside it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from ctx_jax.compilation import float32_means_float32
from ctx_jax.errors import InputError
from ctx_jax.nn.parameters import Params
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

ADAM = Optimizer("adamw", Schedule("constant", 1.0), eps=1e-4, weight_decay=0.0, clip_norm=math.inf)
"""Its updates are taken times the step's learning rate. With an ε of 1e-8 a gradient that is little but rounding would
move a weight as far as any other, and an edge probe's weights would depend on who is trained beside it."""

_CACHED_ROWS = 128


@dataclass(frozen=True)
class Training:
    """How probes are trained.

    Attributes:
      epochs: over the training examples.
      batch_size: examples of a step; None makes about 200 steps an epoch, of 16 to 256 examples.
      learning_rate: Adam's; it falls to 0 over the training, in a line.
      seeds: probes of each layer, with another start and another order each.
    """

    epochs: int = 5
    batch_size: int | None = None
    learning_rate: float = 5e-3
    seeds: int = 5

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"Training.{name}: found {value}, expected at least 1")

    def rows(self, examples: int) -> int:
        """Examples of a step, of so many in all; few sizes, as each is compiled for."""
        return self.batch_size or min(max(1 << (examples // 200).bit_length(), 16), 256)


class Examples(NamedTuple):
    """Some of a task's examples.

    Attributes:
      features: tree of arrays [L, P, …]: a layer lies together, as its probes read it.
      targets: tree of arrays [P, …].
      weights: 1, or 0 at places that nothing fills.
    """

    features: Any
    targets: Any
    weights: Float[Array, "P"]


class Source(Protocol):
    """Where examples come from, in pieces of few shapes, so that few programs serve them all."""

    def __len__(self) -> int:
        """Examples, what fills the last piece up not counted."""

    def counts(self) -> list[int]:
        """Examples of each piece."""

    def pieces(self, rng: np.random.Generator | None = None) -> Iterator[Examples]:
        """All examples; with `rng` in pieces that are drawn anew."""


class _ReadOnce:
    """A source whose piece, if it is a single one, is read once and then stays on the device: its steps have an order
    of their own.
    """

    def __init__(self, source: Source):
        self.counts = source.counts
        self._source = source
        self._single = next(iter(source.pieces())) if len(source.counts()) == 1 else None

    def __len__(self) -> int:
        return len(self._source)

    def pieces(self, rng: np.random.Generator | None = None) -> Iterator[Examples]:
        return self._source.pieces(rng) if self._single is None else iter([self._single])

    def place(self) -> None:
        if self._single is not None:
            self._single = jax.device_put(self._single)


class Probe(Protocol):
    """A probe as a value: it is hashable, and its parameters are apart."""

    def init(self, key: Key[Array, ""]) -> Params:
        """Of one probe."""

    def losses(self, params: Params, features: Any, targets: Any) -> Float[Array, "B"]:
        """Of one probe on one layer, features [B, …]."""

    def predict(self, params: Params, features: Any) -> Any:
        """What is scored."""


@dataclass(frozen=True)
class Mixed:
    """A probe on a mix of layers, Σ softmax(s)ₗ hₗ over those allowed (Tenney et al. 2019, section 3.2); γ is left to
    the probe, whose first product has it.

    Attributes:
      probe: what reads the mix.
      num_layers: L + 1.
    """

    probe: Any
    num_layers: int

    def init(self, key: Key[Array, ""]) -> Params:
        """Begins as the mean."""
        return {"mix": jnp.zeros(self.num_layers), "probe": self.probe.init(key)}


def mixed(mix: Float[Array, "L"], features: Any, allowed: Bool[Array, "L"]) -> Any:
    """Features [L, B, …] to [B, …], by the mix's weights."""
    shares = jax.nn.softmax(jnp.where(allowed, mix, -jnp.inf))
    # Term by term, so that a processor reads the layers once and writes nothing but the sum.
    return jax.tree.map(lambda x: sum(share * layer for share, layer in zip(shares, x, strict=True)), features)


class Fitted(NamedTuple):
    """Probes that were trained.

    Attributes:
      probe: the kind; a `Mixed` one where layers were mixed.
      params: leaves [S, M, …]: seeds, then members, a layer or a mix each.
      mean: of the features, of each layer.
      scale: one over their standard deviations.
      allowed: [M, L], the layers of each mix; None where each member has its own layer.
      loss: [S, M] held-out loss of the best epoch.
    """

    probe: Any
    params: Params
    mean: Any
    scale: Any
    allowed: Bool[Array, "M L"] | None
    loss: Float[np.ndarray, "S M"]

    @property
    def members(self) -> int:
        """M."""
        return self.loss.shape[1]


def fit(
    probe: Any,
    train: Source,
    held_out: Source,
    training: Training,
    key: Key[Array, ""],
    *,
    allowed: Bool[np.ndarray, "M L"] | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> Fitted:
    """Trains a probe for each layer and seed, or for each mix of layers and seed.

    Features are shifted and scaled first, each dimension of each layer to mean 0 and deviation 1 over the training
    examples: layers differ a hundredfold in size, and one learning rate must do for all. A linear probe can say the
    same as without.

    Args:
      probe: see `Probe`.
      train: examples to learn from.
      held_out: to choose the epoch by.
      training: see there.
      key: of what is random.
      allowed: layers that each mix may use; None trains a probe for each layer.
      done: is told of each epoch.
    """
    if not len(train) or not len(held_out):
        raise InputError(f"probe: found {len(train)} examples and {len(held_out)} held out, expected some of each")
    train, held_out = _ReadOnce(train), _ReadOnce(held_out)
    mean, scale = standardisation(train)
    train.place()
    held_out.place()
    num_layers = jax.tree.leaves(mean)[0].shape[0]
    if allowed is not None:
        probe, allowed = Mixed(probe, num_layers), jnp.asarray(allowed)
    members = num_layers if allowed is None else len(allowed)
    # A layer's first parameters are drawn from the seed alone.
    keys = jax.random.split(key, training.seeds)
    params = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], members, axis=1), jax.vmap(probe.init)(keys))
    rows = training.rows(len(train))
    total = training.epochs * sum(_steps(count, rows) for count in train.counts())
    state, taken = jax.vmap(jax.vmap(ADAM.build().init))(params), 0
    best, best_loss = jax.tree.map(jnp.copy, params), np.full((training.seeds, members), np.inf)
    for epoch in range(training.epochs):
        rng = np.random.default_rng([*np.asarray(jax.random.key_data(key)).ravel().tolist(), epoch])
        for piece in train.pieces(rng):
            order, steps = _orders(rng, piece, rows, training.seeds)
            # One piece is read while the one before is learnt from; without this all would wait in memory.
            jax.block_until_ready(params)
            schedule = np.float32(training.learning_rate), np.float32(taken), np.float32(total)
            places = (piece, order, steps, schedule, mean, scale, allowed)
            params, state = _run(probe, params, state, *places, at_once=_at_once(members))
            taken += steps
        loss = mean_loss(Fitted(probe, params, mean, scale, allowed, best_loss), held_out)
        better = loss < best_loss
        best = _choose(jnp.asarray(better), params, best)
        best_loss = np.where(better, loss, best_loss)
        done(1)
    return Fitted(probe, best, mean, scale, allowed, best_loss)


def predict(fitted: Fitted, source: Source) -> Iterator[Any]:
    """What every probe says, a piece of the source at a time: leaves [S, M, P, …] on the host."""
    for piece in source.pieces():
        filled = np.flatnonzero(np.asarray(piece.weights))
        found = _predict(
            fitted.probe,
            fitted.params,
            piece.features,
            fitted.mean,
            fitted.scale,
            fitted.allowed,
            at_once=_at_once(fitted.members),
        )
        yield jax.tree.map(lambda leaf, filled=filled: np.asarray(leaf)[:, :, filled], found)


def mean_loss(fitted: Fitted, source: Source) -> Float[np.ndarray, "S M"]:
    """Mean loss of every probe, in nats."""
    total, count = 0.0, 0.0
    for piece in source.pieces():
        summed = _summed_losses(
            fitted.probe,
            fitted.params,
            piece,
            fitted.mean,
            fitted.scale,
            fitted.allowed,
            at_once=_at_once(fitted.members),
        )
        total = total + np.asarray(summed, np.float64)
        count += float(np.asarray(piece.weights).sum())
    return total / count


def standardisation(source: Source) -> tuple[Any, Any]:
    """Mean and one over the deviation of each layer's features, over all examples: leaves [L, …, D].

    Of features with more axes between the layer's and the last all but the last are taken together, and what is zero
    throughout, padding, is left out.
    """
    sums: Any = None
    for piece in source.pieces():
        found = jax.tree.map(_moments, piece.features)
        sums = found if sums is None else jax.tree.map(lambda a, b: a + b, sums, found)

    def mean(leaf: np.ndarray) -> np.ndarray:
        return leaf[:, 1 : (leaf.shape[1] + 1) // 2] / np.maximum(leaf[:, :1], 1)

    def scale(leaf: np.ndarray) -> Array:
        squares = leaf[:, (leaf.shape[1] + 1) // 2 :] / np.maximum(leaf[:, :1], 1)
        deviation = np.sqrt(np.maximum(squares - mean(leaf) ** 2, 0))
        # A dimension that says nothing stays so.
        used = deviation > 1e-6 * np.sqrt(squares.max(initial=0))
        return jnp.asarray(np.where(used, 1 / np.where(used, deviation, 1), 0), jnp.float32)

    return jax.tree.map(lambda leaf: jnp.asarray(mean(leaf), jnp.float32), sums), jax.tree.map(scale, sums)


def _moments(leaf: np.ndarray) -> np.ndarray:
    """[L, 1 + 2D]: count, sum, sum of squares, in float64."""
    width = leaf.shape[-1]
    result = np.zeros((len(leaf), 1 + 2 * width))

    def of_layer(layer: np.ndarray, row: np.ndarray) -> None:
        present, sums, squares = np.split(row, (1, 1 + width))
        rows = layer.reshape(-1, width)
        # What is in the caches is not written to memory as float64.
        for begin in range(0, len(rows), _CACHED_ROWS):
            some = rows[begin : begin + _CACHED_ROWS].astype(np.float64)
            present += some.any(1).sum()
            sums += some.sum(0)
            squares += np.einsum("nd,nd->d", some, some)

    with ThreadPoolExecutor(min(len(leaf), os.cpu_count() or 1)) as pool:
        list(pool.map(of_layer, leaf, result))
    return result


def _steps(count: int, batch_size: int) -> int:
    return -(-count // batch_size)


def _orders(rng: np.random.Generator, piece: Examples, size: int, seeds: int) -> tuple[np.ndarray, int]:
    """[steps, S, B]: which examples each seed sees in each step, and how many steps there are; the last one is filled
    with the first examples, and beyond it nothing is read.
    """
    filled = np.flatnonzero(np.asarray(piece.weights))
    orders = np.stack([rng.permutation(filled) for _ in range(seeds)], axis=1)
    orders = np.resize(orders, (_steps(len(piece.weights), size) * size, seeds))
    orders = orders.reshape(-1, size, seeds).transpose(0, 2, 1).astype(np.int32)
    return orders, _steps(len(filled), size)


def _standardised(x: Array, mean: Array, scale: Array) -> Array:
    """One layer's features [B, …, D] as float32; zeros, padding, stay zeros."""
    x = x.astype(jnp.float32)
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    shifted = (x - mean.reshape(shape)) * scale.reshape(shape)
    return shifted if x.ndim == 2 else jnp.where((x != 0).any(-1, keepdims=True), shifted, 0.0)


Read = Callable[[Params, Any], tuple[Params, Any]]
"""A member's parameters and places in the piece → parameters of the probe itself, and what it reads there."""


def _readers(features: Any, mean: Any, scale: Any, allowed: Array | None) -> tuple[Any, Callable[[Any], Read]]:
    """A part for each member, stacked, and a function from a member's part to how it reads."""
    layers = features, mean, scale
    if allowed is None:

        def layer(part: Any) -> Read:
            own = jax.tree.map(_standardised, *part)
            return lambda params, at: (params, jax.tree.map(lambda x: x[at], own))

        return layers, layer
    every = jax.vmap(lambda *part: jax.tree.map(_standardised, *part))(*layers)

    def mix(allowed: Array) -> Read:
        def read(params: Params, at: Any) -> tuple[Params, Any]:
            some = jax.tree.map(lambda x: x[:, at], every)
            return params["probe"], mixed(params["mix"], some, allowed)

        return read

    return allowed, mix


def _members_first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), tree)


def _at_once(members: int) -> int:
    """Members of which an accelerator takes all together. On the host one after the other is twice as fast: what one
    reads of a piece stays in the cache.
    """
    return 1 if jax.default_backend() == "cpu" else members


def _itself(probe: Any) -> Any:
    return probe.probe if isinstance(probe, Mixed) else probe


@partial(jax.jit, static_argnames=("probe", "at_once"), donate_argnames=("params", "state"))
@float32_means_float32("float32")
def _run(
    probe: Any,
    params: Params,
    state: Any,
    piece: Examples,
    order: Array,
    steps: int,
    schedule: tuple[Array, Array, Array],
    mean: Any,
    scale: Any,
    allowed: Array | None,
    at_once: int,
) -> tuple[Params, Any]:
    """The steps of a piece of the training examples."""
    update, losses = ADAM.build().update, _itself(probe).losses
    rate, taken, total = schedule
    parts, reader = _readers(piece.features, mean, scale, allowed)

    def member(given: tuple[Params, Any, Any]) -> tuple[Params, Any]:
        params, state, part = given
        read = reader(part)

        def loss(params: Params, at: Array) -> Array:
            targets = jax.tree.map(lambda leaf: leaf[at], piece.targets)
            return losses(*read(params, at), targets).mean()

        def step(number: Array, carry: tuple[Params, Any]) -> tuple[Params, Any]:
            params, state = carry
            grads = jax.vmap(jax.grad(loss))(params, order[number])
            updates, state = jax.vmap(update)(grads, state, params)
            now = rate * (1 - (taken + number.astype(jnp.float32)) / total)
            return jax.tree.map(lambda p, u: p + now * u, params, updates), state

        return jax.lax.fori_loop(0, steps, step, (params, state))

    given = (_members_first(params), _members_first(state), parts)
    return _members_first(jax.lax.map(member, given, batch_size=at_once))


@partial(jax.jit, static_argnames=("probe", "at_once"))
@float32_means_float32("float32")
def _predict(
    probe: Any, params: Params, features: Any, mean: Any, scale: Any, allowed: Array | None, at_once: int
) -> Any:
    parts, reader = _readers(features, mean, scale, allowed)

    def member(given: tuple[Params, Any]) -> Any:
        params, part = given
        read = reader(part)
        return jax.lax.map(lambda params: _itself(probe).predict(*read(params, slice(None))), params)

    return _members_first(jax.lax.map(member, (_members_first(params), parts), batch_size=at_once))


@partial(jax.jit, static_argnames=("probe", "at_once"))
@float32_means_float32("float32")
def _summed_losses(
    probe: Any, params: Params, piece: Examples, mean: Any, scale: Any, allowed: Array | None, at_once: int
) -> Float[Array, "S M"]:
    parts, reader = _readers(piece.features, mean, scale, allowed)

    def member(given: tuple[Params, Any]) -> Array:
        params, part = given
        read = reader(part)
        losses = lambda params: _itself(probe).losses(*read(params, slice(None)), piece.targets)
        return jax.lax.map(lambda params: (losses(params) * piece.weights).sum(), params)

    return _members_first(jax.lax.map(member, (_members_first(params), parts), batch_size=at_once))


@jax.jit
def _choose(better: Bool[Array, "S M"], new: Params, old: Params) -> Params:
    return jax.tree.map(lambda a, b: jnp.where(better.reshape(better.shape + (1,) * (a.ndim - 2)), a, b), new, old)
