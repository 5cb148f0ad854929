"""What becomes of K sparse deltas: their weighted sum, or the sum of those that agree with the elected sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_subspace.merging.methods.registry import Inputs
from peft_subspace.merging.methods.sums import weighted_sum


def add(inputs: Inputs, kept: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """lambda Sigma_k w_k s_k kept_k, over Sigma_k w_k if `normalize`.

    Args:
        inputs: For `weights`, `normalize` and `lambda`.
        kept: K tensors of one shape.
        scales: s_k.
    """
    factor = inputs.options["lambda"]
    if inputs.options["normalize"]:
        total = sum(inputs.weights)
        factor /= total if abs(total) >= 1e-8 else 1.0
    return weighted_sum(kept, [w * s * factor for w, s in zip(inputs.weights, scales, strict=True)], own=inputs.own)


def elect(inputs: Inputs, kept: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """lambda Sigma_{k: sign d_k = sign} w_k s_k kept_k / n, where sign = + if Sigma_k d_k >= 0, else -, entry by entry.

    mergekit elects by the weighted deltas, d_k = w_k s_k kept_k, and n is the sum of the weights that agree (1 if that is
    0, or without `normalize`). PEFT and the paper elect by d_k = s_k kept_k, and n counts those that agree, at least 1.
    With `majority_sign_method: frequency` heads are counted: Sigma_k sign d_k.

    Args:
        inputs: For `weights`, `normalize`, `lambda`, `majority_sign_method` and `semantics`.
        kept: K tensors of one shape, zeros where nothing is kept; overwritten, unless they are tensors that were lent to
            `inputs`.
        scales: s_k.

    Source: TIES-Merging (arXiv:2306.01708), section 3; the differences: `docs/merge-methods.md`.
    """
    weighted = inputs.semantics == "mergekit"
    before = [w * s if weighted else s for w, s in zip(inputs.weights, scales, strict=True)]
    after = [1.0 if weighted else w for w in inputs.weights]
    shares = inputs.weights if weighted else [1.0] * len(kept)
    lent = [None if inputs.own else tau for tau in inputs.tensors]
    ballots = [_scaled(x, factor, tau) for x, factor, tau in zip(kept, before, lent, strict=True)]
    if inputs.options["majority_sign_method"] == "frequency":
        tally = sum((ballot.sign() for ballot in ballots), torch.zeros_like(ballots[0]))
    else:
        tally = ballots[0] + ballots[1] if len(ballots) > 1 else ballots[0].clone()
        tally = _sum([tally, *ballots[2:]])
    sign = tally.sign_().add_(0.5).sign_()  # a tally of 0 elects +
    agreeing = [ballot.mul_(sign).clamp_min_(0) for ballot in ballots]  # |d_k| where it agrees, else 0
    merged = _mean(agreeing, after, shares) if inputs.options["normalize"] or not weighted else _sum(agreeing)
    factor = inputs.options["lambda"]
    return merged.mul_(sign) if factor == 1 else merged.mul_(sign).mul_(factor)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """Sigma_k tensors_k, in place of the first."""
    for tensor in tensors[1:]:
        tensors[0].add_(tensor)
    return tensors[0]


def _mean(agreeing: Sequence[Tensor], factors: Sequence[float], shares: Sequence[float]) -> Tensor:
    """Sigma_k factor_k agreeing_k / Sigma_k share_k, the second sum over those that are not 0; uses them up."""
    merged = agreeing[0] * factors[0]
    divisor = agreeing[0].sign_().mul_(shares[0])
    for tensor, factor, share in zip(agreeing[1:], factors[1:], shares[1:], strict=True):
        merged.add_(tensor, alpha=factor)
        divisor.add_(tensor.sign_(), alpha=share)
    return merged.div_(_without_zeros(divisor, shares))


def _scaled(kept: Tensor, factor: float, lent: Tensor | None) -> Tensor:
    """factor * kept, in place where `kept` is not the tensor that was lent."""
    return kept * factor if kept is lent else kept.mul_(factor)


def _without_zeros(divisor: Tensor, shares: Sequence[float]) -> Tensor:
    """The divisor with something else for 0, in place; where nothing agrees there is nothing to divide."""
    least = min(shares)
    if least > 0:
        return divisor.clamp_min_(least)  # several times faster than a mask
    return divisor.masked_fill_(divisor == 0, 1.0)
