"""Factors against the Eckart-Young theorem and against plain definitions, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_subspace.functional.factorize import balanced, root_of, tucker2, two_factors

EXACT = 1e-9


def moment(size: int, decay: float = 1.0, samples: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(samples or 3 * size, size, generator=generator, dtype=torch.float64)
    rows = rows * torch.logspace(0, -decay, size, dtype=torch.float64)
    return rows.t() @ rows / len(rows)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (3, 20, 30)], ids=str)
@pytest.mark.parametrize("method", ["gram", "full"])
def test_eckart_young(shape: tuple[int, ...], method: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    up, down = two_factors(weight, 7, method=method)
    dropped = torch.linalg.svdvals(weight)[..., 7:]
    error = float((weight - up.double() @ down.double()).norm())
    assert error == pytest.approx(float(dropped.norm()), rel=EXACT if method == "gram" else 1e-6)  # "full" is float32
    assert torch.allclose(up.mT @ up, down @ down.mT, atol=1e-4), "half and half"


def test_full_rank_gives_the_weight_back() -> None:
    weight = torch.randn(12, 9, dtype=torch.float64)
    up, down = two_factors(weight, 9)
    torch.testing.assert_close(up @ down, weight, rtol=EXACT, atol=EXACT)


def test_a_weight_of_lower_rank_leaves_no_nan() -> None:
    weight = torch.randn(12, 2) @ torch.randn(2, 9)
    up, down = two_factors(weight, 5)
    torch.testing.assert_close(up @ down, weight, rtol=1e-4, atol=1e-4)
    assert two_factors(torch.zeros(4, 4), 2)[0].isfinite().all()


@pytest.mark.parametrize("samples", [None, 6], ids=["many", "fewer than features"])
def test_best_for_the_inputs(samples: int | None) -> None:
    """Eckart-Young for W M^(1/2); a singular M does no harm."""
    weight = torch.randn(25, 30, dtype=torch.float64)
    second = moment(30, 2.0, samples)
    up, down = two_factors(weight, 5, second)
    weighted = weight @ root_of(second)
    error = float(((weight - up @ down) @ root_of(second)).norm())
    dropped = float(torch.linalg.svdvals(weighted)[5:].norm())
    assert error == pytest.approx(dropped, rel=1e-6, abs=1e-7 * float(weighted.norm()))
    plain = two_factors(weight, 5)
    assert error < float(((weight - plain[0] @ plain[1]) @ root_of(second)).norm())
    torch.testing.assert_close(up.mT @ up, down @ down.mT, rtol=1e-6, atol=1e-6)


def test_a_diagonal_moment_weighs_columns() -> None:
    weight, frequency = torch.randn(10, 40, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    up, down = two_factors(weight, 4, frequency)
    error = float(((weight - up @ down) * frequency.sqrt()).norm())
    assert error == pytest.approx(float(torch.linalg.svdvals(weight * frequency.sqrt())[4:].norm()), rel=EXACT)


def test_balancing_keeps_the_product() -> None:
    up, down = torch.randn(9, 3, dtype=torch.float64) * 100, torch.randn(3, 8, dtype=torch.float64)
    new_up, new_down = balanced(up, down)
    torch.testing.assert_close(new_up @ new_down, up @ down, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(new_up.t() @ new_up, new_down @ new_down.t(), rtol=EXACT, atol=EXACT)


def kernel(up: Tensor, core: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("ok,klxy,li->oixy", up, core, down)


def test_tucker2() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 12, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(kernel(*tucker2(weight, (16, 12))), weight, rtol=EXACT, atol=EXACT)
    planted = kernel(*(torch.randn(s, dtype=torch.float64) for s in ((16, 5), (5, 4, 3, 3), (4, 12))))
    torch.testing.assert_close(kernel(*tucker2(planted, (5, 4))), planted, rtol=1e-7, atol=1e-7)
    up, core, down = tucker2(weight, (8, 6))
    hosvd = []  # the truncated HOSVD, which HOOI must not be worse than
    for mode, rank in ((0, 8), (1, 6)):
        unfolded = weight.movedim(mode, 0).flatten(1)
        basis = torch.linalg.svd(unfolded, full_matrices=False).U[:, :rank]
        hosvd.append(basis @ basis.t())
    truncated = torch.einsum("oixy,po,qi->pqxy", weight, *hosvd)
    assert (weight - kernel(up, core, down)).norm() <= (weight - truncated).norm() * (1 + 1e-9)
    assert float(up[:, 0].norm()) == pytest.approx(float(down[0].norm())) == pytest.approx(float(core.norm()))


def test_tucker2_for_the_inputs() -> None:
    weight, second = torch.randn(16, 12, 3, 3, dtype=torch.float64), moment(12, 2.0)

    def error(found: tuple[Tensor, ...]) -> float:
        return float(torch.einsum("oixy,ij->ojxy", weight - kernel(*found), root_of(second)).norm())

    assert error(tucker2(weight, (6, 4), second)) < 0.9 * error(tucker2(weight, (6, 4)))
