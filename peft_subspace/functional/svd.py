"""The leading singular values of a matrix with one of its two bases.

    W = sum_i s_i u_i v_i^T          W: [m, n],  s_1 >= s_2 >= ... >= 0

Only one basis is ever made: U^T W = diag(s) V^T gives the other one back. A basis is kept as rows, `[r, d]`, so that the
leading directions of a larger one are a view. All functions work on stacks of matrices `[*, m, n]`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["left", "right"]
Method = Literal["full", "gram", "lowrank"]
CHUNK = 1 << 14  # rows of a long matrix that a Gram matrix takes up at a time


class Singular(NamedTuple):
    """Singular values `[*, r]`, descending, and the left or right singular vectors as rows `[*, r, d]`."""

    values: Tensor
    basis: Tensor


@torch.no_grad()
def leading_singular(
    matrix: Tensor, rank: int, side: Side, method: Method = "gram", niter: int = 8, seed: int = 0, device: str = "auto"
) -> Singular:
    """The `rank` largest singular values and their vectors on one side.

    The sign of each vector is fixed (its largest entry is positive). Nothing here reads or moves the global random state.

    Args:
        matrix: `[*, m, n]`, any float dtype.
        rank: at most min(m, n).
        side: "left" gives u_i `[*, rank, m]`, "right" v_i `[*, rank, n]`.
        method: "gram": eigenvectors of the smaller Gram matrix in float64; the values are good to 1e-16 (s_1 / s_i)^2, and
            near ties turn by 1e-16 / gap where a float32 SVD turns them by 1e-7 / gap, so another machine finds the same
            vectors. "full": LAPACK's SVD in float32 (in float64 on the CPU where that fails). "lowrank": a randomised
            subspace (Halko et al. 2009): a good one, not the singular one, and another for every seed.
        niter: power iterations of "lowrank".
        seed: of "lowrank".
        device: where to compute, such as "cpu" or "cuda"; "auto" is where the matrix lies.

    Returns:
        float64 tensors ("gram") or float32 ones, on the matrix's device.

    Cost: gram 2 k^2 max(m, n) + O(k^3) flops in float64, k = min(m, n), and 8 k^2 bytes; full about 6 times that in
    float32; lowrank about 4 (niter + 1) m n (r + oversampling).
    """
    home = matrix.device
    if device != "auto":
        matrix = matrix.to(device)
    elif home.type == "mps":  # no float64 there
        matrix = matrix.cpu()
    if method == "gram":
        found = _by_gram(matrix, rank, side)
    elif method == "full":
        found = _by_svd(matrix, rank, side)
    else:
        found = _by_sampling(matrix, rank, side, niter, seed)
    if home.type == "mps":
        found = Singular(found.values.float(), found.basis.float())
    return Singular(found.values.to(home), _signed(found.basis).to(home))


def _gram(columns: Tensor) -> Tensor:
    """The Gram matrix of the rows `[*, k, long]` in float64."""
    parts = (part.double() for part in columns.split(CHUNK, dim=-1))
    total: Any = sum(part @ part.mT for part in parts)
    return total


def _by_gram(matrix: Tensor, rank: int, side: Side) -> Singular:
    smaller: Side = "left" if matrix.shape[-2] <= matrix.shape[-1] else "right"
    columns = matrix if smaller == "left" else matrix.mT
    squares, vectors = torch.linalg.eigh(_gram(columns))
    values = squares.flip(-1)[..., :rank].clamp_min(0).sqrt()
    basis = vectors.flip(-1)[..., :rank].mT
    if smaller != side:  # u_i = W v_i / s_i, and nothing where s_i is zero
        basis = basis @ columns.double() * inverse(values, max(matrix.shape[-2:]))[..., None]
    return Singular(values, basis.contiguous())


def _by_svd(matrix: Tensor, rank: int, side: Side) -> Singular:
    try:
        left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    except RuntimeError:  # no convergence, or a GPU without room for the workspace
        left, values, right = torch.linalg.svd(matrix.cpu().double(), full_matrices=False)
    basis = left.mT if side == "left" else right
    return Singular(values[..., :rank].float(), basis[..., :rank, :].float().contiguous())


def _by_sampling(matrix: Tensor, rank: int, side: Side, niter: int, seed: int) -> Singular:
    matrix = matrix.float()
    oversampled = min(*matrix.shape[-2:], rank + max(8, rank // 4))
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        left, _, right = torch.svd_lowrank(matrix, q=oversampled, niter=niter)
    basis = (left if side == "left" else right)[..., :rank].mT.contiguous()
    values = (basis @ (matrix if side == "left" else matrix.mT)).norm(dim=-1)  # what these directions really hold
    return Singular(values, basis)


def _signed(basis: Tensor) -> Tensor:
    largest = basis.gather(-1, basis.abs().argmax(-1, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0).to(basis.dtype)


def spectrum(matrix: Tensor) -> Tensor:
    """All singular values `[*, min(m, n)]`, descending, float64, read off the smaller Gram matrix. Keeps no vectors."""
    columns = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    return torch.linalg.eigvalsh(_gram(columns)).flip(-1).clamp_min(0).sqrt()


def inverse(values: Tensor, size: int) -> Tensor:
    """1 / s_i, and 0 for a direction that the matrix does not have: s_i <= s_1 size eps, eps that of float32.

    Args:
        values: `[*, r]`, descending.
        size: max(m, n) of the matrix.
    """
    present = values > values[..., :1] * (size * torch.finfo(torch.float32).eps)
    return torch.where(present, values.where(present, 1).reciprocal(), 0)


def rank_for_energy(values: Tensor, energy: float, total: float | None = None) -> int | None:
    """The smallest r whose leading values hold `energy` of the squared norm, sum_{i<=r} s_i^2 >= energy ||W||_F^2.

    Args:
        values: `[*, k]`; a stack gets one rank, for its squared norm as a whole.
        energy: share in (0, 1].
        total: ||W||_F^2, if `values` are not all of them.

    Returns:
        r >= 1; None if the values do not hold that much.
    """
    held = values.double().square().flatten(0, -2).sum(0) if values.ndim > 1 else values.double().square()
    cumulative = held.cumsum(0)
    wanted = energy * (float(cumulative[-1]) if total is None else total)
    # 1e-12: what float64 leaves of a sum whose order differs
    reached = (cumulative >= wanted * (1 - 1e-12)).nonzero()
    return int(reached[0]) + 1 if len(reached) else None


def probe(basis: Tensor) -> Tensor:
    """p_i = (a^T u_i)^2 for a fixed unit vector a: does not see signs, sees every turn of the vectors. `[*, r, d] -> [*, r]`.

    a_j is proportional to cos(sqrt(2) j^2), a chirp: the same on every machine, and no direction of a trained weight.
    """
    steps = torch.arange(1, basis.shape[-1] + 1, dtype=torch.float64, device="cpu")
    chirp = torch.cos(math.sqrt(2) * steps.square()).to(basis.device)
    return (basis.double() @ (chirp / chirp.norm())).square()


def _distance(found: Tensor, saved: Tensor) -> float:
    saved = saved.to(found.device, torch.float64)
    return float((found.double() - saved).norm() / saved.norm().clamp_min(1e-300))


def differs(
    values: Tensor, found: Tensor, saved: Tensor, saved_probe: Tensor, dtype: torch.dtype = torch.float32
) -> str | None:
    """How a recomputed basis differs from the one that an adapter was trained with, or None.

    Values may differ by 1e-4, the probe by 2e-3 of its norm: a rounding of the weight to bfloat16 or int8 turns the vectors
    of a near tie by more (and the adapter's effect with them), another machine by less.

    Args:
        values: recomputed values `[*, r]`.
        found: recomputed probe `[*, r]`.
        saved: values in the file.
        saved_probe: probe in the file.
        dtype: of the basis whose probe was taken.
    """
    unit = max(torch.finfo(saved.dtype).eps, 1e-5)  # a file in a narrow dtype has rounded them
    of_basis = torch.finfo(dtype).eps
    of_values, of_probe = _distance(values, saved), _distance(found, saved_probe)
    if not of_values <= max(1e-4, unit):  # NaN differs too
        return f"the singular values differ by {of_values:.1e} (at most 1e-4)"
    if not of_probe <= max(2e-3, 4 * unit, 4 * of_basis):
        return f"the singular vectors have turned: the probe differs by {of_probe:.1e} (at most 2e-3)"
    return None
