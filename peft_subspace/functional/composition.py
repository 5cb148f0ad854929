"""Weights that are composed of others, W = W_0 + sum_t lambda_t tau_t, and the gradients of what they are composed with.

    block        W[e] = W_0[e] + sum_t lambda[t] tau_t[e]
    groups       W[e] = W_0[e] + sum_t lambda[t, pi(e)] tau_t[e]          pi: entry -> one of K groups (a row, a column, a part)
    gradient     dL/dlambda[t, k] = sum of G[e] tau_t[e] over the entries e with pi(e) = k,      G = dL/dW

W is made outside of autograd. The graph gets one node, whose backward takes the one G, forms the inner products in chunks and
drops it: nothing of the size of T weights is kept, whatever T is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import triton_kernels
from .choices import Constraint
from .groups import Groups
from .low_rank import plain_backward

CHUNK = 2**19  # values at a time: few calls, and what is converted to float32 for one of them stays near the core

PullBack = Callable[[Tensor], Sequence[Tensor | None]]


class Vector(Protocol):
    """One tau of one weight."""

    def part(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Values [start, stop) of the flat weight, in the dtype and on the device of `like`."""


class Dense:
    """tau = scale * values, in memory.

    Args:
        values: `[n]`, any float dtype.
        scale: a number that every value is multiplied with.
        follows: keep a copy on the device where the vector is asked for, instead of sending each part there.
    """

    def __init__(self, values: Tensor, scale: float = 1.0, follows: bool = True) -> None:
        self.values, self.scale, self.follows = values, scale, follows

    def on(self, device: torch.device) -> Tensor:
        """All values, without the scale: on that device, if they may stay there."""
        if self.follows and self.values.device != device:
            self.values = self.values.to(device)
        return self.values

    def part(self, start: int, stop: int, like: Tensor) -> Tensor:
        self.on(like.device)
        part = self.values[start:stop].to(like.device, like.dtype, non_blocking=True)
        return part if self.scale == 1.0 else part * self.scale

    def __deepcopy__(self, memo: Any) -> Dense:
        return self  # frozen values: a copied model looks at the same ones


class LowRank:
    """tau = left right, `[rows, r]` and `[r, columns]`: never formed for a whole block."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right

    @property
    def rank(self) -> int:
        """r."""
        return self.right.shape[0]

    def to(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors on the device of `like`, where they stay, and in its dtype."""
        left, right = self.left.to(like.device), self.right.to(like.device)
        self.left, self.right = left, right  # after both have moved: another thread may be here
        return left.to(like.dtype), right.to(like.dtype)

    def part(self, start: int, stop: int, like: Tensor) -> Tensor:
        left, right = self.to(like)
        columns = right.shape[1]
        first, last = start // columns, -(-stop // columns)
        return (left[first:last] @ right).reshape(-1)[start - first * columns : stop - first * columns]

    def __deepcopy__(self, memo: Any) -> LowRank:
        return self


def constrained(numbers: Tensor, constraint: Constraint | None) -> Tensor:
    """lambda of what is trained, `[T]` or `[T, K]`: max(c, 0), or the softmax over the T vectors."""
    if constraint == "nonnegative":
        return numbers.clamp_min(0)
    return torch.softmax(numbers, 0) if constraint == "softmax" else numbers


def through_constraint(grad: Tensor, numbers: Tensor, constraint: Constraint | None) -> Tensor:
    """dL/dc from dL/dlambda, for `constrained`: 0 where c < 0; lambda[t] (g[t] - sum_s lambda[s] g[s]) for the softmax.

    Written out: a graph of its own inside of a backward would make activation checkpointing compute its segment again.
    """
    if constraint == "nonnegative":
        return grad * (numbers >= 0)
    if constraint == "softmax":
        shares = torch.softmax(numbers, 0)
        return shares * (grad - (shares * grad).sum(0))
    return grad


