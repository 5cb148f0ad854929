"""The bounds on memory that docs/scaling.md states, at the widths of one and of seven billion parameters."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.processes import run_python

ENTRIES = 2048**2
GRAM = 8 * ENTRIES  # bytes of a Gram matrix of the smaller side, float64


def measured(*options: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_python("-m benchmarks.large", *options).splitlines()[-1])
    if found.get("growth_bytes", found.get("growth_on_meta_bytes")) is None:
        pytest.skip("the resident set cannot be read on this system")
    return found


@pytest.mark.parametrize("method", ["svfit", "pela"])
def test_an_adapter_takes_its_own_bytes_and_eight_gram_matrices(method: str) -> None:
    """A layer after the other is decomposed, so that it does not matter how many there are."""
    found = measured("--one", method, "--layers", 1, "--targets", "q_proj")
    assert GRAM < found["growth_bytes"] < found["adapter_bytes"] + 8 * GRAM


@pytest.mark.parametrize("method", ["flora", "atlas-lora", "atlas", "concrete-rank", "concrete"])
def test_a_pool_is_read_one_tensor_after_the_other(method: str) -> None:
    """Its own bytes, pages of the files that are read, and 24 bytes for each entry of one tensor."""
    found = measured("--one", method, "--layers", 1)
    assert found["adapter_bytes"] <= found["growth_bytes"] < found["adapter_bytes"] + found["pool_bytes"] + 24 * ENTRIES


def test_a_model_of_seven_billion_parameters_gets_its_weights_block_by_block() -> None:
    """On the meta device the adapter's own bytes, and then a block's weights and no copy of them."""
    found = measured("--one", "flora", "--late", 1, "--targets", "q_proj,v_proj")
    assert found["parameters"] > 6.4e9
    assert found["adapter_bytes"] <= found["growth_on_meta_bytes"] < found["adapter_bytes"] + 20e6
    assert found["weights_bytes"] <= found["growth_by_block_bytes"][0] < found["weights_bytes"] + 50e6
