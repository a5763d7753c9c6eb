"""BERT-small: 4 layers of width 512; Turc et al. 2019.

    ctx-jax data build TEXT… --out data/text --vocab vocab.txt --holdout 0.005
    ctx-jax pretrain configs/bert_small.py --workdir runs/bert_small --data data/text

Sentence pairs and both losses as in the paper, with its AdamW; rows of 128, as the paper's first nine tenths.
Not run here yet.
"""

from ctx_jax.data.plan import RowsConfig
from ctx_jax.experiment import Experiment
from ctx_jax.flops.budget import FlopBudget
from ctx_jax.models.bert import BertConfig
from ctx_jax.objectives.mlm import MaskedLM
from ctx_jax.train.loop import LoopConfig
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

config = Experiment(
    data="data/text",
    model=BertConfig(hidden_size=512, num_layers=4, num_heads=8, intermediate_size=2048, dtype="bfloat16"),
    rows=RowsConfig(length=128, kind="pairs", duplicates=1),
    objective=MaskedLM(max_predictions=20, next_sentence=True),
    optimizer=Optimizer("bert_adamw", Schedule("bert_linear", 0.0007, warmup_steps=10_000, total_steps=200_000)),
    steps=200_000,
    batch_size=256,
    loop=LoopConfig(log_every=100, evaluate_every=10_000, checkpoint_every=5_000),
    flop_budget=FlopBudget(3.4e9, 128),
)
