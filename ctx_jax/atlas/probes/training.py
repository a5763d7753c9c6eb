"""Trains the probes of a task together: one for each layer and seed, in compiled loops.

Every probe sees the examples in an order of its seed, and keeps the parameters of its best epoch on held-out examples.
What a probe learns does not depend on who is trained beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from ctx_jax.atlas.probes.examples import Examples, Pieces, Source, standardisation, standardised
from ctx_jax.compilation import float32_means_float32
from ctx_jax.errors import InputError
from ctx_jax.nn.parameters import Params
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

ADAM = Optimizer("adamw", Schedule("constant", 1.0), eps=1e-4, weight_decay=0.0, clip_norm=math.inf)
"""Its updates are taken times the step's learning rate. With an ε of 1e-8 a gradient that is little but rounding would
move a weight as far as any other, and an edge probe's weights would depend on who is trained beside it."""


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
    train, held_out = Pieces(train), Pieces(held_out)
    mean, scale = standardisation(train)
    num_layers = jax.tree.leaves(mean)[0].shape[0]
    if allowed is not None:
        probe, allowed = Mixed(probe, num_layers), jnp.asarray(allowed)
    members = num_layers if allowed is None else len(allowed)
    if _at_once(members) >= members:
        train.place()
        held_out.place()
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
            run = partial(_run, probe, targets=piece.targets, order=order, steps=steps, schedule=schedule)
            read = _reading(piece, mean, scale, allowed)
            params, state = _in_groups(run, (params, state), read, members)
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
        read = _reading(piece, fitted.mean, fitted.scale, fitted.allowed)
        found = _in_groups(partial(_predict, fitted.probe), fitted.params, read, fitted.members)
        yield jax.tree.map(lambda leaf, filled=filled: np.asarray(leaf)[:, :, filled], found)


def mean_loss(fitted: Fitted, source: Source) -> Float[np.ndarray, "S M"]:
    """Mean loss of every probe, in nats."""
    total, count = 0.0, 0.0
    for piece in source.pieces():
        function = partial(_summed_losses, fitted.probe, targets=piece.targets, weights=piece.weights)
        read = _reading(piece, fitted.mean, fitted.scale, fitted.allowed)
        summed = _in_groups(function, fitted.params, read, fitted.members)
        total = total + np.asarray(summed, np.float64)
        count += float(np.asarray(piece.weights).sum())
    return total / count


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


class _Read(NamedTuple):
    """What members read of a piece.

    Attributes:
      features: of their layers [M, P, …]; of mixes all layers, [L, P, …].
      mean: of each of these layers.
      scale: likewise.
      allowed: [M, L] of mixes, else None.
    """

    features: Any
    mean: Any
    scale: Any
    allowed: Bool[Array, "M L"] | None

    def of(self, members: slice) -> _Read:
        """What some of them read."""
        if self.allowed is not None:
            return self._replace(allowed=self.allowed[members])
        return jax.tree.map(lambda leaf: leaf[members], self)

    def rows(self, at: Any) -> Any:
        """Of one member, some examples as float32 [B, …], or of a mix [L, B, …]."""
        some = lambda x, mean, scale: standardised(x[at], mean, scale)
        return jax.tree.map(some if self.allowed is None else jax.vmap(some), self.features, self.mean, self.scale)


def _reading(piece: Examples, mean: Any, scale: Any, allowed: Array | None) -> _Read:
    # Each mix reads all layers: they are brought to the device once for all of them.
    features = piece.features if allowed is None else jax.device_put(piece.features)
    return _Read(features, mean, scale, allowed)


def _at_once(members: int) -> int:
    """Members of which an accelerator takes all together. On the host one after the other is twice as fast: what one
    reads of a piece stays in the cache.
    """
    return 1 if jax.default_backend() == "cpu" else members


def _in_groups(function: Callable[[Any, _Read], Any], held: Any, read: _Read, members: int) -> Any:
    """What a function gives of members and what they read, so many at a time; leaves are [S, M, …].

    A loop in here, and not in the program: then a layer's program is the same alone and beside others, to the bit.
    """
    size = _at_once(members)
    if size >= members:
        return function(held, read)
    found = []
    for begin in range(0, members, size):
        some = slice(begin, begin + size)
        own = jax.tree.map(lambda leaf, some=some: leaf[:, some], held)
        # Each by itself: two at a time would share the cores and the caches.
        found.append(jax.block_until_ready(function(own, read.of(some))))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *found)


def _over_members(member: Callable[[Any, _Read], Any], held: Any, read: _Read) -> Any:
    layers, mixes = (0, None) if read.allowed is None else (None, 0)
    return jax.vmap(member, in_axes=(1, _Read(layers, layers, layers, mixes)), out_axes=1)(held, read)


def _probed(probe: Any, params: Params, rows: Any, allowed: Array | None) -> tuple[Any, Params, Any]:
    """The probe itself, its parameters and what it reads."""
    if allowed is None:
        return probe, params, rows
    return probe.probe, params["probe"], mixed(params["mix"], rows, allowed)


@partial(jax.jit, static_argnames="probe", donate_argnames="held")
@float32_means_float32("float32")
def _run(
    probe: Any,
    held: tuple[Params, Any],
    read: _Read,
    targets: Any,
    order: Array,
    steps: int,
    schedule: tuple[Array, Array, Array],
) -> tuple[Params, Any]:
    """The steps of a piece of the training examples: new parameters and Adam's state."""
    update = ADAM.build().update
    rate, taken, total = schedule

    def member(held: tuple[Params, Any], read: _Read) -> tuple[Params, Any]:
        def gradient(params: Params, at: Array) -> Params:
            rows, right = read.rows(at), jax.tree.map(lambda leaf: leaf[at], targets)

            def loss(params: Params) -> Array:
                itself, own, vectors = _probed(probe, params, rows, read.allowed)
                return itself.losses(own, vectors, right).mean()

            return jax.grad(loss)(params)

        def step(number: Array, held: tuple[Params, Any]) -> tuple[Params, Any]:
            params, state = held
            updates, state = jax.vmap(update)(jax.vmap(gradient)(params, order[number]), state, params)
            now = rate * (1 - (taken + number.astype(jnp.float32)) / total)
            return jax.tree.map(lambda p, u: p + now * u, params, updates), state

        return jax.lax.fori_loop(0, steps, step, held)

    return _over_members(member, held, read)


@partial(jax.jit, static_argnames="probe")
@float32_means_float32("float32")
def _predict(probe: Any, params: Params, read: _Read) -> Any:
    def member(params: Params, read: _Read) -> Any:
        rows = read.rows(slice(None))

        def one(params: Params) -> Any:
            itself, own, vectors = _probed(probe, params, rows, read.allowed)
            return itself.predict(own, vectors)

        return jax.lax.map(one, params)

    return _over_members(member, params, read)


@partial(jax.jit, static_argnames="probe")
@float32_means_float32("float32")
def _summed_losses(
    probe: Any, params: Params, read: _Read, targets: Any, weights: Float[Array, "P"]
) -> Float[Array, "S M"]:
    def member(params: Params, read: _Read) -> Array:
        rows = read.rows(slice(None))

        def one(params: Params) -> Array:
            itself, own, vectors = _probed(probe, params, rows, read.allowed)
            return (itself.losses(own, vectors, targets) * weights).sum()

        return jax.lax.map(one, params)

    return _over_members(member, params, read)


@jax.jit
def _choose(better: Bool[Array, "S M"], new: Params, old: Params) -> Params:
    return jax.tree.map(lambda a, b: jnp.where(better.reshape(better.shape + (1,) * (a.ndim - 2)), a, b), new, old)
