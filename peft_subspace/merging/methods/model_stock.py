"""Model Stock: how far to go from the base to the average, by the angle between the deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_subspace.merging.methods.registry import Inputs, Pass, Semantics
from peft_subspace.merging.methods.sums import Gram, weighted_sum


def passes(options: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]], semantics: Semantics) -> list[Pass]:
    """Dot products of the deltas, whole or by row."""
    return [Gram(lambda inputs: inputs.tensors, by_row=options["filter_wise"])]


def ratio(gram: Tensor) -> Tensor:
    """t = K c / (1 + (K - 1) c), c the mean cosine of all pairs of deltas; 0 where that has no value.

    Args:
        gram: `[..., K, K]`.
    """
    count = gram.shape[-1]
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    products = (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)).clamp_min(1e-6)
    cosines = (gram / products).clamp(-1, 1)
    above = torch.ones(count, count, dtype=torch.bool).triu(1)
    cosine = cosines[..., above].mean(-1)
    divisor = 1 + (count - 1) * cosine
    singular = divisor.abs() < 1e-6
    return torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, divisor))


def merge(inputs: Inputs) -> Tensor:
    """t mean_k(tau_k) with t of `ratio`; one t for the tensor, or one for each vector along the last axis (`filter_wise`).

    Cost: 2 reads, K (K + 1) / 2 dot products.
    Source: Model Stock (arXiv:2403.19522), equation 3; the bounds are mergekit's.
    """
    count = len(inputs.tensors)
    mean = weighted_sum(inputs.tensors, [1 / count] * count)
    t = ratio(inputs.reduced["gram"])
    if not inputs.options["filter_wise"]:
        return mean.mul_(float(t))
    row = inputs.start // max(1, mean.shape[1])
    return mean.mul_(t[row : row + mean.shape[0]].to(mean.device, mean.dtype).unsqueeze(1))
