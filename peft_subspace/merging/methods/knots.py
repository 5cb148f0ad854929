"""KnOTS: align K deltas in one basis by an SVD of them side by side, then merge the coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peft_subspace.merging.methods.consensus import add, elect
from peft_subspace.merging.methods.registry import Inputs
from peft_subspace.merging.methods.singular import numerical_rank
from peft_subspace.merging.methods.thresholds import exact_top


def _merge_blocks(inputs: Inputs, blocks: Sequence[Tensor]) -> Tensor:
    """Merge K tensors of one shape by the inner method: TIES, or a weighted sum."""
    inner = replace(inputs, tensors=blocks)
    ones = [1.0] * len(blocks)
    if inputs.options["inner"] == "task_arithmetic":
        return add(inner, blocks, ones)
    kept = [exact_top(x, given["density"]) for x, given in zip(blocks, inputs.per_model, strict=True)]
    return elect(inner, kept, ones)


def align(deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """[tau_1 .. tau_K] = U diag(s) [V_1 .. V_K]: one basis of the outputs for all, coefficients for each.

    Args:
        deltas: K matrices `[m, n]`.

    Returns:
        U `[m, q]`, s `[q]`, and K blocks V_k `[q, n]`; q is the numerical rank.
    """
    u, s, v = torch.linalg.svd(torch.cat(list(deltas), 1), full_matrices=False)
    rank = numerical_rank(s, max(u.shape[0], v.shape[1]))  # the others carry rounding errors of unit length in V
    return u[:, :rank], s[:rank], list(v[:rank].split([delta.shape[1] for delta in deltas], 1))


def align_factors(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As `align` for tau_k = B_k A_k, without forming any tau_k.

    [B_1 A_1 .. B_K A_K] = [B_1 .. B_K] diag(A_1 .. A_K) with A_k = R_k^T Q_k^T, so only a small matrix is decomposed.

    Args:
        factors: K pairs B_k `[m, r_k]`, A_k `[r_k, n_k]`.

    Cost: a QR of `[m, R]`, K of `[n, r_k]`, one SVD of `[R, R]`, R = Sigma r_k.
    """
    q_left, left = torch.linalg.qr(torch.cat([b for b, _ in factors], 1))
    rights = [torch.linalg.qr(a.t()) for _, a in factors]
    small = torch.cat(
        [block @ r.t() for block, (_, r) in zip(left.split([b.shape[1] for b, _ in factors], 1), rights, strict=True)], 1
    )
    u, s, v = torch.linalg.svd(small, full_matrices=False)
    rank = numerical_rank(s, max(small.shape))
    blocks = v[:rank].split([r.shape[0] for _, r in rights], 1)
    return q_left @ u[:, :rank], s[:rank], [block @ q.t() for block, (q, _) in zip(blocks, rights, strict=True)]


def merge(inputs: Inputs) -> Tensor:
    """U diag(s) merge(V_1 .. V_K): the aligned coefficients (`align`) are merged by TIES, or added.

    Tensors that are not matrices are merged by the inner method itself.
    Cost: one SVD of `[m, K n]`.
    Source: KnOTS (arXiv:2410.19735), equations 2 to 4.
    """
    if inputs.tensors[0].dim() != 2:
        return _merge_blocks(inputs, inputs.tensors)
    u, s, blocks = align(inputs.tensors)
    return (u * s) @ _merge_blocks(inputs, blocks)


def merge_factors(factors: Sequence[tuple[Tensor, Tensor]], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`merge` of low-rank deltas, as factors B `[m, q]` and A `[q, n]`, q at most Sigma r_k.

    Args:
        factors: K pairs B_k, A_k, of one `[m, n]`.
        inputs: For the parameters; its tensors are not read.
    """
    u, s, blocks = align_factors(factors)
    return u * s, _merge_blocks(inputs, blocks)
