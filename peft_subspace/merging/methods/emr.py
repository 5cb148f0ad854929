"""EMR-Merging: elect one unified delta; each task gets it back through a mask and a scale of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peft_subspace.merging.methods.registry import Inputs
from peft_subspace.merging.methods.sums import weighted_sum


def unify(deltas: Sequence[Tensor]) -> Tensor:
    """sign * max_{k: sign tau_k = sign} |tau_k|, sign that of Sigma_k tau_k (- for 0), entry by entry."""
    total = weighted_sum(deltas, [1.0] * len(deltas))
    sign = total.sign_().mul_(2).sub_(1).sign_()
    largest = torch.zeros_like(sign)
    for delta in deltas:
        torch.maximum(largest, (delta * sign).clamp_min_(0), out=largest)
    return largest.mul_(sign)


def merge(inputs: Inputs) -> Tensor:
    """lambda tau_uni, the unified delta: `unify`. Without the tasks' masks and scales (`modulators`) it is half of EMR.

    Cost: 1 read, about 1 ns for each entry of each model.
    Source: EMR-Merging (arXiv:2405.17461), section 3.
    """
    return unify(inputs.tensors).mul_(inputs.options["lambda"])


def modulators(
    unified: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]]
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """What each task needs besides the unified delta: task k is theta_0 + scale_k mask_k * tau_uni.

    mask_k = (tau_k tau_uni > 0), scale_k = Sigma_tensors mean|tau_k| / Sigma_tensors mean|mask_k * tau_uni|.

    Args:
        unified: The unified delta, by tensor name.
        deltas: The K tasks' deltas, with the same names.

    Returns:
        K dicts of boolean masks, and K scales (1 if nothing is left of a task).

    Source: EMR-Merging (arXiv:2405.17461), section 3, and the official code, which sums the means of the tensors.
    """
    masks = [{name: delta[name] * unified[name] > 0 for name in unified} for delta in deltas]
    scales = []
    for delta, mask in zip(deltas, masks, strict=True):
        size = sum(float(delta[name].abs().mean()) for name in unified)
        kept = sum(float((unified[name].abs() * mask[name]).mean()) for name in unified)
        scales.append(size / kept if kept else 1.0)
    return masks, scales
