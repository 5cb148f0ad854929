"""Every method of `peft.utils.merge_utils` against it; random ones with the same mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from peft_subspace.merging.methods.draws import bernoulli
from peft_subspace.merging.methods.memory import merge_tensors
from peft_subspace.merging.methods.registry import Inputs

CLOSE = {"rtol": 2e-5, "atol": 1e-6}  # float32 sums of a few terms of order 1 in another order
WEIGHTS = [[0.5, 0.3, 0.7], [1.0, 0.0, 0.0], [1.0, -0.4, 0.9]]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_task_arithmetic(weights: list[float]) -> None:
    deltas = list(torch.randn(3, 37, 53))
    wanted = merge_utils.task_arithmetic(deltas, torch.tensor(weights))
    base = torch.zeros(37, 53)
    found = merge_tensors("task_arithmetic", base, deltas, weights, semantics="peft")
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.2, 0.9])
def test_magnitude_prune(weights: list[float], density: float) -> None:
    deltas = list(torch.randn(3, 37, 53))
    wanted = merge_utils.magnitude_prune(deltas, torch.tensor(weights), density)
    found = merge_tensors("magnitude_prune", torch.zeros(37, 53), deltas, weights, {"density": density}, semantics="peft")
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", [0.2, 0.9])
@pytest.mark.parametrize("vote", ["total", "frequency"])
def test_ties(weights: list[float], density: float, vote: Any) -> None:
    deltas = list(torch.randn(3, 37, 53))
    wanted = merge_utils.ties(deltas, torch.tensor(weights), density, vote)
    options = {"density": density, "majority_sign_method": vote}
    found = merge_tensors("ties", torch.zeros(37, 53), deltas, weights, options, semantics="peft")
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dare_with_the_same_masks(monkeypatch: pytest.MonkeyPatch, method: str, weights: list[float], density: float) -> None:
    deltas = list(torch.randn(3, 37, 53))
    found = merge_tensors(method, torch.zeros(37, 53), deltas, weights, {"density": density}, semantics="peft", seed=3)
    inputs = Inputs(None, [delta.view(-1) for delta in deltas], (), {}, (), name="weight", seed=3)
    turn = iter(range(3))

    def draw(chance: Tensor) -> Tensor:
        mask = bernoulli(inputs, next(turn), density)
        return torch.from_numpy(mask).view(chance.shape).to(chance.dtype)

    monkeypatch.setattr(torch, "bernoulli", draw)
    wanted = getattr(merge_utils, method)(deltas, torch.tensor(weights), density)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_the_three_semantics_differ_where_they_are_said_to() -> None:
    """Weights turn the election in mergekit's, not in PEFT's; PEFT divides by heads, mergekit by weights."""
    base, deltas = torch.zeros(1), [torch.tensor([1.0]), torch.tensor([-2.0])]
    found = {s: merge_tensors("ties", base, deltas, [3.0, 1.0], semantics=s).item() for s in ("mergekit", "peft", "paper")}
    assert found == {"mergekit": 1.0, "peft": -2.0, "paper": -2.0}
    deltas = [torch.tensor([1.0]), torch.tensor([2.0])]
    found = {s: merge_tensors("ties", base, deltas, [3.0, 1.0], semantics=s).item() for s in ("mergekit", "peft", "paper")}
    assert found == {"mergekit": 5 / 4, "peft": 5 / 2, "paper": 5 / 2}
