"""Timing: methods against the full model and the floors, on real architectures with random weights or on checkpoints."""
