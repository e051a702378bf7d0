"""The page itself, made of gradio: what is on it, and what happens when something is clicked."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from vtr.eval.examples import Example
from vtr.registry import list_methods
from vtr.types import VtrError
from vtr.types.errors import Refusal, WrongValue, out_of_memory
from vtr.ui.explain import explain, is_patch, step_labels
from vtr.ui.media import LIMITS, Limits, Media, open_media
from vtr.ui.pictures import draw_full, draw_step, token_at
from vtr.ui.reproduce import command, script
from vtr.ui.session import MOST_METHODS, Column, Comparison, Session, methods_for
from vtr.ui.words import escaped, full_numbers, numbers, report_of, told, told_back

_log = logging.getLogger(__name__)
CSS = """
.vtr-picture img { cursor: crosshair; }
.vtr-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); align-items: start; }
.vtr-cards textarea { font-weight: 600; }
.vtr-code textarea { font-family: ui-monospace, monospace; font-size: 0.8rem; }
"""
LEGEND = (
    "Kept tokens as they were, removed ones dimmed, merged ones tinted like the token that they went into. Pink: the token asked about; "
    "blue: what it went into."
)
HINT = "Click a patch of the picture, or type the number of a token."
_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}


def in_a_sentence(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a handler: what a user can cause becomes a sentence on the page, never a traceback."""

    @functools.wraps(handler)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise gr.Error(_sentence(error), duration=None, print_exception=False) from None

    return run


def _sentence(error: Exception) -> str:
    """Returns what is said of an error that a user can cause, as a picture that a processor cannot take; raises any other again."""
    if not isinstance(error, (Refusal, VtrError, OSError, ValueError)) and not out_of_memory(error):
        raise error
    _log.debug("traceback", exc_info=error)
    return str(error) or type(error).__name__


