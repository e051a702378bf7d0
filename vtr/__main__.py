"""The command `vtr`, also as `python -m vtr`."""

import os
import signal


def main() -> None:
    """Runs the command. Ctrl-C ends it without a word while it is being imported (seconds of torch), and as Python does from then on."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # nothing is there yet that could be saved or printed
    from vtr.cli import app

    signal.signal(signal.SIGINT, signal.default_int_handler)
    app()


if __name__ == "__main__":
    main()
