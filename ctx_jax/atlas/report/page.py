"""HTML by small functions. Whatever is given as text is escaped here, and nowhere else."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

STYLE = """
:root{color-scheme:light dark;--ink:#1d1d1f;--soft:#5a5a60;--rule:#d9d9de;--paper:#fff;--band:#f5f5f7}
@media (prefers-color-scheme:dark){:root{--ink:#e8e8ea;--soft:#a9a9b0;--rule:#3c3c42;--paper:#17171a;--band:#222226}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:70em;background:var(--paper);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.25rem;line-height:1.3;margin:2.8rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--rule)}
h3{font-size:1.02rem;margin:1.6rem 0 .4rem}
p,ol,ul,dl{max-width:46em}
.soft,figcaption,caption{color:var(--soft);font-size:.875rem}
ol.lines{padding-left:1.5rem}
ol.lines li{margin:.3rem 0}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1.2rem;align-items:start}
figure{margin:0;min-width:0}
.flow{display:flex;flex-wrap:wrap;gap:1.2rem 2.5rem;align-items:start;margin:1rem 0}
.flow figure{max-width:100%;min-width:min(14rem,100%)}
.flow figcaption,.flow details{width:0;min-width:100%}
.scroll{overflow-x:auto;max-width:100%}
figure svg{display:block;height:auto;background:#fff;border-radius:4px;padding:4px}
.plots svg{max-width:100%}
figcaption{margin-top:.3rem}
details{font-size:.875rem;margin-top:.2rem}
summary{cursor:pointer;color:var(--soft)}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;margin:.6rem 0}
caption{text-align:left;padding-bottom:.3rem}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--rule);overflow-wrap:normal;vertical-align:top}
th{font-weight:600}
thead th{background:var(--band);vertical-align:bottom}
th[scope=row],th.text,td.text{text-align:left}
th[scope=row],td.text{min-width:5em}
td.long{min-width:16em;overflow-wrap:anywhere}
dt{font-weight:600;margin-top:.7rem}
dd{margin:0}
code{font:.875em ui-monospace,monospace}
a{color:inherit}
@media print{@page{size:A4;margin:14mm}:root{--ink:#000;--soft:#444;--rule:#bbb;--paper:#fff;--band:#eee;
color-scheme:light}body{max-width:none;padding:0;font-size:9.5pt}details{display:none}
.plots{grid-template-columns:1fr 1fr;gap:.4rem}.plots svg{width:84%!important}figcaption{font-size:7.5pt}
figure,tr,dt,ol.lines li{break-inside:avoid}h2,h3,dt,thead{break-after:avoid}
.scroll{overflow:visible}figure svg{max-width:100%}table{font-size:7.5pt}th,td{padding:.15rem .3rem}
td.long{min-width:12em}th[scope=row],td.text{min-width:5em}}
"""


def plain(text: str) -> str:
    """Without what neither HTML nor SVG may hold: control characters and halves of pairs."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", str(text))


def escape(text: str) -> str:
    """For text and for attributes."""
    return html.escape(plain(text))


def document(title: str, body: Iterable[str]) -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def section(name: str, title: str, body: Sequence[str]) -> str:
    """A heading and what is under it; nothing where nothing is."""
    if not body:
        return ""
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n' + "\n".join(body) + "\n</section>"


def heading(text: str) -> str:
    """Of a part of a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    """Of text."""
    return f"<p>{escape(text)}</p>"


def lines(texts: Iterable[str]) -> str:
    """A numbered list."""
    return '<ol class="lines">\n' + "\n".join(f"<li>{escape(text)}</li>" for text in texts) + "\n</ol>"


def definitions(terms: Iterable[tuple[str, str]]) -> str:
    """Terms and what they mean."""
    return "<dl>\n" + "\n".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms) + "\n</dl>"


def links(texts: Iterable[tuple[str, str]]) -> str:
    """A list of texts and where they are to be had."""
    items = [f'<li>{escape(text)} <a href="{escape(url)}">{escape(url)}</a></li>' for text, url in texts]
    return "<ul>\n" + "\n".join(items) + "\n</ul>"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = ()) -> str:
    """The first cell of each row names it.

    Args:
      caption: above it.
      head: names of the columns.
      rows: cells.
      text: columns that hold words, which begin at the left.
    """
    kind = lambda place, cell: f' class="text{" long" if len(cell) > 40 else ""}"' if place in (0, *text) else ""
    top = "".join(f'<th scope="col"{kind(place, name)}>{escape(name)}</th>' for place, name in enumerate(head))
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{kind(place, cell)}>{escape(cell)}</td>" for place, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def figure(svg: str, caption: str, numbers: str) -> str:
    """A plot, what it shows, and its numbers as a table to be unfolded.

    Args:
      svg: the element.
      caption: text.
      numbers: a table; none if empty.
    """
    more = f"<details><summary>The numbers</summary>{numbers}</details>" if numbers else ""
    under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="scroll" tabindex="0">{svg}</div>{under}{more}</figure>'


def side_by_side(figures: Sequence[str], *, alike: bool) -> str:
    """Plots, as many in a row as there is room for.

    Args:
      figures: of them.
      alike: all of one width, which follows the screen's. Others keep theirs, and are moved sideways where it is wider.
    """
    kind = "plots" if alike else "flow"
    return f'<div class="{kind}">\n' + "\n".join(figures) + "\n</div>"
