"""Names of tensors in a file and in memory, where transformers saves an architecture under older names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .blueprint import blueprint


def names_in_memory(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Name in memory -> name in the file, as the installed transformers loads them.

    The model is built without values to ask for its renamings; code from the Hub is never run. Tensors that are fused on
    loading (stacks of experts out of single ones) have no name here.

    Args:
        names: in the file.
        config: config.json.

    Returns:
        Nothing, if the architecture is not known to transformers.
    """
    names = list(names)
    found = blueprint(config)
    if found is None:
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(found.model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        others: Any = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
        known = dict.fromkeys(found.model.state_dict(), True)
        renamed = {}
        for name in names:
            new, fused = rename_source_key(name, renamings, others, found.model.base_model_prefix, known)
            if fused is None:
                renamed[new] = name
        return renamed
    except Exception:  # another transformers: names stay as they are
        return {}
