"""What a pre-training run consists of."""

from __future__ import annotations

from dataclasses import dataclass

from ctx_jax.data.plan import RowsConfig
from ctx_jax.errors import InputError
from ctx_jax.flops.architectures import longest
from ctx_jax.flops.budget import FlopBudget
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.objectives.bilm import BiLM
from ctx_jax.objectives.mlm import MaskedLM
from ctx_jax.sharding import MeshShape
from ctx_jax.train.loop import LoopConfig
from ctx_jax.train.optimizer import Optimizer


@dataclass(frozen=True)
class Evaluation:
    """Held-out evaluation: the same rows and the same masks every time."""

    rows: int = 1024
    """At most so many rows of the validation split, evenly spread over it."""
    repeats: int = 1
    """How often each row is masked anew."""
    batch_size: int = 64
    """Rows at once."""
    seed: int = 20181011
    """Of the masks."""


@dataclass(frozen=True)
class Experiment:
    """One reproducible pre-training run."""

    data: str
    """Folder of a tokenised corpus, as `ctx-jax data build` writes it."""
    model: BertConfig | ElmoConfig
    rows: RowsConfig = RowsConfig()
    objective: MaskedLM | BiLM = MaskedLM()
    optimizer: Optimizer = Optimizer()
    """A schedule whose `total_steps` is left open runs over `steps`."""
    steps: int = 1000
    """Updates of the whole run."""
    batch_size: int = 64
    """Rows of a step, over all devices and micro-batches."""
    accumulate: int = 1
    """Micro-batches a step is split into."""
    loop: LoopConfig = LoopConfig()
    evaluation: Evaluation = Evaluation()
    mesh: MeshShape = MeshShape()
    flop_budget: FlopBudget = FlopBudget()
    """What the encoder may cost; `ctx-jax flops` exits 1 when it costs more, and the cost card tells."""
    keep_checkpoints: int = 3
    """The newest so many."""
    keep_best: int = 0
    """Besides, so many of those whose held-out loss was lowest; above 0, every evaluated state is saved."""
    seed: int = 0
    """Of parameters, masks and dropout; the order of the rows has its own in `rows`."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"Experiment.{name} is {getattr(self, name)}, expected at least 1")
        for name, least in (("keep_checkpoints", 1), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise InputError(f"Experiment.{name} is {getattr(self, name)}, expected at least {least}")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"Experiment.batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        kinds = isinstance(self.model, ElmoConfig), isinstance(self.objective, BiLM), self.rows.kind == "stream"
        if len(set(kinds)) > 1:
            model, objective = type(self.model).__name__, type(self.objective).__name__
            raise InputError(
                f"Experiment: model {model}, objective {objective} and rows.kind {self.rows.kind!r} do not go together;"
                " expected ElmoConfig, BiLM and 'stream', or none of them"
            )
        limit = longest(self.model)
        if limit is not None:
            lengths = {"rows.length": self.rows.length}
            if self.flop_budget.forward_flops is not None:
                lengths["flop_budget.length"] = self.flop_budget.length
            for name, length in lengths.items():
                if length > limit:
                    raise InputError(f"Experiment.{name} {length} is more than model.max_position_embeddings {limit}")
        self.optimizer.schedule.over(self.steps)  # raises when the warm-up does not fit
        if isinstance(self.objective, BiLM):
            if self.evaluation.repeats > 1:
                raise InputError("Experiment.evaluation.repeats is for masks; a language model is evaluated once")
        elif self.objective.next_sentence and (self.rows.kind != "pairs" or not self.model.pooler):
            raise InputError("Experiment.objective.next_sentence needs rows.kind 'pairs' and model.pooler")
