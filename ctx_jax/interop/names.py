"""What other libraries call the parameters of BERT and its kin.

A family names our modules in Hugging Face's way; a dialect says how a library spells modules and their leaves.
PyTorch's and Flax's classes have the same modules, and so one family serves both.

Sources: transformers, modeling_bert.py, modeling_roberta.py, modeling_electra.py, modeling_distilbert.py,
modeling_albert.py; google-research/bert, modeling.py and run_pretraining.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ctx_jax.interop.tables import Entry, Part, transposed, whole
from ctx_jax.models.bert import BertConfig

_QKV = "attention/qkv"
_EMBEDDINGS = {
    "embeddings/token": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
}
_LAYER = {
    _QKV: ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward/up": "intermediate.dense",
    "feed_forward/down": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
_SPANS = {"span_classifier/out": "qa_outputs"}
_TOKENS = {"token_classifier/out": "classifier"}
_DENSE_CLASSIFIER = {"sequence_classifier/dense": "classifier.dense", "sequence_classifier/out": "classifier.out_proj"}


@dataclass(frozen=True)
class Family:
    """The modules of one architecture.

    Attributes:
      base: what the encoder is called inside a model with heads.
      encoder: our module → theirs; those that a configuration has not are passed over.
      layers: what stands before the modules of a layer; {layer} is its number.
      layer: our module of a layer → theirs, three of them for query, key and value.
      heads: our head → its modules.
      decoder: theirs, of the masked-LM head's table.
      classifier_activation: of the dense layer in the classifier of whole texts; None where there is a pooler instead.
    """

    base: str
    encoder: Mapping[str, str]
    layers: str
    layer: Mapping[str, str | tuple[str, str, str]]
    heads: Mapping[str, Mapping[str, str]]
    decoder: str
    classifier_activation: str | None = None


FAMILIES: dict[str, Family] = {
    "bert": Family(
        base="bert",
        encoder={**_EMBEDDINGS, "pooler/dense": "pooler.dense"},
        layers="encoder.layer.{layer}.",
        layer=_LAYER,
        heads={
            "masked_lm": {
                "masked_lm": "cls.predictions",
                "masked_lm/dense": "cls.predictions.transform.dense",
                "masked_lm/norm": "cls.predictions.transform.LayerNorm",
            },
            "next_sentence": {"next_sentence": "cls.seq_relationship"},
            "token_classifier": _TOKENS,
            "sequence_classifier": {"sequence_classifier/out": "classifier"},
            "span_classifier": _SPANS,
        },
        decoder="cls.predictions.decoder",
    ),
    "roberta": Family(
        base="roberta",
        encoder={**_EMBEDDINGS, "pooler/dense": "pooler.dense"},
        layers="encoder.layer.{layer}.",
        layer=_LAYER,
        heads={
            "masked_lm": {
                "masked_lm": "lm_head",
                "masked_lm/dense": "lm_head.dense",
                "masked_lm/norm": "lm_head.layer_norm",
            },
            "token_classifier": _TOKENS,
            "sequence_classifier": _DENSE_CLASSIFIER,
            "span_classifier": _SPANS,
        },
        decoder="lm_head.decoder",
        classifier_activation="tanh",
    ),
    "electra": Family(
        base="electra",
        encoder={**_EMBEDDINGS, "embedding_projection": "embeddings_project"},
        layers="encoder.layer.{layer}.",
        layer=_LAYER,
        heads={
            "masked_lm": {
                "masked_lm": "generator_lm_head",
                "masked_lm/dense": "generator_predictions.dense",
                "masked_lm/norm": "generator_predictions.LayerNorm",
            },
            "replaced_token": {
                "replaced_token/dense": "discriminator_predictions.dense",
                "replaced_token/out": "discriminator_predictions.dense_prediction",
            },
            "token_classifier": _TOKENS,
            "sequence_classifier": _DENSE_CLASSIFIER,
            "span_classifier": _SPANS,
        },
        decoder="generator_lm_head",
        classifier_activation="gelu",
    ),
    "distilbert": Family(
        base="distilbert",
        encoder=_EMBEDDINGS,
        layers="transformer.layer.{layer}.",
        layer={
            _QKV: ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            "attention/out": "attention.out_lin",
            "attention_norm": "sa_layer_norm",
            "feed_forward/up": "ffn.lin1",
            "feed_forward/down": "ffn.lin2",
            "feed_forward_norm": "output_layer_norm",
        },
        heads={
            "masked_lm": {
                "masked_lm": "vocab_projector",
                "masked_lm/dense": "vocab_transform",
                "masked_lm/norm": "vocab_layer_norm",
            },
            "token_classifier": _TOKENS,
            "sequence_classifier": {
                "sequence_classifier/dense": "pre_classifier",
                "sequence_classifier/out": "classifier",
            },
            "span_classifier": _SPANS,
        },
        decoder="vocab_projector",
        classifier_activation="relu",
    ),
    "albert": Family(
        base="albert",
        encoder={
            **_EMBEDDINGS,
            "embedding_projection": "encoder.embedding_hidden_mapping_in",
            "pooler/dense": "pooler",
        },
        layers="encoder.albert_layer_groups.0.albert_layers.0.",
        layer={
            _QKV: ("attention.query", "attention.key", "attention.value"),
            "attention/out": "attention.dense",
            "attention_norm": "attention.LayerNorm",
            "feed_forward/up": "ffn",
            "feed_forward/down": "ffn_output",
            "feed_forward_norm": "full_layer_layer_norm",
        },
        heads={
            "masked_lm": {
                "masked_lm": "predictions",
                "masked_lm/dense": "predictions.dense",
                "masked_lm/norm": "predictions.LayerNorm",
            },
            "next_sentence": {"next_sentence": "sop_classifier.classifier"},
            "token_classifier": _TOKENS,
            "sequence_classifier": {"sequence_classifier/out": "classifier"},
            "span_classifier": _SPANS,
        },
        decoder="predictions.decoder",
    ),
}
"""Hugging Face's, by `model_type` of config.json."""

