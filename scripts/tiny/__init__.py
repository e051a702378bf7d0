"""Trains the embedded checkpoints `tiny-llava`, `tiny-llava-next` and `tiny-vit-seg`."""
