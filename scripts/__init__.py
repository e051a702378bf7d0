"""Upkeep of this repository, no part of the wheel: entry points, and the packages `tiny`, `replay` and `pages` that they run."""
