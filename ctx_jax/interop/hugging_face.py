"""Hugging Face's config.json as our configuration, and back; and what a file of its classes holds.

Source: transformers, configuration_bert.py, configuration_roberta.py, configuration_electra.py,
configuration_distilbert.py, configuration_albert.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.interop.files.tensors import Tensors
from ctx_jax.interop.names import FAMILIES, FLAX, PYTORCH, Dialect, bert_table
from ctx_jax.interop.run_folder import bound_model
from ctx_jax.interop.tables import read_params, transposed, whole
from ctx_jax.models.bert import HEADS, BertConfig
from ctx_jax.nn.parameters import Params

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
}
"""Theirs → ours; the first of several is written."""
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
}
_CHOICES = {
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
}
_DISTILBERT_SIZES = _SIZES | {
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
_DISTILBERT_CHOICES = {
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "electra": {"embedding_size": 128},
    "distilbert": {},
    "albert": {"embedding_size": 128, "hidden_act": "gelu_new", "hidden_dropout_prob": 0.0}
    | {"attention_probs_dropout_prob": 0.0},
}
"""Of transformers' configurations, where they are not those of BERT."""
_REFUSED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "num_hidden_groups": 1,
    "inner_group_num": 1,
}
"""What changes the computation, with the only value that we have."""
_SAME = {"xlm-roberta": "roberta", "camembert": "roberta"}
"""Other vocabularies and texts, the same computation under the same names."""
_CLASSIFIERS = {"TokenClassification": "token_classifier", "SequenceClassification": "sequence_classifier"}
_OLD = replace(PYTORCH, norm={"scale": ("gamma", whole), "bias": ("beta", whole)})
"""Files of before 2019, and their copies: bert-base-uncased is one."""


def family_of(record: Mapping[str, Any], where: str) -> str:
    """The family of a config.json's `model_type`.

    Raises:
      InputError: it is none that we have.
    """
    kind = record.get("model_type")
    known = {**dict.fromkeys(FAMILIES), **_SAME}
    if kind not in known:
        near = did_you_mean(str(kind), known)
        raise InputError(f"{where}: model_type: found {kind!r}, expected one of {', '.join(known)}{near}")
    return _SAME.get(kind, kind)


