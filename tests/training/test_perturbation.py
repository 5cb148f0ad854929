"""The penalty against the official one-line formula, in value and gradient, and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_subspace.training import max_perturbation, perturbation_penalty
from peft_subspace.training import perturbation as module


def factors(stack: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    up = torch.randn(*stack, 9, 3, dtype=dtype, requires_grad=True)
    down = torch.randn(*stack, 3, 7, dtype=dtype, requires_grad=True)
    return up, down, torch.randn(*stack, 9, 7, dtype=dtype, requires_grad=True)


def one_line(up: Tensor, down: Tensor, weight: Tensor, mode: str, eps: float) -> Tensor:
    """The definitions, dense. The first is the official code's."""
    difference = up @ down - weight.detach()
    if mode == "official":
        return F.mse_loss(torch.norm(difference, float("inf")), torch.tensor(eps, dtype=up.dtype))
    if mode == "hinge":
        return F.relu(difference.abs().max() - eps) ** 2
    if mode == "topk":
        return F.relu(difference.abs().flatten().topk(5).values.mean() - eps) ** 2
    if mode == "pnorm":
        return F.relu(difference.abs().pow(8).mean().pow(1 / 8) - eps) ** 2
    return difference.norm() ** 2 / weight.detach().norm() ** 2


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("stack", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("block", [1 << 20, 10], ids=["one block", "a row at a time"])
@pytest.mark.parametrize("eps", [1e-3, 0.7])
def test_value_and_gradient(monkeypatch: Any, mode: Any, stack: tuple[int, ...], block: int, eps: float) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    up, down, weight = factors(stack)
    found = perturbation_penalty(up, down, weight, mode, eps, top=5)
    expected = one_line(up, down, weight, mode, eps)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, (up, down)) for value in (found, expected)]
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
    assert weight.grad is None, "the teacher gets no gradient"
    assert (
        not torch.autograd.grad(perturbation_penalty(up, down, weight, mode, eps), (weight,), allow_unused=True)[0] is not None
    )


def test_two_sided_and_hinge_differ_below_eps() -> None:
    up, down, weight = factors()
    largest = float(max_perturbation(up, down, weight))
    assert largest == pytest.approx(float((up @ down - weight).detach().abs().max()))
    official, hinge = (perturbation_penalty(up, down, weight, mode, largest + 1.0) for mode in ("official", "hinge"))
    assert float(official.detach()) == pytest.approx(1.0)
    assert float(hinge.detach()) == 0.0


@pytest.mark.parametrize("mode", module.MODES)
def test_it_is_computed_in_float32_outside_autocast(mode: Any) -> None:
    up, down, weight = (tensor.detach().float().requires_grad_() for tensor in factors())
    alone = perturbation_penalty(up, down, weight.bfloat16(), mode)
    with torch.autocast("cpu", torch.bfloat16):
        inside = perturbation_penalty(up, down, weight.bfloat16(), mode)
    assert inside.dtype == torch.float32
    assert torch.equal(alone, inside)


@pytest.mark.parametrize(
    ("mode", "limit"), [("official", 40), ("hinge", 40), ("topk", 40 * 64), ("frobenius", 2 * 400 * 8 + 2)]
)
def test_what_is_kept_for_backward_is_small(mode: Any, limit: int) -> None:
    """k numbers for an entry (and the few indices that find it), the factors' gradients for a norm; never 400 x 400."""
    up, down = torch.randn(400, 8, requires_grad=True), torch.randn(8, 400, requires_grad=True)
    weight, kept = torch.randn(400, 400), [0]
    own = {up.untyped_storage().data_ptr(), down.untyped_storage().data_ptr()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[0] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        perturbation_penalty(up, down, weight, mode)
    assert 0 < kept[0] <= limit


def test_zero_deviation() -> None:
    up, down, _ = factors()
    for mode in module.MODES:
        value = perturbation_penalty(up, down, (up @ down).detach(), mode, eps=0.0)
        gradients = torch.autograd.grad(value, (up, down))
        assert float(value.detach()) < 1e-20
        assert all(g.isfinite().all() for g in gradients)


def test_wrong_arguments() -> None:
    up, down, weight = factors()
    with pytest.raises(ValueError, match=r"mode='max' is not known. Accepted: 'official', 'hinge'"):
        perturbation_penalty(up, down, weight, "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[9, 3\] times L \[3, 7\] is not a weight \[7, 9\]"):
        perturbation_penalty(up, down, weight.t())