GOOGLE = Family(
    base="bert",
    encoder={**_EMBEDDINGS, "pooler/dense": "pooler.dense"},
    layers="encoder.layer_{layer}.",
    layer=_LAYER,
    heads={
        "masked_lm": FAMILIES["bert"].heads["masked_lm"],
        "next_sentence": FAMILIES["bert"].heads["next_sentence"],
    },
    decoder="cls.predictions.decoder",
)
"""google-research/bert's."""


_View = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Dialect:
    """How a library spells the leaves of a module, and how they lie: our leaf → (their leaf, the view of ours).

    Attributes:
      separator: between modules.
      linear: of a linear map.
      norm: of a LayerNorm.
      table: of a table of vectors; no leaf where the module's name is the tensor's.
      output: of the last linear map of pre-training.
      decoder_bias: a masked-LM head with a table of its own has its bias beside that, not where tied ones have it.
    """

    separator: str
    linear: Mapping[str, tuple[str, _View]]
    norm: Mapping[str, tuple[str, _View]]
    table: Mapping[str, tuple[str, _View]]
    output: Mapping[str, tuple[str, _View]]
    decoder_bias: bool = False

    def name(self, module: str, leaf: str) -> str:
        """The tensor of a leaf."""
        return (f"{module}.{leaf}" if leaf else module).replace(".", self.separator)

    def leaves(self, ours: str) -> Mapping[str, tuple[str, _View]]:
        """Of one of our modules."""
        if ours == "masked_lm":
            return {"bias": self.output["bias"]}
        if ours == "next_sentence":
            return self.output
        if ours.endswith("norm"):
            return self.norm
        return self.table if ours.startswith("encoder/embeddings/") else self.linear


_WEIGHT_AND_BIAS = {"kernel": ("weight", transposed), "bias": ("bias", whole)}
_KERNEL_AND_BIAS = {"kernel": ("kernel", whole), "bias": ("bias", whole)}
PYTORCH = Dialect(
    separator=".",
    linear=_WEIGHT_AND_BIAS,
    norm={"scale": ("weight", whole), "bias": ("bias", whole)},
    table={"table": ("weight", whole)},
    output=_WEIGHT_AND_BIAS,
    decoder_bias=True,
)
FLAX = Dialect(
    separator="/",
    linear=_KERNEL_AND_BIAS,
    norm={"scale": ("scale", whole), "bias": ("bias", whole)},
    table={"table": ("embedding", whole)},
    output=_KERNEL_AND_BIAS,
)
TENSORFLOW = Dialect(
    separator="/",
    linear=_KERNEL_AND_BIAS,
    norm={"scale": ("gamma", whole), "bias": ("beta", whole)},
    table={"table": ("", whole)},
    output={"kernel": ("output_weights", transposed), "bias": ("output_bias", whole)},
)


def bert_table(config: BertConfig, family: Family, dialect: Dialect, *, prefix: str, outer: str = "") -> list[Entry]:
    """The table of a BERT and its heads.

    Args:
      config: which modules there are.
      family: what they are called.
      dialect: how.
      prefix: what stands before the encoder's names: `bert.` in models with heads, nothing in some without.
      outer: what stands before all names.
    """
    modules = {f"encoder/{ours}": outer + prefix + theirs for ours, theirs in family.encoder.items()}
    for head in config.all_heads:
        modules |= {ours: outer + theirs for ours, theirs in family.heads[head].items()}
    if dialect.decoder_bias and not config.tied_head and "masked_lm" in modules:
        modules["masked_lm"] = outer + family.decoder
    absent = {
        "encoder/embeddings/type": config.type_vocab_size == 0,
        "encoder/embedding_projection": config.embedding_size is None,
        "encoder/pooler/dense": not config.pooler,
    }
    entries = [
        Entry(f"{ours}/{leaf}", (Part(dialect.name(theirs, their_leaf), view),))
        for ours, theirs in modules.items()
        if not absent.get(ours)
        for leaf, (their_leaf, view) in dialect.leaves(ours).items()
    ]
    if "masked_lm" in config.all_heads and not config.tied_head:
        their_leaf, view = dialect.linear["kernel"]
        # Theirs is a linear map from E to V.
        table = Part(dialect.name(outer + family.decoder, their_leaf), lambda leaf: view(leaf.T))
        entries.append(Entry("masked_lm/table", (table,)))
    for ours, theirs in family.layer.items():
        for leaf in dialect.leaves(ours):
            parts = _parts(config, family, dialect, outer + prefix, ours, theirs, leaf)
            entries.append(Entry(f"encoder/layers/{ours}/{leaf}", tuple(parts)))
    return entries


def _parts(
    config: BertConfig, family: Family, dialect: Dialect, prefix: str, ours: str, theirs: str | tuple, leaf: str
) -> Iterator[Part]:
    """A stacked leaf, layer by layer; query, key and value lie side by side on its last axis but one."""
    their_leaf, view = dialect.leaves(ours)[leaf]
    for layer in range(1 if config.shared_layers else config.num_layers):
        at = prefix + family.layers.format(layer=layer)
        if isinstance(theirs, str):
            yield Part(dialect.name(at + theirs, their_leaf), lambda x, layer=layer: view(x[layer]))
            continue
        for place, module in enumerate(theirs):
            one = lambda x, layer=layer, place=place: view(x[layer][..., place, :])
            yield Part(dialect.name(at + module, their_leaf), one)
