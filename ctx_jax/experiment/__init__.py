"""Whole pre-training runs: `config.py` says what one consists of, `assembly.py` makes its step, `run.py` runs it."""

from ctx_jax.experiment.config import Evaluation, Experiment
from ctx_jax.experiment.run import Outcome, pretrain

__all__ = ["Evaluation", "Experiment", "Outcome", "pretrain"]
