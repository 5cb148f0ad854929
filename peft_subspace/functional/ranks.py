"""How many directions a compressed weight keeps: by a ratio, by energy, or out of one budget for all weights.

Two factors of rank k replace out * in numbers by k (out + in); they save something iff k < out in / (out + in), the break-even.
A convolution of o outputs, i inputs and kernel volume K becomes a Tucker-2 tensor of k_o o + k_o k_i K + k_i i numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """The matrix, or kernel, that is compressed as one: out features, in features, kernel volume."""

    rows: int
    columns: int
    volume: int = 1

    @property
    def is_matrix(self) -> bool:
        """Whether two factors do; else it is a Tucker-2 tensor with a core."""
        return self.volume == 1

    @property
    def dense(self) -> int:
        """Numbers of the dense block."""
        return self.rows * self.columns * self.volume

    def size(self, ranks: tuple[int, ...]) -> int:
        """Numbers of the factors: k (out + in), or k_o o + k_o k_i K + k_i i."""
        if self.is_matrix:
            return ranks[0] * (self.rows + self.columns)
        return ranks[0] * self.rows + ranks[0] * ranks[1] * self.volume + ranks[1] * self.columns

    def saves(self, ranks: tuple[int, ...]) -> bool:
        """Whether the factors are smaller than the dense block."""
        return self.size(ranks) < self.dense


def ratio_ranks(block: Block, ratio: float) -> tuple[int, ...]:
    """The largest ranks whose factors have at most 1 / ratio of the block's numbers; at least 1.

    Matrix: k = floor(out in / (ratio (out + in))), PELA's rule (`low_rank.py`, lines 61 and 62). Kernel: k_o = floor(a o) and
    k_i = floor(a i) with one a for both modes, the positive root of a (o^2 + i^2) + a^2 o i K = o i K / ratio.
    """
    rows, columns = block.rows, block.columns
    if block.is_matrix:
        return (max(1, int(rows * columns / (ratio * (rows + columns)))),)
    linear, square = rows**2 + columns**2, rows * columns * block.volume
    share = (math.sqrt(linear**2 + 4 * square * block.dense / ratio) - linear) / (2 * square)
    return max(1, int(share * rows)), max(1, int(share * columns))


def most_saving(block: Block) -> tuple[int, ...]:
    """The largest ranks that save anything, for one weight of a module that is compressed as a whole; at least 1."""
    if block.is_matrix:
        return (max(1, (block.dense - 1) // (block.rows + block.columns)),)
    return ratio_ranks(block, 1.0)


def rounded(block: Block, ranks: tuple[int, ...], multiple: int, up: bool = False) -> tuple[int, ...] | None:
    """Ranks as multiples of what the hardware likes, or None where no such ranks save anything: the block stays dense.

    Args:
        block: what is compressed.
        ranks: the wanted ranks.
        multiple: 1, or 8, 16, 64 for tensor cores.
        up: round up instead of down (to keep an energy); down otherwise, but to `multiple` at least.
    """
    roofs = (block.rows, block.columns)
    found = []
    for rank, roof in zip(ranks, roofs, strict=False):
        steps = -(-rank // multiple) if up else rank // multiple
        found.append(min(max(1, steps) * multiple, roof))
    if block.is_matrix:
        found = [min(found[0], block.columns)]
    return tuple(found) if block.saves(tuple(found)) else None


def water_filling(spectra: Mapping[str, Tensor], blocks: Mapping[str, Block], copies: Mapping[str, int], budget: int) -> dict:
    """Ranks of matrices that keep the most squared norm within a common number of parameters.

        max sum_l sum_{i <= k_l} s_{l,i}^2      subject to      sum_l k_l (out_l + in_l) <= budget

    Every direction has a price, out + in, and a worth, s^2; the best worth for the price is bought first. Values fall, so a
    direction is never bought before the larger ones of its weight. A weight that reaches its break-even is bought whole and
    then stays dense.

    Args:
        spectra: name -> singular values `[*, min(out, in)]`, descending; a stack counts with its summed squares.
        blocks: name -> its matrix.
        copies: name -> how many matrices the stack has.
        budget: parameters in all.

    Returns:
        name -> `(k,)` with k >= 1, or None for one that stays dense.

    Cost: one sort of all values.
    """
    worth, price, owner, order = [], [], [], []
    for index, (name, values) in enumerate(spectra.items()):
        block = blocks[name]
        squares = values.double().square().reshape(-1, values.shape[-1]).sum(0)
        (limit,) = most_saving(block)
        cost = copies[name] * (block.rows + block.columns)
        squares = squares[: limit + 1]
        worth.append(squares / cost)
        price.append(torch.full((len(squares),), cost))
        owner.append(torch.full((len(squares),), index))
        order.append(torch.arange(len(squares)))
    ranking = torch.cat(worth).argsort(descending=True, stable=True)
    prices, owners, positions = torch.cat(price)[ranking], torch.cat(owner)[ranking], torch.cat(order)[ranking]
    names = list(spectra)
    bought = dict.fromkeys(names, 1)
    left = budget - sum(copies[name] * (blocks[name].rows + blocks[name].columns) for name in names)
    for cost, index, position in zip(prices.tolist(), owners.tolist(), positions.tolist(), strict=True):
        name = names[index]
        if position and cost <= left and bought[name] == position:
            bought[name] += 1
            left -= cost
    return {name: (rank,) if blocks[name].saves((rank,)) else None for name, rank in bought.items()}
