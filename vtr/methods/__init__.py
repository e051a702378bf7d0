"""One file per method, named like its registry name."""
