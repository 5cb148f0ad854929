"""Names of tensors in a file and in memory, where transformers saves an architecture under older names or in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from .blueprint import blueprint


def names_in_memory(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Name in memory -> name in the file, as the installed transformers loads them.

    The model is built without values to ask for its renamings; code from the Hub is never run. Tensors that are fused on
    loading (stacks of experts out of single ones) have no name here, see `pieces_in_memory`.

    Args:
        names: in the file.
        config: config.json.

    Returns:
        Nothing, if the architecture is not known to transformers.
    """
    try:
        return {renamed: name for name, renamed, fused in _renamed(names, *_model(config)) if fused is None}
    except Exception:  # an architecture of its own, a config that does not fit, another transformers: names stay as they are
        return {}


def pieces_in_memory(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Parameter in memory -> the tensors of the file that lie one after the other in it, in their order.

    What transformers does on loading is tried on small tensors whose values tell where they come from.

    Args:
        shapes: tensors of the file by name.
        config: config.json.

    Returns:
        Without parameters that are made in another way (values are mixed, or transposed); nothing, if the architecture is not
        known to transformers.
    """
    try:
        from transformers.core_model_loading import dot_natural_key

        model, transforms = _model(config)
        groups: dict[str, list[tuple[str, str]]] = {}
        for name, renamed, fused in _renamed(sorted(shapes, key=dot_natural_key), model, transforms):
            if fused is not None:
                groups.setdefault(renamed, []).append((name, fused))
        converters = {pattern: one for one in transforms if hasattr(one, "operations") for pattern in one.source_patterns}
        found = {}
        for target, sources in groups.items():
            order = _order(target, sources, shapes, converters[sources[0][1]], model)
            if order is not None:
                found[target] = [sources[number][0] for number in order]
        return found
    except Exception:  # see above
        return {}


def _model(config: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """A model without values, and how transformers turns what a file has into what it has.

    Raises:
        ValueError: transformers has no such model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    found = blueprint(config)
    if found is None:
        raise ValueError("its class is not known")
    return found.model, get_model_conversion_mapping(found.model)


def _renamed(names: Iterable[str], model: Any, transforms: list[Any]) -> list[tuple[str, str, str | None]]:
    """Name in the file, name in memory, and the pattern of a conversion, None for a mere renaming."""
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    others: Any = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    known = dict.fromkeys(model.state_dict(), True)
    return [(name, *rename_source_key(name, renamings, others, model.base_model_prefix, known)) for name in names]


def _order(
    target: str, sources: list[tuple[str, str]], shapes: Mapping[str, tuple[int, ...]], converter: Any, model: Any
) -> list[int] | None:
    """In which order the sources lie in a parameter; None if they do not lie one after the other, each whole."""
    import torch

    converter, size = deepcopy(converter), 6
    for number, (name, pattern) in enumerate(sources):
        dims = len(shapes[name])
        probe = torch.arange(number * size, (number + 1) * size).reshape([1] * (dims - 2) + [2, 3] if dims > 1 else [6])
        converter.add_tensor(target, name, pattern, probe)
    values = converter.convert(target, model=model, config=model.config)[target].flatten()
    if values.numel() != len(sources) * size:
        return None
    parts = values.reshape(-1, size)
    whole = (parts == parts[:, :1] + torch.arange(size)).all() and (parts[:, 0] % size == 0).all()
    return (parts[:, 0] // size).tolist() if whole else None
