"""`add_low_rank` against its dense definition, its gradients, and what it keeps for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_subspace.functional.low_rank import add_low_rank

N, IN, OUT, R_IN, R_OUT = 6, 7, 5, 3, 2


def inputs(dtype: torch.dtype = torch.float64, *batch: int) -> list[Tensor]:
    """out, x, down, core, up."""
    shapes = [(*(batch or (N,)), OUT), (*(batch or (N,)), IN), (IN, R_IN), (R_OUT, R_IN), (OUT, R_OUT)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def dense(out: Tensor, x: Tensor, down: Tensor, core: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    return out + x @ (scale * up @ core @ down.T).T


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_equals_the_dense_definition(batch: tuple[int, ...], scale: float) -> None:
    tensors = inputs(torch.float64, *batch)
    before = tensors[0].detach().clone()
    found, expected = add_low_rank(*tensors, scale), dense(*tensors, scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64, sums of at most seven terms
    grad = torch.randn_like(found)
    gradients = torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, tensors, grad)
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(tensors[0], before), "`out` is not written to"


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda *tensors: add_low_rank(*tensors, 0.7), inputs())


@pytest.mark.parametrize("wanted", range(5))
def test_gradient_of_a_single_input(wanted: int) -> None:
    tensors = [tensor.detach().requires_grad_(i == wanted) for i, tensor in enumerate(inputs())]
    add_low_rank(*tensors).sum().backward()
    expected = [tensor.detach().requires_grad_(i == wanted) for i, tensor in enumerate(tensors)]
    dense(*expected).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [i == wanted for i in range(5)]
    torch.testing.assert_close(tensors[wanted].grad, expected[wanted].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_x_and_the_narrow_product_and_nothing_else(dtype: torch.dtype) -> None:
    out, x, down, core, up = inputs(torch.float32)  # parameters in float32, whatever the model is in
    parameters = {tensor.untyped_storage().data_ptr() for tensor in (down, core, up)}
    out, x = out.detach().to(dtype), x.detach().to(dtype)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def unpack(tensor: Any) -> Any:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = add_low_rank(out, x, down, core, up, 0.5)
    assert found.dtype == dtype
    others = [tensor for storage, tensor in kept.items() if storage not in parameters]
    assert sum(t.untyped_storage().nbytes() for t in others) == (N * IN + N * R_IN) * x.element_size()
    found.float().sum().backward()
    assert [tensor.grad.dtype for tensor in (down, core, up)] == [torch.float32] * 3


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_changes_nothing(backward_inside: bool) -> None:
    """The layer gives x and out in the dtype that it wants; autocast must not turn them into bfloat16."""
    tensors = inputs(torch.float32)
    expected = add_low_rank(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = add_low_rank(*tensors)
        if backward_inside:
            gradients = torch.autograd.grad(found.sum(), tensors)
    if not backward_inside:
        gradients = torch.autograd.grad(found.sum(), tensors)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    for mine, wanted in zip(gradients, torch.autograd.grad(expected.sum(), tensors), strict=True):
        assert torch.equal(mine, wanted)


def test_second_derivatives_are_refused() -> None:
    tensors = inputs()
    (gradient,) = torch.autograd.grad(add_low_rank(*tensors).square().sum(), tensors[1:2], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_meta_tensors_have_the_right_shape() -> None:
    found = add_low_rank(*[tensor.detach().to("meta") for tensor in inputs(torch.float32, 2, 3)])
    assert found.shape == (2, 3, OUT)
