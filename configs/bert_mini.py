"""BERT-mini: 4 layers of width 256 (Turc et al. 2019), masked LM alone, on rows packed with whole sentences.

ctx-jax data build TEXT… --out data/text --vocab vocab.txt --validation HELD_OUT…
ctx-jax pretrain configs/bert_mini.py --workdir runs/bert_mini --data data/text
"""

from ctx_jax.data.plan import RowsConfig
from ctx_jax.experiment import Evaluation, Experiment
from ctx_jax.models.bert import BertConfig
from ctx_jax.objectives.mlm import MaskedLM
from ctx_jax.train.loop import LoopConfig
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

config = Experiment(
    data="data/text",
    model=BertConfig(
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        intermediate_size=1024,
        hidden_dropout=0.0,  # one pass over the text at most: nothing to overfit
        attention_dropout=0.0,
        pooler=False,
        dtype="bfloat16",
    ),
    rows=RowsConfig(length=128, examples_per_row=8),
    objective=MaskedLM(),
    optimizer=Optimizer("adamw", Schedule("linear", 1e-3, warmup_steps=200), b2=0.98, eps=1e-6),
    steps=2500,
    batch_size=32,
    loop=LoopConfig(log_every=20, evaluate_every=500, checkpoint_every=250),
    evaluation=Evaluation(rows=512, batch_size=32),
)
