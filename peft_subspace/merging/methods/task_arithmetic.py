"""Weighted sums: of models (linear), of deltas (task arithmetic)."""

from __future__ import annotations

from torch import Tensor

from peft_subspace.merging.methods.consensus import add
from peft_subspace.merging.methods.registry import Inputs
from peft_subspace.merging.methods.sums import weighted_sum


def linear(inputs: Inputs) -> Tensor:
    """Sigma_k w_k theta_k, over Sigma_k w_k if `normalize`.

    Cost: 1 read, 2 flops for each entry of each model.
    Source: Model soups (arXiv:2203.05482); mergekit's `linear`, which normalises by default as well.
    """
    merged = weighted_sum(inputs.tensors, inputs.weights, own=inputs.own)
    return merged.div_(sum(inputs.weights)) if inputs.options["normalize"] else merged


def task_arithmetic(inputs: Inputs) -> Tensor:
    """lambda Sigma_k w_k tau_k, over Sigma_k w_k if `normalize`.

    Cost: 1 read, 3 flops for each entry of each model.
    Source: Editing Models with Task Arithmetic (arXiv:2212.04089), section 2.
    """
    return add(inputs, inputs.tensors, [1.0] * len(inputs.tensors))
