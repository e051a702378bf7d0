"""What is installed: the wheel has all that the commands read, a clone called vtr hides nothing, and the versions in the files agree."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import vtr

ROOT = Path(__file__).parents[1]
NAME = "visual-token-reduction"
BUILT = ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "vtr", "models", "eval", "scripts", "constraints")
BUILD = "import sys, setuptools.build_meta as b; to = sys.argv[1]; print(b.build_wheel(to), b.build_editable(to))"
CHECKPOINTS = ("tiny-llava", "tiny-qwen-vl", "tiny-llava-video")
"""What a wheel has room for."""
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "open-clip-torch": "open_clip"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> tuple[Path, Path]:
    """A wheel and an editable wheel, built in a clone that lies in a folder called vtr."""
    clone, dist = tmp_path_factory.mktemp("beside") / "vtr", tmp_path_factory.mktemp("dist")
    clone.mkdir()
    for name in BUILT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, clone / name, ignore=shutil.ignore_patterns("__pycache__", "_data"))
        else:
            shutil.copy(source, clone)
    built = subprocess.run([sys.executable, "-W", "ignore", "-c", BUILD, str(dist)], cwd=clone, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    wheel, editable = built.stdout.split()[-2:]
    return dist / wheel, dist / editable


def config() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(section: str, option: str) -> list[Requirement]:
    lines = config()[section][option].splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def files_under(*folders: str) -> set[str]:
    found = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {str(p.relative_to(ROOT)) for p in found}


def test_the_wheel_has_the_package_and_what_the_commands_read(packages):
    with zipfile.ZipFile(packages[0]) as wheel:
        names = set(wheel.namelist())
        info = f"visual_token_reduction-{vtr.__version__}.dist-info"
        metadata, points = (wheel.read(f"{info}/{file}").decode() for file in ("METADATA", "entry_points.txt"))
    assert packages[0].stat().st_size < 20e6
    shared = files_under("eval", *(f"models/{name}" for name in CHECKPOINTS)) | {"constraints/tested.txt"}
    data = {f"vtr/_data/{name}" for name in shared}
    recipes = {f"vtr/_data/models/{p.name}" for p in ROOT.glob("models/*.yaml")}
    code = {name for name in files_under("vtr") if name.endswith(".py")}
    assert {name for name in names if not name.startswith(info)} == code | data | recipes
    assert {"vtr/_data/models/tiny-llava/model.safetensors", "vtr/_data/eval/examples/questions.json"} <= data
    assert f"\nName: {NAME}\n" in metadata
    assert re.search(r"^vtr = vtr\.__main__:main$", points, re.MULTILINE)
    assert re.search(r"^vtr = vtr\.eval\.lmms:manifest$", points, re.MULTILINE)


@pytest.mark.slow
def test_an_installed_wheel_finds_its_data_from_any_folder(packages, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(packages[0]) as wheel:
        wheel.extractall(site)
    code = (
        "import vtr; from vtr.eval.examples import load_examples; from vtr.models.loading import find_checkpoint; "
        "print(vtr.__file__); print(find_checkpoint('tiny-llava').folder); print(len(load_examples()))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=empty, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert answer.stdout.splitlines() == [str(site / "vtr/__init__.py"), str(site / "vtr/_data/models/tiny-llava"), "6"], answer.stderr


@pytest.mark.parametrize("how", ["script", "folder"])
def test_a_script_beside_a_clone_called_vtr_gets_the_package(packages, tmp_path, how):
    """Without the `.pth` file, the clone's folder would be found first, as a namespace package with nothing in it."""
    with zipfile.ZipFile(packages[1]) as editable:
        editable.extractall(tmp_path)
    beside = packages_clone(tmp_path).parent
    (beside / "script.py").write_text("import vtr\nprint(vtr.__file__)\n")
    site = f"import site, sys; sys.path.insert(0, {str(beside)!r}); site.addsitedir({str(tmp_path)!r}); "
    run = "import runpy; runpy.run_path('script.py')" if how == "script" else "import vtr; print(vtr.__file__)"
    answer = subprocess.run([sys.executable, "-S", "-c", site + run], cwd=beside, capture_output=True, text=True)
    assert answer.stdout.strip() == str(beside / "vtr" / "vtr" / "__init__.py"), answer.stderr


