"""The k-th largest entry without a sort, against a sort."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_subspace.merging.methods.loop import TILE, Job, Part, reduce_and_map
from peft_subspace.merging.methods.registry import Inputs, get
from peft_subspace.merging.methods.thresholds import Top, exact_top, keep_top, settled, top_passes


def find(x: Tensor, ks: list[int], part: int, exact: bool = True) -> list[Top]:
    """The thresholds of one tensor that is seen in parts."""
    inputs = Inputs(None, [x], (), {}, ())
    for each in top_passes(lambda given: given.tensors, lambda count, given: [ks], exact):
        state = each.begin(x.numel(), replace(inputs, tensors=[x[:part]]))
        for start in range(0, x.numel() if state is not None else 0, part):
            if each.update(state, replace(inputs, tensors=[x[start : start + part]], start=start)):
                break
        inputs = replace(inputs, reduced={**inputs.reduced, each.name: None if state is None else each.finish(state)})
    return settled(inputs.reduced)[0]


def by_sorting(x: Tensor, k: int) -> Tensor:
    """x at its k largest magnitudes, ties in the order of their positions."""
    kept = torch.zeros_like(x)
    chosen = x.abs().argsort(descending=True, stable=True)[: max(0, k)]
    kept[chosen] = x[chosen]
    return kept


VALUES = {
    "normal": lambda n: torch.randn(n),
    "few values": lambda n: torch.randint(-3, 4, (n,)).float(),
    "all the same": lambda n: torch.full((n,), -2.5),
    "zeros": lambda n: torch.zeros(n),
    "mostly zeros": lambda n: torch.randn(n) * (torch.rand(n) < 0.1),
    "tiny": lambda n: torch.randn(n) * 1e-41,  # denormal
    "huge": lambda n: torch.randn(n) * 1e38,
    "bfloat16": lambda n: torch.randn(n).bfloat16().float(),
    "neighbours": lambda n: 1 + torch.arange(n) * torch.finfo(torch.float32).eps,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("part", [1000, 3000])
def test_keeps_what_a_stable_sort_keeps(values: str, part: int, dtype: torch.dtype) -> None:
    x = VALUES[values](3000).to(dtype)
    ks = [0, 1, 2, 700, 1500, 2999, 3000]
    for k, top in zip(ks, find(x, ks, part), strict=True):
        found = torch.cat([keep_top(x[start : start + part], top, start) for start in range(0, 3000, part)])
        assert torch.equal(found, by_sorting(x, k)), (k, top)


def test_float64_tells_apart_what_float32_cannot() -> None:
    x = 1 + torch.arange(100, dtype=torch.float64) * 1e-12
    assert torch.equal(keep_top(x, find(x, [30], 7)[0], 0), by_sorting(x, 30))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.data())
def test_any_numbers(numbers: list[float], data: st.DataObject) -> None:
    x = torch.tensor(numbers)
    k = data.draw(st.integers(0, len(numbers)))
    part = data.draw(st.integers(1, len(numbers)))
    assert torch.equal(keep_top(x, find(x, [k], part)[0], 0), by_sorting(x, k))


def test_without_exactness_all_that_tie_are_kept() -> None:
    x = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0])
    assert torch.equal(keep_top(x, find(x, [2], 5, exact=False)[0], 0), torch.tensor([0.0, 2.0, 2.0, 2.0, 3.0]))
    assert torch.equal(keep_top(x, find(x, [2], 5)[0], 0), torch.tensor([0.0, 2.0, 0.0, 0.0, 3.0]))


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.001, 1), (0.5, 6), (0.99, 11), (1.0, 12), (2.0, 12)])
def test_of_a_tensor_in_memory(density: float, kept: int) -> None:
    x = torch.randn(3, 4)
    assert torch.equal(exact_top(x, density).view(-1), by_sorting(x.view(-1), kept))


def test_the_buffer_of_a_bucket_is_counted_when_it_is_full() -> None:
    x = torch.full((400_000,), 1.0)  # all of them in one bucket
    x[7] = 2.0
    assert find(x, [10], 150_000)[0] == Top(1.0, left=9, ties=399_999, cut=10)


def test_nothing_is_read_in_vain() -> None:
    """Of 10 parts: 2 passes and the map; where magnitudes tie, a third pass as far as it must go."""
    reads: list[int] = []

    def count(x: Tensor, density: float) -> int:
        def read(start: int, stop: int) -> Part:
            reads.append(start)
            return Part(None, [x[start:stop]])

        reads.clear()
        job = Job(get("magnitude_prune"), (10 * TILE,), read, {}, [{"density": density}], chunk=TILE)
        assert sum(part.numel() for _, part in reduce_and_map(job)) == x.numel()
        return len(reads)

    x = torch.arange(1.0, 10 * TILE + 1)
    assert count(x, 1.0) == 10
    assert count(x, 0.3) == 10 + 10 + 10
    assert count(x.clamp(max=2.0 * TILE), 0.5) == 10 + 10 + 10 + 7  # the ties begin in the second part, five belong
