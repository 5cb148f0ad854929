"""Drop at random and rescale: DARE, added (dare_linear) or by elected signs (dare_ties)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from peft_subspace.merging.methods import masks
from peft_subspace.merging.methods.consensus import add, elect
from peft_subspace.merging.methods.draws import bernoulli_bits
from peft_subspace.merging.methods.registry import Inputs, Pass, Semantics


def draw(inputs: Inputs, k: int) -> np.ndarray | None:
    """m_k ~ Bernoulli(density_k), independent for each entry; None for density 1."""
    density = inputs.per_model[k]["density"]
    return None if density >= 1 else bernoulli_bits(inputs, k, density)


def passes(options: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]], semantics: Semantics) -> list[Pass]:
    """mergekit rescales to the L1 norm of the whole delta, which takes a pass; PEFT and the paper divide by the density."""
    needed = options["rescale"] and semantics == "mergekit" and any(given["density"] < 1 for given in per_model)
    return [masks.Masks(draw)] if needed else []


def _dropped(inputs: Inputs) -> tuple[list[Tensor], Sequence[float]]:
    kept = [masks.masked(inputs, k, draw) for k in range(len(inputs.tensors))]
    if not inputs.options["rescale"] or inputs.semantics == "mergekit":
        return kept, masks.scales(inputs)
    densities = [given["density"] for given in inputs.per_model]
    return kept, [1 / density if density > 0 else 0.0 for density in densities]


def dare_linear(inputs: Inputs) -> Tensor:
    """lambda Sigma_k w_k s_k m_k * tau_k, m_k ~ Bernoulli(density_k).

    s_k = |tau_k|_1 / |m_k * tau_k|_1 (mergekit) or 1 / density_k (PEFT and the paper); 1 without `rescale`.
    Cost: 1 read, 2 with mergekit's rescaling; about 2 and 4 ns for each entry of each model. Masks are held between the two
    reads, one bit an entry, up to 64 MB in all; above that they are drawn twice.
    Source: DARE (arXiv:2311.03099), section 3.
    """
    return add(inputs, *_dropped(inputs))


def dare_ties(inputs: Inputs) -> Tensor:
    """As `dare_linear`, but the deltas are merged by elected signs (`consensus.elect`)."""
    return elect(inputs, *_dropped(inputs))