def stacked(vectors: Sequence[Vector | None], like: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The factors of all low-rank vectors side by side, and how many directions each has: `[rows, R]`, `[R, columns]`, T ranks.

    Args:
        vectors: T of them; those without factors are left out, and have rank 0.
        like: gives device and dtype.
    """
    pairs = [vector.to(like) for vector in vectors if isinstance(vector, LowRank)]
    left, right = torch.cat([pair[0] for pair in pairs], 1), torch.cat([pair[1] for pair in pairs])
    return left, right, [vector.rank if isinstance(vector, LowRank) else 0 for vector in vectors]


def spread(numbers: Tensor, ranks: Sequence[int]) -> Tensor:
    """One number of each vector `[T]` for every direction that it has: `[R]`.

    Not by an index: that would be sent to the device in every call, and inductor of torch 2.13 writes C++ that does not compile
    where it gathers and scatters by one constant index.
    """
    return torch.cat([number.expand(rank) for number, rank in zip(numbers, ranks, strict=True)])


# Composing and its gradient ----------------------------------------------------------------------------------------------


@torch.no_grad()
def accumulate(total: Tensor, vectors: Sequence[Vector | None], coefficients: Tensor, groups: Groups | None = None) -> None:
    """total += sum_t lambda_t tau_t, in place.

    Args:
        total: the weight, contiguous, float32 or float64.
        vectors: T of them, None for zero.
        coefficients: lambda, `[T]`; `[T, K]` with groups.
        groups: pi.

    Cost: 2 n flops and one pass over tau for each dense vector, 2 n r for one of low rank; memory for one chunk.
    """
    flat, numbers = total.view(-1), _numbers(coefficients, total)
    dense = []
    for number, vector in zip(numbers, vectors, strict=True):
        if isinstance(vector, LowRank) and groups is None:
            left, right = vector.to(total)
            total.view(left.shape[0], -1).addmm_(left * number, right)
        elif vector is not None:
            dense.append((number, vector))
    fused = _fused([vector for _, vector in dense], flat, groups)
    if fused and total.dtype == torch.float32:
        own = torch.stack([torch.as_tensor(number, device=flat.device) * fused[i].scale for i, (number, _) in enumerate(dense)])
        triton_kernels.compose(flat, [vector.values for vector in fused], own.to(total.dtype))
        return
    for start, part in _chunks(flat, groups) if dense else ():
        stop = start + part.numel()
        here = None if groups is None else groups.at(start, stop, part.device)
        for number, vector in dense:
            values = vector.part(start, stop, part)
            if here is not None:
                part.addcmul_(values, here.spread(number))
            elif isinstance(number, float):
                part.add_(values, alpha=number)
            else:
                part.addcmul_(values, number)


def _numbers(coefficients: Tensor, total: Tensor) -> list[Any]:
    """Rows of the coefficients. On a CPU plain numbers are faster; elsewhere they would make the device wait."""
    coefficients = coefficients.detach().to(total.device, total.dtype)
    return coefficients.tolist() if coefficients.ndim == 1 and total.device.type == "cpu" else list(coefficients)


def _fused(vectors: Sequence[Vector], flat: Tensor, groups: Groups | None) -> list[Dense]:
    """These vectors, on the device, if the kernels are on and can take all of them; else none."""
    dense = [vector for vector in vectors if isinstance(vector, Dense)]
    if groups is not None or len(dense) < len(vectors) or not triton_kernels.is_on(flat):
        return []
    return dense if triton_kernels.fits([vector.on(flat.device) for vector in dense], flat) else []


def _chunks(flat: Tensor, groups: Groups | None = None) -> Any:
    step = CHUNK if groups is None else groups.step(CHUNK)
    for start in range(0, flat.numel(), step):
        yield start, flat[start : start + step]


@torch.no_grad()
def inner_products(grad: Tensor, vectors: Sequence[Vector | None], groups: Groups | None = None) -> Tensor:
    """<G, tau_t> for every vector: `[T]`, with groups `[T, K]`, float64 sums of float32 (or wider) chunks.

    Args:
        grad: G, of the weight's shape and any float dtype.
        vectors: T of them, None for zero.
        groups: pi.

    Cost: 2 n flops for each dense vector, 2 n r for one of low rank; reads G once and every tau once; memory for one chunk.
    """
    grad = grad.to_dense() if grad.is_sparse else grad
    flat = grad.reshape(-1)
    wide = torch.promote_types(grad.dtype, torch.float32)
    sums = torch.zeros(len(vectors), 1 if groups is None else groups.count, dtype=torch.float64, device=grad.device)
    low_rank = {t: v for t, v in enumerate(vectors) if isinstance(v, LowRank) and groups is None}
    dense = [(t, vector) for t, vector in enumerate(vectors) if vector is not None and t not in low_rank]
    for t, factors in low_rank.items():
        sums[t] = _low_rank_product(flat, factors, wide)
    fused = _fused([vector for _, vector in dense], flat, groups)
    if fused:
        found = triton_kernels.inner_products(flat, [vector.values for vector in fused])
        for i, (t, _) in enumerate(dense):
            sums[t] = found[i] * fused[i].scale
        return sums[:, 0]
    products = []
    for start, part in _chunks(flat, groups) if dense else ():
        part, stop = part.to(wide), start + part.numel()
        here = None if groups is None else groups.at(start, stop, part.device)
        for t, vector in dense:
            values = vector.part(start, stop, part)
            if here is None:
                products.append(torch.dot(values, part))  # added up at once: an addition each costs a tenth of the pass
            else:
                here.collect(sums[t], values * part)
    if products:
        sums[[t for t, _ in dense], 0] = torch.stack(products).view(-1, len(dense)).double().sum(0)
    return sums[:, 0] if groups is None else sums


def _low_rank_product(flat: Tensor, vector: LowRank, dtype: torch.dtype) -> Tensor:
    """<G, L R> = sum of (L^T G) * R, by blocks of rows of G."""
    left, right = vector.to(flat.new_empty(0, dtype=dtype))
    columns = right.shape[1]
    step = max(1, CHUNK // columns)
    inner = torch.zeros_like(right)
    for first in range(0, left.shape[0], step):
        rows = left[first : first + step]
        inner.addmm_(rows.t(), flat[first * columns : (first + len(rows)) * columns].view(-1, columns).to(dtype))
    return (inner.double() * right).sum()


def combination(
    vectors: Sequence[Vector | None], coefficients: Tensor, shape: Sequence[int], groups: Groups | None = None
) -> Tensor:
    """sum_t lambda_t tau_t as a whole tensor with an ordinary graph: the definition that the rest is tested against.

    Args:
        vectors: T of them, None for zero.
        coefficients: `[T]`, with groups `[T, K]`; the sum is in their dtype, at least float32.
        shape: of the weight.
        groups: pi.

    Cost: T products of the size of the weight, and as many for backward.
    """
    size = math.prod(shape)
    total = coefficients.new_zeros(size, dtype=torch.promote_types(coefficients.dtype, torch.float32))
    where = None if groups is None else groups.part(0, size, total.device)
    for number, vector in zip(coefficients.to(total.dtype), vectors, strict=True):
        if vector is not None:
            total = total + vector.part(0, size, total) * (number if where is None else number[where])
    return total.view(*shape)


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, effective: list[Tensor], pull_back: PullBack, *trained: Tensor) -> Tensor:
        ctx.pull_back = pull_back
        return effective[0]  # in a list, so that the weight is no input: an input that is returned would be copied

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.pull_back(grad)


def composed(effective: Tensor, pull_back: PullBack, trained: Sequence[Tensor]) -> Tensor:
    """The composed weight as a node of the graph: the same memory, with gradients for what it was composed with.

    To be called where the weight is used, not before the model runs: nodes run backward in the order in which they were made,
    and one that was made early keeps its G until the end (measured: twice the peak).

    Args:
        effective: the weight, made without a graph.
        pull_back: dL/dW -> one gradient (or None) for each of `trained`. What it needs of their present values it has kept.
        trained: the tensors that the weight depends on.

    Cost: none forward; backward what `pull_back` costs. Keeps nothing but what `pull_back` holds. Once differentiable.
    """
    result: Tensor = _Composed.apply([effective], pull_back, *trained)
    return result
