"""`vtr run`: one question about your images or videos, with and without a reduction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vtr.cli._common import (
    Attention,
    Device,
    Dtype,
    FrameScoresOption,
    MaxPixels,
    MinPixels,
    Model,
    Quiet,
    VisualsOption,
    err,
    given_visuals,
    is_given,
    load,
    out,
    parse_settings,
    read_plan,
    refuse_unused,
    reported,
    spinner,
)
from vtr.data.frames import Video, read_video
from vtr.registry import create_method, method_class
from vtr.types import Method, VtrError
from vtr.types.errors import WrongValue

HOW = {"prompt": "; shown as images that are one video to the method", "each": "; shown as images, each with the whole budget"}
"""What is said of a video on a model that takes images only."""


@reported
def run(
    context: typer.Context,
    model: Model,
    question: Annotated[
        str, typer.Option("--question", help="What to ask; <image> or <video> marks where images or videos go, else they come first.")
    ],
    method: Annotated[str | None, typer.Option("--method", help="See `vtr list`.")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="Instead of --method and its settings: a plan, e.g. of vtr tune.")] = None,
    image: Annotated[list[str] | None, typer.Option("--image", "-i", help="Image file; repeat for several images in one prompt.")] = None,
    video: Annotated[
        list[str] | None, typer.Option("--video", help="Instead of --image: video file, animation or folder of frames; repeatable.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames that are read of a video, spread evenly.")] = 16,
    keep: Annotated[int | None, typer.Option(help="Visual tokens left per image, or per whole video.")] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="Instead of --keep: the share left, in (0, 1].")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Setting of the method as key=value; repeatable.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for pictures.")] = Path("out/run"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    seed: Annotated[int | None, typer.Option(help="Seed of a method with random choices.")] = None,
    visuals: VisualsOption = None,
    frame_scores: FrameScoresOption = None,
    frame_questions: Annotated[
        list[str] | None,
        typer.Option(
            "--frame-question",
            help="With --frame-scores: yes-or-no question about one frame; repeatable, the likeliest yes counts. Default: whether the frame is "
            "sufficient to answer --question.",
        ),
    ] = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: Attention = "sdpa",
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout instead of a table.")] = False,
) -> None:
    """Ask once with and once without a reduction; print answers, tokens and milliseconds, and draw what was retained."""
    chosen = _planned(context, plan) if plan is not None else make_method(_given(method), keep, keep_ratio, seed, settings or [])
    from vtr.eval.run.asking import MARK, VIDEO_MARK
    from vtr.eval.run.results import prepare_folder
    from vtr.models.pixels import PixelLimits

    if not question.replace(MARK, "").replace(VIDEO_MARK, "").strip():
        raise WrongValue(f"--question: must not be empty, got {question!r}; ask something about the image")
    _check_given(context, image, video)
    _check_scorer(chosen, frame_scores, frame_questions, bool(video) or visuals == "prompt")
    images, pixels = [_open(path) for path in image or ()], PixelLimits(min_pixels, max_pixels)
    prepare_folder(folder)
    how_shown = given_visuals(visuals)
    videos = _read(video or (), frames, quiet)
    loaded, processor = load(model, device, dtype, attention, quiet, pixels)
    from vtr.eval.run.compare import compare
    from vtr.eval.run.setup import noted, shown_as
    from vtr.hosts._protocol import host_of
    from vtr.models.pixels import check_frame_limits

    host = shown_as(host_of(loaded), bool(videos), how_shown)
    if videos:
        check_frame_limits(host, pixels)
    kind, scores = str(loaded.dtype).removeprefix("torch."), None
    if frame_scores is not None:
        scorer = load(frame_scores, device, kind, attention, quiet)
        with spinner(f"scores of frames by {frame_scores}", quiet):
            scores = _scores(scorer, videos or [images], question, frame_questions)
    joined = scores.joined(host.pictures) if scores else None
    with spinner("prompt", quiet) as step:
        found = compare(
            loaded, processor, images, question, chosen, max_new_tokens, step=step, videos=videos, visuals=how_shown, frame_scores=joined
        )
    from vtr.viz import draw_patches

    pictures = []
    shown = [*((path, []) for path in image or ()), *zip(video or (), map(_times, videos), strict=True)]
    if len(shown) != len(found.views):  # frames that are images, or images that are one video
        shown = [(name, [time]) for name, times in shown for time in times] if len(found.views) > 1 else shown[:1]
    for number, ((name, times), views, entry) in enumerate(zip(shown, found.views, found.report["images"], strict=True)):
        budget = len(entry["retained"])
        path = folder / f"{Path(name).resolve().stem}-{number}-{chosen.name}-{budget}.png"
        labels = times[:: -(-len(times) // entry["views"])] if times else ()  # a view may be a pair of frames
        draw_patches(views, entry, resized="input" in chosen.stages, labels=labels).save(path)
        pictures.append(str(path))
    if as_json:
        read = [
            {"file": name, "frames": list(one.indices), "of": one.total, "fps": one.fps}
            for name, one in zip(video or (), videos, strict=True)
        ]
        given = {"scorer": frame_scores, **scores.to_dict()} if scores else {}
        given |= {**pixels.given, **({"videos": read} if read else {}), **noted(host, bool(videos) or host.as_frames)}
        out.print_json(json.dumps({**found.to_dict(), **given, "dtype": kind, "pictures": pictures}))
    else:
        _print(found, pictures, kind)
        entries, how = iter(found.report["images"]), noted(host, bool(videos)).get("visuals")
        for name, one in zip(video or (), videos, strict=True):
            counts = [len(next(entries)["retained"]) for _ in one.frames] if how == "each" else next(entries)["per_frame"]
            left = " to ".join(map(str, sorted({min(counts), max(counts)})))
            said = f"{len(one.frames)} of {one.total} frames of {name}, {left} tokens left of each{HOW.get(how or '', '')}"
            out.print(f"video: {said}", soft_wrap=True, markup=False)
        for own in scores.videos if scores else ():
            took = f"{own.prompts} prompts of {own.visual_tokens // own.prompts} visual tokens, {scaled(own.tflops * 1e12)} FLOPs"
            said = f"{' '.join(f'{score:.2f}' for score in own.row)} by {frame_scores}; {took}, {own.seconds:.2f} s"
            out.print(f"scores of frames: {said}", soft_wrap=True, markup=False)


def _check_given(context: typer.Context, image: list[str] | None, video: list[str] | None) -> None:
    """Refuses neither or both of images and videos, and a number of frames without a video."""
    if image and video:
        raise WrongValue(f"run: give --image or --video, not both, got {len(image)} and {len(video)}; leave one out")
    if not image and not video:
        raise WrongValue("run: needs --image or --video, got neither; give a file")
    if image and is_given(context, "frames"):
        refuse_unused(context, "--image", [p.name for p in context.command.params if p.name and p.name != "frames"])


def _check_scorer(method: Method, scorer: str | None, questions: Sequence[str] | None, frames: bool) -> None:
    """Refuses a model that scores frames where nobody reads scores or there are no `frames`, one that is missing or unknown, and questions
    for none."""
    from vtr.models.loading import find_checkpoint

    if scorer is None and questions:
        raise WrongValue(
            f"--frame-question: is asked of the model that scores frames, got {questions[0]!r} and none; give --frame-scores MODEL"
        )
    if scorer is None and method.card.needs_frame_scores:
        raise WrongValue(f"{method.name}: needs to know how much every frame has to do with the question; give --frame-scores MODEL")
    if scorer is not None and not (method.card.needs_frame_scores and frames):
        why = "images are no frames of a video" if method.card.needs_frame_scores else f"{method.name} reads no scores of frames"
        raise WrongValue(f"--frame-scores: {why}; leave it out")
    if scorer is not None:
        try:
            find_checkpoint(scorer)
        except WrongValue as error:
            raise WrongValue(f"--frame-scores: {str(error).removeprefix('model: ')}") from None


def _planned(context: typer.Context, plan: Path) -> Method:
    """Returns the one method of a plan, and refuses whatever would say it twice."""
    for name in ("method", "keep", "keep_ratio", "seed", "settings"):
        if is_given(context, name):
            option = {"settings": "set"}.get(name, name.replace("_", "-"))
            raise WrongValue(f"--plan: has the method and all its settings, got --{option} beside it; leave one of them out")
    methods = read_plan(plan)
    if len(methods) > 1:
        raise WrongValue(f"--plan: run compares one method with the full model, {plan} has {len(methods)}; evaluate it with vtr eval")
    return methods[0]


def _given(method: str | None) -> str:
    if method is None:
        raise WrongValue("run: needs --method or --plan, got neither; see vtr list")
    return method


def _read(paths: Sequence[str], frames: int, quiet: bool) -> list[Video]:
    """Returns the frames of videos, and says which have fewer than asked for."""
    videos = []
    for path in paths:
        with spinner(f"frames of {path}", quiet):
            videos.append(read_video(path, frames))
        if len(videos[-1].frames) < frames:
            few = f"{path} has {videos[-1].total} frames, fewer than --frames {frames}; all are used"
            err.print(f"[yellow]note:[/] {escape(few)}", soft_wrap=True)
    return videos


def _scores(scorer: tuple[Any, Any], videos: Sequence[Any], question: str, asked: Sequence[str] | None) -> Any:
    """Returns how much every frame has to do with the question, or how likely it is a yes to one of the questions that are asked of frames."""
    from vtr.data.frames import FrameQuestion
    from vtr.eval.frame_scores import FrameScorer

    return FrameScorer(*scorer).scores(videos, FrameQuestion(tuple(asked)) if asked else question)


def _times(video: Video) -> list[str]:
    """Returns when every frame of a video is shown, or its number where nothing says that."""
    return [f"{index / video.fps:.1f} s" if video.fps else f"frame {index + 1}" for index in video.indices]


def _open(path: str) -> Any:
    """Opens an image; one that is none or damaged is wrong input to a command, as is one that does not exist."""
    from vtr.data.pictures import open_image

    try:
        return open_image(path)
    except VtrError as error:
        raise WrongValue(str(error)) from error


def make_method(name: str, keep: int | None, keep_ratio: float | None, seed: int | None, pairs: list[str]) -> Method:
    """Returns a method from the options of a command.

    Raises:
        ValueError: unknown method or setting, a setting given twice, or impossible values.
    """
    settings = parse_settings(pairs)
    options = {"keep": keep, "keep_ratio": keep_ratio, "seed": seed}
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option in settings:
            raise WrongValue(f"--set: {option!r} is given by --{option.replace('_', '-')} already")
    return create_method(method_class(name).name, **given, **settings)


def scaled(number: float) -> str:
    """Returns a number in words, `3.82 T`, `111 M`: three digits and a prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g}"


def _print(found: Any, pictures: list[str], dtype: str) -> None:
    from rich.table import Table

    columns = ("", "answer", "visual tokens", "mean per layer", "prefill ms", "choosing ms", "FLOPs", f"KV MiB ({dtype})")
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for side in (found.full, found.reduced):
        table.add_row(
            f"[bold]{side.name}[/]",
            side.answer,
            " + ".join(map(str, side.retained)),
            f"{side.average_tokens:.1f}",
            f"{side.prefill_ms:.1f}",
            "" if side is found.full else f"{side.choosing_ms:.1f}",
            scaled(side.tflops * 1e12),
            f"{side.kv_mib:.3g}",
        )
    out.print(table)
    runs = len(found.full.prefill_runs_ms)
    out.print(f"prefill: median of {runs}, vision tower and choosing included. FLOPs: LLM only, a multiply-add counts once.", style="dim")
    for path in pictures:
        out.print(f"picture: {path}", soft_wrap=True)
