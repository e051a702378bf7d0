"""Tables, plots and checks from result files: `vtr report`."""

from vtr.eval.report.build import build, read_folders
from vtr.eval.report.output import FORMATS, find_format, render, write_figures
from vtr.eval.report.speed import read_speed

__all__ = ["FORMATS", "build", "find_format", "read_folders", "read_speed", "render", "write_figures"]
