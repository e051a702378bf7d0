"""What commands share: options, consoles, progress, parsing of `key=value`, and errors as one line with an exit code.

`EXIT_CODES` is the rule for all of them.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vtr.types import Method, VtrError
from vtr.types.errors import Refusal, WrongValue, out_of_memory
from vtr.types.settings import setting_value

if TYPE_CHECKING:
    from vtr.planning import Visuals

P = ParamSpec("P")
T = TypeVar("T")

EXIT_CODES = (
    "Exit codes: 0 done; 1 it failed while running (network, disk, memory, a model that cannot do it); "
    "2 what was given is wrong (options, names, images, checkpoints); 130 stopped by Ctrl-C."
)

out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)  # a pipe has no width of its own
err = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Option("--model", "-m", help="Folder, Hugging Face id, or a name of `vtr models`.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto (spread over devices). Default: CUDA if there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, float64. auto: float32 on the CPU, else the checkpoint's own.")]
Attention = Annotated[str, typer.Option(help="Attention backend: sdpa, eager or flash_attention_2.")]
MinPixels = Annotated[int | None, typer.Option(help="Fewest pixels of an image, where the processor has such a limit.")]
MaxPixels = Annotated[
    int | None, typer.Option(help="Most pixels of an image, and so of its visual tokens, where the processor has such a limit.")
]
VisualsOption = Annotated[
    str | None,
    typer.Option(
        "--visuals",
        metavar="[each|prompt]",
        help="How a model that takes images only is shown a video: every frame as an image (each), or all of them as one video with one budget "
        "(prompt, the default).",
        show_default=False,
    ),
]
FrameScoresOption = Annotated[
    str | None,
    typer.Option(
        "--frame-scores",
        metavar="MODEL",
        help="Second model, which says how much every frame of a video has to do with the question, for methods that read that (quota).",
        show_default=False,
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads on the CPU.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results.")]


def given_visuals(visuals: str | None) -> Visuals | None:
    """Returns the value of `--visuals`.

    Raises:
        WrongValue: there is no such value.
    """
    from vtr.planning import check_visuals

    return None if visuals is None else check_visuals(visuals, "--")


def reported(command: Callable[P, T]) -> Callable[P, T]:
    """Decorates a command: what a user can cause becomes one line on stderr and an exit code, never a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except Refusal as error:
            fail(error, 2)
        except (VtrError, OSError) as error:
            fail(error, 1)
        except Exception as error:
            if not out_of_memory(error):
                raise
            fail(error, 1)

    return run


def fail(error: BaseException, code: int) -> NoReturn:
    """Prints the error and leaves; with `vtr --debug` the traceback as well."""
    logging.getLogger("vtr").debug("traceback", exc_info=error)
    err.print(f"[bold red]error:[/] {_escape(str(error) or type(error).__name__)}", soft_wrap=True)
    raise typer.Exit(code)


def is_given(context: typer.Context, name: str) -> bool:
    """Tells whether an option was written on the command line, and not only in the defaults."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def refuse_unused(context: typer.Context, mode: str, used: Collection[str], instead: str = "") -> None:
    """Refuses options on the command line that a command would ignore.

    Args:
        context: of the command.
        mode: options that say what is done, as they are written.
        used: parameters that are read then.
        instead: what to do, after "leave it out".

    Raises:
        ValueError: some are ignored; the message names all of them.
    """
    ignored = [p.opts[0] for p in context.command.params if p.name and p.name not in used and is_given(context, p.name)]
    if ignored:
        out_of_it = "them" if len(ignored) > 1 else "it"
        raise WrongValue(f"{context.info_name}: {mode} does not use {', '.join(ignored)}; leave {out_of_it} out{instead}")


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Parses settings: `["layer=2", "newlines=all"]` -> `{"layer": 2, "newlines": "all"}`; values are JSON where they can be, else text.

    Raises:
        ValueError: no `=`, an empty name, or a name twice.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        name = name.strip()
        if not mark or not name:
            raise WrongValue(f"--set: must look like key=value, got {pair!r}")
        if name in settings:
            raise WrongValue(f"--set: {name!r} is given twice")
        settings[name] = setting_value(value.strip())
    return settings


def method_settings(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """Parses settings of several methods: `["fastv.layer=3"]` -> `{"fastv": {"layer": 3}}`.

    Raises:
        ValueError: a name without a method in front.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in parse_settings(pairs).items():
        method, dot, setting = name.partition(".")
        if not dot or not setting or not method:
            raise WrongValue(f"--set: must look like method.key=value here, got {name}={value}")
        found.setdefault(method, {})[setting] = value
    return found


def read_plan(path: Path) -> list[Method]:
    """Returns the methods of a plan, see `vtr.saved.read_plan`.

    Raises:
        ValueError, TypeError: no such file, or not a plan.
    """
    from vtr import saved

    return saved.read_plan(path, "--plan")[1]


def parse_list(text: str, kind: Callable[[str], T], option: str) -> list[T]:
    """Parses a list: `"192,64"` -> `[192, 64]`, without repetitions.

    Raises:
        ValueError: empty, or an entry that is not of that kind.
    """
    found: list[T] = []
    for part in text.split(","):
        try:
            found.append(kind(part.strip()))
        except ValueError:
            raise WrongValue(f"{option}: must be a list of {kind.__name__} separated by commas, got {text!r}") from None
    return list(dict.fromkeys(found))


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """Bars on stderr; none when quiet or when stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as bars:
        yield bars


@contextmanager
def spinner(what: str, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yields a line that says what is being done and for how long, as a function that changes its text."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as line:
        task = line.add_task(what, total=None)
        yield lambda text: line.update(task, description=text)


def load(model: str, device: str | None, dtype: str, attention: str, quiet: bool, pixels: Any = None) -> tuple[Any, Any]:
    """Calls `vtr.models.loading.load_model` with a spinner; the bars of transformers only for what may be downloaded."""
    from vtr.models.loading import find_checkpoint, load_model

    checkpoint = find_checkpoint(model)
    with spinner(f"loading {checkpoint.name}", quiet):
        return load_model(checkpoint, device, dtype, attention, progress=not quiet and not checkpoint.folder, pixels=pixels)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
