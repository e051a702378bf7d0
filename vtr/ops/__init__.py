"""Pure tensor functions: no classes, no model, no host. Each file states shapes, ties and complexity."""
