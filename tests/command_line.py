"""typer's `CliRunner`, for the many tests that call a command: by itself it reads the options of every command anew for each call."""

from functools import cache

from typer import testing

testing._get_command = cache(testing._get_command)
CliRunner = testing.CliRunner
