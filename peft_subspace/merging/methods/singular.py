"""Merging of matrices by their singular vectors: TSV-M, Iso-C, Iso-CTS. Vectors are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_subspace.merging.methods.registry import Inputs
from peft_subspace.merging.methods.sums import weighted_sum


def mean(inputs: Inputs) -> Tensor:
    """lambda Sigma_k w_k tau_k / Sigma_k w_k: for tensors that are not matrices."""
    total = sum(inputs.weights)
    factor = inputs.options["lambda"] / (total if abs(total) >= 1e-8 else 1.0)
    return weighted_sum(inputs.tensors, [weight * factor for weight in inputs.weights])


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows, if it is wide): U V^T of the SVD, on the range of x alone."""
    u, _, v = leading(x, min(x.shape))
    return u @ v


def leading(x: Tensor, rank: int, largest: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples `[m, q], [q], [q, n]`: q = `rank`, or the numerical rank of x if that is lower.

    Directions without strength (most of those of a LoRA's delta) are whatever LAPACK makes of rounding errors, at unit length:
    they must not take part when vectors are made orthogonal or singular values are levelled.

    Args:
        x: `[m, n]`.
        rank: Greatest number of triples.
        largest: What x's rounding errors are relative to; by default its largest singular value.
    """
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    rank = min(rank, numerical_rank(s, max(x.shape), largest))
    return u[:, :rank], s[:rank], v[:rank]


def numerical_rank(s: Tensor, size: int, largest: float | None = None) -> int:
    """How many singular values (descending) are above the rounding errors of the largest, in a matrix of this size."""
    if not s.numel():
        return 0
    return int((s > (float(s[0]) if largest is None else largest) * size * torch.finfo(s.dtype).eps).sum())


def tsv_m(inputs: Inputs) -> Tensor:
    """lambda U' diag(s_1 .. s_K) V': the leading triples of each w_k tau_k side by side, U' and V' made orthogonal.

    Each of K tasks gives min(m, n) / K triples, at least one, and no more than its rank. U' is the nearest matrix to
    [U_1 .. U_K] with orthonormal columns, V' the nearest to [V_1; ..; V_K] with orthonormal rows.
    Cost: K + 2 SVDs of an `[m, n]` matrix.
    Source: Task Singular Vectors (arXiv:2412.00081), algorithm 1; float32 or better, as LAPACK needs.
    """
    if inputs.tensors[0].dim() != 2:
        return mean(inputs)
    rank = max(1, min(inputs.shape) // len(inputs.tensors))
    triples = [leading(tensor * weight, rank) for tensor, weight in zip(inputs.tensors, inputs.weights, strict=True)]
    u = orthogonal(torch.cat([u for u, _, _ in triples], 1))
    v = orthogonal(torch.cat([v for _, _, v in triples], 0))
    s = torch.cat([s for _, s, _ in triples])
    return (u * (s * inputs.options["lambda"])) @ v


def iso_c(inputs: Inputs) -> Tensor:
    """lambda mean(s) U V^T, with U diag(s) V^T = Sigma_k w_k tau_k: all directions of the sum get the same strength.

    For a sum of low rank, only the directions that it has: the reference implementation fills up the rest at random.
    Cost: one SVD of an `[m, n]` matrix.
    Source: Iso-C (arXiv:2502.04959), equation 5.
    """
    if inputs.tensors[0].dim() != 2:
        return mean(inputs)
    u, s, v = leading(weighted_sum(inputs.tensors, inputs.weights), min(inputs.shape))
    return (u @ v).mul_(_mean(s) * inputs.options["lambda"])


def _shares(size: int, tasks: int, fraction: float) -> tuple[int, int]:
    """Directions of the common space, and of each task's: the rest, rounded to the same number for every task."""
    each = min(round((size - int(size * fraction)) / tasks), size // tasks)
    return size - each * tasks, each


def iso_cts(inputs: Inputs) -> Tensor:
    """As `iso_c`, but part of the directions are each task's own: those of tau_k outside the common space.

    The `common_space_fraction` leading directions of Sigma_k w_k tau_k stay; the others are replaced by the leading triples
    of (I - U_c U_c^T) w_k tau_k, the same number for each task. U and V of all of them are made orthogonal, and the
    singular values are replaced by their mean.
    Cost: K + 3 SVDs of an `[m, n]` matrix.
    Source: Iso-CTS (arXiv:2502.04959), algorithm 1.
    """
    if inputs.tensors[0].dim() != 2:
        return mean(inputs)
    tensors = [tensor * weight for tensor, weight in zip(inputs.tensors, inputs.weights, strict=True)]
    common, each = _shares(min(inputs.shape), len(tensors), inputs.options["common_space_fraction"])
    shared = leading(weighted_sum(tensors, [1.0] * len(tensors)), common)
    own = [leading(x - shared[0] @ (shared[0].t() @ x), each, float(torch.linalg.vector_norm(x))) for x in tensors]
    return _assemble([*own, shared]).mul_(inputs.options["lambda"])


def _assemble(triples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """mean(s) U' V' of several sets of singular triples, U' and V' made orthogonal."""
    u = orthogonal(torch.cat([u for u, _, _ in triples], 1))
    v = orthogonal(torch.cat([v for _, _, v in triples], 0))
    return (u @ v).mul_(_mean(torch.cat([s for _, s, _ in triples])))


def _mean(s: Tensor) -> float:
    return float(s.mean()) if s.numel() else 0.0
