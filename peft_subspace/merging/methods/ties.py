"""Trim by magnitude: magnitude_prune (trim, add) and TIES (trim, elect signs, merge those that agree)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from peft_subspace.merging.methods.consensus import add, elect
from peft_subspace.merging.methods.registry import Inputs, Pass, Semantics
from peft_subspace.merging.methods.sums import Ratio
from peft_subspace.merging.methods.thresholds import keep_top, settled, top_passes


def _kept_count(count: int, density: float, semantics: Semantics) -> int:
    """int(density n); mergekit keeps at least one entry where density > 0."""
    k = int(density * count)
    return max(1, k) if semantics == "mergekit" and density > 0 else k


def trim(inputs: Inputs, k: int) -> Tensor:
    """tau_k where |tau_k| is among the `density` largest of its tensor, else 0."""
    if inputs.per_model[k]["density"] >= 1:
        return inputs.tensors[k]
    return keep_top(inputs.tensors[k], settled(inputs.reduced)[k][0], inputs.start)


def passes(options: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]], semantics: Semantics) -> list[Pass]:
    """The thresholds, then what brings the L1 norms back (`rescale`, as mergekit has it)."""
    if all(given["density"] >= 1 for given in per_model):
        return []

    def ranks(count: int, inputs: Inputs) -> list[list[int]]:
        return [[_kept_count(count, given["density"], semantics)] for given in inputs.per_model]

    found = top_passes(lambda inputs: inputs.tensors, ranks, exact=semantics != "paper")
    return [*found, Ratio(trim)] if options["rescale"] else found


def _trimmed(inputs: Inputs) -> tuple[list[Tensor], Sequence[float]]:
    scales = inputs.reduced.get("ratio") or [1.0] * len(inputs.tensors)
    return [trim(inputs, k) for k in range(len(inputs.tensors))], scales


def magnitude_prune(inputs: Inputs) -> Tensor:
    """lambda Sigma_k w_k trim(tau_k): the largest `density` of each delta, added.

    Cost: 2 reads for the thresholds (3 where magnitudes tie), 1 for the sum; about 5 ns for each entry of each model.
    Source: PEFT's `merge_utils.magnitude_prune`; mergekit has no method of this name, but `breadcrumbs` with gamma 0 is it.
    """
    return add(inputs, *_trimmed(inputs))


def ties(inputs: Inputs) -> Tensor:
    """lambda times the mean of those trim(tau_k) whose sign is the elected one, entry by entry (`consensus.elect`).

    Trims per tensor to exactly int(density n) entries; under `semantics: paper` over the whole model where the caller runs
    the passes over all of its tensors at once, and keeping all entries that tie with the last.
    Cost: 2 reads for the thresholds (3 where magnitudes tie), 1 for the merge; about 7 ns for each entry of each model.
    Source: TIES-Merging (arXiv:2306.01708), algorithm 1.
    """
    return elect(inputs, *_trimmed(inputs))
