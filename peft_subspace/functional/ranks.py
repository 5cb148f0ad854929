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


def water_filling(
    spectra: Mapping[str, Tensor], blocks: Mapping[str, Block], copies: Mapping[str, int], budget: int, multiple: int = 1
) -> dict[str, tuple[int, ...] | None]:
    """Ranks of matrices that keep the most squared norm within a common number of parameters.

        max sum_l sum_{i <= k_l} s_{l,i}^2      subject to      sum_l k_l (out_l + in_l) <= budget

    Directions are bought in groups of `multiple`. A group has a price, multiple (out + in), and a worth, its sum of s^2; the
    best worth for the price is bought first. Values fall, so none is bought before the larger ones of its weight. A weight
    keeps one group at least, even beyond the budget; one without a rank that saves anything stays dense, and so does one
    whose break-even is reached while the budget lasts.

    Args:
        spectra: name -> singular values `[*, min(out, in)]`, descending; a stack counts with its summed squares.
        blocks: name -> its matrix.
        copies: name -> how many matrices the stack has.
        budget: parameters in all.
        multiple: of which ranks are multiples.

    Returns:
        name -> `(k,)`, or None for one that stays dense.

    Cost: one sort of all values.
    """
    names, offers, left = list(spectra), [], budget
    most = {name: most_saving(blocks[name])[0] // multiple if blocks[name].saves((1,)) else 0 for name in names}
    for index, (name, values) in enumerate(spectra.items()):
        block, groups = blocks[name], most[name]
        price = copies[name] * multiple * (block.rows + block.columns)
        left -= price if groups else copies[name] * block.dense
        if groups:
            squares = values.double().square().reshape(-1, values.shape[-1]).sum(0)
            squares = torch.nn.functional.pad(squares, (0, (groups + 1) * multiple))[: (groups + 1) * multiple]
            worth = squares.reshape(-1, multiple).sum(1).tolist()
            dense = copies[name] * block.dense - groups * price  # the last step: from the largest rank to the whole weight
            offers += [(w / price, price, index) for w in worth[1:groups]] + [(worth[groups] / price, dense, index)]
    bought, closed = {name: min(1, most[name]) for name in names}, set()
    for _, price, index in sorted(offers, key=lambda offer: -offer[0]):
        if index in closed:
            continue
        if price > left:
            closed.add(index)  # nothing smaller of this weight may follow
        else:
            bought[names[index]] += 1
            left -= price
    return {name: (count * multiple,) if 0 < count <= most[name] else None for name, count in bought.items()}
