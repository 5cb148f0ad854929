"""What a recipe may write for the fields of an adapter's config, under `subspace.learn.config`. Needs no torch."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

Texts = list[str]
# field -> (type, the type in words); values that go together and choices are checked by the config's own class.
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


def check_fields(config: Mapping[str, Any]) -> None:
    """Raise a ValueError for a field with a value of another type."""
    for name, value in config.items():
        kind, words = TYPES[name]
        try:
            TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"subspace.learn.config: {name}: {value!r} is not accepted; write {words}") from error


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
