"""Files of statistics that some methods need beside each model. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..task_vectors.errors import InputError, RecipeError
from ..task_vectors.headers import TensorHeader, read_header
from ..task_vectors.models import Source
from ..task_vectors.sources import shortened
from ..task_vectors.validate import match_names, tied_head
from .methods.registry import Method
from .recipe import Recipe

Tensors = Mapping[str, TensorHeader]


def open_statistics(recipe: Recipe, method: Method, sources: Sequence[Source], known: Tensors) -> list[Tensors]:
    """The statistics of each model by the names of the tensors that are merged, for the methods that need them.

    They are matched as the models are: by name, with known prefixes taken off or put on. Those of a head that is tied to its
    embedding, or that the model has and the base lacks, may be there.

    Args:
        recipe: names the files.
        method: of the merge.
        sources: the models.
        known: the tensors that are merged.

    Raises:
        RecipeError: a model without a file.
        InputError: a statistic of no tensor, of another shape, or one that a model lacks and another has; names them.
    """
    if not method.statistics:
        return []
    found = []
    for entry, source in zip(recipe.merged_models, sources, strict=True):
        path = entry.parameters.get("statistics")
        if not isinstance(path, str) or not path:
            raise RecipeError(
                f"merge_method {method.name!r} needs {method.statistics}: write `parameters: {{statistics: FILE.safetensors}}` "
                f"under the model {str(entry.model)!r}."
            )
        found.append(_named(path, method, source, known))
    some = sorted(key for key in known if 0 < sum(key in tensors for tensors in found) < len(found))
    if some:
        lacking = next(str(s.reference) for s, tensors in zip(sources, found, strict=True) if some[0] not in tensors)
        raise InputError(f"{shortened(some)}: {lacking} has no statistics of it, and another model has. Give all or none.")
    return found


def _named(path: str, method: Method, source: Source, known: Tensors) -> Tensors:
    """One file's statistics, by the names of the tensors that are merged."""
    tensors = read_header(path).tensors
    names = match_names(list(tensors), known, path)
    own = {} if source.full is None else source.full.tensors
    others = sorted(name for name in tensors if name not in names and name not in own and not tied_head(name, known))
    if others:
        raise InputError(
            f"{path}: {shortened(others)}: neither {source.reference} nor its base has such tensors. Statistics are called as "
            f"the tensors that they are of: {shortened(sorted(known))}."
        )
    wrong = []
    for name, ours in names.items():
        shape, expected = tensors[name].shape, method.statistics_shape(known[ours].shape)
        if shape != expected and not (expected == known[ours].shape and _has_more_rows(shape, expected)):
            wrong.append(f"{name!r} is {list(shape)}, {'none' if expected is None else list(expected)} expected")
    if wrong:
        raise InputError(f"{path}: {shortened(wrong)}: {method.name} takes {method.statistics}.")
    return {names.get(name, name): header for name, header in tensors.items()}


def _has_more_rows(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Those of a vocabulary that the merge truncates."""
    return len(shape) == len(expected) and shape[1:] == expected[1:] and shape[:1] > expected[:1]
