"""The HTML page of the report: one file without scripts or addresses, in the reader's light or dark scheme."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template

CSS = """
:root { color-scheme: light dark; --ink: #23272e; --muted: #68707b; --rule: #dfe3e8;
  --paper: #fdfdfe; --code: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --muted: #9aa3ad; --rule: #353b43; --paper: #16191d; --code: #1e2227; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums lining-nums; }
main { max-width: 130rem; margin: 0 auto; padding: 3rem clamp(1.5rem, 4vw, 5rem) 5rem; }
h1 { font-size: 1.75rem; font-weight: 600; letter-spacing: -0.015em; line-height: 1.2; margin: 0 0 0.6rem; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 3.2rem 0 0.9rem; padding-top: 0.9rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; font-weight: 600; margin: 2.2rem 0 0.6rem; }
p { margin: 0 0 0.9rem; max-width: 46rem; }
.lead { font-size: 1.08rem; }
.scroll { overflow-x: auto; margin: 0 0 0.6rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.36rem 1.6rem 0.36rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; color: var(--muted); font-weight: 400; }
th:last-child, td:last-child { padding-right: 0; }
thead th { font-weight: 600; border-bottom: 1px solid var(--muted); }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
figure { margin: 1.2rem 0 1.6rem; min-width: 0; }
figure img { display: block; width: 100%; max-width: 60rem; height: auto; }
.wide img { max-width: 90rem; }
.warning { font-weight: 600; }
figcaption, .note { color: var(--muted); font-size: 0.875rem; line-height: 1.5; max-width: 46rem; }
figcaption { margin-top: 0.5rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0 1.4rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 36rem), 1fr)); gap: 0 3rem; }
.pair > div { min-width: 0; }
.row figure { margin: 0.6rem 0; }
pre { background: var(--code); border-radius: 4px; padding: 0.7rem 0.9rem; margin: 0.6rem 0 1.2rem; font: 0.8rem/1.55
  ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media print { main { padding: 0; max-width: none; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$css</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


def page(title: str, body: Sequence[str]) -> str:
    """The whole document. `title` is plain text, `body` is HTML."""
    return PAGE.substitute(title=escape(title), css=CSS, body="\n".join(body))


def heading(text: str, level: int = 2) -> str:
    """A heading of plain text."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, css_class: str = "") -> str:
    """A paragraph of plain text; css_class "lead" or "note"."""
    return f"<p{f' class={css_class}' if css_class else ''}>{escape(text)}</p>"


def command(text: str) -> str:
    """Command lines, one to a line."""
    return f"<pre><code>{escape(text)}</code></pre>"


def picture(uri: str, description: str, caption: str) -> str:
    """An embedded figure with its caption; `description` stands in for it where it cannot be seen."""
    return (
        f'<figure><img src="{uri}" alt="{escape(description, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def wide(content: str) -> str:
    """A picture that takes more of a wide screen."""
    return f'<div class="wide">{content}</div>'


def row(pictures: Sequence[str]) -> str:
    """Pictures side by side where there is room."""
    return f'<div class="row">{"".join(pictures)}</div>'


def pair(*columns: Sequence[str]) -> str:
    """Columns of HTML side by side where there is room."""
    return f'<div class="pair">{"".join(f"<div>{chr(10).join(column)}</div>" for column in columns)}</div>'


def table(lines: Sequence[Sequence[str]]) -> str:
    """The first line is the header, the first column holds labels; plain text."""
    head, *rest = ([escape(cell) for cell in line] for line in lines)
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = (
        f'<tr><th scope="row">{line[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in line[1:]) + "</tr>"
        for line in rest
    )
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
