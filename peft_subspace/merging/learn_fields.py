"""What a recipe may write for the fields of an adapter's config, under `subspace.learn.config`. Needs no torch."""

from __future__ import annotations

import math
import string
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..functional.choices import BLOCK_TYPES, CHOICES, MAX_PARTS

Texts = list[str]
# field -> (type, the type in words)
TYPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("target_modules", "exclude_modules"), (Texts | str | None, "a text or a list of texts")),
    "target_parameters": (Texts | None, "a list of texts"),
    "block_types": (Texts, "a list of texts"),
    "tie_blocks": (list[Texts] | None, "a list of lists of texts"),
    "fused_splits": (dict[str, int], "a table of text to whole number"),
    "selected": (dict[str, Texts] | None, "a table of text to list of texts"),
    **dict.fromkeys(("init", "coefficients"), (float | dict[str, float], "a number, or a table of text to number")),
    "temperature": (float, "a number"),
    **dict.fromkeys(("max_vector_bytes", "partition"), (int | None, "a whole number")),
    "partition_seed": (int, "a whole number"),
    **dict.fromkeys(("strict", "bundle_vectors", "clamp_coefficients", "rescale", "stochastic"), (bool, "true or false")),
    **dict.fromkeys(("granularity", "vector_dtype", "placement", "eval_mask", "save_mask"), (str, "a text")),
    **dict.fromkeys(("learn_coefficients", "constraint"), (str | None, "a text")),
}


# Fields of the configs that a recipe says in another place, and where.
ELSEWHERE = {
    "pool": "the task vectors are the recipe's `models`",
    "exclude_pool": "leave a model out of the recipe's `models` instead",
    "base": "it is the recipe's `base_model`",
    "seed": "write `seed` under `subspace.learn`, beside `config`",
    "train_mask": "a recipe with merge_method concrete learns the mask; to learn coefficients alone, use merge_method atlas",
    "modules_to_save": "nothing but coefficients and masks is learned here; use MergeTrainer in a program of your own",
}


def check_fields(config: Mapping[str, Any], method: str, vectors: Collection[str]) -> None:
    """See that a config can be made of these fields, before a model is.

    Args:
        config: fields that the method's config has.
        method: "atlas" or "concrete".
        vectors: names of the task vectors.

    Raises:
        ValueError: a value of another type, an unknown choice or vector, a number out of range, fields that do not go together.
    """
    for name, value in config.items():
        kind, words = TYPES[name]
        try:
            TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"subspace.learn.config: {name}: {value!r} is not accepted; write {words}") from error
    for message in (*_choices(config, method), *_numbers(config, method), *_vectors(config, vectors), *_together(config)):
        raise ValueError(f"subspace.learn.config: {message}")


def _choices(config: Mapping[str, Any], method: str) -> Iterator[str]:
    for name, accepted in CHOICES[method].items():
        if name in config and config[name] not in accepted:
            known = ", ".join("null" if value is None else repr(value) for value in accepted)
            yield f"{name}={config[name]!r} is not known. Accepted: {known}"
    kinds = config.get("block_types", BLOCK_TYPES)
    if not kinds or any(kind not in BLOCK_TYPES for kind in kinds):
        yield f"block_types={kinds!r}: accepted are {', '.join(map(repr, BLOCK_TYPES))}"


def _numbers(config: Mapping[str, Any], method: str) -> Iterator[str]:
    if method == "concrete" and isinstance(config.get("init"), Mapping):
        yield "init: the logits of the mask start at one number; a number for each vector is `coefficients`"
    for name in ("init", "coefficients"):
        given = config.get(name, 0.0)
        if not all(math.isfinite(value) for value in (given.values() if isinstance(given, Mapping) else [given])):
            yield f"{name}={given!r}: a finite number, or a table of them by name of a vector, is expected"
    temperature = config.get("temperature", 1.0)
    if not 0 < temperature < math.inf:
        yield f"temperature={temperature!r} must be a positive number"
    partition = config.get("partition")
    if (partition is None) != (config.get("granularity") != "partition"):
        yield (
            f"partition={partition!r} with granularity={config.get('granularity', 'block')!r}: the number of parts goes with "
            f"granularity='partition', and with no other"
        )
    if partition is not None and not 1 <= partition <= MAX_PARTS:
        yield f"partition={partition!r}: a number of parts from 1 to {MAX_PARTS} is expected"
    wrong = {name: count for name, count in config.get("fused_splits", {}).items() if count < 1}
    if wrong:
        yield f"fused_splits={wrong!r}: a positive number of parts is expected for each ending"


def _vectors(config: Mapping[str, Any], vectors: Collection[str]) -> Iterator[str]:
    tables = {name: config.get(name) for name in ("init", "coefficients")}
    named = {name: list(table) for name, table in tables.items() if isinstance(table, Mapping)}
    named["selected"] = [vector for names in (config.get("selected") or {}).values() for vector in names]
    for name, given in named.items():
        unknown = sorted(set(given) - set(vectors))
        if unknown:
            known = ", ".join(sorted(vectors))
            yield f"{name}: {', '.join(map(repr, unknown))}: no task vector is called so; there are {known}"


def _together(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("selected") is not None and (config.get("granularity") == "task" or config.get("tie_blocks")):
        yield "selected: blocks that share coefficients (granularity: task, tie_blocks) share their vectors too"
    if config.get("selected") is not None and config.get("constraint") == "softmax":
        yield "selected: with constraint: softmax a vector that is left out would keep its share of one"
    if config.get("save_mask") == "hard" and config.get("eval_mask") != "hard":
        yield "save_mask: hard keeps one bit a logit, and eval_mask needs values. Set eval_mask: hard, or save_mask: bfloat16"


def template_parts(text: str) -> list[tuple[str, str | None]]:
    """A text with `{column}` in it as pairs of what is written as it is, and the column behind it, if there is one.

    Raises:
        ValueError: a brace without its partner, a place without a column, or with a format; no place at all.
    """
    try:
        found = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"text: {text!r} cannot be read ({error}); write {{column}}, and {{{{ for a brace") from error
    for _, name, form, conversion in found:
        if name is not None and (not name or form or conversion):
            place = "{" + name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "") + "}"
            raise ValueError(f"text: {text!r} has {place}; write {{column}}, with the name of a column and nothing else")
    if all(name is None for _, name, _, _ in found):
        raise ValueError(f"text: {text!r} has no {{column}}, so that all rows would be the same; write one")
    return [(literal, name) for literal, name, _, _ in found]