class Page:
    """The page of one session.

    Args:
        session: what is asked.
        examples: pictures that one click loads.
        methods: names that are chosen at the start; keep: their budget.
        room: a folder for frames of uploaded videos.
        limits: of uploads.
    """

    def __init__(
        self, session: Session, examples: Sequence[Example], methods: Sequence[str], keep: int, room: Path, limits: Limits = LIMITS
    ) -> None:
        self.session, self.examples, self.methods, self.keep, self.room, self.limits = session, examples, methods, keep, room, limits

    # ---- what happens
    def load(self, files: Sequence[str] | None, frames: int) -> tuple[Any, ...]:
        """Opens what was uploaded; a file that cannot be shown leaves nothing to be asked about."""
        try:
            room = Path(tempfile.mkdtemp(dir=self.room))
            media = open_media(files or (), room, int(frames), self.limits)
            return self._loaded(media)
        except Exception as error:
            return None, None, gr.skip(), escaped(_sentence(error))

    def load_example(self, chosen: gr.SelectData) -> tuple[Any, ...]:
        """Opens an example, and asks its question."""
        example = self.examples[chosen.index]
        return *self._loaded(open_media([example.file], self.room)), example.question

    def _loaded(self, media: Media) -> tuple[Any, ...]:
        count = self.session.count(media)
        shown = media.image or media.video.frames[0]  # type: ignore[union-attr]
        slider = gr.update(maximum=count, value=min(self.keep, count), label=f"keep: visual tokens left, of {count}")
        return media, shown, slider, f"{escaped(media.described)}, {count} visual tokens"

    @in_a_sentence
    def compare(self, media: Media | None, question: str, methods: Sequence[str], keep: int, most: int) -> list[Any]:
        """Asks the full model and every method."""
        if media is None:
            raise gr.Error(
                "upload: needs a picture or a video, got none; choose one, or click an example", duration=None, print_exception=False
            )
        found = self.session.compare(media, question, methods_for(methods, int(keep)), int(most))
        cards: list[Any] = [gr.update(visible=True), "### full model", found.full.answer, full_numbers(found), draw_full(found)]
        for number in range(MOST_METHODS):
            cards += self._card(found, number)
        ran = [(f"{one.method.name}", number) for number, one in enumerate(found.columns) if isinstance(one, Column)]
        first = ran[0][1] if ran else None
        return [found, *cards, gr.update(choices=ran, value=first), gr.update(visible=bool(ran)), None, *self.inspect(found, first, None)]

    def _card(self, found: Comparison, number: int) -> list[Any]:
        """Returns whether a card is seen, its heading, answer, numbers and picture."""
        if number >= len(found.columns):
            return [gr.update(visible=False), "", "", "", None]
        column = found.columns[number]
        text = numbers(found, column)
        if not isinstance(column, Column):
            return [
                gr.update(visible=True),
                f"### {column.name}",
                gr.update(value="", visible=False),
                text,
                gr.update(value=None, visible=False),
            ]
        answer, picture = gr.update(value=column.outcome.answer, visible=True), gr.update(value=draw_step(found, number), visible=True)
        return [gr.update(visible=True), f"### {column.method.name}", answer, text, picture]

    @in_a_sentence
    def inspect(self, found: Comparison | None, number: int | None, token: float | None) -> list[Any]:
        """Shows another method: its steps, its report, how to get the same again."""
        if found is None or number is None:
            return [gr.update(choices=[], value=None), "", "", "", *self.show(None, None, None, None)]
        column = found.column(number)
        labels = step_labels(column)
        steps = gr.update(choices=[(label, index) for index, label in enumerate(labels)], value=len(labels) - 1)
        again = command(self.session, found, column.method), script(self.session, found, column.method)
        return [steps, report_of(column), *again, *self.show(found, number, len(labels) - 1, token)]

    @in_a_sentence
    def show(self, found: Comparison | None, number: int | None, steps: int | None, token: float | None) -> list[Any]:
        """Shows the picture behind a step, and what became of a token: picture, explanation, the button, its result."""
        if found is None or number is None:
            return [None, HINT, gr.update(interactive=False), ""]
        column = found.column(number)
        if token is None or not is_patch(column.entry, token):
            return [draw_step(found, number, steps), HINT, gr.update(interactive=False), ""]
        asked = explain(column, int(token))
        return [draw_step(found, number, steps, asked), told(asked), gr.update(interactive=not asked.fixed), ""]

    @in_a_sentence
    def click(self, found: Comparison | None, number: int | None, steps: int | None, chosen: gr.SelectData) -> list[Any]:
        """Shows what became of the token under a click."""
        if found is None or number is None:
            return [None, *self.show(found, number, steps, None)]
        token = token_at(found, number, *map(int, chosen.index))
        return [token, *self.show(found, number, steps, token)]

    @in_a_sentence
    def give_back(self, found: Comparison | None, number: int | None, token: float | None) -> str:
        """Asks again with a token put back."""
        if found is None or number is None or token is None:
            raise WrongValue("give back: needs a token, got none; run a comparison and click a patch first")
        return told_back(self.session.put_back(found, number, [int(token)]))

    # ---- what is on it
    def build(self) -> gr.Blocks:
        """Returns the page."""
        with gr.Blocks(title=f"vtr: {self.session.name}", analytics_enabled=False, delete_cache=(86400, 86400)) as page:
            gr.Markdown(
                f"# Visual tokens of {escaped(self.session.name)}\n"
                "Ask about a picture or a video with all visual tokens and with few, and see what became of every token."
            )
            media, found = gr.State(None, time_to_live=3600), gr.State(None, time_to_live=3600)
            self._asking(media, found)
        return page

    def _asking(self, media: gr.State, found: gr.State) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                files = gr.File(label="picture, video, or all frames of one", file_count="multiple", height=140)
                said = gr.Markdown(f"Uploads: {self.limits}. Files stay on this machine. Or click an example:")
                gallery = gr.Gallery(
                    [(str(one.file), one.question) for one in self.examples],
                    show_label=False,
                    columns=3,
                    height=320,
                    object_fit="cover",
                    allow_preview=False,
                    buttons=[],
                    interactive=False,
                    visible=bool(self.examples),
                )
            with gr.Column(scale=1, min_width=200):
                preview = gr.Image(label="asked about", interactive=False, height=330, buttons=[], format="png")
            with gr.Column(scale=2, min_width=300):
                question = gr.Textbox(label="question", placeholder="what do you see?", max_lines=3)
                methods = gr.Dropdown(
                    list_methods(),
                    value=list(self.methods),
                    multiselect=True,
                    max_choices=MOST_METHODS,
                    label=f"up to {MOST_METHODS} methods",
                )
                keep = gr.Slider(1, max(576, self.keep), value=self.keep, step=1, label="keep: visual tokens left")
                with gr.Row():
                    frames = gr.Slider(1, self.limits.frames, value=min(16, self.limits.frames), step=1, label="frames of a video")
                    most = gr.Slider(1, 256, value=16, step=1, label="longest answer, in tokens")
                run = gr.Button("Compare", variant="primary")
        cards = self._cards()
        inspector = self._inspector(found)
        loaded = [media, preview, keep, said]
        gr.on([files.change, frames.release], self.load, [files, frames], loaded, api_name="load", **_ONE_AT_A_TIME)
        gallery.select(self.load_example, None, [*loaded, question], api_visibility="private", **_ONE_AT_A_TIME)
        gr.on(
            [run.click, question.submit],
            self.compare,
            [media, question, methods, keep, most],
            [found, *cards, *inspector],
            api_name="compare",
            **_ONE_AT_A_TIME,
        )

    def _cards(self) -> list[Any]:
        """Returns what a comparison fills in: of the full model, then of every method."""
        parts: list[Any] = []
        with gr.Row(elem_classes="vtr-cards"):
            for _ in range(MOST_METHODS + 1):
                with gr.Column(min_width=150, visible=False) as card:
                    heading = gr.Markdown()
                    answer = gr.Textbox(label="answer", interactive=False, max_lines=6)
                    text = gr.Markdown()
                    picture = gr.Image(interactive=False, show_label=False, buttons=["fullscreen"], format="png")
                parts += [card, heading, answer, text, picture]
        return parts

    def _inspector(self, found: gr.State) -> list[Any]:
        """Returns what a comparison fills in below the cards."""
        with gr.Row(visible=False) as row:
            with gr.Column(scale=3, min_width=500):
                method = gr.Radio([], label="look closer at")
                steps = gr.Radio([], label="behind which step")
                picture = gr.Image(
                    show_label=False,
                    interactive=False,
                    buttons=["fullscreen"],
                    format="png",
                    elem_classes="vtr-picture",
                    elem_id="vtr-picture",
                )
                gr.Markdown(LEGEND)
            with gr.Column(scale=2, min_width=300):
                token = gr.Number(None, label="token", precision=0)
                told_of = gr.Markdown(HINT, elem_id="vtr-explanation")
                back = gr.Button("Give it back", interactive=False)
                result = gr.Markdown(elem_id="vtr-result")
                with gr.Accordion("report", open=True):
                    report = gr.Markdown()
                with gr.Accordion("the same again", open=False):
                    copied: dict[str, Any] = {"interactive": False, "buttons": ["copy"], "elem_classes": "vtr-code"}
                    line = gr.Textbox(label="as a command", lines=4, max_lines=4, **copied)
                    code = gr.Textbox(label="in Python", lines=18, max_lines=18, **copied)
        seen = [picture, told_of, back, result]
        inspected = [steps, report, line, code, *seen]
        method.input(self.inspect, [found, method, token], inspected, api_name="inspect")
        gr.on([steps.input, token.submit], self.show, [found, method, steps, token], seen, api_name="explain")
        picture.select(self.click, [found, method, steps], [token, *seen], api_visibility="private")
        back.click(self.give_back, [found, method, token], result, api_name="give_back", **_ONE_AT_A_TIME)
        return [method, row, token, *inspected]
