"""`import vtr` is quick, pulls in no model library, and changes nothing of the program that imports it."""

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vtr
from vtr.registry import method_class

ROOT = Path(__file__).parents[1]

CODE = """
import json, sys, time
import torch
before, seconds = set(sys.modules), []
while len(seconds) < 6 and min(seconds, default=1) >= 0.3:
    for name in set(sys.modules) - before:
        del sys.modules[name]
    start = time.process_time()
    import vtr
    for name in vtr.__all__:
        getattr(vtr, name)
    seconds.append(time.process_time() - start)
added = set(sys.modules) - before
vtr.list_methods()
print(json.dumps([min(seconds), sorted(name for name in added if "." not in name), sorted(set(sys.modules) - before - added)]))
"""
"""Measures again while it is slow: others use this machine, too."""


def test_import_is_quick_and_imports_no_model_library() -> None:
    answer = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, added, by_methods = json.loads(answer.stdout)
    assert not {"transformers", "timm", "open_clip", "torchvision", "accelerate"} & set(added)
    assert "vtr.methods.expedit" in by_methods and "torch._dynamo" not in by_methods  # the compiler takes as long as torch itself
    assert seconds < 0.3


def test_importing_vtr_alone_imports_no_torch() -> None:
    code = "import sys, vtr; print(vtr.__version__, sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == f"{vtr.__version__} []\n"


def test_every_public_name_is_the_one_that_the_imports_for_type_checkers_say() -> None:
    block = next(node for node in ast.parse(Path(vtr.__file__).read_text()).body if isinstance(node, ast.If))
    said = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(said) == vtr.__all__
    for name, module in said.items():
        __import__(module)
        assert getattr(vtr, name) is getattr(sys.modules[module], name)
    assert set(vtr.__all__) <= set(dir(vtr))


def test_the_classes_of_all_methods_are_names_of_the_package() -> None:
    own = {name: method_class(name) for name in vtr.list_methods() if method_class(name).__module__.startswith("vtr.methods.")}
    assert set(own.values()) == {getattr(vtr, name) for name in vtr._method_classes()}
    assert {cls.__name__ for cls in own.values()} <= set(dir(vtr))
    from vtr import FastV

    assert FastV(keep=64) == vtr.create_method("fastv", keep=64)


def test_listing_the_names_imports_no_torch() -> None:
    code = "import sys, vtr; print('FastV' in dir(vtr), 'plan' in dir(vtr), 'importlib' in dir(vtr), 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "True True False False\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vtr' has no attribute 'reduce'"):
        vtr.reduce  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import vtr.plans", "from vtr.reduction import Reduction"])
def test_apply_is_the_function_whatever_was_imported_first(first) -> None:
    code = f"{first}\nimport vtr, vtr.report\nfrom vtr import apply\nprint(vtr.apply is apply, apply.__name__, type(apply).__name__)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert answer.stdout == "True apply function\n", answer.stderr


def heed() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in `folder`, where vtr can be imported, and heeds Ctrl-C, which jobs in the background of a shell are started without."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment, preexec_fn=heed)


TRAIN = """
import os, signal, sys, threading, time
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("saving the checkpoint")
finally:
    print("cleaning up")
"""


@pytest.mark.parametrize(
    "how", [("-m", "package.train"), *(pytest.param(one, marks=pytest.mark.slow) for one in (("package/train.py",), ("scripts/vtr.py",)))]
)
def test_ctrl_c_stays_with_the_program_that_imports_vtr(tmp_path, how) -> None:
    """In a package whose `__init__` imports vtr, under `python -m` too, and in a script that is called vtr.py."""
    package, scripts = tmp_path / "package", tmp_path / "scripts"
    package.mkdir()
    scripts.mkdir()
    (package / "__init__.py").write_text("import vtr\nvtr.reduced\n")
    (package / "train.py").write_text("import vtr\n" + TRAIN)
    (scripts / "vtr.py").write_text("import sys\ndel sys.path[0]\nimport vtr\n" + TRAIN)  # else it would import itself
    answer = run_in(tmp_path, *how)
    assert (answer.returncode, answer.stdout) == (0, "saving the checkpoint\ncleaning up\n"), answer.stderr


@pytest.mark.slow
def test_vtr_can_be_imported_in_a_thread(tmp_path) -> None:
    """As the first import of it, in a process that `python -m` started."""
    (tmp_path / "package").mkdir()
    thread = "import threading\nthread = threading.Thread(target=lambda: __import__('vtr').reduced)\nthread.start()\nthread.join()\n"
    (tmp_path / "package" / "__init__.py").write_text(thread)
    (tmp_path / "package" / "train.py").write_text("import sys\nprint('vtr.reduction' in sys.modules)")
    answer = run_in(tmp_path, "-m", "package.train")
    assert answer.stdout == "True\n" and "Error" not in answer.stderr
