"""Ranks against the published tables, and the shared budget against exhaustive search."""

from __future__ import annotations

import itertools

import pytest
import torch

from peft_subspace.functional.ranks import Block, most_saving, ratio_ranks, rounded, water_filling


@pytest.mark.parametrize(
    ("rows", "columns", "ratio", "rank"),
    [
        (768, 768, 2, 192),
        (2304, 768, 2, 288),
        (3072, 768, 2, 307),
        (768, 768, 3, 128),
        (2304, 768, 3, 192),
        (768, 3072, 3, 204),
    ],
)
def test_the_ranks_of_the_paper(rows: int, columns: int, ratio: float, rank: int) -> None:
    assert ratio_ranks(Block(rows, columns), ratio) == (rank,)


@pytest.mark.parametrize(
    "block", [Block(64, 48, 9), Block(8, 3, 49), Block(512, 512, 9), Block(40, 40), Block(7, 900)], ids=str
)
@pytest.mark.parametrize("ratio", [1.2, 2.0, 5.0])
def test_the_largest_ranks_within_the_ratio(block: Block, ratio: float) -> None:
    found = ratio_ranks(block, ratio)
    assert block.size(found) <= block.dense / ratio or found == (1,) * len(found)
    assert block.size(tuple(k + 1 for k in found)) > block.dense / ratio


def test_break_even() -> None:
    block = Block(768, 3072)
    (k,) = most_saving(block)
    assert block.saves((k,))
    assert not block.saves((k + 1,))
    assert most_saving(Block(1, 5)) == (1,)


def test_rounding() -> None:
    block = Block(768, 768)  # break-even at 384
    assert rounded(block, (307,), 64) == (256,)
    assert rounded(block, (307,), 64, up=True) == (320,)
    assert rounded(block, (3,), 64) == (64,), "down, but to one multiple at least"
    assert rounded(block, (383,), 64, up=True) is None, "384 is the break-even: dense"
    assert rounded(Block(100, 100), (10,), 64) is None, "64 is above the break-even of 50"
    assert rounded(Block(64, 48, 9), (20, 17), 8) == (16, 16)


def test_the_shared_budget_is_the_best_one() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = {"a": Block(6, 6), "b": Block(6, 6), "c": Block(6, 6)}  # break-even at 3, so k is 1 or 2 (or dense)
    spectra = {
        name: torch.rand(6, generator=generator).sort(descending=True).values * scale
        for name, scale in zip(blocks, (1.0, 3.0, 2.0), strict=True)
    }
    budget = 48
    found = water_filling(spectra, blocks, dict.fromkeys(blocks, 1), budget)
    assert sum(blocks[name].size(k) for name, k in found.items() if k) <= budget

    def kept(ranks: tuple[int, ...]) -> float:
        return sum(float(values[:k].square().sum()) for values, k in zip(spectra.values(), ranks, strict=True))

    best = max((r for r in itertools.product((1, 2), repeat=3) if sum(r) * 12 <= budget), key=kept)
    assert tuple(k[0] for k in found.values() if k) == best


def test_groups_of_a_multiple() -> None:
    spectra = {"a": torch.ones(32), "b": 2 * torch.ones(32)}
    blocks = {name: Block(32, 32) for name in spectra}  # break-even at 16
    found = water_filling(spectra, blocks, dict.fromkeys(spectra, 1), 4 * 4 * 64, multiple=4)
    assert found == {"a": (4,), "b": (12,)}
    assert water_filling(spectra, blocks, dict.fromkeys(spectra, 1), 10, multiple=4) == {"a": (4,), "b": (4,)}


def test_a_weight_that_needs_all_of_its_ranks_stays_dense() -> None:
    flat, steep = torch.ones(8), torch.tensor([1.0, *[1e-3] * 7])
    found = water_filling(
        {"flat": flat, "steep": steep}, {n: Block(8, 8) for n in ("flat", "steep")}, {"flat": 1, "steep": 1}, 90
    )
    assert found == {"flat": None, "steep": (1,)}
