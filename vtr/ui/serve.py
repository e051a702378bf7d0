"""Starts the page: on this machine only unless told otherwise, without telemetry, and without fetching anything."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vtr.types.errors import MissingPackage, WrongValue
from vtr.ui.media import LIMITS, Limits
from vtr.ui.session import Session

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
_FONT, _MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")


def check_gradio() -> None:
    """Refuses to go on without gradio.

    Raises:
        VtrError: it is not installed.
    """
    if find_spec("gradio") is None:  # to import it takes seconds
        raise MissingPackage.of("ui: the page", "gradio", "ui")


def check_port(host: str, port: int) -> int:
    """Returns the port if it is free; a free one for 0.

    Raises:
        ValueError: it is in use, or there is no such address here.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as asked:
            asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            asked.bind((host, port))
            return asked.getsockname()[1]
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise WrongValue(f"ui: cannot listen at {host}, port {port} ({reason}); give another --port, or 0 for any that is free") from None


@contextmanager
def served(
    session: Session, methods: Sequence[str], keep: int, host: str = LOOPBACK[0], port: int = 0, limits: Limits = LIMITS
) -> Iterator[str]:
    """Serves the page inside the block; yields its address. Uploaded files are gone behind it."""
    os.environ.update(_QUIET)  # read when gradio is imported
    with tempfile.TemporaryDirectory(prefix="vtr-ui-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        check_gradio()
        import gradio as gr

        from vtr.eval.examples import load_examples
        from vtr.ui.page import CSS, Page

        port, examples = check_port(host, port), load_examples()
        page = Page(session, examples, methods, keep, Path(folder), limits).build()
        options: dict[str, Any] = {"share": False, "inbrowser": False, "mcp_server": False, "ssr_mode": False, "run_history": False}
        with _without_proxy():
            page.queue(max_size=32, default_concurrency_limit=1).launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                enable_monitoring=False,
                max_file_size=f"{limits.mib}mb",
                allowed_paths=sorted({str(example.file.parent) for example in examples}),
                state_session_capacity=32,
                footer_links=[],
                theme=gr.themes.Default(font=_FONT, font_mono=_MONO),
                css=CSS,
                **options,
            )
        try:
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
        finally:
            page.close(verbose=False)


@contextmanager
def _without_proxy() -> Iterator[None]:
    """Lets gradio, which asks its own page once whether it is there, reach it without a proxy."""
    before = {name: os.environ.get(name) for name in ("NO_PROXY", "no_proxy")}
    os.environ.update(dict.fromkeys(before, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def serve(session: Session, methods: Sequence[str], keep: int, host: str, port: int, started: Callable[[str], None]) -> None:
    """Serves the page until Ctrl-C; `started` is called with its address."""
    with served(session, methods, keep, host, port) as address:
        started(address)
        while True:
            time.sleep(3600)
