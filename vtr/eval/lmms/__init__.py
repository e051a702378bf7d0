"""vtr as a model of lmms-eval, and our tasks as tasks of lmms-eval. Nothing else of vtr imports this package or lmms_eval."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Returns what the entry point in the group `lmms_eval.models` gives to lmms-eval: the model `vtr`, with and without `--force_simple`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vtr", simple_class_path="vtr.eval.lmms.model.SimpleVtr", chat_class_path="vtr.eval.lmms.model.Vtr")
