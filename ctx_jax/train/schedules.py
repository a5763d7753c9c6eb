"""Learning rates over the steps: the published curves as optax schedules."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from ctx_jax.errors import InputError, did_you_mean

KINDS = ("constant", "constant_with_warmup", "linear", "bert_linear", "cosine", "cosine_hard_restarts", "polynomial")

# Hugging Face's num_cycles where none is given: half a wave is one way down; one restart period is the whole run.
_CYCLES = {"cosine": 0.5, "cosine_hard_restarts": 1.0}


@dataclass(frozen=True)
class Schedule:
    """A learning-rate curve: linear from 0 to `peak` over `warmup_steps`, then what `kind` says until `total_steps`.

    With T = total_steps - warmup_steps and n = step - warmup_steps, after the warm-up:

    - `constant` (no warm-up), `constant_with_warmup`: peak;
    - `linear`: end + (peak - end) · (1 - n / T);
    - `bert_linear`: peak · (1 - step / total_steps). The decay counts from step 0, so that the curve steps down
      where the warm-up ends: what BERT was trained with;
    - `polynomial`: end + (peak - end) · (1 - n / T)^power;
    - `cosine`: peak · ½ (1 + cos(2π · cycles · n / T));
    - `cosine_hard_restarts`: peak · ½ (1 + cos(π · frac(cycles · n / T))), 0 at the end.

    From `total_steps` on the curves hold their last value (HF's cosine would rise again).

    Sources: Hugging Face transformers, optimization.py, `get_*_schedule`; `bert_linear`: google-research/bert,
    optimization.py, `create_optimizer`.

    Attributes:
      kind: the curve, by one of the names above.
      peak: highest learning rate.
      warmup_steps: steps of the warm-up; the first step of all is taken at 0.
      total_steps: updates of the run, which fills it in where it is None. The constant kinds do not look at it.
      end: last learning rate, of `linear` and `polynomial`.
      power: exponent, of `polynomial`.
      cycles: waves, of `cosine` (by default 0.5, one way down) and `cosine_hard_restarts` (by default 1).
    """

    kind: str = "linear"
    peak: float = 1e-4
    warmup_steps: int = 0
    total_steps: int | None = None
    end: float = 0.0
    power: float = 1.0
    cycles: float | None = None

    def __post_init__(self) -> None:
        """Refuses what makes no curve, and fields that this kind would not look at."""
        if self.kind not in KINDS:
            hint = did_you_mean(self.kind, KINDS)
            raise InputError(f"Schedule.kind: {self.kind!r}{hint}, expected one of {', '.join(KINDS)}")
        for name in ("peak", "end", "power", "cycles"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"Schedule.{name}: {value}, expected a finite number of at least 0")
        if self.warmup_steps < 0:
            raise InputError(f"Schedule.warmup_steps: {self.warmup_steps}, expected at least 0")
        if self.total_steps is not None and self.total_steps < 1:
            raise InputError(f"Schedule.total_steps: {self.total_steps}, expected at least 1")
        if self.total_steps is not None and self.warmup_steps > self.total_steps:
            raise InputError(
                f"Schedule.warmup_steps: {self.warmup_steps}, expected at most total_steps = {self.total_steps}"
            )
        if self.kind == "constant" and self.warmup_steps:
            raise InputError(
                f"Schedule.warmup_steps: {self.warmup_steps}, expected 0 with kind 'constant'"
                " (did you mean 'constant_with_warmup'?)"
            )
        self._refuse("end", self.end == 0, ("linear", "polynomial"))
        self._refuse("power", self.power == 1, ("polynomial",))
        self._refuse("cycles", self.cycles is None, tuple(_CYCLES))

    def _refuse(self, name: str, default: bool, kinds: tuple[str, ...]) -> None:
        if not default and self.kind not in kinds:
            used = " and ".join(kinds)
            raise InputError(f"Schedule.{name}: {getattr(self, name)} with kind {self.kind!r}; only {used} use it")

    def over(self, steps: int) -> Schedule:
        """The same curve over a run of so many steps, where `total_steps` was left open."""
        return self if self.total_steps is not None else dataclasses.replace(self, total_steps=steps)

    def build(self) -> optax.Schedule:
        """The curve as a function: step (int, or integer array) → learning rate (float32; float64 under x64).

        Raises:
          InputError: `total_steps` was left open and the kind needs it.
        """
        if self.total_steps is None:
            if not self.kind.startswith("constant"):
                raise InputError(f"Schedule.total_steps: None, expected a number of steps with kind {self.kind!r}")
            return self.over(max(1, self.warmup_steps)).build()

        def schedule(step: jax.typing.ArrayLike) -> jax.Array:
            step = jnp.clip(jnp.asarray(step, jnp.int32), 0, self.total_steps)
            decayed = jnp.full(step.shape, self.peak) if self.kind.startswith("constant") else self._decayed(step)
            warming = self.peak * (step.astype(float) / max(1, self.warmup_steps))
            return jnp.where(step < self.warmup_steps, warming, decayed)

        return schedule

    def _decayed(self, step: jax.Array) -> jax.Array:
        # Differences are taken in integers, and ½ (1 + cos πx) is written sin²(π/2 (1 - x)): near the end of a run
        # 1 - step / total in float32 keeps no correct digit. For that reason not optax's own schedules.
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        left = (self.total_steps - step).astype(float)
        if self.kind == "bert_linear":
            return self.peak * (left / self.total_steps)
        if self.kind in ("linear", "polynomial"):
            return self.end + (self.peak - self.end) * (left / decay_steps) ** self.power
        cycles = _CYCLES[self.kind] if self.cycles is None else self.cycles
        # Position within the wave, in steps: the product and the remainder are exact in float32 for the usual cycles.
        position = jnp.fmod(cycles * (step - self.warmup_steps).astype(float), decay_steps)
        if self.kind == "cosine":
            return self.peak * jnp.sin(jnp.pi * ((0.5 * decay_steps - position) / decay_steps)) ** 2
        wave = self.peak * jnp.sin(0.5 * jnp.pi * ((decay_steps - position) / decay_steps)) ** 2
        return jnp.where(left == 0, 0.0, wave)