def read_config(record: Mapping[str, Any], where: str, **known: Any) -> BertConfig:
    """Our configuration of a config.json.

    Args:
      record: its fields.
      where: the file, for messages.
      known: fields of BertConfig that the weights say: heads, pooler, tied_head.

    Raises:
      InputError: a field is missing or has a value that cannot be followed.
    """
    kind = family_of(record, where)
    for name, value in _REFUSED.items():
        if (record.get(name) or value) != value:
            raise InputError(f"{where}: {name}: found {record[name]!r}, expected {value!r}, all there is here")
    given = _DEFAULTS[kind] | dict(record)
    distilbert = kind == "distilbert"
    fields: dict[str, Any] = {}
    for ours, theirs in (_DISTILBERT_SIZES if distilbert else _SIZES).items():
        fields[ours] = _number(given, theirs, int, where)
    for ours, theirs in (_DISTILBERT_CHOICES if distilbert else _CHOICES).items():
        if theirs in given:
            fields[ours] = _number(given, theirs, float, where)
    name = "activation" if distilbert else "hidden_act"
    activation = given.get(name, "gelu")
    if activation not in _ACTIVATIONS:
        near = did_you_mean(str(activation), _ACTIVATIONS)
        raise InputError(f"{where}: {name}: found {activation!r}, expected one of {', '.join(_ACTIVATIONS)}{near}")
    fields["activation"] = _ACTIVATIONS[activation]
    fields["type_vocab_size"] = (
        0 if distilbert else _number({"type_vocab_size": 2, **given}, "type_vocab_size", int, where)
    )
    if kind in ("electra", "albert"):
        width = _number(given, "embedding_size", int, where)
        fields["embedding_size"] = None if kind == "electra" and width == fields["hidden_size"] else width
    if kind == "albert":
        fields["shared_layers"] = True
    if kind == "roberta":
        fields["position_offset"] = _number(given, "pad_token_id", int, where) + 1
    fields |= known
    heads = fields.get("heads") or ()
    if {"token_classifier", "sequence_classifier"} & set(heads):
        fields["labels"] = _labels(given, where)
    if "sequence_classifier" in heads:
        fields["classifier_activation"] = FAMILIES[kind].classifier_activation
    if "masked_lm" in heads and kind in ("roberta", "electra") and fields["activation"] != "gelu":
        raise InputError(
            f"{where}: {name}: found {activation!r}, expected 'gelu', which this masked-LM head always has"
        )
    try:
        return BertConfig(**fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def write_config(config: BertConfig) -> dict[str, Any]:
    """The config.json of a BERT or its kin.

    Raises:
      InputError: no class of theirs computes what the configuration says.
    """
    kind = kind_of(config)
    distilbert = kind == "distilbert"
    record: dict[str, Any] = {"model_type": kind, "architectures": [_architecture(config, kind)]}
    for ours, theirs in (_DISTILBERT_SIZES if distilbert else _SIZES).items():
        record[theirs] = getattr(config, ours)
    for ours, theirs in (_DISTILBERT_CHOICES if distilbert else _CHOICES).items():
        record[theirs] = getattr(config, ours)
    back = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    record["activation" if distilbert else "hidden_act"] = back[config.activation]
    if not distilbert:
        record["type_vocab_size"] = config.type_vocab_size
    if kind in ("electra", "albert"):
        record["embedding_size"] = config.embedding_width
    if kind == "albert":
        record |= {"num_hidden_groups": 1, "inner_group_num": 1}
    if kind == "roberta":
        record |= {"pad_token_id": config.position_offset - 1, "bos_token_id": 0, "eos_token_id": 2}
    if config.labels:
        record["id2label"] = {str(number): label for number, label in enumerate(config.labels)}
        record["label2id"] = {label: number for number, label in enumerate(config.labels)}
    return record | {"tie_word_embeddings": config.tied_head}


def kind_of(config: BertConfig) -> str:
    """The `model_type` whose class computes what the configuration says.

    Raises:
      InputError: none does.
    """
    if config.gated or config.attention_window is not None:
        option = "gated" if config.gated else "attention_window"
        raise InputError(f"BertConfig.{option} is {getattr(config, option)}: no class of transformers computes that")
    for kind, family in FAMILIES.items():
        fits = (
            (kind == "albert") == config.shared_layers,
            kind in ("electra", "albert") or config.embedding_size is None,
            (kind == "distilbert") == (config.type_vocab_size == 0),
            (kind == "roberta") == (config.position_offset > 0),
            kind != "distilbert" or config.layer_norm_eps == 1e-12,
            set(config.all_heads) <= family.heads.keys(),
            "sequence_classifier" not in config.all_heads
            or config.classifier_activation == family.classifier_activation,
            not config.pooler or "pooler/dense" in family.encoder,
            kind not in ("roberta", "electra") or "masked_lm" not in config.all_heads or config.activation == "gelu",
        )
        if all(fits):
            return kind
    raise InputError(
        f"no class of transformers computes heads {', '.join(config.all_heads) or 'none'} with embedding_size "
        f"{config.embedding_size}, shared_layers {config.shared_layers}, type_vocab_size {config.type_vocab_size}, "
        f"position_offset {config.position_offset} and activation {config.activation!r}"
    )


_CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "electra": "Electra",
    "distilbert": "DistilBert",
    "albert": "Albert",
}
_HEAD_CLASSES = {
    ("masked_lm", "next_sentence"): "ForPreTraining",
    ("masked_lm",): "ForMaskedLM",
    ("next_sentence",): "ForNextSentencePrediction",
    ("replaced_token",): "ForPreTraining",
    ("token_classifier",): "ForTokenClassification",
    ("sequence_classifier",): "ForSequenceClassification",
    ("span_classifier",): "ForQuestionAnswering",
    (): "Model",
}


def _architecture(config: BertConfig, kind: str) -> str:
    suffix = _HEAD_CLASSES.get(tuple(name for name in HEADS if name in config.all_heads))
    if suffix is None:
        raise InputError(f"no class of transformers has the heads {', '.join(config.all_heads)} together")
    return _CLASSES[kind] + suffix


@dataclass(frozen=True)
class Found:
    """What a file of theirs holds, by its names.

    Attributes:
      dialect: how they are spelt.
      outer: stands before all names.
      prefix: stands before the encoder's.
      heads: those of which there is a tensor.
      pooler: whether there is one.
    """

    dialect: Dialect
    outer: str
    prefix: str
    heads: tuple[str, ...]
    pooler: bool


