"""Optimizers as the papers' own code has them: BERT's AdamW, AdamW, LAMB, and Adagrad for ELMo."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.train.schedules import Schedule

# What each kind was published with; a setting that is not listed is one the kind does not have.
# Sources: google-research/bert optimization.py; Loshchilov and Hutter 2019; You et al. 2020; bilm-tf bin/train_elmo.py.
_PUBLISHED: dict[str, dict[str, float]] = {
    "bert_adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-6, "weight_decay": 0.01, "clip_norm": 1.0},
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0},
    "lamb": {"b1": 0.9, "b2": 0.999, "eps": 1e-6, "weight_decay": 0.01, "clip_norm": 1.0},
    "adagrad": {"initial_accumulator": 1.0, "clip_norm": 10.0},
}
KINDS = tuple(_PUBLISHED)


@dataclass(frozen=True)
class Optimizer:
    """An optimizer with its schedule. Settings left at None take the value that the kind was published with.

    Before anything else the gradients are clipped to a global norm of `clip_norm`. With m and v the moving averages of
    the gradient and its square, m̂ and v̂ the same corrected for their start at 0, and η the schedule's value:

    - `bert_adamw`: θ -= η (m / (√v + eps) + weight_decay · θ). No bias correction
      (google-research/bert, optimization.py, AdamWeightDecayOptimizer);
    - `adamw`: θ -= η (m̂ / (√v̂ + eps) + weight_decay · θ) (Loshchilov and Hutter 2019, algorithm 2);
    - `lamb`: with u the bracket of `adamw`, θ -= η · ‖θ‖ / ‖u‖ · u, norms per weight matrix (You et al. 2020,
      algorithm 2);
    - `adagrad`: s += g²; θ -= η g / √s, s from `initial_accumulator` (TensorFlow's AdagradOptimizer; bilm-tf trains
      ELMo with it at a constant 0.2).

    Biases and LayerNorms are not decayed, and LAMB's ratio is 1 for them, as in google-research/albert,
    lamb_optimizer.py (which, unlike the paper, has no bias correction).

    Attributes:
      kind: `bert_adamw`, `adamw`, `lamb` or `adagrad`.
      schedule: the learning rate.
      b1: decay of the moving average of the gradient.
      b2: decay of the moving average of its square.
      eps: added to the root.
      weight_decay: per unit of learning rate.
      clip_norm: largest global norm of the gradients; infinity does not clip.
      initial_accumulator: what Adagrad's sums of squares start from.
    """

    kind: str = "bert_adamw"
    schedule: Schedule = field(default_factory=Schedule)
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None
    initial_accumulator: float | None = None

    def __post_init__(self) -> None:
        """Refuses unknown kinds, values out of range, and settings that this kind would not look at."""
        if self.kind not in KINDS:
            hint = did_you_mean(self.kind, KINDS)
            raise InputError(f"Optimizer.kind: {self.kind!r}{hint}, expected one of {', '.join(KINDS)}")
        for name in ("b1", "b2", "eps", "weight_decay", "clip_norm", "initial_accumulator"):
            value = getattr(self, name)
            if value is None:
                continue
            if name not in _PUBLISHED[self.kind]:
                used = ", ".join(_PUBLISHED[self.kind])
                raise InputError(f"Optimizer.{name}: {value} with kind {self.kind!r}, which has only {used}")
            if name in ("b1", "b2") and not 0 <= value < 1:
                raise InputError(f"Optimizer.{name}: {value}, expected at least 0 and less than 1")
            if name in ("clip_norm", "initial_accumulator") and not value > 0:
                raise InputError(f"Optimizer.{name}: {value}, expected more than 0")
            if not value >= 0 or (math.isinf(value) and name != "clip_norm"):
                raise InputError(f"Optimizer.{name}: {value}, expected a finite number of at least 0")

    @property
    def settings(self) -> dict[str, float]:
        """The kind's settings by name, those left at None filled in."""
        return {
            name: published if getattr(self, name) is None else getattr(self, name)
            for name, published in _PUBLISHED[self.kind].items()
        }

    def build(self) -> optax.GradientTransformation:
        """The optimizer. Its state is a pytree of float32 moments, shaped as the parameters, and int32 counts."""
        settings = self.settings
        parts = []
        if not math.isinf(settings["clip_norm"]):
            parts.append(optax.clip_by_global_norm(settings["clip_norm"]))
        if self.kind == "adagrad":
            parts.append(optax.scale_by_rss(settings["initial_accumulator"], eps=0.0))
        else:
            corrected = self.kind != "bert_adamw"
            parts.append(_scale_by_adam(settings["b1"], settings["b2"], settings["eps"], corrected=corrected))
            parts.append(optax.add_decayed_weights(settings["weight_decay"], mask=decay_mask))
            if self.kind == "lamb":
                parts.append(_scale_by_trust_ratio())
        parts.append(optax.scale_by_learning_rate(self.schedule.build()))
        return _in_float32(optax.chain(*parts))


