"""`python -m vtr` is the command `vtr`."""

from vtr.cli import main

if __name__ == "__main__":
    main()
