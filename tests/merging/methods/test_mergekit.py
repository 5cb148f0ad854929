"""Every method that mergekit has, against mergekit's own function; random ones with the same mask."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_subspace.merging.methods.checks import span
from peft_subspace.merging.methods.draws import bernoulli, random_bits, uniform
from peft_subspace.merging.methods.memory import merge_tensors
from peft_subspace.merging.methods.registry import Inputs

# float32 sums of a few terms of up to 4 in another order: a rounding is 2.4e-7
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def mergekit() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        pytest.importorskip("mergekit", reason="the extra `oracles` is not installed: pip install peft-subspace[oracles]")
        return importlib.import_module("mergekit.merge_methods")


def models(count: int, shape: tuple[int, ...] = (37, 53)) -> tuple[Tensor, list[Tensor]]:
    base = torch.randn(shape)
    return base, [base + 0.1 * torch.randn(shape) for _ in range(count)]


def oracle(mergekit: Any, method: str, base: Tensor | None, tensors: list[Tensor], **parameters: Any) -> Tensor:
    given = tensors if base is None else [base, *tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mergekit.merge_tensors(given, method, parameters=parameters, base_index=None if base is None else 0)


WEIGHTS = [[0.5, 0.3, 0.7], [1.0, 0.0, 0.0], [1.0, -0.4, 0.9]]
SHAPES = [(37, 53), (1, 5000), (5000,), (3, 4, 50)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(mergekit: Any, weights: list[float], normalize: bool, shape: tuple[int, ...]) -> None:
    _, tensors = models(3, shape)
    found = merge_tensors("linear", None, tensors, weights, {"normalize": normalize})
    torch.testing.assert_close(found, oracle(mergekit, "linear", None, tensors, weight=weights, normalize=normalize), **CLOSE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"lambda": 0.3}], ids=str)
def test_task_arithmetic(mergekit: Any, weights: list[float], options: dict[str, Any], shape: tuple[int, ...]) -> None:
    base, tensors = models(3, shape)
    found = merge_tensors("task_arithmetic", base, tensors, weights, options)
    torch.testing.assert_close(found, oracle(mergekit, "task_arithmetic", base, tensors, weight=weights, **options), **CLOSE)


SPARSE = [
    ("ties", {"density": 0.5}),
    ("ties", {"density": 0.2, "normalize": False, "lambda": 0.7}),
    ("ties", {"density": 0.9, "rescale": True}),
    ("ties", {"density": 1.0}),
    ("ties", {"density": 0.0}),
    ("ties", {"density": 1e-6}),  # keeps one entry
    ("breadcrumbs", {"density": 0.5}),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.2, "rescale": True}),
    ("breadcrumbs", {"density": 0.95, "gamma": 0.2}),  # fewer outliers are dropped, for the density to hold
    ("breadcrumbs", {"density": 0.0}),
    ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.05, "normalize": True, "lambda": 1.5}),
    ("breadcrumbs_ties", {"density": 1.0, "gamma": 0.5}),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("method", "options"), SPARSE, ids=str)
def test_sparse(mergekit: Any, method: str, options: dict[str, Any], weights: list[float], shape: tuple[int, ...]) -> None:
    base, tensors = models(3, shape)
    found = merge_tensors(method, base, tensors, weights, options)
    torch.testing.assert_close(found, oracle(mergekit, method, base, tensors, weight=weights, **options), **CLOSE)


def test_a_density_for_each_model(mergekit: Any) -> None:
    base, tensors = models(3)
    found = merge_tensors(
        "ties", base, tensors, None, {}, [{"weight": w, "density": d} for w, d in ((1, 0.2), (2, 1.0), (0.5, 0.0))]
    )
    wanted = oracle(mergekit, "ties", base, tensors, weight=[1, 2, 0.5], density=[0.2, 1.0, 0.0])
    torch.testing.assert_close(found, wanted, **CLOSE)


def same_masks(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor], dropped: list[int]) -> None:
    """Let mergekit's `torch.bernoulli` draw our numbers: an entry is kept iff its uniform number is below its chance."""
    inputs = Inputs(None, [tensor.reshape(-1) for tensor in tensors], (), {}, (), name="weight", seed=7)
    turn = iter(dropped)

    def draw(chance: Tensor) -> Tensor:
        k, first = next(turn), float(chance.view(-1)[0])
        if (chance == first).all():
            return torch.from_numpy(bernoulli(inputs, k, round(first, 6))).view(chance.shape).to(chance.dtype)
        return (torch.from_numpy(uniform(random_bits(inputs, k))).view(chance.shape) < chance).to(chance.dtype)

    monkeypatch.setattr(torch, "bernoulli", draw)


RANDOM = [
    ("dare_linear", {"density": 0.5}),
    ("dare_linear", {"density": 0.1, "rescale": False, "normalize": True}),
    ("dare_ties", {"density": 0.25, "lambda": 0.5}),
    ("dare_ties", {"density": 0.75, "normalize": True}),
    ("della_linear", {"density": 0.5, "epsilon": 0.2}),
    ("della_linear", {"density": 0.3, "epsilon": 0.1, "rescale": False}),
    ("della", {"density": 0.7, "epsilon": 0.25}),
]


@pytest.mark.parametrize("shape", [*SHAPES, (2, 6, 5, 3)], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("method", "options"), RANDOM, ids=str)
def test_random_with_the_same_masks(
    mergekit: Any,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    options: dict[str, Any],
    weights: list[float],
    shape: tuple[int, ...],
) -> None:
    base, tensors = models(3, shape)
    found = merge_tensors(method, base, tensors, weights, options, seed=7)
    same_masks(monkeypatch, tensors, [0, 1, 2])
    torch.testing.assert_close(found, oracle(mergekit, method, base, tensors, weight=weights, **options), **CLOSE)


