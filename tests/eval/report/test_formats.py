"""The formats: text from data cannot break out, HTML needs nothing else, the same results give the same bytes."""

import base64
import csv
import hashlib
import io
import re
from html.parser import HTMLParser

import pytest

from tests.eval.report.made import cell, table
from vtr.eval.report import build, find_format, render, write_figures

HOSTILE = '<script>alert("1")</script>|$x_{$ `a` %& \\input{x}\n=1+1 "\'--></style>'


@pytest.fixture(scope="module")
def hostile():
    """A method, a family and a task with that name, with plots."""
    cells = [cell(name, 0.5, keep=64, task=HOSTILE, families=(HOSTILE, "=cmd()")) for name in (HOSTILE, "random", "_hidden", "=1+1")]
    return build([*cells, cell("full", 0.9, task=HOSTILE, families=(HOSTILE, "=cmd()"))], plots=True)


class Page(HTMLParser):
    """Tags with attributes, and the text of table cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self._cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._cell = "" if tag in ("td", "button") else self._cell

    def handle_data(self, data):
        self._cell = None if self._cell is None else self._cell + data

    def handle_endtag(self, tag):
        if tag in ("td", "button"):
            self.cells.append(self._cell)
            self._cell = None


def test_html_escapes_every_text_from_data(hostile):
    text = render(hostile, "html")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert HOSTILE in page.cells and "=cmd()" in page.cells
    assert text.count("</script>") == 1 and text.count("</style>") == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_html_loads_nothing_and_only_its_own_script_may_run(hostile):
    text = render(hostile, "html")
    links = [a[name] for _, a in Page(text).tags for name in ("src", "href") if name in a]
    assert links and all(link.startswith(("data:image/svg+xml;base64,", "#part-")) for link in links)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in text
    assert "default-src 'none'" in text


def test_plots_inside_the_page_are_whole_svg_files(hostile):
    found = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", render(hostile, "html"))
    drawn = [base64.b64decode(one).decode() for one in found]
    assert len(drawn) == len(hostile.parts[0].figures) == 4
    assert all("<svg" in one and one.rstrip().endswith("</svg>") and "<script" not in one for one in drawn)


def test_markdown_keeps_its_columns(hostile):
    lines = [line for line in render(hostile, "md").splitlines() if line.startswith("|")]
    groups = {
        len(re.findall(r"(?<!\\)\|", line)) for line in lines if "against random" in line or ("alert" in line and "ranking" not in line)
    }
    assert all(len(re.findall(r"(?<!\\)\|", line)) in groups for line in lines if "distinguishable" in line)
    assert "<script" not in render(hostile, "md")


def test_csv_can_be_read_back_and_holds_no_formula(hostile):
    rows = list(csv.DictReader(io.StringIO(render(hostile, "csv"))))
    assert {row["row"] for row in rows if row["table"] == "keep 64: cost"} >= {HOSTILE, "'=1+1", "random", "_hidden"}
    assert not [v for row in rows for name, v in row.items() if v.startswith(("=", "+", "@")) and name in ("row", "column", "part")]
    macro = next(row for row in rows if row["row"] == "random" and row["column"] == "macro")
    assert (float(macro["value"]), float(macro["low"]) < 50 < float(macro["high"])) == (50.0, True)


def test_latex_escapes_what_tex_would_run(hostile):
    text = render(hostile, "latex")
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert "\\input{x}" not in "".join(body) and r"\textbackslash{}input\{x\}" in text
    assert all(len(re.findall(r"(?<!\\)%", line)) == line.endswith("{!}{%") for line in body)
    assert all(line.endswith(r"\\") for line in body if re.search(r"(?<!\\)&", line))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == len(hostile.parts[0].tables)


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes_in_any_order():
    cells = table((64,))
    first, second = build(cells, plots=True), build(sorted(cells, key=lambda c: c.key), plots=True)
    for form in ("md", "csv", "latex", "html"):
        assert render(first, form) == render(second, form)
    assert [f.png for f in first.parts[0].figures] == [f.png for f in second.parts[0].figures]


def test_plots_are_written_as_png_and_svg(tmp_path):
    files = write_figures(build(table((64,)), plots=True), tmp_path / "plots")
    assert sorted(path.suffix for path in files) == [".png"] * 4 + [".svg"] * 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files if path.suffix == ".png")
    assert {path.name.split(".")[-2] for path in files} == {"retained", "tflops", "latency_ms", "families"}


def test_the_format_follows_the_name_of_the_file(tmp_path):
    assert [find_format(None, tmp_path / name) for name in ("a.html", "a.csv", "a.tex", "a.txt")] == ["html", "csv", "latex", "md"]
    assert find_format("csv", tmp_path / "a.html") == "csv" and find_format(None, None) == "md"
    with pytest.raises(ValueError, match="must be one of md, csv, latex, html, got 'htm'; did you mean 'html'"):
        find_format("htm", None)
