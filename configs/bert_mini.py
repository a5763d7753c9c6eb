"""BERT-mini: 4 layers of width 256 (Turc et al. 2019), masked LM alone, on rows packed with whole sentences.

    ctx-jax data build TEXT… --out data/text --vocab vocab.txt --validation HELD_OUT…
    ctx-jax pretrain configs/bert_mini.py --workdir runs/bert_mini --data data/text

Sized for an hour on a small machine. Run on 2026-11-24 on 2 shared cores of an AMD EPYC (Zen 4, no AMX) beside other
work, 96 minutes, jax 0.12.0, on 10.8 M of 78.6 M tokens of Wikipedia and books (BERT's uncased vocabulary): held-out
masked-LM loss 6.273 nats, accuracy 15.5 %; unigram entropy of the same 34,702 tokens 6.744. 3.65e14 FLOP in matrix
products, 1,884 tokens/s, 31 % of the peak. So it has learnt from context, and is a beginning: log and cost are in
results/bert_mini/.
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
    optimizer=Optimizer("adamw", Schedule("linear", 1e-3, warmup_steps=300), b2=0.98, eps=1e-6),
    steps=6000,
    batch_size=16,
    loop=LoopConfig(log_every=50, evaluate_every=1000, checkpoint_every=250),
    evaluation=Evaluation(rows=2048, batch_size=32),
    flop_budget=FlopBudget(0.88e9, 128),
)
