"""Numbers of published models, drawn in grey beside ours, each with where it stands.

Data and probes are not ours, so they say where curves of that kind lie, and not who is better.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Of one model.

    Attributes:
      quantity: `anisotropy`; `pos`, a task of that name; `1-nn of SemCor`, disambiguation by the nearest
        occurrence there.
      model: whose.
      num_layers: L.
      values: layer → value; accuracies are fractions. Papers give some layers only.
      best: of any layer, where the paper does not say which; None elsewhere.
      source: a key of `ctx_jax.atlas.report.definitions.SOURCES`.
    """

    quantity: str
    model: str
    num_layers: int
    values: dict[int, float]
    best: float | None
    source: str


PUBLISHED = [
    Published("anisotropy", "ELMo", 2, {0: 0.008, 1: 0.157, 2: 0.136}, None, "Ethayarajh 2019"),
    Published("anisotropy", "BERT-base-cased", 12, {0: 0.105, 11: 0.675, 12: 0.477}, None, "Ethayarajh 2019"),
    Published("pos", "BERT-base", 12, {0: 0.884}, 0.966, "not confirmed"),
    Published("1-nn of SemCor", "BERT-base", 12, {0: 0.527, 11: 0.725}, None, "not confirmed"),
]


def published(quantity: str) -> list[Published]:
    """All of one quantity."""
    return [one for one in PUBLISHED if one.quantity == quantity]
