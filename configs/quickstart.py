"""The smallest BERT that learns something from context: 2 layers of width 128 on half a megabyte of text.

ctx-jax data build python:topics --out data/topics --train-vocab 2000 --holdout 0.12
ctx-jax pretrain configs/quickstart.py --workdir runs/quickstart --data data/topics
"""

from ctx_jax.data.plan import RowsConfig
from ctx_jax.experiment import Evaluation, Experiment
from ctx_jax.flops.budget import FlopBudget
from ctx_jax.models.bert import BertConfig
from ctx_jax.objectives.mlm import MaskedLM
from ctx_jax.train.loop import LoopConfig
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

config = Experiment(
    data="data/topics",
    model=BertConfig(
        vocab_size=2000,
        hidden_size=128,
        num_layers=2,
        num_heads=2,
        intermediate_size=512,
        max_position_embeddings=128,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pooler=False,
    ),
    rows=RowsConfig(length=128, examples_per_row=4),
    objective=MaskedLM(),
    optimizer=Optimizer(kind="adamw", schedule=Schedule(kind="linear", peak=1.5e-3, warmup_steps=100)),
    steps=1200,
    batch_size=16,
    loop=LoopConfig(log_every=20, evaluate_every=400, checkpoint_every=400),
    evaluation=Evaluation(rows=256, repeats=4, batch_size=32),
    flop_budget=FlopBudget(0.12e9, 128),
)
