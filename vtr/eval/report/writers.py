"""A report as Markdown, CSV and LaTeX; text from data cannot break out of its cell."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from vtr.eval.report.document import Document
from vtr.markdown import markdown_table

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def markdown(document: Document, pictures: str = "") -> str:
    """Returns headings, pipe tables, warnings in front and the meaning of the columns at the end.

    Args:
        document: what to write.
        pictures: folder of the plots as seen from the file, none = no pictures.
    """
    blocks = []
    for head, lines in document.notices():
        blocks.append("\n".join([f"**{head}**", "", *(f"- {_md(line)}" for line in lines)]))
    for part in document.parts:
        blocks += [f"## {_md(part.title)}", _md(part.scope)]
        for table in part.tables:
            rows = [[_md(cell.text) for cell in row] for row in table.rows]
            blocks += [f"### {_md(table.title)}", markdown_table([*map(_md, table.columns)], rows)]
        blocks += [f"![{_md(figure.title)}]({pictures}/{figure.name}.png)" for figure in part.figures if pictures]
    blocks.append("\n".join(f"- {line}" for line in document.legend))
    return "\n\n".join(blocks) + "\n"


def _md(text: str) -> str:
    text = _flat(text).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[").replace("`", "\\`").replace("*", "\\*")


def comma_separated(document: Document) -> str:
    """Returns one line for every number: model, table, row, column, text, value and the ends of its interval; empty = not measured.

    What stands in front comes first, as lines whose table is `no better than chance` or `warnings`.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("part", "table", "row", "column", "text", "value", "low", "high"))
    for head, lines in document.notices():
        writer.writerows(("", head.lower(), "", "", _safe(line), "", "", "") for line in lines)
    for part in document.parts:
        for table in part.tables:
            for row in table.rows:
                for column, cell in zip(table.columns[1:], row[1:], strict=True):
                    places = map(_safe, (part.title, table.title, row[0].text, column))
                    text = cell.text if cell.value is not None else _safe(cell.text)
                    writer.writerow((*places, text, *("" if v is None else f"{v:.10g}" for v in (cell.value, cell.low, cell.high))))
    return stream.getvalue()


def _safe(text: str) -> str:
    """Returns text that a spreadsheet does not run as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def latex(document: Document) -> str:
    """`table` environments with booktabs rules, warnings as comments; `\\input` it into a paper that loads booktabs and graphicx."""
    blocks = [f"% {head.lower()}: {_flat(line)}" for head, lines in document.notices() for line in lines]
    for part in document.parts:
        for table in part.tables:
            rows = [_latex_row([_tex(cell.text) for cell in row]) for row in table.rows]
            head = _latex_row([_tex(column) for column in table.columns])
            body = "\n".join(
                [f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
            )
            caption = f"\\caption{{{_tex(f'{part.title}, {table.title}. {part.scope}')}}}"
            fitted = f"\\resizebox{{\\textwidth}}{{!}}{{%\n{body}\n\\end{{tabular}}}}"
            blocks.append("\n".join([r"\begin{table}", r"\centering", caption, fitted, r"\end{table}"]))
    blocks += [f"% {_flat(line)}" for line in document.legend]
    return "\n\n".join(blocks) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in _flat(text))


def _flat(text: str) -> str:
    """Returns the text on one line, without control characters."""
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", text)
