"""Checkpoint folders like the embedded ones, with random weights: what commands and evaluation are tested on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

_PLACES: list[TemporaryDirectory] = []  # removed when the tests end


@cache
def random_checkpoint(next_: bool = False) -> Path:
    """A folder that plain `from_pretrained` loads: real processor, 576 visual tokens (or AnyRes), 3 layers of width 32."""
    import torch

    from scripts.tiny.export import export
    from scripts.tiny.model import Sizes, build_model
    from scripts.tiny.tokenizer import build_tokenizer

    place = TemporaryDirectory(prefix="vtr-test-")
    _PLACES.append(place)
    folder = Path(place.name) / ("random-next" if next_ else "random")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(build_tokenizer(), Sizes(width=32, tower_layers=3, llm_layers=3, heads=2, intermediate=64), next_=next_)
    export(model, folder)
    return folder
