"""What a recipe says about one tensor: filters and gradients become plain values. Needs no torch.

Semantics are mergekit's (0.1.5): a value of a model comes before one of the recipe, and that before the method's default; in a
list of `{filter, value}` the first whose filter is in the tensor's name counts, and if none is, the next place is asked; a
list of numbers is a polyline over the depth of the model. Stricter than mergekit: a filter that no tensor is left for is an
error, and so is an empty list.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..task_vectors.errors import RecipeError, sentence
from ..task_vectors.sources import shortened
from ..task_vectors.validate import OUTPUT_HEADS
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
        chosen = chosen_filter(setting, name)
        return None if chosen is None else evaluate(setting[chosen].value, name, depth, parameter)
    values = [parameter.check(_number(value, parameter)) for value in setting]
    position = depth * (len(values) - 1)
    left = int(position)
    if isinstance(values[left], (bool, str)):
        return values[left]
    right = min(left + 1, len(values) - 1)
    between = (1 - (position - left)) * values[left] + (position - left) * values[right]
    return parameter.check(int(between) if isinstance(parameter.default, int) else between)


def chosen_filter(conditions: Sequence[Condition], name: str) -> int | None:
    """The first of a list of `{filter, value}` that counts for a tensor."""
    fits = (number for number, one in enumerate(conditions) if _is_for_all(one) or str(one.filter) in name)
    return next(fits, None)


def _is_for_all(condition: Condition) -> bool:
    return condition.filter in (None, "*")


def _conditions(setting: Any) -> list[Condition] | None:
    """The list of `{filter, value}` that a setting is; None for a number, a text or a list of numbers."""
    if isinstance(setting, Condition):
        return [setting]
    return setting if isinstance(setting, list) and setting and isinstance(setting[0], Condition) else None


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
    for where, table in _tables(recipe):
        for name, setting in table.items():
            try:
                parameter = method.parameter(name)
                _check_lists(name, setting)
                for value in _all_values(setting):
                    parameter.check(_number(value, parameter))
            except ValueError as error:
                raise RecipeError(f"{where}: {sentence(error)}") from error
            if where != "parameters" and parameter.scope == "global":
                raise RecipeError(
                    f"{where}: {name!r} is one value for all models; it belongs under `parameters` of the recipe."
                )


def _check_lists(name: str, setting: Any) -> None:
    """Raise a ValueError for an empty list, and for filters after the value for all tensors, which no tensor comes to."""
    conditions = _conditions(setting) or []
    if setting == [] or any(one.value == [] for one in conditions):
        raise ValueError(f"{name}: [] says no value. Write a number, or leave {name!r} out")
    for condition, later in itertools.pairwise(conditions):
        if _is_for_all(condition):
            after = "value" if _is_for_all(later) else f"filter {later.filter!r}"
            raise ValueError(
                f"{name}: the {after} stands after the value for all tensors ({condition.value!r}), so nothing comes to it. "
                f"Move the value without a filter to the end of the list"
            )


@dataclass(frozen=True)
class Use:
    """What a value of a recipe is used for.

    Attributes:
        model: whose it is; None for what is said for all models.
        parameter: its name.
        text: the filter and the value, as they are printed.
        tensors: for how many tensors it counts.
    """

    model: str | None
    parameter: str
    text: str
    tensors: int


def check_filters(recipe: Recipe, names: Collection[str]) -> None:
    """Refuse filters that no tensor is left for.

    Args:
        recipe: its parameters are checked already.
        names: of the tensors that are merged.

    Raises:
        RecipeError: names the filter, and the nearest part of a tensor's name.
    """
    for where, table in _tables(recipe):
        for parameter, setting in table.items():
            conditions = _conditions(setting) or []
            counts = Counter(chosen_filter(conditions, name) for name in names)
            for number, condition in enumerate(conditions):
                if not _is_for_all(condition) and not counts[number]:
                    raise RecipeError(f"{where}: {parameter}: {_why_none(str(condition.filter), names)}")


def _why_none(text: str, names: Collection[str]) -> str:
    taken = [name for name in names if text in name]
    if taken:
        return (
            f"the filter {text!r} is in the names of {len(taken)} tensors, and filters before it count for all of them, so it "
            f"has no effect. Move it further up, or leave it out."
        )
    if any(text in head for head in OUTPUT_HEADS):
        return (
            f"the filter {text!r} is in no tensor's name: the base's file has no head of its own. One that is tied to the "
            f"embedding takes the embedding's value; leave the filter out."
        )
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    near = difflib.get_close_matches(text, parts, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"parts of their names are {shortened(parts, 12)}"
    return f"the filter {text!r} is in no tensor's name; {hint}"


def _tables(recipe: Recipe) -> list[tuple[str, Mapping[str, Any]]]:
    """Where parameters stand: for all models, and of each."""
    own = [(f"models[{number}].parameters", entry.parameters) for number, entry in enumerate(recipe.models)]
    return [("parameters", recipe.parameters), *own]


def uses(recipe: Recipe, method: Method, names: Collection[str]) -> list[Use]:
    """Which values count for how many tensors: of every parameter of each model, and of what is given for all.

    Args:
        recipe: whose values.
        method: its method.
        names: of the tensors that are merged.
    """
    found = []
    for parameter in method.parameters:
        if parameter.scope == "global":
            if parameter.name in recipe.parameters:
                found += _uses(None, parameter, [recipe.parameters], names)
            continue
        for entry in recipe.merged_models:
            found += _uses(str(entry.model), parameter, [entry.parameters, recipe.parameters], names)
    return found


def _uses(model: str | None, parameter: Parameter, tables: Sequence[Mapping[str, Any]], names: Collection[str]) -> list[Use]:
    left, found = set(names), []
    for table in tables:
        if parameter.name not in table:
            continue
        setting = table[parameter.name]
        conditions = _conditions(setting) or [Condition(value=setting)]
        chosen = {name: chosen_filter(conditions, name) for name in left}
        counts = Counter(chosen.values())
        for number, one in enumerate(conditions):
            where = "" if _is_for_all(one) else f"{one.filter!r}: "
            found.append(Use(model, parameter.name, f"{where}{_value_text(one.value)}", counts[number]))
        left = {name for name, number in chosen.items() if number is None}
    if left and parameter.default != "":
        found.append(Use(model, parameter.name, f"{_value_text(parameter.default)} (default)", len(left)))
    return found


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        return f"{', '.join(map(_value_text, value))} from the first layer to the last"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


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


def _first(tables: Sequence[Mapping[str, Any]], parameter: Parameter, name: str, depth: float) -> Any:
    for table in tables:
        if parameter.name in table:
            value = evaluate(table[parameter.name], name, depth, parameter)
            if value is not None:
                return value
    if parameter.demanded and any(parameter.name in table for table in tables):
        raise ValueError(
            f"no filter of {parameter.name!r} is in its name, and there is no value for all other tensors. Add one to the "
            f"end of the list: `- value: {parameter.default:g}`"
        )
    return parameter.default
