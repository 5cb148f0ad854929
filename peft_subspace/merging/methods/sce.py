"""SCE: select what varies, calculate weights, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_subspace.merging.methods.registry import Inputs, Pass, Semantics
from peft_subspace.merging.methods.sums import block_sums, weighted_sum
from peft_subspace.merging.methods.thresholds import keep_top, settled, top_passes


def variance(inputs: Inputs) -> Tensor:
    """mean_k (tau_k - mean_j tau_j)^2, entry by entry."""
    count = len(inputs.tensors)
    mean = weighted_sum(inputs.tensors, [1 / count] * count)
    total = torch.zeros_like(mean)
    for tensor in inputs.tensors:
        total.add_((tensor - mean).square_())
    return total.div_(count)


def select(inputs: Inputs) -> Sequence[Tensor]:
    """tau_k at the entries whose variance is among the largest, else 0; all of them for `select_topk: 1`."""
    if inputs.options["select_topk"] >= 1:
        return inputs.tensors
    ((top,),) = settled(inputs.reduced)
    chosen = keep_top(variance(inputs), top, inputs.start).ne(0)
    return [tensor * chosen for tensor in inputs.tensors]


@dataclass
class _Varying:
    """How many entries have a variance other than zero."""

    name: str = "varying"

    def begin(self, count: int, inputs: Inputs) -> Any:
        return [0]

    def update(self, state: Any, inputs: Inputs) -> None:
        state[0] += int(torch.count_nonzero(variance(inputs)))

    def finish(self, state: Any) -> Any:
        return state[0]


@dataclass
class _Weights:
    """w_k = mean of the squares of what is selected of tau_k, over their sum; equal if that is 0 (in mergekit: below 1e-6)."""

    semantics: Semantics
    name: str = "weights"

    def begin(self, count: int, inputs: Inputs) -> Any:
        return {"count": count, "sums": [[] for _ in inputs.tensors]}

    def update(self, state: Any, inputs: Inputs) -> None:
        for sums, tensor in zip(state["sums"], select(inputs), strict=True):
            sums += block_sums(tensor.square())

    def finish(self, state: Any) -> Any:
        means = [math.fsum(sums) / state["count"] for sums in state["sums"]]
        total = math.fsum(means)
        if total == 0 or (self.semantics == "mergekit" and total < 1e-6):
            return [1 / len(means)] * len(means)
        return [mean / total for mean in means]


def passes(options: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]], semantics: Semantics) -> list[Pass]:
    """The entries to select (if not all), then the weights."""
    share = options["select_topk"]
    if share >= 1:
        return [_Weights(semantics)]

    def ranks(count: int, inputs: Inputs) -> list[list[int]]:
        return [[int(inputs.reduced["varying"] * share)]]

    return [_Varying(), *top_passes(lambda inputs: [variance(inputs)], ranks), _Weights(semantics)]


def merge(inputs: Inputs) -> Tensor:
    """Sigma_{k: sign tau_k = sign} w_k tau_k / Sigma_{k: same} w_k on the selected entries, sign that of Sigma_k tau_k.

    w_k is the mean square of the selected tau_k over the sum of these. mergekit takes equal weights where that sum is below
    1e-6, which it is for most fine-tuned models (their deltas are below 1e-3): `semantics: paper` does not.
    Cost: 2 reads, 5 or 6 if entries are selected.
    Source: FuseChat 3.0 / SCE (arXiv:2408.07990), mergekit's `sce`.
    """
    selected, weights = select(inputs), inputs.reduced["weights"]
    sign = weighted_sum(selected, [1.0] * len(selected)).sign_().mul_(2).add_(1).sign_()
    merged, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for tensor, weight in zip(selected, weights, strict=True):
        agreeing = (tensor * sign).clamp_min_(0)
        merged.add_(agreeing, alpha=weight)
        divisor.add_(agreeing.sign_(), alpha=weight)
    return merged.div_(divisor.clamp_min_(1e-6)).mul_(sign)
