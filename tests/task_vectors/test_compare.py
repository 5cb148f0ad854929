"""What is unlike its base."""

from __future__ import annotations

import math

import pytest

from peft_subspace.task_vectors.compare import unlike_base


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"head": 1.4},  # one block alone
        {"a": 0.1, "b": 0.2, "head": 1.4},  # a trained head beside blocks that are alike
        {"a": 0.1, "b": 0.2, "c": math.nan},  # damage is no sign of another base, in whatever order
        {"c": math.nan, "a": 0.1, "b": 0.2},
        {"a": 0.1, "b": math.inf, "c": math.inf, "d": 0.1},
        {"a": math.nan, "b": math.nan},
    ],
)
def test_what_looks_fine_tuned(found: dict[str, float]) -> None:
    assert unlike_base(found, "the base") is None


def test_another_base_is_told_by_its_worst_blocks() -> None:
    found = {"a": 1.3, "b": 1.4, "c": 0.1, "d": 1.2, "e": math.nan}
    assert unlike_base(found, "the base") == (
        "does not look like a fine-tuned the base: the difference is 1.25 times as large as the base (worst: b 1.40, a 1.30, "
        "d 1.20)"
    )
