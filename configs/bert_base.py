"""BERT-base: 12 layers of width 768; Devlin et al. 2019.

    ctx-jax data build TEXT… --out data/text --vocab vocab.txt --holdout 0.005
    ctx-jax pretrain configs/bert_base.py --workdir runs/bert_base --data data/text

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
    model=BertConfig(hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072, dtype="bfloat16"),
    rows=RowsConfig(length=128, kind="pairs", duplicates=10),
    objective=MaskedLM(max_predictions=20, next_sentence=True),
    optimizer=Optimizer("bert_adamw", Schedule("bert_linear", 0.0001, warmup_steps=10_000, total_steps=1_000_000)),
    steps=900_000,
    batch_size=256,
    loop=LoopConfig(log_every=100, evaluate_every=10_000, checkpoint_every=5_000),
    flop_budget=FlopBudget(22.4e9, 128),
)
