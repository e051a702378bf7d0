"""Checkpoints: recipes and loading. Nothing here imports transformers until a model is loaded."""

from vtr.models.recipes import Recipe, find_recipe, list_recipes

__all__ = ["Recipe", "find_recipe", "list_recipes"]
