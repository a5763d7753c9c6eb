"""The files of allenai/bilm-tf and AllenNLP: options.json and weights in HDF5.

Gates stand in the order i, j, f, o, and their product takes the word above the state, both as with us; what bilm-tf
calls `carry` is the gate that lets the transformed vector through. The files hold the encoder alone; the language
model's output layer was never published (bilm-tf, bilm/training.py, dump_weights; allennlp, elmo_lstm.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ctx_jax.errors import InputError
from ctx_jax.interop.tables import Entry, Part, whole
from ctx_jax.models.elmo import ElmoConfig

_PLACES = {
    "filters": ("char_cnn", "filters"),
    "character_dim": ("char_cnn", "embedding", "dim"),
    "max_characters": ("char_cnn", "max_characters_per_token"),
    "num_highway": ("char_cnn", "n_highway"),
    "activation": ("char_cnn", "activation"),
    "lstm_dim": ("lstm", "dim"),
    "projection_dim": ("lstm", "projection_dim"),
    "num_layers": ("lstm", "n_layers"),
    "cell_clip": ("lstm", "cell_clip"),
    "projection_clip": ("lstm", "proj_clip"),
    "skip_connections": ("lstm", "use_skip_connections"),
}
"""Where options.json has the fields of ElmoConfig."""
_DEFAULTS = {"cell_clip": None, "projection_clip": None, "skip_connections": False, "num_highway": 0}
"""Of what options.json may leave out (bilm/model.py, BidirectionalLanguageModelGraph)."""


def read_options(record: Mapping[str, Any], where: str) -> ElmoConfig:
    """Our configuration of an options.json, without an output layer.

    Raises:
      InputError: a field is missing or has a value that cannot be followed.
    """
    fields: dict[str, Any] = {}
    for ours, place in _PLACES.items():
        value: Any = record
        for name in place:
            if not isinstance(value, Mapping) or name not in value:
                if ours not in _DEFAULTS:
                    raise InputError(f"{where}: found no {'.'.join(place)}, expected it in an options.json of bilm-tf")
                value = _DEFAULTS[ours]
                break
            value = value[name]
        fields[ours] = value
    characters = record["char_cnn"].get("n_characters")
    if characters not in (261, 262):
        raise InputError(f"{where}: char_cnn.n_characters: found {characters!r}, expected 262, or 261 that means it")
    for ours in ("character_dim", "max_characters", "num_highway", "lstm_dim", "projection_dim", "num_layers"):
        if type(fields[ours]) is not int:
            raise InputError(f"{where}: {'.'.join(_PLACES[ours])}: found {fields[ours]!r}, expected a whole number")
    filters = fields["filters"]
    if not isinstance(filters, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in filters
    ):
        raise InputError(f"{where}: char_cnn.filters: found {filters!r:.80}, expected [[width, count], …]")
    try:
        return ElmoConfig(**fields, vocab_size=0)
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {error}") from error


def write_options(config: ElmoConfig) -> dict[str, Any]:
    """The options.json of an ELMo, as bilm-tf and AllenNLP read it."""
    record: dict[str, Any] = {}
    for ours, (*groups, name) in _PLACES.items():
        here = record
        for group in groups:
            here = here.setdefault(group, {})
        value = getattr(config, ours)
        here[name] = [list(pair) for pair in value] if ours == "filters" else value
    record["char_cnn"]["n_characters"] = config.num_characters
    return record


def bilm_table(config: ElmoConfig) -> list[Entry]:
    """The table of an ELMo's encoder."""
    same = lambda ours, theirs: Entry(f"encoder/words/{ours}", (Part(theirs, whole),))
    entries = [
        same("table", "char_embed"),
        same("projection/kernel", "CNN_proj/W_proj"),
        same("projection/bias", "CNN_proj/b_proj"),
    ]
    for number in range(len(config.filters)):
        # Theirs are images one row high.
        entries.append(Entry(f"encoder/words/kernels/{number}", (Part(f"CNN/W_cnn_{number}", lambda x: x[None]),)))
        entries.append(same(f"biases/{number}", f"CNN/b_cnn_{number}"))
    for number in range(config.num_highway):
        for leaf, letter in (("kernel", "W"), ("bias", "b")):
            parts = tuple(
                Part(f"CNN_high_{number}/{letter}_{which}", lambda x, place=place: x[..., place, :])
                for place, which in enumerate(("transform", "carry"))
            )
            entries.append(Entry(f"encoder/words/highway/{number}/{leaf}", parts))
    for number, direction in enumerate(("forward", "backward")):
        for layer in range(config.num_layers):
            entries += _lstm(config, f"encoder/{direction}/{layer}", f"RNN_{number}/RNN/MultiRNNCell/Cell{layer}")
    return entries


def _lstm(config: ElmoConfig, ours: str, theirs: str) -> Iterator[Entry]:
    width, cell = config.projection_dim, f"{theirs}/LSTMCell"
    flat = lambda x: x.reshape(len(x), -1)
    yield Entry(f"{ours}/input_kernel", (Part(f"{cell}/W_0", flat, (0, width, 2 * width)),))
    yield Entry(f"{ours}/recurrent_kernel", (Part(f"{cell}/W_0", flat, (width, 2 * width, 2 * width)),))
    yield Entry(f"{ours}/bias", (Part(f"{cell}/B", np.ravel),))
    yield Entry(f"{ours}/projection", (Part(f"{cell}/W_P_0", whole),))
