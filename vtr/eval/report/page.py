"""A report as one HTML file that needs nothing else: tables that sort, plots inside, no script but its own."""

from __future__ import annotations

import base64
import hashlib
from html import escape

from vtr.eval.report.document import Cell, Document, Figure, Part, Table

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --warn: #c60; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 3rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; } nav a { margin-right: 1.2rem; }
.warnings { border-left: 4px solid var(--warn); background: var(--soft); padding: .5rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .84rem; }
th, td { padding: .2rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B2"; } th[aria-sort=descending] button::after { content: " \\25BC"; }
tr:hover td { background: var(--soft); } .same, .missing { opacity: .6; font-style: italic; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; background: white; } figcaption, .scope, .legend { opacity: .8; font-size: .9rem; }
"""

_SCRIPT = """
for (const button of document.querySelectorAll('th button')) button.addEventListener('click', () => {
  const head = button.parentElement, body = head.closest('table').tBodies[0], column = head.cellIndex;
  const sorted = head.getAttribute('aria-sort'), up = column ? sorted === 'descending' : sorted !== 'ascending';
  for (const other of head.parentElement.cells) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const key = row => { const cell = row.cells[column]; return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value); };
  const order = (a, b) => typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b));
  const rows = [...body.rows], blank = row => key(row) === '';
  const full = rows.filter(row => !blank(row)).sort((a, b) => (up ? 1 : -1) * order(key(a), key(b)));
  body.append(...full, ...rows.filter(blank));
});
"""


def html(document: Document, title: str = "vtr report") -> str:
    """Returns the whole page; all text from data is escaped, and the policy in its head lets only the script above run."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<a href="#part-{index}">{escape(part.title)}</a>' for index, part in enumerate(document.parts))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1><nav>{links}</nav>",
            *map(_notice, document.notices()),
            "" if document.warnings else '<p class="legend">No check found anything to warn about.</p>',
            *(_part(index, part) for index, part in enumerate(document.parts)),
            '<h2>What the columns mean</h2><ul class="legend">',
            *(f"<li>{escape(line)}</li>" for line in document.legend),
            f"</ul><script>{_SCRIPT}</script></body></html>\n",
        ]
    )


def _notice(notice: tuple[str, list[str]]) -> str:
    head, lines = notice
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<details class="warnings" open><summary>{head}: {len(lines)}</summary><ul>{items}</ul></details>'


def _part(index: int, part: Part) -> str:
    head = f'<section id="part-{index}"><h2>{escape(part.title)}</h2><p class="scope">{escape(part.scope)}</p>'
    return "\n".join([head, *map(_figure, part.figures), *map(_table, part.tables), "</section>"])


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col"><button>{escape(column)}</button></th>' for column in table.columns)
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return f'<h3>{escape(table.title)}</h3><div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _cell(cell: Cell) -> str:
    value = "" if cell.value is None else f' data-value="{cell.value:.10g}"'
    mark = f' class="{cell.mark}"' if cell.mark else ""
    return f"<td{value}{mark}>{escape(cell.text)}</td>"


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.svg).decode()
    title = escape(figure.title)
    return f'<figure><img alt="{title}" src="data:image/svg+xml;base64,{data}"><figcaption>{title}</figcaption></figure>'
