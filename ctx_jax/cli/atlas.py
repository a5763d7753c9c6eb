"""`ctx-jax atlas`: what each layer of an encoder knows, as a report."""

import contextlib
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ctx_jax.cli.parsing import OptionalPath
from ctx_jax.errors import InputError


@dataclass(frozen=True)
class MakeAtlas:
    """What each layer of one or more encoders knows: index.html, atlas.json and the plots.

    The folder of data is searched for what is known: CoNLL-U, CoNLL columns, spans as JSON lines, senses as XML with
    keys, CoarseWSD-20, WiC, STS. What was computed before is taken from the cache.
    """

    models: Annotated[Positional[tuple[pathlib.Path, ...]], arg(metavar="MODEL…")]
    """Run directories, or folders of any library that `ctx-jax import` reads."""
    data: pathlib.Path
    """Folder of labelled data, searched with all that is below it."""
    out: pathlib.Path
    """Folder of the report; made if need be."""
    tasks: tuple[str, ...] = ()
    """Patterns of tasks, such as `*/pos en_ewt-ud/*`; by default all that the data have."""
    probes: tuple[Literal["linear", "mlp", "edge"], ...] = ("linear", "mlp")
    """Kinds of probe; the first is asked more: control labels, mixes of layers, description length."""
    seeds: int = 5
    """Probes of each layer, each with another start and order."""
    epochs: int = 5
    """Over the training examples."""
    controls: bool = True
    """Control labels and selectivity."""
    mixes: bool = True
    """Mixes of layers, expected layer, centre of gravity."""
    code: bool = True
    """Description length by online code."""
    geometry: bool = True
    """The shape of each layer's space."""
    train_words: int = 60_000
    """Words of a corpus that probes learn from, at most; whole sentences, by chance."""
    words: tuple[str, ...] = ("bank", "apple")
    """Whose occurrences are drawn as a map, where the data have senses of them."""
    umap: bool = False
    """Draw the maps by UMAP, too; needs umap-learn."""
    twins: bool = False
    """Beside each model the same one untrained, with random weights."""
    cache: OptionalPath = None
    """Where vectors and results are kept; by default the folder `cache` of --out."""
    keep: Literal["float16", "float32"] = "float16"
    """Type of the vectors on disk."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the encoder's computation; by default what the model's folder says."""


def _as_typed(command: MakeAtlas) -> list[str]:
    """The words of a command that does the same, folders by their names alone: a path is somebody's machine."""
    words = ["ctx-jax", "atlas", *(path.resolve().name for path in command.models)]
    words += ["--data", command.data.resolve().name]
    for field in fields(command):
        value, name = getattr(command, field.name), field.name.replace("_", "-")
        if field.name in ("models", "data", "out", "cache") or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def make_atlas(command: MakeAtlas) -> int:
    """Atlas"""
    from ctx_jax.atlas.cache import Cache
    from ctx_jax.atlas.probes.labelling import Probing
    from ctx_jax.atlas.probes.training import Training
    from ctx_jax.atlas.report import require_matplotlib, summary, write_report
    from ctx_jax.atlas.run import Plan, untrained
    from ctx_jax.atlas.run import make_atlas as run
    from ctx_jax.atlas.word_senses import LEAST, umap_2d
    from ctx_jax.compilation import keep_compiled
    from ctx_jax.encoder import Encoder

    require_matplotlib()
    if command.umap:
        umap_2d(0, LEAST)  # says that it is missing before hours of work, not after
    if not command.probes:
        raise InputError("--probes: found none, expected linear, mlp or edge")
    plan = Plan(
        tasks=command.tasks,
        probing=Probing(
            command.probes,
            Training(epochs=command.epochs, seeds=command.seeds),
            controls=command.controls,
            mixes=command.mixes,
            code=command.code,
        ),
        train_words=command.train_words,
        held_out_words=max(command.train_words // 5, 1),
        geometry=command.geometry,
        map_words=command.words,
        umap=command.umap,
        dtype=command.keep,
    )
    keep_compiled()
    models = {}
    for path in command.models:
        name = path.resolve().name
        if name in models:
            raise InputError(f"{path}: two models are called {name}, expected folders of different names")
        models[name] = Encoder.from_pretrained(path, dtype=command.dtype)
        if command.twins:
            models[f"{name}, untrained"] = untrained(models[name])
    cache = Cache(command.cache or command.out / "cache")
    atlas = run(models, command.data, cache, plan, Bars(), shlex.join(_as_typed(command)))
    write_report(atlas, command.out)
    print("\n".join(summary(atlas)))
    print(f"wrote {command.out / 'index.html'} in {atlas.seconds:.0f} s, {atlas.peak_memory / 1e9:.1f} GB at most")
    return 0


class Bars:
    """Lines and bars on standard error."""

    def line(self, text: str) -> None:
        """One line."""
        print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """With the rate and the time left, where somebody looks."""
        from tqdm import tqdm

        shown = tqdm(total=total, desc=f"  {what}", unit=unit, unit_scale=True, disable=not sys.stderr.isatty())
        with shown as bar:
            yield bar.update
