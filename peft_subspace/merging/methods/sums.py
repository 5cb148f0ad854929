"""Sums over a whole tensor that do not depend on how it is cut, nor on threads: by block or row, then exactly rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_subspace.merging.methods.registry import BLOCK, Inputs


def block_sums(x: Tensor) -> list[float]:
    """Sums of blocks of `BLOCK` entries, row by row.

    A block is summed by one thread in a fixed order; more than a block would be split among threads.

    Args:
        x: `[n]` from a multiple of `BLOCK` on, or whole rows `[rows, columns]`.
    """
    if x.dim() == 1 and x.numel() % BLOCK == 0:
        return x.view(-1, BLOCK).sum(1).tolist()
    rows = x if x.dim() == 2 else x.view(1, -1)
    whole = rows.shape[1] // BLOCK * BLOCK
    found = [rows[:, :whole].reshape(-1, BLOCK).sum(1)] if whole else []
    if whole < rows.shape[1]:
        found.append(rows[:, whole:].contiguous().sum(1))
    return torch.cat(found).tolist()


@dataclass
class Ratio:
    """For each model, Sigma |tau| / Sigma |kept|: what brings the kept entries up to the L1 norm of the delta.

    1 where either sum is below 1e-7. Source: mergekit's `rescale`.
    """

    keep: Callable[[Inputs, int], Tensor]
    name: str = "ratio"

    def begin(self, count: int, inputs: Inputs) -> Any:
        return [([], []) for _ in inputs.tensors]

    def update(self, state: Any, inputs: Inputs) -> None:
        for k, (before, after) in enumerate(state):
            kept = self.keep(inputs, k)
            after += block_sums(kept.abs())
            before += block_sums(inputs.tensors[k].abs()) if kept is not inputs.tensors[k] else ()

    def finish(self, state: Any) -> Any:
        return [ratio(math.fsum(before), math.fsum(after)) for before, after in state]


def ratio(before: float, after: float) -> float:
    """before / after, or 1 where either is below 1e-7."""
    return 1.0 if before < 1e-7 or after < 1e-7 else before / after


def row_sums(x: Tensor) -> Tensor:
    """`[rows]` float64: the sums of `[rows, columns]` along the rows, each by one thread in a fixed order."""
    whole = x.shape[1] // BLOCK * BLOCK
    blocks = x[:, :whole].reshape(x.shape[0], -1, BLOCK).sum(2) if whole else x.new_zeros(x.shape[0], 0)
    rest = x[:, whole:].sum(1, keepdim=True)
    return torch.cat([blocks, rest], 1).to(torch.float64).sum(1)


@dataclass
class Gram:
    """All dot products of K tensors: float64 `[K, K]` over the whole tensor, or `[rows, K, K]` for each row.

    Args:
        vectors: Gives the K tensors of a part: `[n]`, or `[rows, columns]`.
        by_row: One matrix for each row.
    """

    vectors: Callable[[Inputs], Sequence[Tensor]]
    by_row: bool = False
    name: str = "gram"

    def begin(self, count: int, inputs: Inputs) -> Any:
        size = len(self.vectors(inputs))
        return {(i, j): [] for i in range(size) for j in range(i, size)}

    def update(self, state: Any, inputs: Inputs) -> None:
        vectors = self.vectors(inputs)
        for (i, j), sums in state.items():
            product = vectors[i] * vectors[j]
            if self.by_row:
                sums.append(row_sums(product).cpu())
            else:
                sums += block_sums(product)

    def finish(self, state: Any) -> Any:
        size = max(j for _, j in state) + 1
        if self.by_row:
            found = {place: torch.cat(sums) for place, sums in state.items()}
        else:
            found = {place: torch.tensor(math.fsum(sums), dtype=torch.float64) for place, sums in state.items()}
        rows = [torch.stack([found[min(i, j), max(i, j)] for j in range(size)], -1) for i in range(size)]
        return torch.stack(rows, -2)


def weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float], own: bool = False) -> Tensor:
    """Sigma_k c_k x_k, in order; in place of x_0 if `own`."""
    total = tensors[0].mul_(coefficients[0]) if own else tensors[0] * coefficients[0]
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total.add_(tensor, alpha=coefficient)
    return total
