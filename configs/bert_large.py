"""BERT-large: 24 layers of width 1024; Devlin et al. 2019.

    ctx-jax data build TEXT… --out data/text --vocab vocab.txt --holdout 0.005
    ctx-jax pretrain configs/bert_large.py --workdir runs/bert_large --data data/text

The original's recipe (google-research/bert, README and appendix A.2 of the paper): a million steps of 256 rows, nine
tenths of them at 128 tokens, AdamW without bias correction, 1e-4 after 10,000 steps of warm-up, linear decay. This is
the part at 128 tokens. Not run here: on one accelerator it takes days to weeks.
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
    model=BertConfig(
        hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096, dtype="bfloat16", remat="dots"
    ),
    rows=RowsConfig(length=128, kind="pairs", duplicates=10),
    objective=MaskedLM(max_predictions=20, next_sentence=True),
    optimizer=Optimizer("bert_adamw", Schedule("bert_linear", 0.0001, warmup_steps=10_000, total_steps=1_000_000)),
    steps=900_000,
    batch_size=256,
    loop=LoopConfig(log_every=100, evaluate_every=10_000, checkpoint_every=5_000),
    flop_budget=FlopBudget(79e9, 128),
)
