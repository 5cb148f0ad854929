"""`align: weight_matching` of a recipe: models with their neurons in the order of the first, before they are merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..task_vectors.errors import RecipeError
from ..task_vectors.headers import TensorHeader, read_header
from ..task_vectors.models import Source, given_by
from ..task_vectors.sources import is_float


def align_sources(
    sources: tuple[Source, ...], reference: Source, scratch: Path, seed: int, embeddings: str = "error"
) -> tuple[Source, ...]:
    """Copies of the models whose MLP neurons and attention heads are in the order of the reference's.

    The two models that are compared are held in memory whole, and every copy lies in `scratch` until the merge is done. For
    the manifest the models stay what they were.

    Args:
        sources: whole models.
        reference: the base, or the first model; it stays as it is.
        scratch: a folder for the copies.
        seed: of the matching.
        embeddings: as in the recipe.

    Raises:
        RecipeError: an adapter, or an architecture whose permutations are not known.
    """
    return tuple(s if s is reference else _aligned(s, reference, scratch, seed, embeddings) for s in sources)


def _aligned(source: Source, reference: Source, scratch: Path, seed: int, embeddings: str) -> Source:
    from ..task_vectors.writing import write_file  # imports torch, as the next does
    from .align import apply, find_permutations, match

    if len(source.checkpoints) != 1 or source.full is None or reference.full is None:
        raise RecipeError(f"{source.reference}: subspace.align is for whole models; an adapter belongs to the base's neurons.")
    known, config = reference.full.tensors, reference.full.config
    given, *_ = given_by(source, known, embeddings=embeddings, config=config)
    own = {name: one.values for name, one in given.items() if one.values is not None}
    try:
        permutations = find_permutations({name: header.shape for name, header in known.items()}, config)
        theirs, ours = _values(own), _values({name: known[name] for name in own})
        aligned = apply(theirs, permutations, match(ours, theirs, permutations, seed=seed).orders)
    except ValueError as error:
        raise RecipeError(f"{source.reference}: cannot be aligned: {error}.") from error
    path = scratch / f"{len(list(scratch.iterdir()))}.safetensors"
    entries = {name: (own[name].dtype, tuple(tensor.shape)) for name, tensor in aligned.items()}
    write_file(path, entries, {"format": "pt"}, aligned.values())
    tensors = {**{name: header for name, header in own.items() if name not in aligned}, **read_header(path).tensors}
    return replace(source, checkpoints=(replace(source.full, tensors=tensors),))


def _values(headers: Mapping[str, TensorHeader]) -> dict[str, Any]:
    from ..task_vectors.reading import read_tensor

    return {name: read_tensor(header) for name, header in headers.items() if is_float(header)}
