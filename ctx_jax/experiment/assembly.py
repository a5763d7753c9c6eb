"""From an experiment to its training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ctx_jax.arrays import Batch, Windows
from ctx_jax.data.corpus import Corpus
from ctx_jax.data.loader import Loader
from ctx_jax.data.plan import make_plan
from ctx_jax.data.streams import Streams
from ctx_jax.errors import InputError
from ctx_jax.experiment.config import Experiment
from ctx_jax.models.bert import BertWithHeads
from ctx_jax.models.elmo import ElmoConfig, ElmoForPreTraining
from ctx_jax.nn.parameters import Bound
from ctx_jax.objectives.bilm import BiLMObjective, Lexicon
from ctx_jax.objectives.masking import Vocabulary
from ctx_jax.objectives.mlm import MaskedLMObjective
from ctx_jax.text.characters import Characters
from ctx_jax.text.tokenizer import Tokenizer
from ctx_jax.train.step import Objective, TrainState, init_state, make_train_step


class Assembly(NamedTuple):
    """What a run works with.

    Attributes:
      bound: the model.
      objective: what it learns.
      init: a key → the first state.
      schedule: learning rate by step.
      step: one training step, not yet jitted.
    """

    bound: Bound
    objective: Objective
    init: Callable[[jax.Array], TrainState]
    schedule: optax.Schedule
    step: Callable[..., Any]


def assemble(experiment: Experiment, vocabulary: Vocabulary | Lexicon) -> Assembly:
    """Puts model, objective and optimizer together; the schedule runs over the steps of the run."""
    bound, objective = _model_and_objective(experiment, vocabulary)
    optimizer = replace(experiment.optimizer, schedule=experiment.optimizer.schedule.over(experiment.steps))
    transform = optimizer.build()
    step = make_train_step(
        bound,
        objective,
        transform,
        mask_seed=experiment.seed,
        dropout_seed=experiment.seed + 1,
        accumulate=experiment.accumulate,
        skip_non_finite=experiment.loop.skip_non_finite > 0,
    )
    init = lambda key: init_state(bound, transform, key, objective.start(experiment.batch_size))
    return Assembly(bound, objective, init, optimizer.schedule.build(), step)


def _model_and_objective(experiment: Experiment, vocabulary: Vocabulary | Lexicon) -> tuple[Bound, Objective]:
    model, rows = experiment.model, experiment.rows
    if isinstance(model, ElmoConfig):
        bound = Bound(lambda rngs: ElmoForPreTraining(model, rngs=rngs))
        return bound, BiLMObjective(experiment.objective, model, vocabulary)
    bound = Bound(lambda rngs: BertWithHeads(model, rngs=rngs))
    return bound, MaskedLMObjective(
        experiment.objective, vocabulary, length=rows.length, examples_per_row=rows.examples_per_row
    )


def vocabulary_of(experiment: Experiment, tokenizer: Tokenizer) -> Vocabulary | Lexicon:
    """What the objective must know of a corpus' tokenizer.

    Raises:
      InputError: model and tokenizer do not fit.
    """
    model, size, specials = experiment.model, tokenizer.vocab_size, tokenizer.specials
    if isinstance(model, ElmoConfig):
        if tokenizer.continues_word.any():
            raise InputError(f"{experiment.data} holds sub-words; ELMo takes whole words: build with --train-words")
        if not 4 <= model.vocab_size <= size:
            raise InputError(
                f"model.vocab_size is {model.vocab_size}, expected 4 to {size}, the words of {experiment.data}"
            )
        characters = Characters(model.max_characters)
        return Lexicon(np.stack([characters.word(word) for word in tokenizer.tokens(range(size))]), specials.unk)
    if model.vocab_size != size:
        raise InputError(f"model.vocab_size is {model.vocab_size}, but {experiment.data} has a vocabulary of {size}")
    if specials.mask == specials.unk:
        raise InputError(f"{experiment.data} holds whole words and no mask; BERT takes sub-words: build with --vocab")
    return Vocabulary(size, specials.mask, tuple(sorted(set(specials))), tokenizer.continues_word)


def open_rows(
    corpus: Corpus, experiment: Experiment, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> Loader | Streams:
    """The rows of a split, as the experiment cuts them."""
    rows = experiment.rows
    if rows.kind == "stream":
        return Streams(corpus, rows)
    plan = make_plan(corpus.sentence_offsets, corpus.document_offsets, rows, progress=progress)
    return Loader(corpus, rows, plan)


def abstract_step(experiment: Experiment) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The training step of an experiment and the shapes of its arguments, for those who count or compile it without
    data: of the vocabulary only the size is real.
    """
    model, rows, length = experiment.model, experiment.batch_size, experiment.rows.length
    size, examples = model.vocab_size, experiment.rows.examples_per_row
    signed = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    unsigned = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.uint32)
    if isinstance(model, ElmoConfig):
        vocabulary = Lexicon(np.broadcast_to(np.int16(0), (size, model.max_characters)), 2)
        batch = Windows(*(signed(rows, length) for _ in range(4)), signed(rows), unsigned(rows))
    else:
        vocabulary = Vocabulary(size, 4, tuple(range(5)), np.zeros(size, bool))
        batch = Batch(
            *(signed(rows, length) for _ in range(4)), unsigned(rows, examples), unsigned(rows), signed(rows, examples)
        )
    parts = assemble(experiment, vocabulary)
    state = jax.eval_shape(lambda: parts.init(jax.random.key(0, impl="threefry2x32")))
    arguments = jax.ShapeDtypeStruct(parts.objective.arguments.shape, parts.objective.arguments.dtype)
    return parts.step, (state, batch, arguments)
