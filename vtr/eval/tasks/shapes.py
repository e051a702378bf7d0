"""The tasks `shapes` and `shapes-video`: questions about drawn scenes and clips, which the embedded checkpoints were trained for."""

from __future__ import annotations

from vtr.data import shapes, shapes_video
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


@register_task("shapes-video")
def build_shapes_video() -> Task:
    """Returns the task on the test split of `shapes-video` with 8 frames."""
    return _shapes_video("shapes-video", 8)


@register_task("shapes-video@16")
def build_long_shapes_video() -> Task:
    """Returns the task on the test split of `shapes-video` with 16 frames, which has clips of its own."""
    return _shapes_video("shapes-video@16", 16)


def _shapes_video(name: str, frames: int) -> Task:
    return Task(
        name=name,
        version=shapes_video.VERSION,
        sha256=shapes_video.TEST_SHA256[frames],
        families=shapes_video.FAMILIES,
        samples=lambda limit: shapes_video.test_samples(limit=limit, frames=frames),
        is_correct=shapes.is_correct,
        max_new_tokens=16,
        frames=frames,
    )
