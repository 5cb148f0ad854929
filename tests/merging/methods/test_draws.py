"""Random numbers that belong to positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from peft_subspace.merging.methods import masks
from peft_subspace.merging.methods.della import keep_mask
from peft_subspace.merging.methods.draws import bernoulli, random_bits, uniform
from peft_subspace.merging.methods.registry import Inputs


def inputs(start: int, count: int, k: int = 0, name: str = "w", seed: int = 0) -> Inputs:
    return Inputs(None, [torch.empty(count)] * (k + 1), (), {}, (), name=name, seed=seed, start=start)


def bits(start: int, count: int, **stream: Any) -> np.ndarray:
    return random_bits(inputs(start, count, **stream), stream.get("k", 0))


def kept(start: int, count: int, chance: float, **stream: Any) -> np.ndarray:
    return bernoulli(inputs(start, count, **stream), stream.get("k", 0), chance)


def test_the_numbers_are_the_same_for_ever() -> None:
    """Merges that were made with an older version must come out the same."""
    assert bits(0, 5).tolist() == [-1846302558, 128231059, 1311883678, 1693410900, -676807112]


@pytest.mark.parametrize("start", [0, 1, 2, 777, 4096])
@pytest.mark.parametrize("count", [0, 1, 2, 33])
def test_a_part_is_a_slice_of_the_whole(start: int, count: int) -> None:
    assert np.array_equal(bits(start, count), bits(0, 5000)[start : start + count])
    for chance in (0.5, 0.3):
        assert np.array_equal(kept(start, count, chance), kept(0, 5000, chance)[start : start + count])


def test_streams_of_models_tensors_and_seeds_are_unrelated() -> None:
    n = 20_000
    streams = [bits(0, n), bits(0, n, k=1), bits(0, n, name="v"), bits(0, n, seed=1)]
    units = np.stack([uniform(stream) - 0.5 for stream in streams])
    correlation = np.corrcoef(units)
    assert np.abs(correlation - np.eye(4)).max() < 4.5 / n**0.5
    masks_ = [kept(0, n, 0.5), kept(0, n, 0.5, k=1), kept(0, n, 0.5, name="v"), kept(0, n, 0.5, seed=1)]
    assert np.abs(np.corrcoef(masks_) - np.eye(4)).max() < 4.5 / n**0.5


@pytest.mark.parametrize("chance", [0.0, 0.001, 0.25, 0.5, 0.9, 1.0])
def test_bernoulli_has_its_chance(chance: float) -> None:
    n = 200_000
    share = kept(0, n, chance).mean()
    assert abs(share - chance) <= 4.5 * (chance * (1 - chance) / n) ** 0.5


@pytest.mark.parametrize("part", [0.1, 0.25, 0.9])
def test_chances_between_multiples_of_2_to_the_minus_8(part: float) -> None:
    """The hash decides where 8 bits equal the chance's: of those entries it keeps the right share."""
    n, base, least = 1_000_000, 78, 2.0**-20  # multiples of 2^-8 themselves take fewer draws: other masks
    lower, upper, between = (kept(0, n, (base + x) / 2**8) for x in (least, 1 - least, part))
    assert not (lower & ~between).any()
    assert not (between & ~upper).any()
    edge = upper & ~lower
    assert abs(edge.sum() - n / 2**8) <= 4.5 * (n / 2**8) ** 0.5
    assert abs(between[edge].mean() - part) <= 4.5 * (0.25 / edge.sum()) ** 0.5


def test_uniform_is_uniform() -> None:
    u = uniform(bits(0, 200_000))
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.bincount((u * 100).astype(int), minlength=100)
    assert ((counts - 2000) ** 2 / 2000).sum() < 160  # chi^2 with 99 degrees of freedom: one in ten thousand


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_mask_keeps_or_drops_and_changes_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(40, 50, dtype=dtype)
    mask = kept(0, 2000, 0.3)
    assert torch.equal(
        masks.apply(np.packbits(mask, bitorder="little"), x), torch.where(torch.from_numpy(mask).view(40, 50), x, 0.0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [1, 2, 3, 50, 1000])
def test_della_keeps_by_rank(columns: int, dtype: torch.dtype) -> None:
    """Kept iff u < low + (high - low) rank / (columns - 1), with ranks from a sort."""
    x = torch.randn(7, columns, dtype=dtype)
    drawn = bits(0, x.numel())
    u = uniform(drawn).reshape(x.shape)
    ranks = x.abs().argsort(1).argsort(1).numpy()
    chance = 0.2 + 0.6 * ranks / (columns - 1) if columns > 1 else np.full(x.shape, 0.5)
    found = keep_mask(x, 0.2, 0.8, drawn).reshape(x.shape)
    differ = found != (u < chance)
    assert np.abs(u - chance)[differ].max(initial=0) < 1e-6, (
        "a number within float32's rounding of its chance may fall either way"
    )
    assert differ.sum() <= 1
