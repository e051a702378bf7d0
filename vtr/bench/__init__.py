"""Timing: what choosing tokens costs, on the real architectures with random weights."""
