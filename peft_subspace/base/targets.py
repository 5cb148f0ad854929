"""Which layers an adapter acts on: defaults, shorthands, and the demand that every name matches something."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import TARGET_SHORTHANDS, SubspaceConfig, find_pattern
from .geometry import Geometry, describe, describe_all


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the model by name, wrapped ones as what they wrap, without anything that an adapter added."""
    closed: list[str] = []
    for name, module in model.named_modules():
        if not name or name.startswith(tuple(closed)):
            continue
        if isinstance(module, BaseTunerLayer):
            closed.append(f"{name}.")
            if getattr(module, "is_holder", False):
                continue  # it stands beside the parameters of its parent, which is here already
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            closed.append(f"{name}.")
            continue
        elif isinstance(module, nn.MultiheadAttention):
            closed.append(f"{name}.")  # its out_proj is read, not called: it is adapted together with the attention
        yield name, module


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """All parameters of the base: full name, the module that has it, its dotted name below that module, the parameter.

    A tied parameter comes once for each of its names.
    """
    for name, module in base_modules(model):
        whole = isinstance(module, nn.MultiheadAttention)  # its children are adapted together with it
        for own, parameter in module.named_parameters(recurse=whole, remove_duplicate=False):
            yield f"{name}.{own}", module, own, parameter


def resolve_targets(config: SubspaceConfig, model: nn.Module) -> None:
    """Replace None, "all-linear" and "all-conv" in `config.target_modules` by layer names."""
    targets: Any = config.target_modules
    if targets is None:
        if config.target_parameters:
            config.target_modules = []
            return
        targets = DEFAULT_TARGETS.get(getattr(getattr(model, "config", None), "model_type", ""))
        if targets is None:
            linear, conv = (_layers_of_kind(model, kind, config) for kind in ("linear", "conv"))
            targets = "all-linear" if len(linear) >= len(conv) else "all-conv"  # a conv net's few linears are its head
        else:
            targets = _inside_sequences(targets, model)
    if isinstance(targets, str):
        if targets.lower() not in TARGET_SHORTHANDS:
            config.target_modules = targets  # a regular expression
            return
        targets = [targets.lower()]
    names: set[str] = set()
    for target in targets:
        names |= _expand(target, model, config) if target in TARGET_SHORTHANDS else {target}
    config.target_modules = names  # type: ignore[assignment]  # PEFT keeps a set


def _inside_sequences(targets: Any, model: nn.Module) -> list[str]:
    """A default name may have become a sequence of layers (of a compressed model): those are meant then."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) and _ends_with_any(name, targets) and all(map(describe, module)):
            found += [f"{name}.{child}" for child, _ in module.named_children()]
    return found or list(targets)


def _expand(shorthand: str, model: nn.Module, config: SubspaceConfig) -> set[str]:
    kind = shorthand.removeprefix("all-")
    names = _layers_of_kind(model, kind, config)
    if not names:
        where = "" if config.layers_to_transform is None else f" in layers_to_transform={config.layers_to_transform}"
        raise ValueError(f"target_modules={shorthand!r}: {type(model).__name__} has no {kind} layer to adapt{where}.")
    stacks = {name for name, _ in _fused_parameters(model)}
    if shorthand == "all-linear" and stacks and not config.target_parameters:
        warnings.warn(
            f"target_modules='all-linear' does not reach these fused parameters: {sorted(stacks)}. To adapt them too, pass "
            f"target_parameters={sorted({'.'.join(name.split('.')[-2:]) for name in stacks})}.",
            stacklevel=2,
        )
    return names


def _layers_of_kind(model: nn.Module, kind: str, config: SubspaceConfig) -> set[str]:
    head = _output_head(model, config)
    inside = set(map(id, head.modules())) if head is not None else set()  # a head may be a Sequential
    found = set()
    for name, module in base_modules(model):
        geometries = describe(module)
        if id(module) not in inside and geometries and all(g.kind == kind for g in geometries.values()):
            found.add(name)
    return {name for name in found if _in_chosen_layers(name, config)}


def _in_chosen_layers(name: str, config: SubspaceConfig) -> bool:
    """PEFT's `layers_to_transform`, which it does not apply to names that are given in full, as a shorthand's are."""
    if config.layers_to_transform is None:
        return True
    by_ending: Any = SimpleNamespace(
        target_modules={name.rpartition(".")[2]},
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return bool(check_target_module_exists(by_ending, f"model.{name}"))


def _output_head(model: nn.Module, config: SubspaceConfig) -> nn.Module | None:
    """The last layer of a model for a task, which "all-linear" leaves alone (PEFT does too)."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        return output
    if config.task_type == "SEQ_CLS" or type(model).__name__.endswith("Classification"):
        return next((getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)), None)
    return None


