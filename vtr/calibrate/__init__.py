"""What a method learns from a few samples of a model, once."""
