"""The task `shapes`: questions about drawn scenes, which the embedded checkpoints were trained for."""

from __future__ import annotations

from vtr.data import shapes
from vtr.eval.tasks.registry import register_task
from vtr.eval.tasks.task import Task


@register_task("shapes")
def build_shapes() -> Task:
    """Returns the task on the test split of `shapes`."""
    return Task(
        name="shapes",
        version=shapes.VERSION,
        sha256=shapes.TEST_SHA256,
        families=tuple(shapes.FAMILIES),
        samples=lambda limit: shapes.test_samples(limit=limit),
        is_correct=shapes.is_correct,
        max_new_tokens=16,
    )