def decay_mask(params: optax.Params) -> Any:
    """True for the leaves that are decayed: all but `…/scale` (LayerNorm) and those whose name ends in `bias`.

    By name, because stacked layers give biases an axis more, and a rule by rank would decay them.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_weight(_names(path)), params)


def _names(path: tuple[Any, ...]) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def _is_weight(names: list[str]) -> bool:
    return names[-1] != "scale" and not names[-1].endswith("bias")


def _matrix_axes(names: list[str], ndim: int) -> tuple[int, ...]:
    """Axes over which one weight matrix extends: without that of the layers, and that of matrices stored as one."""
    stacked = int("layers" in names)
    axes = range(stacked, ndim)
    if {"qkv", "gated_up"} & set(names):  # [L?, D, 3, D], [L?, D, 2, F]: several matrices, stored as one for speed
        axes = (axis for axis in axes if axis != stacked + 1)
    return tuple(axes)


class _Moments(NamedTuple):
    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def _scale_by_adam(b1: float, b2: float, eps: float, *, corrected: bool) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, algorithm 1), with the bias correction or without.

    Not optax.scale_by_adam, which always corrects, does not run under strict dtype promotion, and forms 1 - b2^t in
    float32: 5e-5 off in the first step.
    """

    def init(params: optax.Params) -> _Moments:
        return _Moments(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(
        grads: optax.Updates, state: _Moments, params: optax.Params | None = None
    ) -> tuple[optax.Updates, _Moments]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
        first, second = (_one_minus_power(b, count) if corrected else 1.0 for b in (b1, b2))
        updates = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + eps), mu, nu)
        return updates, _Moments(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _one_minus_power(base: float, exponent: jax.Array) -> jax.Array | float:
    """1 - base^exponent, exact to float32 where the two are nearly equal."""
    return -jnp.expm1(exponent.astype(jnp.float32) * math.log(base)) if base else 1.0


def _scale_by_trust_ratio() -> optax.GradientTransformation:
    """LAMB's ‖θ‖ / ‖u‖ per weight matrix, 1 where either norm is 0 and for biases and LayerNorms.

    optax.scale_by_trust_ratio takes one norm a leaf, which for stacked layers mixes them all, and scales biases and
    LayerNorms too.
    """

    def scale(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
        names = _names(path)
        if not _is_weight(names):
            return update
        axes = _matrix_axes(names, param.ndim)
        weight_norm = jnp.sqrt(jnp.sum(jnp.square(param), axes, keepdims=True))
        update_norm = jnp.sqrt(jnp.sum(jnp.square(update), axes, keepdims=True))
        usable = (weight_norm > 0) & (update_norm > 0)
        ratio = jnp.where(usable, weight_norm / jnp.where(usable, update_norm, 1.0), 1.0)
        return update * jnp.broadcast_to(ratio, update.shape)

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params
    ) -> tuple[optax.Updates, optax.EmptyState]:
        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on float32 copies, so that bfloat16 parameters or gradients still have float32 moments and norms."""

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params
    ) -> tuple[optax.Updates, optax.OptState]:
        single = optax.tree.cast(grads, jnp.float32), state, optax.tree.cast(params, jnp.float32)
        updates, state = inner.update(*single)
        return jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params), state

    return optax.GradientTransformation(init, update)
