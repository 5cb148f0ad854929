"""Sums of low-rank matrices, exact and truncated, without forming any of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import svd


def stack(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Sigma_k w_k B_k A_k = [w_1 B_1 .. w_K B_K] [A_1; ..; A_K]: exact, of rank Sigma r_k.

    Args:
        factors: K pairs B_k `[out, r_k]`, A_k `[r_k, in]`.
        weights: K numbers, of any sign.

    Returns:
        B `[out, Sigma r_k]`, A `[Sigma r_k, in]`.
    """
    left = torch.cat([b * weight for (b, _), weight in zip(factors, weights, strict=True)], 1)
    return left, torch.cat([a for _, a in factors], 0)


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """`svd.rank_for_energy` of all singular values; 0 for a matrix of zeros, which a product of rank 0 is."""
    if not singular_values.any():
        return 0
    return svd.rank_for_energy(singular_values, min(energy, 1.0)) or singular_values.numel()


def truncate_sum(
    factors: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Tensor, Tensor, float]:
    """The best approximation B A of Sigma_k w_k B_k A_k with a given rank, or of a given energy.

    With the stacked factors L R (`stack`) and the QR decompositions L = Q_l T_l, R^T = Q_r T_r, the sum is
    Q_l (T_l T_r^T) Q_r^T: an SVD of the small `[R, R]` matrix is the SVD of the sum.

    Args:
        factors: K pairs B_k `[out, r_k]`, A_k `[r_k, in]`, in any float dtype; the computation is in float32 or better.
        weights: K numbers, by default ones.
        rank: Of the result; may be larger than that of the sum, which is then padded with zeros. None: as `energy` says, or
            Sigma r_k at most.
        energy: Share of the sum of the squared singular values that the result must have, in (0, 1].

    Returns:
        B `[out, rank]`, A `[rank, in]`, both with the square roots of the singular values; and the share of the energy that
        is discarded, |sum - B A|^2 / |sum|^2 (Frobenius), 0 if the sum is zero.

    Raises:
        ValueError: No factors, shapes that do not fit, a rank below 1, or an energy outside (0, 1].

    Cost: 2 (out + in) R^2 flops for the QR decompositions and an SVD of `[R, R]`, R = Sigma r_k; where R exceeds a side of the
    sum, that side bounds it. PEFT's `add_weighted_adapter(combination_type="svd")` decomposes the dense `[out, in]` sum.
    Source: the usual compression of a sum of low-rank matrices (recompression by QR and SVD).
    """
    if not factors:
        raise ValueError("there are no factors to be summed")
    weights = [1.0] * len(factors) if weights is None else weights
    _check(factors, weights, rank, energy)
    dtype = torch.promote_types(torch.float32, factors[0][0].dtype)
    left, right = stack([(b.to(dtype), a.to(dtype)) for b, a in factors], weights)
    q_left, t_left = torch.linalg.qr(left)
    q_right, t_right = torch.linalg.qr(right.t())
    u, s, v = torch.linalg.svd(t_left @ t_right.t(), full_matrices=False)
    kept = s.numel() if energy is None else max(1, rank_for_energy(s, energy))
    kept = min(kept, rank) if rank is not None else kept
    root = s[:kept].sqrt()
    b, a = (q_left @ u[:, :kept]) * root, root.unsqueeze(1) * (v[:kept] @ q_right.t())
    if rank is not None and rank > kept and energy is None:  # every layer of an adapter may be asked for one rank
        missing = rank - kept
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], 1)
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])], 0)
    squares = s.double().square()
    total = float(squares.sum())
    return b, a, float(squares[kept:].sum()) / total if total else 0.0


def _check(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], rank: int | None, energy: float | None) -> None:
    """Raise a ValueError unless the factors are of one sum, and the rank and energy are possible."""
    if len(weights) != len(factors):
        raise ValueError(f"got {len(weights)} weights for {len(factors)} pairs of factors")
    shapes = [(tuple(b.shape), tuple(a.shape)) for b, a in factors]
    out, width = factors[0][0].shape[0], factors[0][1].shape[-1]
    for b, a in shapes:
        if len(b) != 2 or len(a) != 2 or b[1] != a[0] or b[0] != out or a[1] != width:
            raise ValueError(f"factors must be [out, r] and [r, in] with out={out} and in={width}, got {b} and {a}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}: expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy}: expected a number in (0, 1]")
