"""What is said of FLOPs and parameters, and what counting shows.

Claims travel without their length, their unit and their conventions. Each one here is counted anew, at the length that
it names and at the one where it comes true, if there is one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ctx_jax.flops.architectures import encoder_cost
from ctx_jax.flops.electra import training_flops
from ctx_jax.models.bert import BertConfig
from ctx_jax.models.elmo import ElmoConfig

TOLERANCE = 0.03
"""A claim of two or three digits is right within so much."""

BASE = BertConfig()
LARGE = BertConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096)
ELMO = ElmoConfig()


class Claim(NamedTuple):
    """A claim and what was counted.

    Attributes:
      claim: what is said.
      source: by whom.
      claimed: the number, in `unit`.
      unit: FLOP, MAC (multiply-adds, half as many) or parameters.
      length: tokens or words that it is said of; 0 where there is none.
      counted: our number, in the same unit at the same length.
      what: what was counted.
      right: whether the two agree.
      verdict: in words.
    """

    claim: str
    source: str
    claimed: float
    unit: str
    length: int
    counted: float
    what: str
    right: bool
    verdict: str


def _forward(config: BertConfig | ElmoConfig, length: int) -> int:
    return encoder_cost(config, length=length).matrix_flops


def check() -> list[Claim]:
    """Counts every claim."""
    base_128, base_512 = _forward(BASE, 128), _forward(BASE, 512)
    elmo_128, elmo_512 = _forward(ELMO, 128), _forward(ELMO, 512)
    products = "forward, matrix products of the encoder"
    claims = [
        _claim(
            "BERT-base spends ~22 GFLOP on 512 tokens",
            "often repeated",
            22e9,
            "FLOP",
            512,
            base_512,
            products,
            f"that is what 128 tokens cost ({base_128 / 1e9:.2f} GFLOP); 512 cost {base_512 / base_128:.2f} times it",
        ),
        _claim(
            "ELMo spends ~14 GFLOP on 128 words",
            "often repeated, without a length",
            14e9,
            "FLOP",
            128,
            elmo_128,
            "forward, matrix products and convolutions, both directions",
            f"{elmo_128 / 2e9:.1f} are the multiply-adds, half the FLOPs; 512 words are {elmo_512 / 1e9:.1f} GFLOP",
        ),
    ]
    claims += [
        _claim("BERT-base: 22.5 B FLOPs", source, 22.5e9, "FLOP", 128, base_128, products, "")
        for source in ("Jiao et al. 2020 (TinyBERT), table 1", "Sun et al. 2020 (MobileBERT), table 4")
    ]
    electra = training_flops()
    for name, said, source_number in (
        ("elmo", "ELMo", 3.3e18),
        ("gpt", "GPT", 4.0e19),
        ("bert_base", "BERT-base", 6.4e19),
        ("bert_large", "BERT-large", 1.9e20),
    ):
        claims.append(
            _claim(
                f"{said}: {source_number:.2g} FLOPs to pre-train",
                "Clark et al. 2020 (ELECTRA), tables 1 and 2",
                source_number,
                "FLOP",
                0,
                electra[name],
                "pre-training by ELECTRA's conventions: look-up as a product, training = 2 × forward",
                "",
                tolerance=0.04,
            )
        )
    for said, source, number, config in (
        ("BERT-base: 110 M parameters", "Devlin et al. 2019, section 3", 110e6, BASE),
        ("BERT-large: 340 M parameters", "Devlin et al. 2019, section 3", 340e6, LARGE),
        ("ELMo: 93.6 M parameters", "allennlp.org/elmo, original model", 93.6e6, ELMO),
    ):
        counted = encoder_cost(config, length=128).parameters
        claims.append(_claim(said, source, number, "parameters", 0, counted, "the encoder, without training heads", ""))
    return claims


def _claim(
    claim: str,
    source: str,
    claimed: float,
    unit: str,
    length: int,
    counted: float,
    what: str,
    explanation: str,
    *,
    tolerance: float = TOLERANCE,
) -> Claim:
    off = claimed / counted - 1
    right = abs(off) <= tolerance
    factor = max(claimed, counted) / min(claimed, counted)
    verdict = (
        f"right ({off:+.1%})"
        if right and abs(off) > 5e-4
        else "right"
        if right
        else f"wrong by a factor of {factor:.2f}"
    )
    if explanation:
        verdict += f": {explanation}"
    return Claim(claim, source, claimed, unit, length, counted, what, right, verdict)


def lines(claims: Sequence[Claim]) -> Iterator[str]:
    """The claims for people, at most 100 columns; FLOP and parameters, never MAC."""
    yield "1 multiply-add = 2 FLOP = 1 MAC; counts are FLOP unless they say otherwise."
    for claim in claims:
        at = f" at {claim.length}" if claim.length else ""
        yield ""
        yield f"{claim.claim}   [{claim.source}]"
        counted = f"{claim.counted:,.0f} {claim.unit}{at}: {claim.what}"
        yield from textwrap.wrap(counted, 96, initial_indent="  counted  ", subsequent_indent="           ")
        yield from textwrap.wrap(claim.verdict, 96, initial_indent="  verdict  ", subsequent_indent="           ")
