"""What a method demands of its parameters together, checked before anything is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_subspace.merging.methods.registry import Method, Semantics

Options = Mapping[str, Any]


def weights_do_not_cancel(
    options: Options, per_model: Sequence[Options], weights: Sequence[float], semantics: Semantics
) -> None:
    """Raise a ValueError if the weights are to be divided by their sum, and that is 0."""
    flag = next((name for name in ("normalize", "normalize_weights") if name in options), None)
    if (flag is None or options[flag]) and sum(weights) == 0:
        way_out = f"set {flag}: false, or change them" if flag else "change them"
        raise ValueError(f"the weights {', '.join(f'{weight:g}' for weight in weights)} sum to 0; {way_out}")


def turns_signs(method: Method, options: Options, weights: Sequence[float], semantics: Semantics) -> bool:
    """Whether dividing by the weights turns the sign of a negative one back, for all entries or for some of them."""
    if not any(weight < 0 for weight in weights):
        return False
    flag = next((name for name in ("normalize", "normalize_weights") if name in options), None)
    if flag is not None and "majority_sign_method" in options:
        return bool(options[flag]) and semantics == "mergekit"  # the others count those that agree
    divides = method.divides if flag is None else "sum" if options[flag] else ""
    return divides == "entry" or (divides == "sum" and sum(weights) < 0)


def span(given: Options, semantics: Semantics) -> tuple[float, float]:
    """DELLA's chance of the smallest entry of a row to be kept, and of the largest.

    density -+ epsilon (mergekit), or density -+ epsilon / 2 (the paper, whose epsilon is the whole span).
    """
    half = given["epsilon"] if semantics == "mergekit" else given["epsilon"] / 2
    return given["density"] - half, given["density"] + half


def chances_inside_0_1(options: Options, per_model: Sequence[Options], weights: Sequence[float], semantics: Semantics) -> None:
    """Raise a ValueError unless DELLA's chances are inside (0, 1)."""
    for given in per_model:
        low, high = span(given, semantics)
        if 0 < given["density"] < 1 and not 0 < low <= high < 1:
            raise ValueError(
                f"density={given['density']:g} with epsilon={given['epsilon']:g}: entries would be kept with chances from "
                f"{low:g} to {high:g}, which must lie inside (0, 1); choose a smaller epsilon"
            )
