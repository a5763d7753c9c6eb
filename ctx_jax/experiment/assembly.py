"""From an experiment to its training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ctx_jax.arrays import Batch
from ctx_jax.experiment.config import Experiment
from ctx_jax.models.bert import BertForPreTraining
from ctx_jax.nn.parameters import Bound
from ctx_jax.objectives.masking import Vocabulary
from ctx_jax.objectives.mlm import MaskedLMObjective
from ctx_jax.text.tokenizer import Tokenizer
from ctx_jax.train.step import init_state, make_train_step


class Assembly(NamedTuple):
    """What a run works with.

    Attributes:
      bound: the model.
      objective: what it learns.
      transform: what turns gradients into updates.
      schedule: learning rate by step.
      step: one training step, not yet jitted.
    """

    bound: Bound
    objective: MaskedLMObjective
    transform: optax.GradientTransformation
    schedule: optax.Schedule
    step: Callable[..., Any]


def assemble(experiment: Experiment, vocabulary: Vocabulary) -> Assembly:
    """Puts model, objective and optimizer together; the schedule runs over the steps of the run."""
    bound = Bound(lambda rngs: BertForPreTraining(experiment.model, rngs=rngs))
    objective = MaskedLMObjective(
        experiment.objective,
        vocabulary,
        length=experiment.rows.length,
        examples_per_row=experiment.rows.examples_per_row,
    )
    optimizer = replace(experiment.optimizer, schedule=experiment.optimizer.schedule.over(experiment.steps))
    transform = optimizer.build()
    step = make_train_step(
        bound,
        objective,
        transform,
        mask_seed=experiment.seed,
        dropout_seed=experiment.seed + 1,
        accumulate=experiment.accumulate,
    )
    return Assembly(bound, objective, transform, optimizer.schedule.build(), step)


def abstract_step(experiment: Experiment) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The training step of an experiment and the shapes of its arguments, for those who count or compile it without
    data: of the vocabulary only the size is real.
    """
    size = experiment.model.vocab_size
    parts = assemble(experiment, Vocabulary(size, 4, tuple(range(5)), np.zeros(size, bool)))
    state = jax.eval_shape(lambda: init_state(parts.bound, parts.transform, jax.random.key(0, impl="threefry2x32")))
    rows, length, examples = experiment.batch_size, experiment.rows.length, experiment.rows.examples_per_row
    signed = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    unsigned = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.uint32)
    batch = Batch(
        *(signed(rows, length) for _ in range(4)), unsigned(rows, examples), unsigned(rows), signed(rows, examples)
    )
    return parts.step, (state, batch, parts.objective.arguments)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """What masking must know of a tokenizer."""
    specials = tokenizer.specials
    return Vocabulary(tokenizer.vocab_size, specials.mask, tuple(sorted(set(specials))), tokenizer.continues_word)