@pytest.mark.parametrize(("method", "options"), RANDOM[:1] + RANDOM[4:5], ids=str)
def test_random_in_distribution(mergekit: Any, method: str, options: dict[str, Any]) -> None:
    """Over 400 seeds, each entry is kept as often as mergekit keeps it: 4.5 standard deviations, for 200 entries."""
    base, tensors = torch.zeros(4, 50), [torch.rand(4, 50) + 0.5]
    runs = 400
    kept = torch.zeros(2, 4, 50)
    for seed in range(runs):
        torch.manual_seed(seed)
        kept[0] += merge_tensors(method, base, tensors, [1.0], {**options, "rescale": False}, seed=seed) != 0
        kept[1] += oracle(mergekit, method, base, tensors, weight=[1.0], **{**options, "rescale": False}) != 0
    assert ((kept[0] - kept[1]).abs() <= 4.5 * (2 * runs * 0.25) ** 0.5).all()
    assert abs(kept[0].mean() - kept[1].mean()) <= 4.5 * (2 * runs * 0.25 / 200) ** 0.5


def test_della_at_equal_magnitudes_has_the_mean_chance() -> None:
    """mergekit's argsort spreads equal magnitudes over their ranks, so together they have the mean of their chances."""
    base, tensor = torch.zeros(1, 400), torch.ones(1, 400)
    tensor[0, ::2] = 2.0
    options = {"density": 0.5, "epsilon": 0.4, "rescale": False}
    kept = torch.stack([merge_tensors("della_linear", base, [tensor], [1.0], options, seed=seed) != 0 for seed in range(200)])
    for part, chance in ((kept[..., ::2], 0.7), (kept[..., 1::2], 0.3)):  # the upper and the lower half of 0.1 .. 0.9
        assert abs(part.float().mean() - chance) < 4.5 * (0.25 / part.numel()) ** 0.5
    assert span({"density": 0.5, "epsilon": 0.4}, "mergekit") == pytest.approx((0.1, 0.9))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(mergekit: Any, t: float) -> None:
    first, second = torch.randn(2, 41, 31)
    wanted = oracle(mergekit, "slerp", first, [second], t=t)
    torch.testing.assert_close(merge_tensors("slerp", first, [second], None, {"t": t}), wanted, **CLOSE)


@pytest.mark.parametrize("second", ["parallel", "opposite", "zero", "itself"])
def test_slerp_where_there_is_no_angle(mergekit: Any, second: str) -> None:
    first = torch.randn(41, 31)
    other = {"parallel": 2 * first, "opposite": -first, "zero": torch.zeros_like(first), "itself": first}[second]
    wanted = oracle(mergekit, "slerp", first, [other], t=0.3)
    torch.testing.assert_close(merge_tensors("slerp", first, [other], None, {"t": 0.3}), wanted, **CLOSE)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}], ids=str
)
@pytest.mark.parametrize("weights", [[0.3, 0.9], [1.0, -1.0], [1.0, 0.0]], ids=str)
@pytest.mark.parametrize("shape", [(37, 53), (60,), (3, 4, 50)], ids=str)
def test_nuslerp(mergekit: Any, with_base: bool, options: dict[str, Any], weights: list[float], shape: tuple[int, ...]) -> None:
    base, tensors = models(2, shape)
    base = base if with_base else None
    wanted = oracle(mergekit, "nuslerp", base, tensors, weight=weights, **options)
    found = merge_tensors("nuslerp", base, tensors, weights, options)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)  # mergekit takes the angle in float32


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("weights", [[0.3, 0.9, 0.5], [1.0, 0.0, 0.0]], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp(mergekit: Any, with_base: bool, weights: list[float], normalize: bool) -> None:
    base, tensors = models(3)
    base = base if with_base else None
    wanted = oracle(mergekit, "multislerp", base, tensors, weight=weights, normalize_weights=normalize)
    found = merge_tensors("multislerp", base, tensors, weights, {"normalize_weights": normalize})
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_karcher(mergekit: Any, count: int, spread: float) -> None:
    common = torch.randn(37, 53)
    tensors = [(k + 1) * (common + spread * torch.randn(37, 53)) for k in range(count)]
    wanted = oracle(mergekit, "karcher", None, tensors)
    torch.testing.assert_close(merge_tensors("karcher", None, tensors), wanted, rtol=1e-4, atol=1e-4)  # it stops at 1e-5


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("shape", [(37, 53), (60,), (3, 4, 50)], ids=str)
def test_model_stock(mergekit: Any, count: int, filter_wise: bool, shape: tuple[int, ...]) -> None:
    base, _ = models(0, shape)
    common = torch.randn(shape)
    tensors = [base + 0.1 * common + 0.1 * torch.randn(shape) for _ in range(count)]
    wanted = oracle(mergekit, "model_stock", base, tensors, filter_wise=filter_wise)
    found = merge_tensors("model_stock", base, tensors, None, {"filter_wise": filter_wise})
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)  # the ratio amplifies float32 cosines


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("topk", [1.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # below 1e-6 in the mean square, mergekit's weights are equal
def test_sce(mergekit: Any, count: int, topk: float, scale: float) -> None:
    base = torch.randn(37, 53)
    tensors = [base + scale * (k + 1) * torch.randn(37, 53) for k in range(count)]
    wanted = oracle(mergekit, "sce", base, tensors, select_topk=topk)
    torch.testing.assert_close(merge_tensors("sce", base, tensors, None, {"select_topk": topk}), wanted, **CLOSE)
