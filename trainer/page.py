"""A static HTML page of tables and PNG plots in one file, nothing from outside."""

import base64
import html
from collections.abc import Sequence

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;
color:#1b1b1b;background:#fff}h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .5rem;
border-bottom:1px solid #bbb;padding-bottom:.3rem}p.lead{font-size:1.1rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.93em;margin:.6rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .45rem;border-bottom:1px solid #e4e4e4;text-align:right;vertical-align:top}
th{border-bottom-color:#888;font-weight:600}
th.text,td.text{text-align:left}td{white-space:nowrap}td.text{white-space:normal}
tr.ours td{font-weight:600}
img{max-width:100%;height:auto;display:block;margin:.6rem 0}summary{cursor:pointer}"""


def page(title: str, body: list[str]) -> str:
    """The whole page; `body` is HTML, made of the parts below."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{text(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    text_columns: int = 1,
    ours: Sequence[int] = (),
) -> str:
    """Cells are plain text. The first `text_columns` stand left, the rest are numbers; the rows
    `ours` are bold."""

    lines = []
    for number, row in enumerate(rows):
        style = ' class="ours"' if number in ours else ""
        lines.append(f"<tr{style}>{_cells('td', row, text_columns)}</tr>")
    head = f"<thead><tr>{_cells('th', header, text_columns)}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _cells(kind: str, row: Sequence[str], text_columns: int) -> str:
    cells = []
    for place, one in enumerate(row):
        style = ' class="text"' if place < text_columns else ""
        content = text(one)
        if kind == "th":
            content = content.replace(".", ".<wbr>").replace("_", "_<wbr>")  # keys may break there
        cells.append(f"<{kind}{style}>{content}</{kind}>")
    return "".join(cells)


def heading(value: str) -> str:
    return f"<h2>{text(value)}</h2>"


def paragraph(value: str, lead: bool = False) -> str:
    style = ' class="lead"' if lead else ""
    return f"<p{style}>{text(value)}</p>"


def folded(summary: str, content: str) -> str:
    """Content that a click opens."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def image(png: bytes, alternative: str) -> str:
    """A plot inside the page, with what it shows in words."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{text(alternative)}" src="data:image/png;base64,{data}">'


def text(value: str) -> str:
    return html.escape(value, quote=True)
