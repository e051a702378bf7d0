"""Shortens the prompt of an LLM and follows its KV cache."""
