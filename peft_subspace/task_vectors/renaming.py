"""Names of tensors in a file and in memory, where transformers saves an architecture under older names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


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
    architecture = next(iter(config.get("architectures") or []), None)
    names = list(names)
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        model_class: Any = getattr(transformers, str(architecture))
        with torch.device("meta"):
            model = model_class(model_class.config_class.from_dict(dict(config)))
        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        others: Any = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
        known = dict.fromkeys(model.state_dict(), True)
        found = {}
        for name in names:
            renamed, fused = rename_source_key(name, renamings, others, model.base_model_prefix, known)
            if fused is None:
                found[renamed] = name
        return found
    except Exception:  # an architecture of its own, a config that does not fit, another transformers: names stay as they are
        return {}
