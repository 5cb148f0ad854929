"""Composing weights, the inner products that are their gradients, the map of a partition, and the node of the graph."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_subspace.functional import composition, groups
from peft_subspace.functional.composition import Dense, LowRank, accumulate, combination, composed, inner_products
from peft_subspace.functional.groups import Groups, partition

SHAPES = {"matrix": (6, 10), "vector": (7,), "kernel": (4, 3, 2, 2), "row": (1, 5)}


def vectors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Any], Tensor]:
    """A dense, a scaled, an absent and a low-rank vector, and the same as `[T, *shape]` in float64."""
    size, columns = torch.Size(shape).numel(), torch.Size(shape[1:]).numel()
    dense, scaled = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    left, right = torch.randn(shape[0], 2), torch.randn(2, columns)
    found = [Dense(dense), Dense(scaled, 0.25), None, LowRank(left, right)]
    whole = [dense.double(), 0.25 * scaled.double(), torch.zeros(size).double(), (left.double() @ right.double()).flatten()]
    return found, torch.stack(whole).view(-1, *shape)


def groups_for(size: int, kind: str) -> tuple[Groups | None, Tensor]:
    """No groups, or three, and the group of every entry."""
    if kind == "one":
        return None, torch.zeros(size, dtype=torch.long)
    numbers = partition(3, 0, "x", 0, size)
    return Groups(3, lambda start, stop, device: numbers[start:stop]), numbers.long()


@pytest.fixture(params=[2**18, 7], ids=["one chunk", "chunks of 7"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["one", "three"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    """In float64 against sum_t lambda[t, pi(e)] tau_t[e], written out, and the gradient that autograd gives it."""
    found, whole = vectors(shape, dtype)
    groups, numbers = groups_for(whole[0].numel(), kind)
    coefficients = torch.randn(len(found), 1 if groups is None else 3, dtype=torch.float64, requires_grad=True)
    expected = (coefficients[:, numbers].view(-1, *shape) * whole).sum(0)
    grad = torch.randn(shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected, coefficients, grad)
    own = coefficients.detach() if groups is not None else coefficients.detach()[:, 0]
    base = torch.randn(shape, dtype=torch.float64)
    total = base.clone()
    accumulate(total, found, own, groups)
    torch.testing.assert_close(total, base + expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(combination(found, own, shape, groups), expected.detach(), rtol=1e-12, atol=1e-12)
    products = inner_products(grad, found, groups)
    torch.testing.assert_close(products.view_as(gradient), gradient, rtol=1e-12, atol=1e-12)


def test_a_gradient_in_bfloat16_is_summed_in_float32() -> None:
    """Its own rounding is all that is lost: a sum in bfloat16 would be off by hundredths."""
    found, whole = vectors((64, 1000))
    grad = torch.randn(64, 1000).to(torch.bfloat16)
    exact = (whole * grad.double()).flatten(1).sum(1)
    scale = whole.flatten(1).norm(dim=1) * grad.double().norm()
    assert ((inner_products(grad, found) - exact).abs() <= 1e-6 * scale.clamp_min(1e-30)).all()


def test_a_gradient_may_be_sparse_or_strided() -> None:
    found, whole = vectors((6, 10))
    grad = torch.randn(10, 6).t()
    exact = (whole * grad.double()).flatten(1).sum(1)
    for given in (grad, grad.to_sparse()):
        torch.testing.assert_close(inner_products(given, found), exact, rtol=1e-5, atol=1e-5)


# The map of a partition --------------------------------------------------------------------------------------------------


GOLDEN = [5, 5, 8, 6, 3, 9, 7, 1, 7, 5, 0, 4, 7, 8, 0, 5]


def test_the_map_is_the_same_everywhere() -> None:
    """Written down once: a file that was made on another machine depends on these numbers."""
    assert partition(10, 0, "layer.weight", 0, 16).tolist() == GOLDEN
    assert _by_hand(16, 10, 0, "layer.weight") == GOLDEN


def _by_hand(size: int, parts: int, seed: int, name: str) -> list[int]:
    """The formula of the docstring with Python's own integers."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    keys = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
        return x ^ (x >> 16)

    return [(mix(mix((e % 2**32) ^ keys[0]) ^ (e >> 32) ^ keys[1]) * parts) >> 32 for e in range(size)]


def test_a_map_is_even_and_belongs_to_its_block_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = partition(7, 3, "a", 0, 200_000)
    counts = torch.bincount(whole.long(), minlength=7).double()
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 22.5  # chi squared, 6 degrees, 0.1 %
    for seed, name in ((3, "b"), (4, "a")):
        same = (partition(7, seed, name, 0, 200_000) == whole).double().mean()
        assert float(same) == pytest.approx(1 / 7, abs=0.01)
    monkeypatch.setattr(groups, "CHUNK", 1000)
    assert torch.equal(partition(7, 3, "a", 0, 200_000), whole)


# The node ----------------------------------------------------------------------------------------------------------------


def node(coefficients: Tensor, weight: Tensor, found: list[Any]) -> Tensor:
    effective = weight.clone()
    accumulate(effective, found, coefficients.detach())
    return composed(effective, lambda grad: (inner_products(grad, found).to(coefficients.dtype),), [coefficients])


def test_the_node_has_the_right_gradient_and_copies_nothing() -> None:
    found, whole = vectors((6, 10))
    weight, x = torch.randn(6, 10, dtype=torch.float64), torch.randn(5, 10, dtype=torch.float64)
    coefficients = torch.randn(4, dtype=torch.float64, requires_grad=True)
    effective = weight.clone()
    result = composed(effective, lambda grad: (inner_products(grad, found),), [coefficients])
    assert result.data_ptr() == effective.data_ptr()
    result = node(coefficients, weight, found)
    (mine,) = torch.autograd.grad((x @ result.t()).square().sum(), coefficients)
    expected = weight + (coefficients.view(-1, 1, 1) * whole).sum(0)
    (wanted,) = torch.autograd.grad((x @ expected.t()).square().sum(), coefficients)
    torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_a_weight_that_is_written_to_before_backward_is_an_error() -> None:
    """And not a wrong gradient: the product has kept it for the gradient of its input."""
    found, _ = vectors((6, 10))
    coefficients, x = torch.randn(4, requires_grad=True), torch.randn(5, 10, requires_grad=True)
    effective = torch.randn(6, 10)
    result = composed(effective, lambda grad: (inner_products(grad, found).float(),), [coefficients])
    y = x @ result.t()
    with torch.no_grad():
        effective.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
