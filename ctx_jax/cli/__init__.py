"""The command `ctx-jax`. Exit codes: 0 done (or stopped by SIGTERM and saved), 1 failed, 2 bad input."""

import logging
import os
import sys
from collections.abc import Callable, Sequence

import ctx_jax
from ctx_jax.cli import atlas, bench, compile, data, encode, flops, interop, pretrain, senses
from ctx_jax.cli.config_file import load_config as load_config
from ctx_jax.cli.parsing import command
from ctx_jax.errors import InputError, did_you_mean
from ctx_jax.memory import keep_memory

COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "data build": ("text → tokenised corpus", command(data.Build, data.build, "data build")),
    "data audit": ("what a trainer should know of a corpus", command(data.Audit, data.audit, "data audit")),
    "pretrain": ("train the run of a config file, or go on with it", pretrain.pretrain),
    "encode": ("texts → vectors of every layer", command(encode.Encode, encode.encode, "encode")),
    "fill-mask": ("the likeliest tokens at [MASK]", command(encode.FillMask, encode.fill_mask, "fill-mask")),
    "senses": ("a word's occurrences, layer by layer", command(senses.Senses, senses.senses, "senses")),
    "import": ("another library's model → a folder of ours", command(interop.Import, interop.import_, "import")),
    "export": ("a model → another library's folder", command(interop.Export, interop.export, "export")),
    "truncate": ("a model's first layers as a model", command(interop.Truncate, interop.truncate, "truncate")),
    "verify": ("read an import or an export again", command(interop.Verify, interop.verify, "verify")),
    "bench": ("how fast models are beside their peers", command(bench.Bench, bench.bench, "bench")),
    "compile": ("a config's training step for TPUs, without one", compile.compile_),
    "atlas": ("what each layer of encoders knows, as a report", command(atlas.MakeAtlas, atlas.make_atlas, "atlas")),
    "flops": ("what models cost, counted three ways, beside a budget", command(flops.Flops, flops.flops, "flops")),
    "flops search": ("encoders that fit a budget", command(flops.Search, flops.search, "flops search")),
    "flops claims": ("what is said of FLOPs, and what is true", command(flops.Claims, flops.claims, "flops claims")),
}


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  ctx-jax {name:<12}  {summary}" for name, (summary, _) in COMMANDS.items()]
    return "\n".join(
        [f"ctx_jax {ctx_jax.__version__}: {ctx_jax.__doc__}", "", *lines, "", "  ctx-jax COMMAND --help  its arguments"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the installed script exits with what it returns."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(ctx_jax.__version__)
        return 0
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name = " ".join(argv[:words])
    if name not in COMMANDS:
        group = [line for line in usage().splitlines() if line.startswith(f"  ctx-jax {name} ")]
        if group and (len(argv) == 1 or argv[1] in ("-h", "--help")):
            print("\n".join(group))
            return 0 if len(argv) > 1 else 2
        name = " ".join(argv[:2]) if group else name
        print(f"ctx-jax: no command {name!r}{did_you_mean(name, COMMANDS)}; see ctx-jax --help", file=sys.stderr)
        return 2
    keep_memory()
    try:
        return COMMANDS[name][1](argv[words:])
    except InputError as error:
        print(f"ctx-jax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RuntimeError as error:
        if type(error).__name__ in ("NonFiniteLoss",):
            print(f"ctx-jax: {error}", file=sys.stderr)
            return 1
        raise
