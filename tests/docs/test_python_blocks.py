"""Every block of Python on a page runs, on the embedded checkpoints."""

import re
from pathlib import Path

import pytest

from tests.docs import surroundings
from tests.docs.pages import ROOT, Block, blocks

BLOCKS = blocks("python")
ELSEWHERE = {
    "CONTRIBUTING.md": "tests/examples/test_contributing_example.py",
    "docs/testing.md": "tests/examples/test_testing_page.py",
}
"""Pages whose blocks another test runs, with more to say of what they do."""
SLOW = {
    "docs/quickstart.md": "two models and three answers",
    "docs/add-model.md": "every oracle on the family of the page",
    "docs/ui.md": "a comparison of two methods and one answer more",
    "docs/ecosystem.md": "other libraries are imported, compile and train",
}
"""Pages whose blocks take longer than the fast set allows."""
FAST = "load_plan"
"""A word in blocks of such pages that are cheap."""
KINDS = {
    "vcast": "of_videos",
    "frames": "of_videos",
    "vit": "of_vits",
    "load_dense": "of_vits",
    "backward": "of_training",
    "LoraConfig": "of_training",
    "Trainer": "of_training",
    "Accelerator": "of_training",
    "compile": "of_small",
}
"""A word in a block, and what stands around it where it is not a model of images."""


def marked(block: Block) -> object:
    marks = [pytest.mark.slow] if block.page in SLOW and FAST not in block.code else []
    if "peft" in block.code:  # it reads names that transformers has deprecated
        marks.append(pytest.mark.filterwarnings("ignore::FutureWarning"))
    return pytest.param(block, id=str(block), marks=marks)


@pytest.mark.parametrize("block", [marked(block) for block in BLOCKS if block.page not in ELSEWHERE])
def test_a_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT if "models/" in block.code else tmp_path)
    run(block, tmp_path)


def run(block: Block, folder: Path) -> dict[str, object]:
    """Runs a block and returns the names that it knows in the end."""
    if surroundings.CLIP in block.code:
        given, code = surroundings.of_clip(folder), block.code.replace(surroundings.CLIP, str(folder))
    else:
        kind = next((kind for word, kind in KINDS.items() if re.search(rf"\b{word}\b", block.code)), "of_images")
        given, code = getattr(surroundings, kind)(), block.code
    code = re.sub(r"^(\s+)\.\.\.$", r"\1model.generate(**inputs, max_new_tokens=1)", code, flags=re.MULTILINE)
    exec(compile(code, str(block), "exec"), given)
    return given


@pytest.mark.parametrize("page", ELSEWHERE)
def test_what_runs_elsewhere_is_read_there(page: str) -> None:
    assert Path(page).name in (ROOT / ELSEWHERE[page]).read_text(encoding="utf-8")
    assert page in [block.page for block in BLOCKS]


def test_all_blocks_are_python_with_names_that_vtr_has() -> None:
    """The cheap half of what runs with `--slow`."""
    for block in BLOCKS:
        compile(block.code, str(block), "exec")
        used = re.sub(r"^(from|import) .*", "", block.code, flags=re.MULTILINE)
        for name in re.findall(r"\bvtr\.(\w+)", used):
            assert hasattr(surroundings.vtr, name), f"{block}: vtr.{name}"


def test_a_block_that_is_wrong_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown method 'fastw'"):
        run(Block("a.md", 1, "python", 'with vtr.reduced(model, "fastw", keep=64):\n    ...\n'), tmp_path)
