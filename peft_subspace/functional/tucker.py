"""Tucker format: a tensor as a small core times one factor matrix per mode.

    T = G x_0 U_0 x_1 U_1 ... x_{N-1} U_{N-1}          G: [r_0, ..., r_{N-1}],  U_n: [d_n, r_n]

`x_n` is the n-mode product (Kolda & Bader, "Tensor Decompositions and Applications", SIAM Review 2009, section 2.5 and 4).
A factor of None stands for the identity: that mode of the core already has its full size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Factors = Sequence["Tensor | None"]


class Tucker(NamedTuple):
    """A core `[r_0, ..., r_{N-1}]` and its factors `[d_n, r_n]`."""

    core: Tensor
    factors: list[Tensor]


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """n-mode product: contract `matrix` `[d, r]` with mode `mode` (size r) of `tensor`; that mode then has size d.

    Cost: 2 d prod(tensor.shape) flops.
    """
    if mode == tensor.ndim - 1:  # then the result is contiguous as it comes
        return torch.tensordot(tensor, matrix, dims=([mode], [1]))
    return torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Mode-n unfolding `[d_n, prod of the others]`."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def reconstruct(core: Tensor, factors: Factors) -> Tensor:
    """The dense tensor `G x_0 U_0 ... x_{N-1} U_{N-1}`, shape `[d_0, ..., d_{N-1}]`.

    The modes that grow least are contracted first, so that the large product comes last and only once.
    Cost: about 2 r_max prod(d_n) flops.
    """
    growth = {mode: factor.shape[0] / factor.shape[1] for mode, factor in enumerate(factors) if factor is not None}
    for mode in sorted(growth, key=growth.__getitem__):
        factor = factors[mode]
        assert factor is not None
        core = mode_product(core, factor, mode)
    return core


def gradients(core: Tensor, factors: Factors, grad: Tensor) -> list[Tensor | None]:
    """Gradients of <grad, reconstruct(core, factors)> with respect to the core, then each factor (None for None).

    dG = grad x_0 U_0^T ... x_{N-1} U_{N-1}^T,      dU_n = grad_(n) (G x_{m != n} U_m)_(n)^T
    """
    found: list[Tensor | None] = [reconstruct(grad, [None if factor is None else factor.t() for factor in factors])]
    for mode, factor in enumerate(factors):
        others = [None if other == mode else f for other, f in enumerate(factors)]
        found.append(None if factor is None else unfold(grad, mode) @ unfold(reconstruct(core, others), mode).t())
    return found


def mode_spectrum(tensor: Tensor, mode: int) -> Tensor:
    """Singular values of the mode-n unfolding, descending, `[min(d_n, prod of the others)]`, float64.

    Read off the eigenvalues of the smaller Gram matrix in float64: relative to the largest, accurate to 1e-8.
    Cost: 2 m^2 M + O(m^3) flops for an unfolding of sides m <= M.
    """
    matrix = unfold(tensor, mode).to(torch.float64)
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()


def leading_directions(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """The `rank` leading left singular vectors of the mode-n unfolding, `[d_n, rank]`, float64, orthonormal columns.

    The sign is fixed (largest entry positive) so that two runs agree. When the unfolding has fewer than `rank`
    directions the rest completes the basis.
    """
    matrix = unfold(tensor, mode).to(torch.float64)
    vectors = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def ranks_for_energy(tensor: Tensor, energy: float) -> list[int]:
    """Smallest rank of each mode such that the truncated HOSVD keeps `energy` of the squared Frobenius norm.

    Mode n may discard at most (1 - energy) / N of ||T||^2, which bounds the total error of the truncation by
    (1 - energy) ||T||^2 (De Lathauwer et al. 2000, property 10). A zero tensor gets rank 1 everywhere.

    Args:
        tensor: `[d_0, ..., d_{N-1}]`.
        energy: share of the squared norm to keep, in (0, 1].
    """
    ranks = []
    for mode in range(tensor.ndim):
        spectrum = mode_spectrum(tensor, mode).square()
        discarded = spectrum.sum() - spectrum.cumsum(0)  # after keeping 1, 2, ... directions
        # 1e-12: what float64 cancellation leaves of a sum that is zero in exact arithmetic
        allowed = (1 - energy) / tensor.ndim * spectrum.sum() + 1e-12 * spectrum.sum()
        ranks.append(int((discarded > allowed).sum()) + 1)
    return ranks


def useful_ranks(ranks: Sequence[int]) -> list[int]:
    """Lower each rank to at most the product of the others: beyond it that unfolding of the core cannot use them."""
    ranks = list(ranks)
    for mode in sorted(range(len(ranks)), key=lambda n: -ranks[n]):
        others = math.prod(r for n, r in enumerate(ranks) if n != mode)
        ranks[mode] = min(ranks[mode], others)
    return ranks


def orthogonalize(core: Tensor, factors: Sequence[Tensor]) -> Tucker:
    """The same tensor with orthonormal factor columns: U_n = Q_n R_n, and R_n moves into the core.

    A factor with more columns than rows shrinks to `[d_n, d_n]`: its extra columns carried nothing. float64 inside.
    Cost: sum of 2 d_n r_n^2 flops.
    """
    core = core.to(torch.float64)
    bases = []
    for mode, factor in enumerate(factors):
        basis, upper = torch.linalg.qr(factor.to(torch.float64))
        core = mode_product(core, upper, mode)
        bases.append(basis)
    return Tucker(core, bases)


def compress(core: Tensor, factors: Sequence[Tensor], ranks: Sequence[int] | float) -> tuple[Tucker, float]:
    """Recompress a Tucker tensor without ever forming it.

    QR of the factors, then a Tucker decomposition (HOSVD refined by HOOI, tensorly) of the small core.

    Args:
        core: `[r_0, ..., r_{N-1}]`.
        factors: `[d_n, r_n]` each.
        ranks: the new ranks (lowered to useful ones), or the relative error that may be made (0.01 keeps 1 - 1e-4 of the
            squared norm).

    Returns:
        The compressed tensor in float64 with orthonormal factors, and the relative error ||T - T'|| / ||T|| made.

    Cost: QR of the factors plus O(sum_n r_n prod(r)) flops; memory of the core.
    """
    import tensorly  # here and not above: its import costs 0.3 s that only pruning and combining need to pay
    from tensorly.decomposition import tucker

    core, bases = orthogonalize(core, factors)
    wanted = ranks_for_energy(core, 1 - ranks**2) if isinstance(ranks, float) else list(ranks)
    wanted = [min(rank, size) for rank, size in zip(wanted, core.shape, strict=True)]
    norm = float(core.norm())
    if norm == 0.0 or wanted == list(core.shape):
        small = core[tuple(slice(rank) for rank in wanted)]
        return Tucker(small.clone(), [basis[:, :rank] for basis, rank in zip(bases, wanted, strict=True)]), 0.0
    with tensorly.backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Trying to compute SVD", UserWarning)  # a rank above the product of the others
        small, rotations = tucker(core, rank=wanted, init="svd", n_iter_max=20, tol=1e-12)
    for mode, rank in enumerate(useful_ranks(small.shape)):
        if rank < small.shape[mode]:  # loses nothing: the others leave no more directions
            rotation = leading_directions(small, mode, rank)
            small, rotations[mode] = mode_product(small, rotation.t(), mode), rotations[mode] @ rotation
    error = float((core - reconstruct(small, rotations)).norm()) / norm
    return Tucker(small, [basis @ rotation for basis, rotation in zip(bases, rotations, strict=True)]), error


def block_diagonal(cores: Sequence[Tensor]) -> Tensor:
    """Cores on the diagonal of a larger core, so that sum_k T_k = block_diagonal(G_k) x_n [U_n^1 | U_n^2 | ...]."""
    total = [sum(core.shape[mode] for core in cores) for mode in range(cores[0].ndim)]
    out = cores[0].new_zeros(total)
    start = [0] * cores[0].ndim
    for core in cores:
        stop = [a + n for a, n in zip(start, core.shape, strict=True)]
        out[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = core
        start = stop
    return out
