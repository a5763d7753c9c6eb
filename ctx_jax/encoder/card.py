"""What goes with a model when it leaves: a card for people, README.md beside the weights."""

from __future__ import annotations

import pathlib

from ctx_jax.flops.architectures import encoder_cost, longest
from ctx_jax.interop.pretrained import REPAIRS, Pretrained, Repairs
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import count_parameters

_LENGTH = 128
_TASKS = {"masked_lm": "fill-mask", "token_classifier": "token-classification"}
_TASKS |= {"sequence_classifier": "text-classification", "span_classifier": "question-answering"}


def model_card(pretrained: Pretrained) -> str:
    """Markdown: sizes, data, training, cost, licence and limits, as far as they are known; what is not, says so."""
    config, about = pretrained.config, pretrained.about
    elmo = isinstance(config, ElmoConfig)
    heads = () if elmo else config.all_heads
    tasks = ["sentence-similarity"] if pretrained.pooling else [_TASKS[head] for head in heads if head in _TASKS]
    task = (*tasks, "feature-extraction")[0]
    length = min(_LENGTH, longest(config) or _LENGTH)
    flops = encoder_cost(config, rows=1, length=length).matrix_flops
    unit = "words" if elmo else "tokens"
    sizes = (
        f"an ELMo of {config.num_layers} LSTMs a direction, {config.lstm_dim} cells, projection {config.projection_dim}"
        if elmo
        else f"a BERT-like encoder of {config.num_layers} layers, width {config.hidden_size}, {config.num_heads} heads"
    )
    lines = [
        "---",
        f"pipeline_tag: {task}",
        "tags: [jax, ctx_jax, contextual-embeddings]",
        "---",
        "",
        "# Model card",
        "",
        f"This is {sizes}, {count_parameters(pretrained.params):,} parameters in all; heads: "
        f"{', '.join(heads) or 'none'}. Written by ctx_jax.",
        *_truncated(about),
        *_repaired(pretrained.repairs),
        "",
        "## Data",
        "",
        _data(about),
        "",
        "## Cost",
        "",
        f"A forward pass over {length} {unit} takes {flops / 1e9:.3g} GFLOP in matrix products, a multiply-add counted "
        "as two, by formula (`ctx-jax flops`).",
        *_training(about),
        "",
        "## Licence",
        "",
        "None is stated. Whoever publishes the weights names it here; it must be one that the data allow, and the "
        "model that this one comes from.",
        "",
        "## Limits",
        "",
        _limits(pretrained),
        "",
        "## Proof",
        "",
        "certificate.json says how far off those were who read this folder back; `ctx-jax verify` does it again.",
    ]
    return "\n".join(lines) + "\n"


def _truncated(about: dict) -> list[str]:
    if (found := about.get("truncated")) is None:
        return []
    name = f", `{found['name']}`" if found["name"] else ""
    return [
        "",
        f"It was truncated: these are the first {found['layers']} layers of a model of {found['of']}{name}, as they "
        "were in it and not trained since. What read the last layer, heads and pooler, is left out.",
    ]


def _repaired(repairs: Repairs) -> list[str]:
    if not repairs:
        return []
    listed = "; ".join(f"layer {layer}: {', '.join(kinds)}" for layer, kinds in sorted(repairs.items()))
    return ["", f"Repairs of its vectors, (x - mean) @ matrix, are in {REPAIRS}: {listed}."]


def _data(about: dict) -> str:
    experiment = about.get("experiment")
    if experiment is None:
        return "Not known: the weights came from elsewhere."
    # A path's last name says what the data are; the rest of it is somebody's machine.
    name = pathlib.PurePath(str(experiment.get("data", ""))).name
    return f"The corpus `{name}`, fingerprint `{about.get('data', 'unknown')}` (`ctx-jax data audit`)."


def _training(about: dict) -> list[str]:
    experiment = about.get("experiment")
    if experiment is None:
        return []
    rows, optimizer = experiment["rows"], experiment["optimizer"]
    return [
        "",
        f"Trained with {optimizer['kind']} for {experiment['steps']:,} steps of {experiment['batch_size']} rows of "
        f"{rows['length']}, seed {experiment['seed']}.",
    ]


def _limits(pretrained: Pretrained) -> str:
    most = longest(pretrained.config)
    length = f"Rows of at most {most} tokens, special ones counted. " if most else "Texts of any length. "
    return length + (
        "It knows the language, the time and the prejudices of the text it was trained on, and nothing else; it was "
        "not tested for any use in which a wrong answer does harm."
    )
