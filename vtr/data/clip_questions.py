"""The five question families of `shapes-video`: what changes, what does not, and what is there for one frame only.

As for pictures, each family has one answer space, so that the question alone says nothing about the answer.
"""

from __future__ import annotations

from .clips import Clip
from .questions import Question, attributes_of


def order(clip: Clip) -> list[Question]:
    """Asks which of two items that come and go comes first, from both sides. Both are there equally long."""
    begins = {track.name: track.shown.index(True) for track in clip.of("passing")}
    return [
        Question("order", f"does the {a} appear before or after the {b}?", "before" if begins[a] < begins[b] else "after")
        for a in begins
        for b in begins
        if begins[a] != begins[b]
    ]


def motion(clip: Clip) -> list[Question]:
    """Asks in which of four directions an item moves."""
    return [Question("motion", f"which way does the {track.name} move?", track.direction or "") for track in clip.of("moving")]


def events(clip: Clip) -> list[Question]:
    """Asks how many times an item blinks: comes and goes again at once."""
    return [Question("events", f"how many times does the {track.name} blink?", str(sum(track.shown))) for track in clip.of("blinking")]


def needle(clip: Clip) -> list[Question]:
    """Asks what the sign says that one frame shows; answers are in lower case."""
    return [Question("needle", "what does the sign say?", clip.sign.text.lower())]


def attribute(clip: Clip) -> list[Question]:
    """Asks for the color (or shape) of an item that is in all frames, named by its size and its shape (or color)."""
    items = tuple(track.item for track in clip.tracks)
    return [question for track in clip.of("staying") for question in attributes_of(track.item, items)]


ASKERS = {"order": order, "motion": motion, "events": events, "needle": needle, "attribute": attribute}
