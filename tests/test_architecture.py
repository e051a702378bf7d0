"""The import rules and the layout that CONTRIBUTING.md describes. Reads sources with `ast`, imports nothing of ours."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "vtr").rglob("*.py"))
UPKEEP = sorted((ROOT / "scripts").glob("*/*.py"))
METHODS = [p for p in sorted((ROOT / "vtr" / "methods").glob("*.py")) if not p.name.startswith("_")]

ENGINE = {"engine", "planning", "plans", "checks", "reduction", "report"}
EVERYTHING = ENGINE | {
    "bench",
    "calibrate",
    "cli",
    "cost",
    "data",
    "eval",
    "files",
    "hosts",
    "markdown",
    "methods",
    "models",
    "ops",
    "recipes",
    "registry",
    "saved",
    "types",
    "viz",
    "selfcheck",
    "testing",
    "tune",
    "ui",
    "versions",
}
TOOLS = ENGINE | {"models", "recipes", "registry", "markdown", "cost", "data", "viz", "types"}
MAY_IMPORT = {
    "__init__": {"planning", "plans", "reduction", "report", "saved", "hosts", "registry", "types", "methods", "viz", "data", "eval"},
    "__main__": {"cli"},
    "cli": EVERYTHING,
    "eval": TOOLS | {"bench", "files", "hosts"},
    "bench": TOOLS | {"hosts", "ops"},
    "tune": TOOLS | {"eval", "bench", "files", "hosts"},
    "calibrate": TOOLS | {"ops"},
    "ui": TOOLS | {"eval", "methods"},
    "engine": {"plans", "planning", "hosts", "registry", "types", "ops", "selfcheck", "versions"},
    "plans": {"files", "types"},
    "saved": {"plans", "planning", "types"},
    "files": set(),
    "checks": {"plans", "hosts", "types"},
    "planning": {"plans", "checks", "registry", "hosts", "ops", "types"},
    "reduction": {"engine", "plans", "planning", "checks", "report", "hosts", "types"},
    "report": {"plans", "engine", "hosts", "ops", "types", "viz"},
    "selfcheck": ENGINE | {"hosts", "registry", "testing", "types"},
    "testing": ENGINE | {"hosts", "registry", "types"},
    "versions": set(),
    "models": {"hosts", "recipes", "registry", "types", "data"},
    "hosts": {"ops", "types", "registry"},
    "methods": {"recipes", "registry", "types", "ops"},
    "markdown": set(),
    "recipes": set(),
    "registry": {"types"},
    "cost": {"types"},
    "viz": {"types"},
    "data": {"types"},
    "types": set(),
    "ops": set(),
}
UPKEEP_MAY_IMPORT = {
    "tiny": TOOLS | {"hosts", "eval"},
    "replay": ENGINE | {"methods", "registry", "ops", "types", "calibrate", "hosts"},
    "pages": TOOLS | {"eval", "bench", "files", "ops", "hosts", "testing"},
}
MODEL_LIBRARIES = {"transformers", "timm", "open_clip"}
INDEPENDENT = ("cut", "families", "qwen", "joined", "onevision", "pixtral", "smolvlm", "videos", "tiny_models", "reference")
"""Modules of vtr.testing that use nothing else of vtr."""
MODEL_LIBRARIES_IN = {"hosts", "models", "eval", "bench", "engine", "checks", "saved", "selfcheck", "testing"}


def part(path: Path) -> str:
    """`vtr/hosts/hf_llava.py` -> `hosts`."""
    return path.relative_to(ROOT / "vtr").parts[0].removesuffix(".py")


@cache
def parsed(path: Path) -> tuple[list[ast.stmt], list[ast.AST]]:
    """Statements at module level, and every import and call of a file."""
    module = ast.parse(path.read_text())
    return module.body, [node for node in ast.walk(module) if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call))]


@cache
def imports(path: Path, everywhere: bool = True) -> list[str]:
    """Dotted names that a file imports, or only those at module level; `from vtr.ops import x` is `vtr.ops.x`."""
    package = path.relative_to(ROOT).parent.parts
    body, nodes = parsed(path)
    found = []
    for node in nodes if everywhere else body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_keeps_the_rules(path: Path) -> None:
    me, source = part(path), path.read_text()
    assert me in MAY_IMPORT, f"vtr/{me}: new parts need a row in MAY_IMPORT"
    assert source.count("\n") <= 400, "more than 400 lines: two files"
    assert not [name for name in imports(path) if name.startswith("scripts.")], "scripts/ is not installed: vtr must not import it"

    ours = {name.split(".")[1] for name in imports(path) if name.startswith("vtr.")}
    forbidden = ours - MAY_IMPORT[me] - {me} - {"__version__"}
    assert not forbidden, f"vtr/{me} must not import vtr.{', vtr.'.join(sorted(forbidden))}"

    libraries = {name.split(".")[0] for name in imports(path)}
    if me not in MODEL_LIBRARIES_IN:
        assert not libraries & MODEL_LIBRARIES, f"vtr/{me} must not import model libraries"
    if me in ("engine", "checks", "reduction", "registry", "types", "__init__", "saved", "testing"):
        at_import = {name.split(".")[0] for name in imports(path, everywhere=False)}
        assert not at_import & MODEL_LIBRARIES, "`import vtr` must stay quick: import model libraries inside functions"
    if path.parent.name == "testing" and path.stem in INDEPENDENT:
        own = tuple(f"vtr.testing.{name}" for name in INDEPENDENT)
        assert all(name.startswith(own) for name in imports(path) if name.startswith("vtr")), "independent of vtr"
    assert not libraries & {"pytest", "hypothesis", "tests"}, "vtr must work without what only tests need"
    if me == "ops":
        kernels = {"triton"} if path.name.startswith("_triton") else set()
        assert libraries <= {"torch", "vtr"} | kernels | sys.stdlib_module_names, "vtr/ops uses torch only, and Triton in _triton_*.py"

    assert me == "cli" or not prints(path), f"print in lines {prints(path)}: only vtr/cli and entry points in scripts/ print"


def prints(path: Path) -> list[int]:
    """Lines that call `print`."""
    return [node.lineno for node in parsed(path)[1] if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"]


@pytest.mark.parametrize("path", UPKEEP, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_of_the_upkeep_keeps_the_rules(path: Path) -> None:
    me, source = path.parent.name, path.read_text()
    assert me in UPKEEP_MAY_IMPORT, f"scripts/{me}: new packages need a row in UPKEEP_MAY_IMPORT"
    assert source.count("\n") <= 400, "more than 400 lines: two files"
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("vtr.")}
    forbidden = ours - UPKEEP_MAY_IMPORT[me] - {"__version__"}
    assert not forbidden, f"scripts/{me} must not import vtr.{', vtr.'.join(sorted(forbidden))}"
    others = {name.split(".")[1] for name in imports(path) if name.startswith("scripts.")} - {me}
    assert not others, f"scripts/{me} must not import scripts.{', scripts.'.join(sorted(others))}"
    assert not prints(path), f"print in lines {prints(path)}: only entry points print"


def file_of(name: str) -> Path | None:
    """`vtr.ops.topk.topk_mask` -> `vtr/ops/topk.py`; None for a name that is not ours."""
    parts = name.split(".")
    bases = (ROOT.joinpath(*parts[:n]) for n in range(len(parts), 0, -1)) if parts[0] in ("vtr", "scripts") else ()
    return next((path for base in bases for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that reach each other, sorted: strongly connected parts, by the algorithm of Tarjan."""
    found: list[list[str]] = []
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(file: str) -> None:
        number[file] = lowest[file] = len(number)
        stack.append(file)
        for other in sorted(graph[file]):
            if other not in number:
                visit(other)
            if other in stack:
                lowest[file] = min(lowest[file], lowest[other])
        if lowest[file] == number[file]:
            at = stack.index(file)
            group = sorted(stack[at:])
            del stack[at:]
            if len(group) > 1 or file in graph[file]:
                found.append(group)

    for file in sorted(graph):
        if file not in number:
            visit(file)
    return sorted(found)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b", "x"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "x": {"y"}, "y": {"x"}}) == [["a", "b", "c"], ["x", "y"]]


