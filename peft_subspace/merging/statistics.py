"""Files of statistics that some methods need beside each model. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from ..task_vectors.errors import RecipeError
from ..task_vectors.headers import TensorHeader, read_header
from .methods.registry import Method
from .recipe import Recipe


def open_statistics(recipe: Recipe, method: Method) -> list[Mapping[str, TensorHeader]]:
    """The tensors of each model's file of statistics, for the methods that need one."""
    if not method.statistics:
        return []
    paths = [entry.parameters.get("statistics") for entry in recipe.merged_models]
    for entry, path in zip(recipe.merged_models, paths, strict=True):
        if not isinstance(path, str) or not path:
            raise RecipeError(
                f"merge_method {method.name!r} needs {method.statistics}: write `parameters: {{statistics: FILE.safetensors}}` "
                f"under the model {str(entry.model)!r}."
            )
    return [read_header(str(path)).tensors for path in paths]
