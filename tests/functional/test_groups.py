"""Values of groups: spread by broadcasting where their entries come in runs, the same as by look-up."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_subspace.functional.groups import along_axis, groups_from


def described(shape: tuple[int, ...], swapped: bool, groups: int = 1) -> Any:
    """A weight of this canonical shape, as `Geometry` has it."""
    return SimpleNamespace(shape=shape, swapped=swapped, groups=groups)


# canonical shape, its layout in the module, whether both differ, convolution groups, axis, indices that share a number
CASES = {
    "rows": ((6, 10), (6, 10), False, 1, 0, 1),
    "columns": ((6, 10), (6, 10), False, 1, 1, 1),
    "parts of a fused weight": ((6, 10), (6, 10), False, 1, 0, 2),
    "rows of Conv1D": ((6, 10), (10, 6), True, 1, 0, 1),
    "columns of Conv1D": ((6, 10), (10, 6), True, 1, 1, 1),
    "channels of a convolution": ((4, 3, 2, 2), (4, 3, 2, 2), False, 1, 0, 1),
    "input channels": ((4, 3, 2, 2), (4, 3, 2, 2), False, 1, 1, 1),
    "transposed": ((4, 3, 2, 2), (3, 4, 2, 2), True, 1, 0, 1),
    "transposed in groups": ((4, 3, 2, 2), (6, 2, 2, 2), True, 2, 0, 1),
    "a vector": ((7,), (7,), False, 1, 0, 1),
}


@pytest.mark.parametrize("most", [1, 5, 16, 10**6])
@pytest.mark.parametrize(("shape", "layout", "swapped", "count", "axis", "length"), CASES.values(), ids=CASES)
def test_spread_and_collect_are_the_look_up(
    shape: Any, layout: Any, swapped: bool, count: int, axis: int, length: int, most: int
) -> None:
    groups = groups_from(along_axis(described(shape, swapped, count), axis, length), layout)
    size = math.prod(layout)
    where = groups.part(0, size, torch.device("cpu"))
    values, part = torch.randn(groups.count), torch.randn(size, dtype=torch.float64)
    step = groups.step(most)
    assert 1 <= step <= most
    spread, total = [], torch.zeros(groups.count, dtype=torch.float64)
    for start in range(0, size, step):
        stop = min(start + step, size)
        here = groups.at(start, stop, torch.device("cpu"))
        spread.append(here.spread(values))
        here.collect(total, part[start:stop])
    assert torch.equal(torch.cat(spread), values[where])
    wanted = torch.zeros(groups.count, dtype=torch.float64).index_add_(0, where, part)
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-12)


def test_a_range_that_cuts_a_run_is_looked_up() -> None:
    groups = groups_from(along_axis(described((6, 10), False), 0), (6, 10))
    values, cpu = torch.arange(6.0), torch.device("cpu")
    assert torch.equal(groups.at(7, 33, cpu).spread(values), values[groups.part(7, 33, cpu)])
