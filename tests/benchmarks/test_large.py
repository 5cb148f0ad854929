"""The bound on memory that docs/scaling.md states, at the widths of a billion parameters."""

from __future__ import annotations

import json

import pytest

from tests.processes import run_python

GRAM = 8 * 2048**2  # bytes of a Gram matrix of the smaller side, float64


@pytest.mark.parametrize("method", ["svfit", "pela"])
def test_an_adapter_takes_its_own_bytes_and_eight_gram_matrices(method: str) -> None:
    """A layer after the other is decomposed, so that it does not matter how many there are."""
    found = json.loads(
        run_python("-m benchmarks.large", "--one", method, "--layers", 1, "--targets", "q_proj").splitlines()[-1]
    )
    if found["growth_bytes"] is None:
        pytest.skip("the resident set cannot be read on this system")
    assert GRAM < found["growth_bytes"] < found["adapter_bytes"] + 8 * GRAM
