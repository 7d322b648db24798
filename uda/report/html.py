"""Small pieces of HTML, escaped, and the page around them: no script, nothing from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--muted:#5d6777;--grid:#d9dee7;--paper:#ffffff;--back:#f4f6f9;
--accent:#2b66b8;--oracle:#8a5a00;--oracle-back:#fdf3dc;--warn:#a3283b}
@media (prefers-color-scheme:dark){:root{--ink:#e7ebf2;--muted:#9aa6b8;--grid:#343c4a;--paper:#171b22;--back:#0f1217;
--accent:#7fb0f5;--oracle:#f0c674;--oracle-back:#2e2614;--warn:#ff8fa0}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:34px}
h1{font-size:1.85rem;line-height:1.2;margin:0 0 .3em;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 .35em}
h3{font-size:1rem;margin:1.2em 0 .4em}
p{margin:.4em 0 .8em;max-width:75ch}
.lead{color:var(--muted);margin:0 0 1em}
a{color:var(--accent)}
nav ul{display:flex;flex-wrap:wrap;gap:.2em 1.1em;list-style:none;padding:0;margin:.6em 0 1.4em;font-size:.92rem}
section{background:var(--paper);border:1px solid var(--grid);border-radius:12px;padding:22px 24px;margin:0 0 20px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:.4em 0 1em}
.card{border:1px solid var(--grid);border-radius:10px;padding:12px 14px}
.card b{display:block;font-size:1.7rem;line-height:1.15;font-variant-numeric:tabular-nums}
.card span{color:var(--muted);font-size:.86rem;display:block}
.card.oracle{background:var(--oracle-back)}
.oracle-tag{color:var(--oracle);background:var(--oracle-back);border-radius:5px;padding:.08em .42em;font-size:.8em;
font-weight:600;white-space:nowrap}
.scroll{overflow-x:auto;margin:.4em 0 1em}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);font-size:.86rem;padding:0 0 .4em}
th,td{padding:.34em .75em;border-bottom:1px solid var(--grid);text-align:left;vertical-align:top}
thead th{color:var(--muted);font-weight:600;font-size:.84rem}
td.n,th.n{text-align:right}
td.oracle,th.oracle{background:var(--oracle-back)}
.none{color:var(--muted)}
td code{overflow-wrap:anywhere}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.88em}
.dot{display:inline-block;width:.72em;height:.72em;border-radius:50%;margin-right:.45em}
.grid{display:grid;gap:18px 22px;grid-template-columns:repeat(auto-fit,minmax(min(100%,var(--least,420px)),1fr));
align-items:start}
.small{--least:290px}
.grid+figure{margin-top:20px}
figure{margin:0;min-width:0;overflow-x:auto}
figure>svg{display:block;width:100%;height:auto;margin:0 auto 0 0}
figure>.t{font-weight:600;font-size:.93rem;margin:.2em 0 .35em}
figcaption{color:var(--muted);font-size:.86rem;max-width:75ch;margin:.35em 0 0}
.faces{display:grid;grid-template-columns:repeat(auto-fill,minmax(118px,1fr));gap:14px;padding:0;margin:.6em 0;
list-style:none}
.faces img{display:block;width:100%;max-width:128px;height:auto;border-radius:6px;border:1px solid var(--grid);
image-rendering:auto}
.faces img.pixels{image-rendering:pixelated}
.faces span{display:block;font-size:.8rem;line-height:1.35;color:var(--muted);overflow-wrap:anywhere}
.faces b{color:var(--ink)}
.note{border-left:3px solid var(--grid);padding:.1em 0 .1em .9em;color:var(--muted)}
details{margin:.5em 0}
summary{cursor:pointer;color:var(--accent);font-size:.92rem}
pre{overflow-x:auto;background:var(--back);border:1px solid var(--grid);border-radius:8px;padding:12px 14px;
font-size:.82rem;line-height:1.45}
li{margin:.2em 0}
footer{color:var(--muted);font-size:.84rem;padding-bottom:40px}
@media (max-width:600px){section{padding:16px 14px;border-radius:10px}main,header,footer{padding-left:12px;
padding-right:12px}h1{font-size:1.45rem}header{padding-top:20px}th,td{padding:.3em .5em}}
@media print{body{background:#fff}section{border:0;padding:0;break-inside:avoid-page}nav{display:none}}
"""


@dataclass(frozen=True)
class Cell:
    """A table cell: HTML, CSS class, whether it heads its row, and columns and rows that it spans."""

    html: str
    css: str = ""
    head: bool = False
    columns: int = 1
    rows: int = 1


@dataclass(frozen=True)
class Section:
    """A part of the page: anchor, title and HTML."""

    anchor: str
    title: str
    html: str


def text(value: Any) -> str:
    """Plain text as HTML."""
    return escape(str(value), quote=True)


def paragraph(html: str, css: str = "") -> str:
    """A paragraph."""
    return f"<p{_css(css)}>{html}</p>"


def note(words: str) -> str:
    """A sentence on what is not there."""
    return paragraph(text(words), "note")


def bullets(items: Iterable[str]) -> str:
    """A list of HTML items; empty for none."""
    rows = "".join(f"<li>{i}</li>" for i in items)
    return f"<ul>{rows}</ul>" if rows else ""


def oracle(words: str = "oracle") -> str:
    """The tag of what is chosen by target labels."""
    return f'<span class="oracle-tag">{text(words)}</span>'


def by_labels() -> str:
    """The tag of what is measured or shown with target labels."""
    return oracle("target labels")


def dot(color: str) -> str:
    """A run's colour."""
    return f'<span class="dot" style="background:{color}"></span>'


def table(caption: str, head: Sequence[Sequence[Cell]], body: Sequence[Sequence[Cell]]) -> str:
    """A table with header cells that say whether they head a column or a row; ``caption`` is HTML."""

    def rows(part: Sequence[Sequence[Cell]], scope: str) -> str:
        return "".join("<tr>" + "".join(_cell(c, scope) for c in row) + "</tr>" for row in part)

    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead>{rows(head, "col")}</thead>'
        f"<tbody>{rows(body, 'row')}</tbody></table></div>"
    )


def _cell(cell: Cell, scope: str) -> str:
    tag = "th" if scope == "col" or cell.head else "td"
    span = (f' colspan="{cell.columns}"' if cell.columns > 1 else "") + (
        f' rowspan="{cell.rows}"' if cell.rows > 1 else ""
    )
    group = "colgroup" if scope == "col" and cell.columns > 1 else scope
    head = f' scope="{group}"' if tag == "th" else ""
    return f"<{tag}{_css(cell.css)}{span}{head}>{cell.html}</{tag}>"


def _css(css: str) -> str:
    return f' class="{css}"' if css else ""


def details(summary: str, html: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{text(summary)}</summary>{html}</details>"


def page(title: str, lead: str, sections: Sequence[Section], foot: str) -> str:
    """The whole document; ``lead`` and ``foot`` are HTML."""
    links = "".join(f'<li><a href="#{s.anchor}">{text(s.title)}</a></li>' for s in sections)
    parts = "".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title"><h2 id="{s.anchor}-title">{text(s.title)}</h2>'
        f"{s.html}</section>\n"
        for s in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n"
        '<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body><header><h1>{text(title)}</h1>"
        f'<p class="lead">{lead}</p><nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{parts}</main>\n<footer>{foot}</footer></body></html>\n"
    )
