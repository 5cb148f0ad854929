"""Truncated sums of low-rank matrices against the SVD of the dense sum."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_subspace.functional.stacked import rank_for_energy, stack, truncate_sum


def factors(out: int, width: int, ranks: list[int], dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(out, r, dtype=dtype), torch.randn(r, width, dtype=dtype)) for r in ranks]


def dense(pairs: list[tuple[Tensor, Tensor]], weights: list[float]) -> Tensor:
    return sum((w * (b.double() @ a.double()) for (b, a), w in zip(pairs, weights, strict=True)), torch.zeros(()).double())


@pytest.mark.parametrize("ranks", [[4], [3, 5], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -2.0, 0.0]], ids=str)
def test_the_stack_is_the_sum(ranks: list[int], weights: list[float]) -> None:
    pairs, weights = factors(20, 30, ranks), weights[: len(ranks)]
    b, a = stack(pairs, weights)
    assert b.shape == (20, sum(ranks))
    torch.testing.assert_close(b @ a, dense(pairs, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("out", "width"), [(20, 30), (30, 20), (4, 30), (30, 4), (1, 1)])
@pytest.mark.parametrize("rank", [1, 3, 6, 50])
def test_is_the_best_of_its_rank(out: int, width: int, rank: int) -> None:
    """Eckart and Young: the truncated SVD of the dense sum, and what it leaves out."""
    pairs, weights = factors(out, width, [2, 3, 4]), [1.0, -0.5, 2.0]
    b, a, discarded = truncate_sum(pairs, weights, rank=rank)
    assert b.shape == (out, rank)
    assert a.shape == (rank, width)
    total = dense(pairs, weights)
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    torch.testing.assert_close(b @ a, (u[:, :rank] * s[:rank]) @ v[:rank], rtol=1e-9, atol=1e-9)
    assert discarded == pytest.approx(float((total - b @ a).square().sum() / total.square().sum()), abs=1e-12)


def test_without_a_rank_nothing_is_lost() -> None:
    pairs = factors(20, 30, [2, 3])
    b, a, discarded = truncate_sum(pairs)
    assert b.shape == (20, 5)
    assert discarded == 0
    torch.testing.assert_close(b @ a, dense(pairs, [1.0, 1.0]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_by_energy(energy: float) -> None:
    pairs = factors(20, 30, [3, 4])
    b, _, discarded = truncate_sum(pairs, energy=energy)
    assert discarded <= 1 - energy + 1e-12
    if b.shape[1] > 1:
        assert truncate_sum(pairs, rank=b.shape[1] - 1)[2] > 1 - energy
    assert truncate_sum(pairs, rank=2, energy=energy)[0].shape[1] <= 2


def test_what_cancels_is_zero() -> None:
    (pair,) = factors(6, 5, [2])
    b, a, discarded = truncate_sum([pair, pair], [1.0, -1.0], rank=2)
    torch.testing.assert_close(b @ a, torch.zeros(6, 5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert 0 <= discarded <= 1
    assert truncate_sum([(torch.zeros(6, 2), torch.zeros(2, 5))], rank=2)[2] == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_raised(dtype: torch.dtype) -> None:
    pairs = [(b.to(dtype), a.to(dtype)) for b, a in factors(20, 30, [2, 3], torch.float32)]
    b, a, _ = truncate_sum(pairs, [1.0, 0.5], rank=5)
    assert b.dtype == torch.float32
    torch.testing.assert_close((b @ a).double(), dense(pairs, [1.0, 0.5]), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 12))
def test_any_shapes(out: int, width: int, ranks: list[int], rank: int) -> None:
    pairs = factors(out, width, ranks)
    b, a, discarded = truncate_sum(pairs, rank=rank)
    total = dense(pairs, [1.0] * len(pairs))
    s = torch.linalg.svdvals(total)
    assert discarded == pytest.approx(float(s[rank:].square().sum() / s.square().sum()), abs=1e-10)
    assert (b.shape, a.shape) == ((out, rank), (rank, width))


def test_rank_for_energy() -> None:
    s = torch.tensor([2.0, 1.0, 1.0])
    assert [rank_for_energy(s, e) for e in (0.1, 0.66, 0.67, 0.84, 1.0)] == [1, 1, 2, 3, 3]
    assert rank_for_energy(torch.zeros(3), 0.9) == 0


def test_costs_far_less_than_the_dense_way() -> None:
    """At 512 x 512, four of rank 8: measured 100 times at 1024; a tenth of it is asked for here, on a busy machine."""
    pairs = factors(512, 512, [8] * 4, torch.float32)

    def seconds(call: object) -> float:
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            call()  # type: ignore[operator]
            runs.append(time.perf_counter() - start)
        return min(runs)

    quick = seconds(lambda: truncate_sum(pairs, rank=8))
    assert quick * 10 < seconds(lambda: torch.linalg.svd(sum(b @ a for b, a in pairs), full_matrices=False))


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, r"there are no factors"),
        ([((3, 2), (2, 4)), ((3, 2), (2, 5))], {}, r"out=3 and in=4, got \(3, 2\) and \(2, 5\)"),
        ([((3, 2), (1, 4))], {}, r"got \(3, 2\) and \(1, 4\)"),
        ([((3, 2), (2, 4))], {"weights": [1.0, 2.0]}, r"got 2 weights for 1 pairs"),
        ([((3, 2), (2, 4))], {"rank": 0}, r"rank=0: expected 1 or more"),
        ([((3, 2), (2, 4))], {"energy": 1.5}, r"energy=1.5: expected a number in \(0, 1\]"),
    ],
)
def test_what_cannot_be_summed(pairs: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truncate_sum([(torch.zeros(b), torch.zeros(a)) for b, a in pairs], **options)