def _fused_parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Weights of three or more modes on a module that is no layer that we know: experts of a MoE model."""
    for name, module in base_modules(model):
        if not describe(module):
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 3 and parameter.shape[0] > 1:
                    yield f"{name}.{parameter_name}", parameter


def find_targets(
    model: nn.Module, config: SubspaceConfig, matches: Any, every_parameter: bool = False
) -> dict[str, dict[str, Geometry]]:
    """All layers that the config names, described, with every way to go wrong refused before the model is touched.

    Args:
        model: the base model, perhaps with adapters already.
        config: the config, its shorthands resolved.
        matches: PEFT's rule, `(config, name) -> truthy`.
        every_parameter: describe all parameters of a module (norms and biases too), not only its weight.

    Returns:
        layer name -> (weight name -> geometry).

    Raises:
        ValueError: a name matches nothing, or a matched layer is of a type that cannot be adapted.
    """
    modules = dict(base_modules(model))
    if isinstance(config.target_modules, (set, list)):
        _all_match(config.target_modules, list(modules), "target_modules", model)
    found = {}
    for name, module in modules.items():
        if not matches(config, name):
            continue
        geometries = describe_all(module) if every_parameter else describe(module)
        if not geometries:
            supported = (
                "modules without children that have parameters of their own"
                if every_parameter
                else "linear layers (quantised and Conv1D too), convolutions, embeddings"
            )
            raise ValueError(
                f"Target module {name!r} ({type(module).__name__}) is not supported. Supported are {supported}, and "
                f"MultiheadAttention; a bare parameter of any module can be adapted with target_parameters. Leave the layer "
                f"out with exclude_modules."
            )
        found[name] = geometries
    if config.target_parameters:
        parameters = {
            f"{name}.{p}": describe(module, p)
            for name, module in modules.items()
            for p, _ in module.named_parameters(recurse=False)
        }
        _all_match(config.target_parameters, list(parameters), "target_parameters", model)
        for key, geometries in parameters.items():
            if _ends_with_any(key, config.target_parameters):
                found[key] = geometries
    return found


def _ends_with_any(name: str, targets: Any) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _all_match(targets: Any, names: list[str], field: str, model: nn.Module) -> None:
    for target in sorted(targets):
        if any(_ends_with_any(name, [target]) for name in names):
            continue
        endings = {".".join(parts[i:]) for name in names for parts in [name.split(".")] for i in range(len(parts))}
        near = difflib.get_close_matches(target, sorted(endings), n=3)
        raise ValueError(
            f"{field} names {target!r}, which was not found in {type(model).__name__}."
            + (f" Near names: {', '.join(near)}." if near else "")
            + f" Every name must match the end of a {'parameter' if field == 'target_parameters' else 'module'}'s name; "
            f"list them with `model.named_{'parameters' if field == 'target_parameters' else 'modules'}()`."
        )


def exact_targets(names: set[str], model: nn.Module) -> list[str] | str:
    """`target_modules` that mean these layers and no others: the names, or an expression where one is the ending of another."""
    others = {name for name, _ in base_modules(model)} - names
    if any(_ends_with_any(other, names) for other in others):
        return "|".join(re.escape(name) for name in sorted(names))
    return sorted(names)


def check_patterns(config: SubspaceConfig, targets: dict[str, dict[str, Geometry]]) -> None:
    """Warn about keys of `rank_pattern` and its like that no target matches."""
    names = [key for name, weights in targets.items() for key in (name, *(f"{name}.{weight}" for weight in weights))]
    for field in config.patterns:
        unmatched = [p for p in getattr(config, field) if not any(find_pattern({p: None}, name) for name in names)]
        if unmatched:
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: {sorted(unmatched)}.",
                RuntimeWarning,
                stacklevel=2,
            )
