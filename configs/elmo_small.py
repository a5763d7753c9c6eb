"""ELMo small: 2 LSTMs of 1024 cells a direction, projected to 128; 13.6 M parameters (allennlp.org/elmo, "small").

    ctx-jax data build TEXT… --out data/words --train-words 1000000 --validation HELD_OUT…
    ctx-jax pretrain configs/elmo_small.py --workdir runs/elmo_small --data data/words

Windows of 20 words, dropout 0.1, a softmax sampled with 8,192 of the 50,000 most frequent words, as bilm-tf trains it;
but AdamW on 32 streams instead of Adagrad on 128, which gets further in the hours of a small machine.

On 2026-11-24 on 2 shared cores of an AMD EPYC (Zen 4), in 73 minutes at the lowest priority: after these 1,500 steps,
0.96 M words, held-out perplexity 262 forwards and 256 backwards, where a 5-gram Kneser-Ney model of all 69.9 M words
has 136: results/elmo_small/.
"""

from ctx_jax.data.plan import RowsConfig
from ctx_jax.experiment import Evaluation, Experiment
from ctx_jax.flops.budget import FlopBudget
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.objectives.bilm import BiLM
from ctx_jax.train.loop import LoopConfig
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

config = Experiment(
    data="data/words",
    model=ElmoConfig(
        lstm_dim=1024, projection_dim=128, num_highway=1, vocab_size=50_000, dropout=0.1, dtype="bfloat16"
    ),
    rows=RowsConfig(length=20, kind="stream"),
    objective=BiLM(num_samples=8192),
    optimizer=Optimizer("adamw", Schedule("linear", 2e-3, warmup_steps=100), b2=0.98, weight_decay=0.0),
    steps=1_500,
    batch_size=32,
    loop=LoopConfig(log_every=25, evaluate_every=500, checkpoint_every=250),
    evaluation=Evaluation(rows=1280, batch_size=64),
    flop_budget=FlopBudget(5.7e9, 128),
)
