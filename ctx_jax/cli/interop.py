"""`ctx-jax import`, `export`, `truncate` and `verify`: other libraries' models in, ours out, with proof."""

import json
import pathlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from ctx_jax.cli.parsing import parse_layers


@dataclass(frozen=True)
class Import:
    """A model of another library's as a folder of ours, with a certificate.

    Read are Hugging Face's folders (BERT, RoBERTa, ELECTRA, DistilBERT, ALBERT; safetensors, PyTorch's .bin, Flax's
    msgpack), sentence-transformers, google-research/bert, bilm-tf and AllenNLP, recognised by what is there.
    """

    source: Annotated[Positional[pathlib.Path], arg(metavar="SRC")]
    """Folder of the model."""
    out: Annotated[Positional[pathlib.Path], arg(metavar="DST")]
    """Folder to write; it appears whole or not at all."""
    overwrite: bool = False
    """Replace an existing folder."""
    json: bool = False
    """One JSON object instead of lines."""


def import_(command: Import) -> int:
    """Import"""
    from ctx_jax.encoder import Encoder

    encoder = Encoder.from_pretrained(command.source)
    return _write(encoder, command.source, command.out, "ctx_jax", command.overwrite, command.json)


@dataclass(frozen=True)
class Export:
    """A model as a folder of another library's, with a certificate: sample inputs, our outputs, the errors of those who
    read it back.
    """

    model: Annotated[Positional[pathlib.Path], arg(metavar="MODEL")]
    """A run directory, an import, or anything else that `import` reads."""
    out: Annotated[Positional[pathlib.Path], arg(metavar="DST")]
    """Folder to write; it appears whole or not at all."""
    format: Annotated[str, arg(metavar="FORMAT")] = "hugging-face"
    """ctx_jax, hugging-face, flax, google-bert, bilm or npz; or the computation as stablehlo, onnx or saved-model."""
    layers: Annotated[str, arg(metavar="{all,last,N,N,…}")] = "all"
    """Of a computation: all layers, the last, or some by number; negative ones count from the last."""
    weights: Literal["inside", "inputs"] = "inside"
    """Of StableHLO: inside the program, or its inputs, in an archive beside it."""
    python: Annotated[str | None, arg(metavar="PYTHON")] = None
    """For ONNX: the Python of an environment with jax2onnx, which cannot share ours."""
    overwrite: bool = False
    """Replace an existing folder."""
    json: bool = False
    """One JSON object instead of lines."""


def export(command: Export) -> int:
    """Export"""
    from ctx_jax.encoder import Encoder
    from ctx_jax.interop.programs.forward import ProgramOptions

    options = ProgramOptions(parse_layers(command.layers), command.weights, command.python)
    encoder = Encoder.from_pretrained(command.model)
    return _write(encoder, command.model, command.out, command.format, command.overwrite, command.json, options)


@dataclass(frozen=True)
class Truncate:
    """The model of another one's first layers, exactly as they were, as a folder with a certificate.

    Tokenizer, pooling and repairs stay; pooler and heads, which read the last layer, go, unless all layers stay.
    """

    model: Annotated[Positional[pathlib.Path], arg(metavar="MODEL")]
    """A run directory, an import, or anything else that `import` reads."""
    out: Annotated[Positional[pathlib.Path], arg(metavar="DST")]
    """Folder to write; it appears whole or not at all."""
    layers: int
    """How many layers to keep, from 1."""
    format: Annotated[str | None, arg(metavar="FORMAT")] = None
    """As of `export`; by default hugging-face, of an ELMo bilm."""
    overwrite: bool = False
    """Replace an existing folder."""
    json: bool = False
    """One JSON object instead of lines."""


def truncate(command: Truncate) -> int:
    """Truncate"""
    from ctx_jax.encoder import Encoder

    encoder = Encoder.from_pretrained(command.model).truncate(command.layers, name=command.model.resolve().name)
    return _write(encoder, command.model, command.out, command.format, command.overwrite, command.json)


@dataclass(frozen=True)
class Verify:
    """Reads a folder that has a certificate again, with every reader that is installed."""

    folder: Annotated[Positional[pathlib.Path], arg(metavar="DIR")]
    """Folder that `import` or `export` wrote."""
    json: bool = False
    """One JSON object instead of lines."""


def verify(command: Verify) -> int:
    """Verify"""
    from ctx_jax.interop.certificate import verify as run

    return _report(run(command.folder), command.json)


def _write(
    encoder: Any,
    source: pathlib.Path,
    out: pathlib.Path,
    format: str | None,
    overwrite: bool,
    as_json: bool,
    options: Any = None,
) -> int:
    from ctx_jax.interop.programs.forward import WHOLE
    from ctx_jax.nn.parameters import count_parameters

    checks = encoder.save_pretrained(out, format, options or WHOLE, overwrite=overwrite)
    if not as_json:
        heads = getattr(encoder.config, "all_heads", ())
        print(
            f"{source}: {type(encoder.config).__name__.removesuffix('Config')}, {encoder.config.num_layers} layers, "
            f"{count_parameters(encoder.params):,} parameters, heads: {', '.join(heads) or 'none'}, "
            f"tokenizer: {type(encoder.tokenizer).__name__ if encoder.tokenizer else 'none'}"
        )
        print(f"wrote {out}" + (f" ({format})" if format else ""))
    return _report(checks, as_json)


def _report(checks: list, as_json: bool) -> int:
    failed = any(check.passed is False for check in checks)
    if as_json:
        rows = [{"reader": c.reader, "error": c.error, "output": c.output, "passed": c.passed} for c in checks]
        print(json.dumps({"checks": rows, "passed": not failed}))
        return int(failed)
    for check in checks:
        if check.error is None:
            print(f"  {check.reader}: not checked")
        else:
            verdict = "ok" if check.passed else "FAILED"
            print(f"  {check.reader}: largest error {check.error:.1e}, in {check.output}: {verdict}")
    return int(failed)
