"""PruMerge+ vectors: the schema of PruMerge."""

from vtr.replay.prumerge import replay

__all__ = ["replay"]
