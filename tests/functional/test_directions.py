"""The four forms against W' = W + U diag(delta) V^T in float64, their gradients, and the rule that chooses one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_subspace.functional.directions import (
    built_linear,
    choose_form,
    factored_linear,
    flops,
    scale_channels,
    scale_matrix,
    scale_rows,
)

OUT_IN = [(6, 9), (9, 6), (7, 7)]


class Case:
    """A weight in float64 with its whole SVD, an input, and the dense definition."""

    def __init__(self, out: int, in_: int, r: int | None = None, dtype: torch.dtype = torch.float64) -> None:
        self.weight = torch.randn(out, in_, dtype=dtype)
        left, self.values, self.right = torch.linalg.svd(self.weight, full_matrices=False)
        self.r = min(out, in_) if r is None else r
        self.left_rows, self.right_rows = left.T[: self.r].contiguous(), self.right[: self.r].contiguous()
        self.z = (0.5 * torch.randn(self.r, dtype=dtype)).requires_grad_()
        self.bias = torch.randn(out, dtype=dtype, requires_grad=True)
        self.x = torch.randn(3, 5, in_, dtype=dtype, requires_grad=True)

    def adapted(self) -> Tensor:
        return self.weight + self.left_rows.T @ ((self.z * self.values[: self.r])[:, None] * self.right_rows)

    def expected(self) -> Tensor:
        return F.linear(self.x, self.adapted(), self.bias)

    def forms(self) -> dict[str, Tensor]:
        x, weight, bias, z = self.x, self.weight, self.bias, self.z
        found = {
            "one-sided, output": scale_rows(F.linear(x, weight, bias), self.left_rows, z, bias),
            "one-sided, input": F.linear(scale_rows(x, self.right_rows, z), weight, bias),
            "built, left": built_linear(x, weight, bias, self.left_rows, z, True),
            "built, right": built_linear(x, weight, bias, self.right_rows, z, False),
        }
        if self.r == min(weight.shape):
            found["factored, left"] = factored_linear(x, bias, self.left_rows @ weight, self.left_rows, z)
            found["factored, right"] = factored_linear(x, bias, self.right_rows, (weight @ self.right_rows.T).T, z)
        return found


@pytest.mark.parametrize("size", OUT_IN, ids=str)
@pytest.mark.parametrize("r", [None, 3])
def test_all_forms_are_the_definition(size: tuple[int, int], r: int | None) -> None:
    case = Case(*size, r)
    inputs = [case.x, case.z, case.bias]
    expected = case.expected()
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, grad)
    for name, found in case.forms().items():
        if r is None or "factored" not in name:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)
            gradients = torch.autograd.grad(found, inputs, grad)
            torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-10, msg=name)


def test_the_gradient_of_delta_is_the_diagonal_of_the_projected_gradient() -> None:
    """d loss / d delta_i = u_i^T G v_i, G the gradient of the dense weight."""
    case = Case(6, 9)
    dense = case.adapted().detach().requires_grad_()
    F.linear(case.x, dense, case.bias).square().sum().backward()
    assert dense.grad is not None
    wanted = (case.left_rows @ dense.grad @ case.right_rows.T).diagonal() * case.values
    for found in case.forms().values():
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), case.z)[0], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", OUT_IN, ids=str)
def test_forms_agree_in_float32(size: tuple[int, int]) -> None:
    """To 1e-5 of the update: what float32 leaves of it."""
    case = Case(*size, dtype=torch.float32)
    update = F.linear(case.x, case.adapted() - case.weight)
    for found in case.forms().values():
        assert float(((found - case.expected()).norm() / update.norm()).detach()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_moves_at_zero(dtype: torch.dtype) -> None:
    """Bit for bit, in the forms that an adapter starts with."""
    case = Case(6, 9, dtype=torch.float32)
    weight, bias, x = (tensor.detach().to(dtype) for tensor in (case.weight, case.bias, case.x))
    z, expected = torch.zeros(case.r), F.linear(x, weight, bias)
    assert torch.equal(scale_rows(expected, case.left_rows, z, bias), expected)
    assert torch.equal(F.linear(scale_rows(x, case.right_rows, z), weight, bias), expected)
    for left, rows in ((True, case.left_rows), (False, case.right_rows)):
        assert torch.equal(built_linear(x, weight, bias, rows, z, left), expected)


def test_the_sign_of_a_direction_does_not_matter() -> None:
    case = Case(6, 9)
    signs = torch.tensor([1.0, -1.0] * 3, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        scale_matrix(case.weight, signs * case.left_rows, case.z, True), scale_matrix(case.weight, case.left_rows, case.z, True)
    )


def test_scaling_all_values_scales_the_weight() -> None:
    case = Case(6, 9)
    for rows, left in ((case.left_rows, True), (case.right_rows[:6], False)):
        found = case.weight + scale_matrix(case.weight, rows, torch.full((6,), 0.5, dtype=torch.float64), left)
        torch.testing.assert_close(found, 1.5 * case.weight)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_of_a_convolution(groups: int, channels_last: bool) -> None:
    y = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    y = (y.contiguous(memory_format=torch.channels_last) if channels_last else y).requires_grad_()
    d = 6 // groups
    basis = torch.linalg.qr(torch.randn(groups, d, 2, dtype=torch.float64))[0].mT.contiguous()
    z = torch.randn(groups, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    found = scale_channels(y, basis, z, bias)
    rest = (y - bias[:, None, None]).reshape(2, groups, d, 3, 4)
    matrix = basis.mT @ (z[..., None] * basis)
    expected = y + torch.einsum("gab,ngbhw->ngahw", matrix, rest).reshape(y.shape)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    grad = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, (y, z, bias), grad) for out in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_dropout_drops_directions_of_tokens() -> None:
    """The same draw in every form: each row loses whole directions, the others are scaled up."""
    case = Case(6, 9)
    base = F.linear(case.x, case.weight, case.bias)
    results = []
    for form in ("output", "input", "factored"):
        torch.manual_seed(3)
        if form == "output":
            results.append(scale_rows(base, case.left_rows, case.z, case.bias, 0.5))
        elif form == "input":
            results.append(F.linear(scale_rows(case.x, case.right_rows, case.z, None, 0.5), case.weight, case.bias))
        else:
            results.append(factored_linear(case.x, case.bias, case.left_rows @ case.weight, case.left_rows, case.z, 0.5))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    shares = (results[0] - base) @ case.left_rows.T
    whole = (F.linear(case.x, case.weight) @ case.left_rows.T) * case.z
    ratio = shares / whole
    assert ((ratio.abs() < 1e-9) | ((ratio - 2).abs() < 1e-9)).all()
    grad = torch.randn_like(base)
    torch.testing.assert_close(*(torch.autograd.grad(y, (case.x, case.z), grad) for y in results[:2]))


@pytest.mark.parametrize("form", ["one-sided, output", "one-sided, input", "built, left", "built, right", "factored, left"])
def test_gradcheck(form: str) -> None:
    case = Case(4, 5)

    def call(x: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        case.x, case.z, case.bias = x, z, bias
        return case.forms()[form]

    assert torch.autograd.gradcheck(call, (case.x, case.z, case.bias))


# The rule ----------------------------------------------------------------------------------------------------------------


def count(form: str, n: int, out: int, in_: int, r: int) -> int:
    """Multiply-adds times two of every product that the form's forward makes."""
    k = min(out, in_)
    products = {
        "one-sided": [(n, in_, out), (n, k, r), (n, r, k)],
        "two-sided": [(n, in_, out), (n, in_, r), (n, r, out)],
        "built": [(r, k, max(out, in_)), (out, r, in_), (n, in_, out)],
        "factored": [(n, in_, r), (n, r, out)],
    }[form]
    return sum(2 * a * b * c for a, b, c in products)


