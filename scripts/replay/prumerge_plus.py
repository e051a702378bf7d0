"""PruMerge+ vectors: the schema of PruMerge."""

from scripts.replay.prumerge import replay

__all__ = ["replay"]
