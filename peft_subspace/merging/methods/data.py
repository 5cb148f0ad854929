"""Merging with statistics of the tasks' data, which the user brings: RegMean (Gram matrices) and Fisher averaging."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_subspace.merging.methods.registry import Inputs
from peft_subspace.merging.methods.sums import weighted_sum


def _average(inputs: Inputs) -> Tensor:
    """Sigma_k w_k theta_k / Sigma_k w_k."""
    total = sum(inputs.weights)
    if total == 0:
        raise ValueError(f"{inputs.name} has no statistics, and the weights sum to 0, so it has no mean; change the weights")
    return weighted_sum(inputs.tensors, [weight / total for weight in inputs.weights])


def regmean(inputs: Inputs) -> Tensor:
    """W^T = (Sigma_k w_k G_k)^-1 Sigma_k w_k G_k W_k^T: the linear layer whose outputs are nearest to those of all tasks.

    G_k = X_k^T X_k `[in, in]` is the Gram matrix of the layer's inputs in task k, its off-diagonal entries times
    `reduction`. Inputs that are always zero get the mean of the weights. Tensors without a Gram matrix are averaged.
    Cost: one Cholesky factorisation of `[in, in]` in float64.
    Source: RegMean (arXiv:2212.09849), equation 1 and section 3.2; weights are `[out, in]`, as in `nn.Linear`.
    """
    if inputs.statistics is None or inputs.tensors[0].dim() != 2:
        return _average(inputs)
    width = inputs.tensors[0].shape[1]
    total = torch.zeros(width, width, dtype=torch.float64, device=inputs.tensors[0].device)
    right = torch.zeros(width, inputs.tensors[0].shape[0], dtype=torch.float64, device=total.device)
    for tensor, given, weight in zip(inputs.tensors, inputs.statistics, inputs.weights, strict=True):
        if tuple(given.shape) != (width, width):
            raise ValueError(
                f"Gram matrix of {inputs.name} has shape {tuple(given.shape)}, expected {(width, width)}, as the weight is "
                f"{tuple(tensor.shape)} ([out, in])"
            )
        gram = given.to(total.device, torch.float64)
        diagonal = gram.diagonal()
        gram = gram * inputs.options["reduction"] + torch.diag(
            diagonal * (1 - inputs.options["reduction"]) + 1e-8 * diagonal.mean().clamp_min(1e-30)
        )
        total.add_(gram, alpha=weight)
        right.addmm_(gram, tensor.t().to(torch.float64), alpha=weight)
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed:
        raise ValueError(f"the weighted Gram matrices of {inputs.name} are not positive definite; use weights above 0")
    return torch.cholesky_solve(right, factor).t().to(inputs.tensors[0].dtype)


def fisher(inputs: Inputs) -> Tensor:
    """Sigma_k w_k F_k * theta_k / Sigma_k w_k F_k, entry by entry; F_k the diagonal Fisher information, at least `floor`.

    Tensors without Fisher information are averaged. That of different tasks may differ by orders of magnitude: bring each to
    one norm, or the least certain model wins.
    Cost: 1 read of the models and of as many statistics.
    Source: Fisher-weighted averaging (arXiv:2111.09832), equation 4.
    """
    if inputs.statistics is None:
        return _average(inputs)
    shares = [
        given.clamp_min(inputs.options["floor"]) * weight
        for given, weight in zip(inputs.statistics, inputs.weights, strict=True)
    ]
    divisor = weighted_sum(shares, [1.0] * len(shares))
    merged = torch.zeros_like(divisor)
    for tensor, share in zip(inputs.tensors, shares, strict=True):
        merged.addcmul_(tensor, share)
    return merged.div_(divisor)
