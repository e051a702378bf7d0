"""What is kept of result files, and for how long."""

from tests.eval.report.made import content
from vtr.eval import summary
from vtr.eval.report.build import read_folders
from vtr.eval.run.results import write_cell
from vtr.eval.summary import condense, make_rows


def held():
    """Entries in the containers of the module."""
    return {name: len(value) for name, value in vars(summary).items() if isinstance(value, (dict, list, set)) and name[:2] != "__"}


def test_equal_sample_ids_are_kept_once_and_not_by_the_process(tmp_path):
    before = held()
    for keep in (64, 32):
        made = content("random", keep=keep, count=7)
        write_cell(tmp_path, **{part: made[part] for part in ("fingerprint", "conditions", "summary", "samples")})
    cells, problems = read_folders([tmp_path])
    assert problems == [] and len(cells) == 2
    first, second = (cell.families["text"].ids for cell in cells)
    assert first is second and len(first) == 7
    for count in range(1, 5):
        make_rows([content("random", count=count)])
        condense(content("random", count=count))
    assert held() == before
