"""A folder with the page, its plots and the numbers behind them."""

from __future__ import annotations

import os
import pathlib

from ctx_jax.atlas.report import geometry, page, senses, sentences, tasks
from ctx_jax.atlas.report.definitions import cited, defined
from ctx_jax.atlas.report.drawing import draw, require_matplotlib
from ctx_jax.atlas.report.numbers import count, shown
from ctx_jax.atlas.report.plots import Block, Curves, HeatMap, Plot
from ctx_jax.atlas.report.summary import summary
from ctx_jax.atlas.results import Atlas, write_atlas
from ctx_jax.errors import InputError


def write_report(atlas: Atlas, folder: str | os.PathLike[str]) -> None:
    """Writes `atlas.json`, `index.html` and each plot as `plots/*.svg` and `plots/*.png`.

    The page stands alone: it loads nothing. The same atlas gives the same bytes, with the same matplotlib; what
    `read_atlas` reads of `atlas.json` gives them again.

    Args:
      atlas: of one or more models.
      folder: made if need be; files of these names are written over.

    Raises:
      InputError: matplotlib is not installed, the atlas has no model or not one value for each layer, or the folder
        cannot be written.
    """
    require_matplotlib()
    if not atlas.models:
        raise InputError("atlas: found no model, expected at least one")
    folder = pathlib.Path(folder)
    drawn: dict[str, tuple[str, bytes]] = {}
    body = page.document(_title(atlas), _body(atlas, drawn))
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        write_atlas(atlas, folder / "atlas.json")
        for name, (svg, png) in drawn.items():
            (folder / "plots" / f"{name}.svg").write_text(svg, encoding="utf-8")
            (folder / "plots" / f"{name}.png").write_bytes(png)
        (folder / "index.html").write_text(body, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}), expected a writable folder") from error


def _title(atlas: Atlas) -> str:
    return "Layer atlas: " + " and ".join(model.name for model in atlas.models)


def _body(atlas: Atlas, drawn: dict[str, tuple[str, bytes]]) -> list[str]:
    parts: list[tuple[str, str, list[Block]]] = [
        ("tasks", "Tasks over layers", tasks.curves(atlas)),
        ("heat", "Tasks by layers", tasks.heat_maps(atlas)),
        ("geometry", "The shape of each layer's space", geometry.blocks(atlas)),
        ("senses", "Senses of words", senses.blocks(atlas)),
        ("sentences", "Vectors of sentences", sentences.blocks(atlas)),
        ("advice", "What to use", sentences.advice(atlas)),
    ]
    sections = [
        page.section(name, title, [_html(block, drawn) for block in blocks if block]) for name, title, blocks in parts
    ]
    about = f"What each layer knows, how its space is shaped, and which one to use. {atlas.date}".rstrip()
    head = [f"<h1>{page.escape(_title(atlas))}</h1>", f'<p class="soft">{page.escape(about)}</p>']
    terms = defined(atlas)
    # Captions and legends cite too: whatever the page names is listed.
    said = [text for term in terms for text in term] + [section for section in sections if section]
    meaning = [page.definitions(terms), page.heading("Sources"), page.links(cited(said))]
    return [
        "<header>",
        *head,
        page.lines(summary(atlas)),
        "</header>",
        "<main>",
        *filter(None, sections),
        page.section("meaning", "What each number means", meaning),
        page.section("made", "How it was made", _made(atlas)),
        "</main>",
    ]


def _html(block: Block, drawn: dict[str, tuple[str, bytes]]) -> str:
    if not isinstance(block, str):
        alike = not any(isinstance(plot, HeatMap) for plot in block)
        return page.side_by_side([_figure(plot, drawn) for plot in block], alike=alike)
    return block


def _figure(plot: Plot, drawn: dict[str, tuple[str, bytes]]) -> str:
    drawn[plot.name] = draw(plot)
    return page.figure(drawn[plot.name][0], plot.caption, _numbers(plot))


def _numbers(plot: Plot) -> str:
    """The plot as a table. Points of a map have no order that a table could show."""
    if isinstance(plot, Curves):
        lines = [*plot.lines, *plot.lower]
        columns = range(max((line.num_layers for line in lines), default=0) + 1)
        rows = []
        for line in lines:
            at = dict(zip(line.layers, line.values, strict=True))
            rows.append([line.label, *(shown(at[layer], plot.digits) if layer in at else "" for layer in columns)])
        return page.table(f"{plot.title}: {plot.unit}", ["layer", *map(str, columns)], rows)
    if isinstance(plot, HeatMap):
        rows = [
            [row, *(shown(value, plot.digits) for value in values)]
            for row, values in zip(plot.rows, plot.values, strict=True)
        ]
        return page.table(plot.title, [plot.across, *plot.columns], rows)
    return ""


def _made(atlas: Atlas) -> list[str]:
    models = [
        [model.name, model.architecture, str(model.num_layers), str(model.width), count(model.parameters),
         count(model.layer_flops[-1] if model.layer_flops else None), model.fingerprint]
        for model in atlas.models
    ]  # fmt: skip
    head = ["model", "architecture", "layers", "width", "parameters", "FLOPs a token", "fingerprint"]
    facts = [
        ("command", atlas.command),
        ("machine", atlas.machine),
        ("date", atlas.date),
        ("time", f"{shown(atlas.seconds)} s" if atlas.seconds else ""),
        ("peak memory", f"{count(atlas.peak_memory)}B" if atlas.peak_memory else ""),
    ]
    return [
        page.table("Models", head, models, text=[1, 6]),
        page.table("Run", ["what", "value"], [[name, value or "–"] for name, value in facts], text=[1]),
    ]
