"""`vtr ui`: a page on which a model is asked with all and with few visual tokens, and every token can be followed."""

from __future__ import annotations

from typing import Annotated

import typer

from vtr.cli._common import Device, Dtype, Quiet, err, load, out, parse_list, reported
from vtr.registry import method_class
from vtr.types.errors import WrongValue


@reported
def ui(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder, Hugging Face id, or a name of `vtr models`.")] = "tiny-llava",
    methods: Annotated[str, typer.Option(help="Up to three names separated by commas, chosen at the start.")] = "random,divprune,fastv",
    keep: Annotated[int, typer.Option(min=1, help="Visual tokens left, at the start.")] = 64,
    device: Device = None,
    dtype: Dtype = "auto",
    host: Annotated[
        str, typer.Option("--host", "--listen", help="Address to listen at; 0.0.0.0 lets other machines use the page.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 7860,
    quiet: Quiet = False,
) -> None:
    """Serve a page: full model and methods side by side, what became of every token, and tokens given back."""
    from vtr.ui.serve import LOOPBACK, check_gradio, check_port, serve
    from vtr.ui.session import MOST_METHODS, Session

    names = [method_class(name).name for name in parse_list(methods, str, "--methods")]
    if len(names) > MOST_METHODS:
        raise WrongValue(f"--methods: takes up to {MOST_METHODS}, got {len(names)}; leave some out")
    port = check_port(host, port)
    check_gradio()
    loaded, processor = load(model, device, dtype, "sdpa", quiet)
    if host not in LOOPBACK:
        err.print("[yellow]note:[/] whoever reaches this machine can use the page; it asks for no password", soft_wrap=True)
    serve(
        Session(loaded, processor, model, device, dtype),
        names,
        keep,
        host,
        port,
        lambda address: out.print(f"page: {address} (Ctrl-C ends it)"),
    )
