"""What a recipe says about one tensor: filters and gradients become plain values. Needs no torch.

Semantics are mergekit's (0.1.5): a value of a model comes before one of the recipe, and that before the method's default; in a
list of `{filter, value}` the first whose filter is in the tensor's name counts, and if none is, the next place is asked; a
list of numbers is a polyline over the depth of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..task_vectors.errors import RecipeError, sentence
from .methods.registry import Method, Parameter
from .recipe import Condition, Recipe

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")


def depths(names: Iterable[str]) -> dict[str, float]:
    """Where a tensor is between the first layer, 0, and the last, 1; 0 for those outside of all layers.

    A layer's number is the first number in a tensor's name, counted among the names that begin alike, so no table of
    architectures is needed. A model of one layer is at 1.
    """
    names = list(names)
    found = {name: match for name in names if (match := _LAYER.match(name))}
    last: dict[str, int] = {}
    for match in found.values():
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    return {
        name: 0.0 if name not in found else (int(found[name][2]) / last[found[name][1]] if last[found[name][1]] else 1.0)
        for name in names
    }


def evaluate(setting: Any, name: str, depth: float, parameter: Parameter) -> Any:
    """The value of a setting for one tensor, or None if no filter fits it.

    Raises:
        ValueError: the value is not what the parameter accepts.
    """
    if isinstance(setting, Condition):
        setting = [setting]
    if not isinstance(setting, Sequence) or isinstance(setting, str):
        return parameter.check(_number(setting, parameter))
    if setting and isinstance(setting[0], Condition):
        for condition in setting:
            if condition.filter in (None, "*") or condition.filter in name:
                return evaluate(condition.value, name, depth, parameter)
        return None
    if not setting:
        return None
    values = [parameter.check(_number(value, parameter)) for value in setting]
    position = depth * (len(values) - 1)
    left = int(position)
    if isinstance(values[left], (bool, str)):
        return values[left]
    right = min(left + 1, len(values) - 1)
    between = (1 - (position - left)) * values[left] + (position - left) * values[right]
    return parameter.check(int(between) if isinstance(parameter.default, int) else between)


def _number(value: Any, parameter: Parameter) -> Any:
    """YAML 1.1 reads 1e-3 as a text; mergekit's recipes have such numbers, sometimes in quotes."""
    if isinstance(value, str) and isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(parameter.default, bool) and value in (0, 1):
        return bool(value)  # int8_mask: 1
    return value


def check_parameters(recipe: Recipe, method: Method) -> None:
    """Refuse parameters that the method does not have, or that stand at the wrong place, before any file is opened.

    Raises:
        RecipeError: names the parameter and the nearest ones.
    """
    for where, table in [("parameters", recipe.parameters)] + [
        (f"models[{i}].parameters", entry.parameters) for i, entry in enumerate(recipe.models)
    ]:
        for name, setting in table.items():
            try:
                parameter = method.parameter(name)
                for value in _all_values(setting):
                    parameter.check(_number(value, parameter))
            except ValueError as error:
                raise RecipeError(f"{where}: {sentence(error)}") from error
            if where != "parameters" and parameter.scope == "global":
                raise RecipeError(
                    f"{where}: {name!r} is one value for all models; it belongs under `parameters` of the recipe."
                )


def _all_values(setting: Any) -> list[Any]:
    if isinstance(setting, Condition):
        return _all_values(setting.value)
    if isinstance(setting, list):
        return [value for item in setting for value in _all_values(item)]
    return [setting]


def resolve(
    method: Method, shared: Mapping[str, Any], own: Sequence[Mapping[str, Any]], name: str, depth: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All parameters of one tensor: the global ones, and those of each model.

    Args:
        method: says which parameters there are.
        shared: the recipe's `parameters`.
        own: each model's `parameters`.
        name: of the tensor.
        depth: see `depths`.
    """
    options: dict[str, Any] = {}
    per_model: list[dict[str, Any]] = [{} for _ in own]
    for parameter in method.parameters:
        if parameter.scope == "global":
            options[parameter.name] = _first([shared], parameter, name, depth)
        else:
            for values, table in zip(per_model, own, strict=True):
                values[parameter.name] = _first([table, shared], parameter, name, depth)
    return options, per_model


def _first(tables: Iterable[Mapping[str, Any]], parameter: Parameter, name: str, depth: float) -> Any:
    for table in tables:
        if parameter.name in table:
            value = evaluate(table[parameter.name], name, depth, parameter)
            if value is not None:
                return value
    return parameter.default
