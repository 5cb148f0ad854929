"""Files of statistics that some methods need beside each model. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..task_vectors.errors import InputError, RecipeError
from ..task_vectors.headers import TensorHeader, read_header
from ..task_vectors.sources import shortened
from .methods.registry import Method
from .recipe import Recipe

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, TensorHeader]


def open_statistics(recipe: Recipe, method: Method) -> list[Tensors]:
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


def check_statistics(method: Method, names: Sequence[str], opened: Sequence[Tensors], shapes: Shapes) -> None:
    """Whether statistics belong to the tensors that are merged: by name and shape, and of all models or of none.

    Args:
        method: that needs them.
        names: of the models.
        opened: what `open_statistics` found.
        shapes: of the tensors that are merged, by name.

    Raises:
        InputError: a statistic of no tensor, of another shape, or one that a model lacks and another has; names them.
    """
    for name, tensors in zip(names, opened, strict=True):
        unknown = sorted(set(tensors) - set(shapes))
        if unknown:
            raise InputError(
                f"the statistics of {name}: {shortened(unknown)}: there are no such tensors to merge. They are named as in the "
                f"models: {shortened(sorted(shapes))}."
            )
        wrong = [
            f"{key!r} is {list(header.shape)}, {'none' if expected is None else list(expected)} expected"
            for key, header in sorted(tensors.items())
            if header.shape != (expected := method.statistics_shape(shapes[key]))
        ]
        if wrong:
            raise InputError(f"the statistics of {name}: {shortened(wrong)}: {method.name} takes {method.statistics}.")
    some = sorted(key for key in shapes if 0 < sum(key in tensors for tensors in opened) < len(opened))
    if some:
        lacking = [name for name, tensors in zip(names, opened, strict=True) if some[0] not in tensors]
        raise InputError(f"{shortened(some)}: {lacking[0]} has no statistics of it, and another model has. Give all or none.")
