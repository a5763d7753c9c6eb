"""`ctx-jax senses`: the occurrences of a word, layer by layer."""

import dataclasses
import json
import pathlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ctx_jax.cli.parsing import OptionalPath, parse_layers
from ctx_jax.errors import InputError

if TYPE_CHECKING:
    from ctx_jax.atlas.results import LayerSenses, WordSenses

SHOWN = 3
"""Contexts of a cluster."""
SHOWN_WORDS = 8
"""Neighbours of a cluster, so that they fit into a line."""


@dataclass(frozen=True)
class Senses:
    """Where a word occurs, into which clusters its occurrences fall on each layer, and what is near them in context.

    The text is searched as it is read, and the occurrences are a uniform sample of all. Shown are the clusters of the
    layer that separates them best, then a line for each layer.
    """

    word: Annotated[Positional[str], arg(metavar="WORD")]
    """A word, or several in quotes, in whatever case; forms of it are other words."""
    model: Annotated[Positional[pathlib.Path], arg(metavar="RUN")]
    """Run directory, or another library's folder."""
    corpus: Annotated[str, arg(metavar="TEXT")] = "python:topics"
    """A text as `data build` takes them, or a folder of labelled data (CoarseWSD-20, SemCor), whose senses are used
    where the word is a lemma of it."""
    layers: Annotated[str, arg(metavar="{all,last,N,N,…}")] = "all"
    """Which layers."""
    most: int = 1000
    """How many occurrences to look at."""
    sentences: Annotated[Literal["lines", "split"] | None, arg(metavar="{lines,split}")] = None
    """`lines` takes each line as a sentence, `split` finds the sentences; by default as the format has it."""
    language: Annotated[str, arg(metavar="CODE")] = "en"
    """For finding sentences, ISO 639."""
    umap: bool = False
    """With --out: a second map by UMAP; needs umap-learn."""
    seed: int = 0
    """Of the sample and of the clusters."""
    out: OptionalPath = None
    """A folder for senses.json and the maps as .svg; needs matplotlib."""


def senses(command: Senses) -> int:
    """Senses"""
    from tqdm import tqdm

    from ctx_jax.atlas.occurrences import search, words_of
    from ctx_jax.atlas.report import require_matplotlib
    from ctx_jax.atlas.word_senses import umap_2d, word_senses
    from ctx_jax.compilation import keep_compiled
    from ctx_jax.encoder import Encoder
    from ctx_jax.encoder.base import progress
    from ctx_jax.interop.programs.forward import chosen_layers

    # What needs no work is looked at before the work.
    words_of(command.word)
    layers = parse_layers(command.layers)
    if command.most < 1:
        raise InputError(f"--most: found {command.most}, expected at least 1")
    if command.umap and command.out is None:
        raise InputError("--umap is of the maps, expected --out too")
    if command.umap:
        umap_2d(command.seed, command.most)
    if command.out is not None:
        require_matplotlib()
        if not command.out.parent.is_dir():
            raise InputError(f"--out {command.out}: there is no folder {command.out.parent}")
    keep_compiled()
    encoder, show = Encoder.from_pretrained(command.model), sys.stderr.isatty()
    last = encoder.config.num_layers
    numbers = chosen_layers(layers, last + 1) or [last]
    found = search(
        command.word,
        command.corpus,
        most=command.most,
        seed=command.seed,
        sentences=command.sentences,
        language=command.language,
        show_progress=show,
    )
    with (
        progress(len(found.sentences), show) as encoded,
        tqdm(total=len(set(numbers)), disable=not show, unit="layer", desc="clusters") as bar,
    ):
        result = word_senses(
            encoder,
            command.word,
            found,
            numbers,
            model=command.model.resolve().name,
            corpus=command.corpus,
            with_umap=command.umap,
            seed=command.seed,
            encoded=encoded,
            clustered=bar.update,
        )
    print("\n".join(_report(result)))
    if command.out is not None:
        _write(result, command.out)
    return 0


def _report(found: "WordSenses") -> list[str]:
    used = len(found.layers[0].labels)
    looked = "all are looked at" if used == found.occurrences else f"{used:,} of them are looked at, drawn by chance"
    times = "once" if found.occurrences == 1 else f"{found.occurrences:,} times"
    lines = [f"{found.word!r} occurs {times} in {found.sentences:,} sentences of {found.corpus}; {looked}"]
    if found.cut:
        lines.append(f"{found.cut:,} are in sentences so long that only words about them were read")
    best = next(layer for layer in found.layers if layer.layer == found.best)
    reason = f"silhouette {best.silhouette:.3f}" if best.ari is None else f"ARI {best.ari:.3f}"
    count = "1 cluster" if len(best.clusters) == 1 else f"{len(best.clusters)} clusters"
    lines += ["", f"layer {best.layer}, {reason}: {count}"]
    for number, cluster in enumerate(best.clusters, 1):
        lines += ["", f"{number:>3}  {cluster.share:4.0%}  {cluster.contexts[0]}"]
        lines += [f"{'':11}{context}" for context in cluster.contexts[1:SHOWN]]
        if cluster.senses:
            lines.append(f"{'':11}senses: {', '.join(f'{name} {count:,}' for name, count in cluster.senses.items())}")
        if cluster.words:
            lines.append(
                f"{'':11}near: {', '.join(f'{word} {cosine:.2f}' for word, cosine in cluster.words[:SHOWN_WORDS])}"
            )
    gold = best.ari is not None
    lines += ["", "layer  clusters  silhouette  self-similarity" + "    ARI      V" * gold]
    return lines + [_line(layer) for layer in found.layers]


def _line(layer: "LayerSenses") -> str:
    line = f"{layer.layer:>5}  {len(layer.clusters):>8}  {layer.silhouette:>10.3f}  {layer.self_similarity:>15.3f}"
    return line if layer.ari is None else f"{line}  {layer.ari:>5.3f}  {layer.v_measure:>5.3f}"


def _write(found: "WordSenses", folder: pathlib.Path) -> None:
    from ctx_jax.atlas.report.senses import write_map
    from ctx_jax.interop.files.replacing import replacing

    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror}, expected a folder that can be made") from error
    maps = [name for map in found.maps for name in write_map(map, found.model, folder)]
    with replacing(folder / "senses.json") as (file,):
        file.write((json.dumps(dataclasses.asdict(found), indent=1) + "\n").encode())
    print(f"\nwrote {folder}: senses.json, {', '.join(maps)}")
