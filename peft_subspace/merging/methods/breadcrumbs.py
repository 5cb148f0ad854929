"""Drop the smallest and the very largest: Model Breadcrumbs, added or by elected signs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from peft_subspace.merging.methods.consensus import add, elect
from peft_subspace.merging.methods.registry import Inputs, Pass, Semantics
from peft_subspace.merging.methods.sums import Ratio
from peft_subspace.merging.methods.thresholds import keep_top, settled, top_passes


def _ranks(count: int, given: Mapping[str, Any]) -> list[int]:
    """Entries are kept from the first rank to the second: fewer outliers are dropped where the density asks for it."""
    kept = int(given["density"] * count)
    outliers = min(int(given["gamma"] * count), count - kept)
    return [outliers, outliers + kept]


def without_outliers(inputs: Inputs, k: int) -> Tensor:
    """tau_k without its largest `gamma` n entries, and of the others the largest `density` n; n its number of entries."""
    tensor = inputs.tensors[k]
    if inputs.per_model[k]["density"] >= 1:
        return tensor
    outliers, kept = settled(inputs.reduced)[k]
    return keep_top(tensor, kept, inputs.start) - keep_top(tensor, outliers, inputs.start)  # x - x and x - 0: exact


def passes(options: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]], semantics: Semantics) -> list[Pass]:
    """Two thresholds for each model, then what brings the L1 norms back."""
    if all(given["density"] >= 1 for given in per_model):
        return []

    def ranks(count: int, inputs: Inputs) -> list[list[int]]:
        return [_ranks(count, given) for given in inputs.per_model]

    found = top_passes(lambda inputs: inputs.tensors, ranks)
    return [*found, Ratio(without_outliers)] if options["rescale"] else found


def _kept(inputs: Inputs) -> tuple[list[Tensor], Sequence[float]]:
    scales = inputs.reduced.get("ratio") or [1.0] * len(inputs.tensors)
    return [without_outliers(inputs, k) for k in range(len(inputs.tensors))], scales


def breadcrumbs(inputs: Inputs) -> Tensor:
    """lambda Sigma_k w_k m_k * tau_k, where m_k keeps the ranks gamma n .. (gamma + density) n by magnitude.

    With density + gamma > 1 fewer outliers are dropped, so that the density holds; with density 1 nothing is.
    Cost: as `ties.magnitude_prune`, with two thresholds a model.
    Source: Model Breadcrumbs (arXiv:2312.06795); the knobs are mergekit's.
    """
    return add(inputs, *_kept(inputs))


def breadcrumbs_ties(inputs: Inputs) -> Tensor:
    """As `breadcrumbs`, but the deltas are merged by elected signs (`consensus.elect`)."""
    return elect(inputs, *_kept(inputs))
