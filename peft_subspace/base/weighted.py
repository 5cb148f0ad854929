"""The exact weighted sum of adapters, as a new adapter."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from .holders import Holder
from .kinds import ParamWrapper
from .targets import exact_targets

if TYPE_CHECKING:
    from .model import SubspaceModel


def add_weighted_adapter(
    tuner: SubspaceModel, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
) -> None:
    """See `SubspaceModel.add_weighted_adapter`."""
    _check(tuner, adapters, weights, adapter_name, combination_type)
    by_name: dict[str, float] = {}
    for name, weight in zip(adapters, weights, strict=True):
        by_name[name] = by_name.get(name, 0.0) + weight
    config = copy.deepcopy(tuner.peft_config[adapters[0]])
    config.awaits_weights, config.is_from_file = None, False
    config.target_modules, config.target_parameters = set(), None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None  # the targets are named one by one
    config.lowered_ranks = {}
    for pattern in config.patterns:
        setattr(config, pattern, {})
    layers = [
        (key, layer, _combine_layer(tuner, key, layer, by_name, config))
        for key, layer in tuner.named_subspace_layers()
        if any(layer.has_adapter(name) for name in adapters)
    ]
    config.target_modules = exact_targets(config.target_modules, tuner.model)
    tuner.peft_config[adapter_name] = config
    for key, layer, tensors in layers:
        layer.update_layer(adapter_name, config, key)
        layer.load_tensors(adapter_name, tensors)
    for norm in tuner._batch_norms():
        norm.average(by_name, adapter_name)
        norm.set_adapter(tuner.active_adapters)


def _combine_layer(tuner: Any, key: str, layer: Any, weights: dict[str, float], config: Any) -> dict[str, Any]:
    """Sum one layer's updates; notes the new ranks and the target in the config."""
    if isinstance(layer, (ParamWrapper, Holder)):
        config.target_parameters = [*(config.target_parameters or []), key]
    else:
        config.target_modules.add(key)
    tensors = {}
    for container, (weight, _) in layer.geometries.items():
        found = [name for name in weights if layer.has_adapter(name)]
        found = [name for name in found if container in layer.deltas(name)]
        if not found:
            continue
        deltas = [layer.deltas(name)[container] for name in found]
        factors = [weights[name] * delta.multiplier for name, delta in zip(found, deltas, strict=True)]
        fields, tensors[container] = tuner.delta_cls.combine(deltas, factors)
        exact = key if len(layer.geometries) == 1 else f"{key}.{weight}"
        for pattern, field in config.patterns.items():
            getattr(config, pattern).update({exact: fields[field]} if field in fields else {})
    return tensors


def _check(tuner: Any, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str) -> None:
    missing = [name for name in adapters if name not in tuner.peft_config]
    if missing:
        raise ValueError(f"Adapters {missing} are not loaded. Loaded: {sorted(tuner.peft_config)}.")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"An adapter {adapter_name!r} exists already. Delete it first or choose another name.")
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight per adapter.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={weights}: every weight must be a finite number.")
    if tuner.delta_cls.replaces_base:
        raise ValueError(
            f"Each of {adapters} stands in for the base's weights, so their weighted sum is no adapter of this kind. Merge "
            f"each into a model of its own (`merge_and_unload`) and combine the models with `peft-subspace merge`."
        )
    if combination_type != "linear":
        raise ValueError(f"combination_type={combination_type!r} is not known. Accepted: 'linear' (the exact sum).")
    if any(tuner.peft_config[name].modules_to_save for name in adapters):
        raise ValueError("Adapters with modules_to_save cannot be summed: those modules are whole copies, not updates.")