def find(names: Collection[str], record: Mapping[str, Any], flax: bool, where: str) -> Found:
    """Finds out how names are spelt and which modules they belong to.

    Raises:
      InputError: there is no token table, or a classifier of unknown kind.
    """
    kind = family_of(record, where)
    family, dialect = FAMILIES[kind], FLAX if flax else PYTORCH
    token = dialect.name(family.encoder["embeddings/token"], dialect.leaves("encoder/embeddings/token")["table"][0])
    before = [name.removesuffix(token) for name in names if name.endswith(token)]
    if len(before) != 1:
        raise InputError(f"{where}: found {len(before)} tensors …{token}, expected one, of a {kind}")
    base = family.base + dialect.separator
    prefix = base if before[0].endswith(base) else ""
    outer = before[0].removesuffix(prefix)
    if not flax and f"{outer}{prefix}{family.encoder['embeddings/norm']}.gamma" in names:
        dialect = _OLD
    spelt = lambda ours, theirs: (
        {dialect.name(outer + theirs, leaf) for leaf, _ in dialect.leaves(ours).values()} & set(names)
    )
    heads = [
        head for head, modules in family.heads.items() if any(spelt(ours, theirs) for ours, theirs in modules.items())
    ]
    if {"token_classifier", "sequence_classifier"} <= set(heads):
        dense = family.heads["sequence_classifier"].get("sequence_classifier/dense")
        if dense:
            which = "sequence_classifier" if spelt("sequence_classifier/dense", dense) else "token_classifier"
        else:
            which = _classifier(record, where)
        heads = [head for head in heads if head not in _CLASSIFIERS.values() or head == which]
    pooler = family.encoder.get("pooler/dense")
    has_pooler = bool(pooler) and bool(spelt("pooler/dense", prefix + pooler))
    return Found(dialect, outer, prefix, tuple(heads), has_pooler)


def read_model(
    record: Mapping[str, Any], tensors: Tensors, *, config_file: str, file: str, flax: bool = False
) -> tuple[BertConfig, Params]:
    """Configuration and parameters of one of their models.

    Heads and pooler are those that the file holds. Buffers of positions are left out, and so are copies of the token
    table; a table of the masked-LM head that differs from the token table is the head's own.

    Args:
      record: fields of config.json.
      tensors: of the weights.
      config_file: for messages.
      file: of the weights, for messages.
      flax: names of their Flax classes, not PyTorch's.

    Raises:
      InputError: the configuration cannot be followed, or the tensors are not those it asks for.
    """
    family = FAMILIES[family_of(record, config_file)]
    found = find(tensors.keys(), record, flax, file)
    dialect = found.dialect
    spelt = lambda module, leaf: dialect.name(found.outer + module, leaf)
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith((".position_ids", ".token_type_ids"))}
    tied = record.get("tie_word_embeddings", True) is not False
    kernel, view = dialect.linear["kernel"]
    decoder = spelt(family.decoder, kernel)
    if "masked_lm" in found.heads:
        if decoder in left:
            token = left[spelt(found.prefix + family.encoder["embeddings/token"], dialect.table["table"][0])]
            own = left[decoder].read()
            tied = np.array_equal(own if view is transposed else own.T, token.read())
            if tied:
                del left[decoder]
        bias, copy = spelt(family.heads["masked_lm"]["masked_lm"], "bias"), spelt(family.decoder, "bias")
        if copy != bias and not tied and dialect.decoder_bias:
            # Theirs reads the decoder's; the other is a leftover of the tied head.
            leftover = left.pop(bias, None)
            if leftover is not None:
                left.setdefault(copy, leftover)
        elif copy != bias and copy in left:
            theirs = left.pop(copy)
            if not np.array_equal(theirs.read(), left.setdefault(bias, theirs).read()):
                raise InputError(f"{file}: tensor {copy}: found other values than in {bias}, expected the same")
    config = read_config(
        record, config_file, heads=found.heads, pooler=found.pooler, tied_head="masked_lm" not in found.heads or tied
    )
    table = bert_table(config, family, dialect, prefix=found.prefix, outer=found.outer)
    return config, read_params(table, left, bound_model(config).shapes, file)


def _classifier(record: Mapping[str, Any], where: str) -> str:
    names = record.get("architectures") or []
    for architecture in names:
        for suffix, head in _CLASSIFIERS.items():
            if str(architecture).endswith(suffix):
                return head
    raise InputError(
        f"{where}: found a tensor classifier.weight and architectures {names}, expected one …ForTokenClassification or "
        "…ForSequenceClassification in config.json"
    )


def _number(given: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = given.get(name)
    if name not in given:
        raise InputError(f"{where}: found no {name}, expected a number")
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        expected = "a number" if kind is float else "a whole number"
        raise InputError(f"{where}: {name}: found {value!r}, expected {expected}")
    return kind(value)


def _labels(given: Mapping[str, Any], where: str) -> tuple[str, ...]:
    labels = given.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    if not isinstance(labels, dict) or sorted(labels) != sorted(map(str, range(len(labels)))):
        raise InputError(f"{where}: id2label: found {labels!r:.80}, expected names of the labels 0, 1, …")
    return tuple(str(labels[str(number)]) for number in range(len(labels)))