@pytest.mark.parametrize("form", ["one-sided", "two-sided", "built", "factored"])
def test_flops_are_those_of_the_products(form: str) -> None:
    for n, out, in_, r in ((512, 768, 768, 768), (100, 64, 256, 64), (7, 30, 20, 5)):
        assert flops(form, n, out, in_, r, train=False) == count(form, n, out, in_, r)
        if form != "built":
            assert flops(form, n, out, in_, r, train=True) == 2 * count(form, n, out, in_, r)


@pytest.mark.parametrize(
    ("tokens", "out", "in_", "r", "train", "expected"),
    [
        (512, 768, 768, 16, True, "one-sided"),
        (512, 768, 768, 256, True, "one-sided"),
        (512, 768, 768, 768, True, "factored"),  # 8 against 12 units of 2 n d d
        (512, 2048, 768, 768, True, "factored"),
        (512, 64, 4096, 64, True, "one-sided"),  # a narrow layer: its directions are few beside the layer itself
        (4096, 768, 768, 384, True, "built"),  # 6.4 against 8
        (2048, 768, 768, 384, True, "one-sided"),  # fewer than four tokens a row of the weight: W' would be kept beside them
        (2048, 768, 768, 384, False, "built"),
        (4096, 768, 768, 16, True, "one-sided"),  # 4.1 against 4.2: not worth a weight
        (4096, 768, 768, 384, False, "built"),
        (8, 768, 768, 768, False, "factored"),
    ],
)
def test_the_rule(tokens: int, out: int, in_: int, r: int, train: bool, expected: str) -> None:
    assert choose_form(tokens, out, in_, r, train) == expected


def test_the_rule_knows_what_cannot_be() -> None:
    arguments: tuple[Any, ...] = (512, 768, 768, 768, True)
    assert choose_form(*arguments, may_factor=False) == "one-sided"
    assert choose_form(4096, 768, 768, 384, True, may_build=False) == "one-sided"
    assert choose_form(512, 768, 768, 700, True) == "one-sided", "factored needs a full basis"
    for out, in_ in ((768, 768), (64, 4096), (4096, 64)):
        for r in (1, 16, 64):
            assert flops("one-sided", 100, out, in_, r, True) <= flops("two-sided", 100, out, in_, r, True)