def test_no_files_import_each_other_in_a_circle() -> None:
    files = [*SOURCES, *sorted((ROOT / "scripts").rglob("*.py"))]
    targets = {path: {file for name in imports(path) if (file := file_of(name))} - {path} for path in files}
    graph = {str(path.relative_to(ROOT)): {str(file.relative_to(ROOT)) for file in own} for path, own in targets.items()}
    found = circles(graph)
    assert not [" <-> ".join(group) for group in found], "imports inside functions count, too; move what both need into a file of its own"


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_method_is_one_file_with_a_test(path: Path) -> None:
    others = {p.stem for p in METHODS} - {path.stem}
    imported = {name.split(".")[2] for name in imports(path) if name.startswith("vtr.methods.")}
    assert not imported & others, "no method imports another: shared steps belong into vtr/ops"
    assert (ROOT / "tests" / "methods" / f"test_{path.stem}.py").is_file(), f"tests/methods/test_{path.stem}.py is missing"


def test_models_and_eval_hold_no_python() -> None:
    assert not [p for folder in ("models", "eval") for p in (ROOT / folder).rglob("*.py")], "all Python lives in vtr/ and scripts/"


def test_scripts_are_thin() -> None:
    assert not [p.name for p in (ROOT / "scripts").glob("*") if p.is_file() and p.read_text().count("\n") >= 50]


def test_no_folder_of_somebodys_machine_is_written_down() -> None:
    machine = re.compile(r"(?<![\w.])/(home|root|tmp|Users|mnt|work|workspace)/")
    folders = ("vtr", "models", "eval", "scripts", "tests", "docs")
    texts = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".sh", ".md", ".yaml", ".json", ".txt")]
    found = [f"{p.relative_to(ROOT)}: {m.group()}" for p in [*texts, *ROOT.glob("*.md")] for m in [machine.search(p.read_text())] if m]
    assert not found
