"""Scores of task vectors from one pass, and the search without gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_subspace import AtlasConfig
from peft_subspace.training.selection import coefficient_gradients, rank_vectors, search
from tests.pico import MODELS, loss
from tests.pools import pool_of, vector_of, write_vector


def adapted(**fields: Any) -> Any:
    return get_peft_model(MODELS["mlp"].model(), AtlasConfig(pool=pool_of(MODELS["mlp"], count=4), **fields)).eval()


def test_scores_are_mean_gradients_and_the_other_vectors_do_not_matter() -> None:
    """At zero a vector's gradient is that of the model with this vector alone: chunks of a pool give the same."""
    batches = [MODELS["mlp"].batch(seed=seed) for seed in range(3)]
    whole = coefficient_gradients(adapted(), batches, loss)
    for t in range(4):
        others = [f"task{u}" for u in range(4) if u != t]
        alone = coefficient_gradients(adapted(exclude_pool=others), batches, loss)
        for name, gradient in alone.items():
            torch.testing.assert_close(gradient[0], whole[name][t], rtol=1e-5, atol=1e-7)
    model = adapted()
    for batch in batches:
        (loss(model, batch) / 3).backward()
    for name, gradient in model.named_parameters():
        if gradient.grad is not None:
            block = name.split(".atlas_delta_")[0].removeprefix("base_model.model.")
            own = f"{block}.{name.split('.atlas_delta_')[1].split('.')[0]}"
            torch.testing.assert_close(gradient.grad.double(), whole[own], rtol=1e-5, atol=1e-7)
    assert not any(p.grad is not None for p in adapted().parameters())
    with pytest.raises(ValueError, match="No batches"):
        coefficient_gradients(model, [], loss)


def test_ranking() -> None:
    gradients = {"a": torch.tensor([1.0, -4.0, 0.0]), "b": torch.tensor([[1.0, 1.0], [2.0, -2.0], [0.0, 0.5]])}
    ranked = rank_vectors(gradients, ["x", "y", "z"])
    assert [name for name, _ in ranked] == ["y", "x", "z"]
    assert [score for _, score in ranked] == pytest.approx([3.0, 1.0, 0.125])


def test_the_search_lowers_a_loss_and_leaves_the_best() -> None:
    batch, model = MODELS["mlp"].batch(), adapted(granularity="task")
    calls: list[float] = []

    def black_box(candidate: Any) -> float:
        calls.append(float(loss(candidate, batch)))
        return calls[-1]

    lowest = search(model, black_box, budget=40, seed=1)
    assert len(calls) == 40
    assert lowest == min(calls) < calls[0]
    assert loss(model, batch).item() == pytest.approx(lowest)
    again = adapted(granularity="task")
    assert search(again, lambda candidate: float(loss(candidate, batch)), budget=40, seed=1) == lowest
    assert all(float(value.abs().max()) <= 1.5 for value in model.base_model.coefficients().values())


def test_a_search_leaves_alone_what_is_not_used(tmp_path: Path) -> None:
    """Vectors that a block leaves out, or that have nothing there."""
    pico = MODELS["mlp"]
    first, *others = [name for name, _ in pico.model().named_parameters()]
    tensors = vector_of(pico.model(), 3)
    del tensors[others[0]]
    pool = {**pool_of(pico), "part": write_vector(tmp_path / "part.safetensors", tensors)}
    model: Any = get_peft_model(pico.model(), AtlasConfig(pool=pool, selected={first: ["task0"]}))
    batch = pico.batch()
    search(model, lambda candidate: float(loss(candidate, batch)), budget=8)
    found = model.base_model.coefficients()
    assert [bool(value) for value in found[first]] == [True, False, False]
    assert [bool(value) for value in found[others[0]]] == [True, True, False]


def test_a_search_recovers_from_a_loss_that_is_no_number_and_from_an_error() -> None:
    pico = MODELS["mlp"]
    model: Any = get_peft_model(pico.model(), AtlasConfig(pool=pool_of(pico)))
    values = iter([float("nan"), 3.0, 2.0, 4.0])
    assert search(model, lambda candidate: next(values), budget=4) == 2.0
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = iter([1.0])
    with pytest.raises(StopIteration):
        search(model, lambda candidate: next(losses), budget=3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
