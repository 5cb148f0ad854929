"""A weight as a product of thin factors: the best ones, also for the inputs that the weight really sees.

    W ~ R L          R: [out, k],  L: [k, in]
    W ~ C x_out R x_in L^T          a kernel: core C [k_out, k_in, *kernel] (Tucker-2)

Source: PELA (arXiv:2310.10700) and its official `low_rank.py`: truncated SVD, singular values split half and half. Weighting
by the inputs is that of ASVD and SVD-LLM in exact form; the Tucker-2 decomposition is tensorly's HOOI.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from . import svd


@torch.no_grad()
def two_factors(weight: Tensor, rank: int, moment: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """The rank-k product R L nearest to W: in the Frobenius norm, or for the inputs x that the layer gets.

        min ||W - R L||_F                                   U, s, V = svd(W),   R = U_k s_k^(1/2),  L = s_k^(1/2) V_k^T
        min E ||W x - R L x||^2 = ||(W - R L) M^(1/2)||_F^2,  M = E[x x^T]:    R L = U_k U_k^T W with U of W M^(1/2)

    No inverse of M^(1/2) is taken, so a singular M (fewer tokens than features) does no harm. Both factors get the same norm.

    Args:
        weight: `[*, out, in]`, any float dtype; a stack is factored one by one.
        rank: k, at most min(out, in).
        moment: M, `[*, in, in]`; or its diagonal `[*, in]` (an embedding's token frequencies).
        options: `method`, `niter`, `seed`, `device` of `functional.svd.leading_singular`.

    Returns:
        R `[*, out, k]` and L `[*, k, in]`, float32 (float64 for a float64 weight).

    Cost: that of `leading_singular`, in float64 for "gram"; with a moment, 2 out in^2 + O(in^3) flops more.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    matrix = weight.to(dtype)
    if moment is None:
        side: svd.Side = "left" if weight.shape[-2] <= weight.shape[-1] else "right"
        values, basis = svd.leading_singular(matrix, rank, side, **options)
        basis = basis.to(dtype)
        root = values.to(dtype).sqrt()
        inverse = svd.inverse(values, max(weight.shape[-2:])).to(dtype).sqrt()
        if side == "left":
            return basis.mT * root[..., None, :], inverse[..., None] * (basis @ matrix)
        return matrix @ basis.mT * inverse[..., None, :], root[..., None] * basis
    diagonal = moment.ndim < weight.ndim
    weighted = matrix * moment.to(dtype).sqrt()[..., None, :] if diagonal else matrix @ root_of(moment).to(dtype)
    _, basis = svd.leading_singular(weighted, rank, "left", **options)
    return balanced(basis.to(dtype).mT, basis.to(dtype) @ matrix)


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with R^T R = L L^T: both factors as large, as after a truncated SVD.

    Args:
        up: R `[*, out, k]`.
        down: L `[*, k, in]`.

    Cost: QR of both and an SVD of k x k; the product is not formed.
    """
    left, upper = torch.linalg.qr(up.double())
    right, lower = torch.linalg.qr(down.double().mT)
    u, values, v = torch.linalg.svd(upper @ lower.mT)
    root = values.sqrt()
    return (left @ (u * root[..., None, :])).to(up.dtype), ((right @ v.mT) * root[..., None, :]).mT.to(down.dtype)


def root_of(moment: Tensor) -> Tensor:
    """M^(1/2) of a symmetric positive semi-definite `[*, n, n]`, float64."""
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors * values.clamp_min(0).sqrt()[..., None, :] @ vectors.mT


@torch.no_grad()
def tucker2(weight: Tensor, ranks: tuple[int, ...], moment: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel as a small one between two channel mixers, W ~ C x_out R x_in L^T: HOOI over the two channel modes.

    Args:
        weight: `[out, in, *kernel]`.
        ranks: (k_out, k_in).
        moment: E[x x^T] `[in, in]` of the input channels: then ||(W - W') x_in M^(1/2)|| is made small, with 1e-6 of its mean
            added to M's diagonal.

    Returns:
        R `[out, k_out]`, C `[k_out, k_in, *kernel]`, L `[k_in, in]`, float32 (float64 for float64), with one norm for the
        columns of R, the rows of L and the whole core.

    Cost: about 20 sweeps of two SVDs of the narrow unfoldings.
    """
    import tensorly  # here: its import costs 0.3 s that other layers need not pay
    from tensorly.decomposition import partial_tucker

    dtype = torch.promote_types(weight.dtype, torch.float32)
    tensor, back = weight.double(), None
    if moment is not None:
        values, vectors = torch.linalg.eigh(moment.double())
        root = (values.clamp_min(0) + 1e-6 * values.mean().clamp_min(1e-300)).sqrt()
        tensor = torch.tensordot(vectors * root @ vectors.mT, tensor, dims=([1], [1])).movedim(0, 1)
        back = vectors / root @ vectors.mT
    with tensorly.backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Trying to compute SVD", UserWarning)  # a rank above the product of the others
        (core, (up, thin)), _ = partial_tucker(tensor, rank=list(ranks), modes=[0, 1], n_iter_max=20, tol=1e-8)
    thin = thin if back is None else back @ thin
    scale = float(core.norm()) ** (1 / 3) or 1.0
    return (up * scale).to(dtype), (core / scale**2).to(dtype), (thin.mT * scale).to(dtype)


def compose(up: Tensor, core: Tensor | None, down: Tensor, kernel: int = 0) -> Tensor:
    """The dense weight of factors: R L, or the kernel C x_out R x_in L^T.

    Args:
        up: R `[*, out, k_out]`.
        core: C `[*, k_out, k_in, *kernel]`, or None.
        down: L `[*, k_in, in]`.
        kernel: number of the kernel's modes.

    Returns:
        `[*, out, in]`, or `[*, out, in, prod(kernel)]` with a core.
    """
    if core is None:
        return up @ down
    flat = core.flatten(-kernel)
    return torch.einsum("...oa,...aik->...oik", up, torch.einsum("...abk,...bi->...aik", flat, down))
