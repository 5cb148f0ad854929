"""Singular values and one basis: every way to them against float64, energy, and what tells one base from another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_subspace.functional import svd

SHAPES = [(12, 8), (8, 12), (9, 9), (3, 6, 10), (2, 10, 6)]
# Relative to s_1: gram works in float64, full in float32; lowrank finds only what power iterations bring out.
EXACT = {"gram": 1e-12, "full": 1e-5}


def matrix(*shape: int, decay: float = 0.7) -> Tensor:
    """A float32 matrix whose singular values fall by `decay`, so that its vectors are well defined."""
    left, _, right = torch.linalg.svd(torch.randn(*shape, dtype=torch.float64), full_matrices=False)
    return ((left * decay ** torch.arange(left.shape[-1])) @ right).float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["gram", "full"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_leading_singular_against_float64(shape: tuple[int, ...], method: Any, side: Any) -> None:
    weight, r = matrix(*shape), 4
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    found = svd.leading_singular(weight, r, side, method)
    torch.testing.assert_close(found.values.double(), values[..., :r], rtol=EXACT[method], atol=EXACT[method])
    wanted = (left.mT if side == "left" else right)[..., :r, :]
    torch.testing.assert_close(found.basis.double().square(), wanted.square(), rtol=1e-4, atol=EXACT[method] * 100)
    eye = torch.eye(r, dtype=torch.float64).expand(*found.basis.shape[:-2], r, r)
    torch.testing.assert_close(found.basis.double() @ found.basis.double().mT, eye, rtol=0, atol=EXACT[method] * 100)
    largest = found.basis.gather(-1, found.basis.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all(), "the sign is fixed"


def test_one_basis_gives_the_other_back() -> None:
    weight = matrix(6, 9).double()
    left, right = (svd.leading_singular(weight, 6, side) for side in ("left", "right"))  # type: ignore[arg-type]
    torch.testing.assert_close((left.basis @ weight).abs(), (left.values[:, None] * right.basis).abs())


def test_a_long_matrix_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(5, 40)
    whole = svd.leading_singular(weight, 5, "left")
    monkeypatch.setattr(svd, "CHUNK", 7)
    torch.testing.assert_close(svd.leading_singular(weight, 5, "left"), whole)
    torch.testing.assert_close(svd.spectrum(weight), whole.values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_lowrank_is_seeded_and_leaves_the_global_state_alone(side: Any) -> None:
    weight = matrix(60, 50, decay=0.95)
    state = torch.get_rng_state()
    found = svd.leading_singular(weight, 8, side, "lowrank", niter=8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    again = svd.leading_singular(weight, 8, side, "lowrank", niter=8, seed=3)
    other = svd.leading_singular(weight, 8, side, "lowrank", niter=8, seed=4)
    assert torch.equal(found.basis, again.basis)
    assert not torch.equal(found.basis, other.basis)
    exact = torch.linalg.svdvals(weight.double())[:8]
    torch.testing.assert_close(found.values.double(), exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.values, (found.basis @ (weight if side == "left" else weight.T)).norm(dim=1))


def test_full_svd_that_does_not_converge_is_done_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, original = matrix(6, 8), torch.linalg.svd

    def fails(tensor: Tensor, **kwargs: Any) -> Any:
        if tensor.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return original(tensor, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", fails)
    found = svd.leading_singular(weight, 3, "left", "full")
    torch.testing.assert_close(found.values.double(), torch.linalg.svdvals(weight.double())[:3], rtol=1e-6, atol=0)


def test_inverse_leaves_out_what_is_not_there() -> None:
    values = torch.tensor([4.0, 2.0, 4 * 10 * 1e-7, 0.0])
    assert svd.inverse(values, 10).tolist() == [0.25, 0.5, 0.0, 0.0]
    assert svd.inverse(torch.zeros(3), 10).tolist() == [0.0, 0.0, 0.0]
    assert svd.inverse(torch.tensor([[1.0, 0.5], [128.0, 1e-5]]), 10)[1].tolist() == [1 / 128, 0.0], "each matrix by its own"


@pytest.mark.parametrize(
    ("values", "energy", "r"),
    [
        ([3.0, 2.0, 1.0], 9 / 14, 1),
        ([3.0, 2.0, 1.0], 9 / 14 + 1e-6, 2),
        ([3.0, 2.0, 1.0], 13 / 14, 2),
        ([3.0, 2.0, 1.0], 1.0, 3),
        ([2.0, 2.0, 2.0, 2.0], 0.5, 2),  # a tie: half of the energy is in any two
        ([2.0, 2.0, 2.0, 2.0], 0.51, 3),
        ([5.0, 1.0, 0.0, 0.0], 1.0, 2),  # a tail of zeros is not counted
        ([0.0, 0.0], 0.9, 1),
    ],
)
def test_rank_for_energy(values: list[float], energy: float, r: int) -> None:
    assert svd.rank_for_energy(torch.tensor(values), energy) == r


def test_rank_for_energy_of_a_part_and_of_a_stack() -> None:
    values = torch.tensor([3.0, 2.0])
    assert svd.rank_for_energy(values, 13 / 14, total=14.0) == 2
    assert svd.rank_for_energy(values, 0.95, total=14.0) is None
    stack = torch.tensor([[3.0, 0.0], [1.0, 2.0]])  # 10, then 4 of 14
    assert svd.rank_for_energy(stack, 10 / 14) == 1
    assert svd.rank_for_energy(stack, 11 / 14) == 2


def test_the_probe_sees_turns_and_no_signs() -> None:
    basis = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64))[0].T
    seen = svd.probe(basis)
    assert torch.equal(svd.probe(-basis), seen)
    turned = basis.clone()
    angle = torch.tensor(0.05)
    turned[2], turned[3] = angle.cos() * basis[2] - angle.sin() * basis[3], angle.sin() * basis[2] + angle.cos() * basis[3]
    values = torch.arange(6, 0, -1.0)
    assert "turned" in str(svd.differs(values, svd.probe(turned), values, seen))
    assert svd.differs(values, seen, values.bfloat16(), seen.bfloat16()) is None, "a file in a narrow dtype is not another base"
    assert svd.differs(values, seen, values, seen) is None
    assert "singular values" in str(svd.differs(values * 1.01, seen, values, seen))
    assert svd.differs(values * torch.nan, seen, values, seen) is not None
    assert svd.differs(values * 0, seen * 0, values * 0, seen * 0) is None, "a weight of zeros"