def packages_clone(site: Path) -> Path:
    """The folder that the only `.pth` file of a site-packages folder names; an import hook instead of a folder is not one."""
    (file,) = site.glob("*.pth")
    folder = Path(file.read_text().strip())
    assert folder.name == "vtr" and folder.is_dir(), file.read_text()
    return folder


BROUGHT_BY = {
    **dict.fromkeys(("huggingface-hub", "packaging"), "transformers"),
    **dict.fromkeys(("datasets", "loguru", "tqdm"), "lmms-eval"),
    "triton": "torch",
}
"""What vtr imports and asks for through another library that needs it, too."""


def test_what_is_imported_is_required_and_what_is_required_is_imported():
    """A library that only the tests' environment happens to have would be missed by the first user."""
    imported = set()
    for path in (ROOT / "vtr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    names = {module: name for name, module in IMPORTED_AS.items()}
    used = {names.get(module, canonicalize_name(module)) for module in imported - sys.stdlib_module_names - {"vtr"}}
    always = {canonicalize_name(r.name) for r in requirements("options", "install_requires")}
    extras = {canonicalize_name(r.name) for extra in ("video", "eval", "ui") for r in requirements("options.extras_require", extra)}
    assert always - used == {"torchvision"}, "image processors of transformers are made of it"
    assert used - always - extras == BROUGHT_BY.keys() and set(BROUGHT_BY.values()) <= always | extras


@pytest.mark.parametrize("name", ["tested", "ui"])
def test_the_tested_versions_fit_the_requirements_and_are_plain_pins(name):
    lines = [line for line in (ROOT / "constraints" / f"{name}.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines), "name==version, no local build, no path"
    assert lines == sorted(lines, key=lambda line: line.split("==")[0])
    pins = {one: Version(version) for one, _, version in (line.partition("==") for line in lines)}
    assert NAME not in pins and "vtr" not in pins
    wanted = requirements("options", "install_requires")
    wanted += [r for extra in ("eval" if name == "tested" else name, "dev") for r in requirements("options.extras_require", extra)]
    assert len(wanted) > 20
    for needed in wanted:
        assert needed.specifier.contains(pins[canonicalize_name(needed.name)]), needed


def test_the_oldest_set_has_the_lower_bound_of_every_requirement():
    told = subprocess.run(["make", "-n", "test-oldest"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for needed in requirements("options", "install_requires"):
        (bound,) = needed.specifier
        assert bound.operator == ">=", f"{needed}: lower bounds only"
        assert f'"{needed.name}=={bound.version}.*"' in told


def test_the_citation_is_of_this_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0" and found["type"] == "software"
    assert found["message"] and found["title"] and all(set(author) == {"name"} for author in found["authors"]), "what the format wants"
    assert (found["version"], found["license"]) == (vtr.__version__, config()["metadata"]["license_expression"])


@pytest.mark.parametrize("form", ["bug", "method", "model"])
def test_a_form_for_issues_is_complete(form):
    found = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text(encoding="utf-8"))
    assert found["name"] and found["description"] and all(isinstance(label, str) for label in found["labels"])
    fields = found["body"]
    assert {field["type"] for field in fields} <= {"input", "textarea", "checkboxes"} and all(
        field["attributes"]["label"] for field in fields
    )
    assert len({field["id"] for field in fields}) == len(fields) and any(field.get("validations") == {"required": True} for field in fields)
    assert all(option["label"] for field in fields if field["type"] == "checkboxes" for option in field["attributes"]["options"])
