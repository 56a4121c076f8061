"""A report as one self-contained HTML file: no script, no network, and pictures inside as SVG images.

Everything that came from a folder is escaped. A policy in the head forbids the browser to load or run anything else.
"""

from __future__ import annotations

import base64
from html import escape

from hvdllm.report.figures import Figures
from hvdllm.report.table import Table, left_out, method, tables
from hvdllm.report.verdict import verdict

STYLE = """
body { font: 16px/1.5 Georgia, serif; color: #000; background: #fff; max-width: 70rem; margin: 2rem auto }
body { padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.verdict { font-size: 1.1rem; border-left: 4px solid #000; padding: .2rem 0 .2rem 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font: 13px/1.4 system-ui, sans-serif }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ccc; text-align: right; vertical-align: top }
th { border-bottom: 1.5px solid #000; font-weight: 600 }
th.w, td.w { text-align: left; overflow-wrap: anywhere; min-width: 6rem }
p.note, li, figcaption { font-size: .9rem } figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto }
@media print {
  body { max-width: none; margin: 0 } table { font-size: 9pt }
  figure, tr { break-inside: avoid } .wide { overflow: visible }
}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(f: Figures, pictures: dict[str, tuple[str, bytes]], command: str) -> str:
    """The whole page.

    Args:
        f: the numbers.
        pictures: SVG, as draw.pictures makes them.
        command: the one that made this page; it is shown at the end.
    """
    groups = ", ".join(line.label for line in f.lines[:8])
    every = tables(f)
    parts = [
        f"<h1>{escape(f'Report: {groups}')}</h1>",
        f'<p class="verdict">{escape(verdict(f))}</p>',
        _table(every[0]),
        *(_picture(text, data) for text, data in pictures.values()),
        *(_table(one) for one in every[1:]),
        "<h2>How the numbers were made</h2><ul>",
        *(f"<li>{escape(note)}</li>" for note in method(f)),
        "</ul>",
        f"<p class=note>{len(f.runs)} runs compared, {len(left_out(f).rows) if f.skipped else 0} folders skipped. "  # type: ignore[union-attr]
        f"Made by <code>{escape(command)}</code></p>",
    ]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f'<meta name="viewport" content="width=device-width"><title>hvdllm report</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _picture(text: str, svg: bytes) -> str:
    """A picture as an image element, which runs nothing and shares no ids with other pictures."""
    data = base64.b64encode(svg).decode("ascii")
    shown = escape(text)
    return (
        f'<figure><img alt="{shown}" src="data:image/svg+xml;base64,{data}"><figcaption>{shown}</figcaption></figure>'
    )


def _table(table: Table) -> str:
    def cells(tag: str, row: list[str]) -> str:
        marks = ("" if k >= table.left else " class=w" for k in range(len(row)))
        return "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, row, strict=True))

    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in table.notes)
    if not table.rows:
        return f"<h2>{escape(table.title)}</h2>{notes}"
    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in table.rows)
    head = f"<thead><tr>{cells('th', table.head)}</tr></thead>"
    return f"<h2>{escape(table.title)}</h2><div class=wide><table>{head}<tbody>\n{body}</tbody></table></div>{notes}"
