"""One model that is asked about pictures: in full and with some methods side by side, and with tokens that are put back.

All of it works without gradio. One session asks one thing at a time, in whichever threads it is called.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vtr.eval.run.asking import generate, prefill_ms
from vtr.eval.run.compare import Outcome, Prompt, ask, prompted
from vtr.eval.run.setup import visuals_as
from vtr.planning import plan
from vtr.plans import Change
from vtr.reduction import reduced
from vtr.registry import create_method, method_class
from vtr.types import Kind, Method, VtrError
from vtr.types.errors import Refusal, WrongValue
from vtr.ui.media import Media
from vtr.ui.steps import PuttingBack, Taken, Watching, check_put_back

MOST_METHODS = 3


@dataclass(frozen=True)
class Column:
    """What one method did.

    Args:
        method: with its settings as they acted, `position_ids` and `frames` among them.
        outcome: answer, tokens and milliseconds.
        entry: of the image or video in the report.
        taken: what every step of its plan did, in model order.
        notes: what it warned of.
    """

    method: Method
    outcome: Outcome
    entry: dict[str, Any]
    taken: list[Taken]
    notes: list[str]

    @property
    def resized(self) -> bool:
        """Returns whether the picture was made smaller in front of the tower."""
        return any(step.action == "input" for step in self.taken)


@dataclass(frozen=True)
class Refused:
    """A method that could not be run on this prompt, and the sentence that says why."""

    name: str
    why: str


@dataclass(frozen=True)
class Comparison:
    """The full model and some methods on one prompt.

    Args:
        media: what was shown; question, max_new_tokens: as asked.
        visual_tokens: before any reduction.
        full: of the full model.
        columns: of the methods, in order.
        views: pixels that the tower saw, `(V, H, W, 3)` uint8.
        prompt: as the model got it.
    """

    media: Media
    question: str
    max_new_tokens: int
    visual_tokens: int
    full: Outcome
    columns: list[Column | Refused]
    views: np.ndarray = field(repr=False)
    prompt: Prompt = field(repr=False)

    def column(self, number: int) -> Column:
        """Returns a method that ran.

        Raises:
            ValueError: there is none of that number.
        """
        column = self.columns[number] if 0 <= number < len(self.columns) else None
        if not isinstance(column, Column):
            raise WrongValue(f"compare: method {number + 1} of this comparison did not run; choose one with an answer")
        return column


@dataclass(frozen=True)
class PutBack:
    """What the model answered with tokens put back: `before` and `after`, and the entry of the report."""

    tokens: list[int]
    before: str
    after: str
    entry: dict[str, Any]

    @property
    def changed(self) -> bool:
        """Returns whether the answer is another one."""
        return self.before != self.after


class Session:
    """A loaded model with its processor.

    Args:
        model, processor: from `load_model`.
        name: how a command names the model.
        device, dtype: as the model was loaded with them, None and `auto` where nothing was said.
    """

    def __init__(self, model: Any, processor: Any, name: str, device: str | None = None, dtype: str = "auto") -> None:
        self.model, self.processor, self.name, self.device, self.dtype = model, processor, name, device, dtype
        self._lock = threading.Lock()

    def count(self, media: Media) -> int:
        """Returns the visual tokens of a picture or video, without running the model.

        Raises:
            VtrError: the model shows every frame as a picture of its own.
        """
        return self.prompt(media, "?").tokens[0]

    def compare(self, media: Media, question: str, methods: Sequence[Method], max_new_tokens: int = 16) -> Comparison:
        """Asks the full model and every method; one that cannot be run says why in its place.

        Raises:
            ValueError: no question, or more than three methods.
            VtrError: the model shows every frame as a picture of its own, or cannot be asked at all.
        """
        if not question.strip():
            raise WrongValue("question: must not be empty; ask something about the picture")
        if len(methods) > MOST_METHODS:
            raise WrongValue(f"compare: takes up to {MOST_METHODS} methods, got {len(methods)}; leave some out")
        with self._lock:
            prompt = self.prompt(media, question)
            full, _ = ask(self.model, self.processor, prompt.inputs, None, max_new_tokens)
            full.retained, full.average_tokens = prompt.tokens, float(sum(prompt.tokens))
            columns = [self._column(prompt, method, max_new_tokens) for method in methods]
        views = prompt.views(self.processor)[0]
        return Comparison(media, question, max_new_tokens, prompt.tokens[0], full, columns, views, prompt)

    def put_back(self, found: Comparison, number: int, tokens: Collection[int]) -> PutBack:
        """Asks one method of a comparison again, with some of the tokens that it removed put back behind the step that removed them.

        Everything else stays as it was chosen, see `PuttingBack`; the report is compared with that.

        Args:
            found: the comparison; number: of the method in it.
            tokens: patch ids.

        Raises:
            ValueError: a token that is not gone.
            VtrError: a token that cannot be put back, saying why.
        """
        column = found.column(number)
        check_put_back(column.taken, tokens)
        with self._lock, self.reduction(found.prompt, column.method, PuttingBack(kind_of(column.entry), column.taken, tokens)) as reduction:
            answer = generate(self.model, self.processor, found.prompt.inputs, found.max_new_tokens)[0][0]
            entry = reduction.report().to_dict()["images"][0]
        if set(entry["retained"]) != set(column.entry["retained"]) | set(tokens):
            raise VtrError(
                f"{column.method.name}: kept other tokens when these were put back, so that the answers cannot be compared; try another"
            )
        return PutBack(sorted(tokens), column.outcome.answer, answer, entry)

    def reduction(self, prompt: Prompt, method: Method, change: Change) -> Any:
        """Returns the reduction of the model by a method whose steps are changed, to be entered."""
        given = {"processor": self.processor, "visuals": visuals_as(prompt.host)}
        return reduced(self.model, plan(self.model, method, **given).map(change), **given)

    def prompt(self, media: Media, question: str) -> Prompt:
        """Returns a prompt about a picture or video as the model gets it; errors as for `count`."""
        images, videos = ([media.image], []) if media.image else ([], [media.video])
        prompt = prompted(self.model, self.processor, images, question, videos)  # type: ignore[arg-type]
        if len(prompt.tokens) > 1:
            raise VtrError(
                f"{self.name}: shows every frame of a video as a picture of its own, and this page compares one; upload one picture, or use a "
                "model with videos"
            )
        return prompt

    def _column(self, prompt: Prompt, method: Method, max_new_tokens: int) -> Column | Refused:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                outcome, report = ask(self.model, self.processor, prompt.inputs, method, max_new_tokens, visuals=visuals_as(prompt.host))
                entry = report["images"][0]
                watching = Watching(kind_of(entry))
                with self.reduction(prompt, method, watching) as reduction:
                    prefill_ms(self.model, prompt.inputs)
                    again = reduction.report().to_dict()["images"][0]
        except (Refusal, VtrError) as error:
            return Refused(method.name, str(error))
        if again["retained"] != entry["retained"]:
            raise VtrError(f"{method.name}: kept other tokens at the second time; its steps cannot be shown")
        notes = list(dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)))
        return Column(reduction.plan.methods[0], outcome, entry, watching.taken, notes)


def kind_of(entry: dict[str, Any]) -> Kind:
    """Returns whether an entry of a report is an image or a video."""
    return entry.get("kind", "image")


def methods_for(names: Sequence[str], keep: int) -> list[Method]:
    """Returns methods by name that leave `keep` tokens, those without a budget as they are.

    Raises:
        ValueError: unknown names (closest ones), or an impossible `keep`.
    """
    return [create_method(name, **({"keep": keep} if method_class(name).takes_budget else {})) for name in dict.fromkeys(names)]
