"""Merging of models and adapters by recipe: `merge(recipe, out)`. See docs/merging.md. Importing it imports no torch."""

from .manifest import verify
from .plan import Plan
from .planner import make_plan
from .recipe import Recipe, load_recipe
from .run import merge

__all__ = ["Plan", "Recipe", "load_recipe", "make_plan", "merge", "verify"]
