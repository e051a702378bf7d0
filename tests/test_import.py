"""`import vtr` is quick and pulls in no model library."""

import json
import subprocess
import sys

CODE = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import vtr
print(json.dumps([time.process_time() - start, sorted(m for m in set(sys.modules) - before if "." not in m)]))
"""


def import_vtr() -> tuple[float, list[str]]:
    """CPU seconds that `import vtr` adds to `import torch`, and the top-level modules that it adds."""
    answer = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(answer.stdout)
    return seconds, modules


def test_import_is_quick_and_imports_no_model_library() -> None:
    seconds, modules = min(import_vtr() for _ in range(3))
    assert not {"transformers", "timm", "open_clip", "torchvision", "accelerate"} & set(modules)
    assert seconds < 0.3
