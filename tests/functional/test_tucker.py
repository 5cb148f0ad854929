"""The Tucker format against its definition, written out as one einsum in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from peft_subspace.functional import tucker

EXACT = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)  # float64, sums of fewer than a thousand terms
SHAPES = {
    "linear": ((7, 5), (3, 2)),
    "conv1d": ((6, 5, 3), (3, 2, 2)),
    "conv2d": ((6, 5, 3, 4), (4, 5, 2, 3)),
    "conv3d": ((4, 5, 2, 3, 3), (2, 3, 2, 1, 2)),
    "vector": ((7,), (1,)),
}
each_shape = pytest.mark.parametrize(("shape", "ranks"), SHAPES.values(), ids=SHAPES)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def random_tucker(shape: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    return random(*ranks), [random(size, rank) for size, rank in zip(shape, ranks, strict=True)]


def dense(core: Tensor, factors: list[Tensor]) -> Tensor:
    """T[i, j, ...] = sum_{a, b, ...} G[a, b, ...] U_0[i, a] U_1[j, b] ..."""
    small, large = "abcde"[: core.ndim], "ijklm"[: core.ndim]
    pairs = ",".join(f"{d}{r}" for d, r in zip(large, small, strict=True))
    return torch.einsum(f"{small},{pairs}->{large}", core, *factors)


@each_shape
def test_reconstruct_is_the_sum_over_all_ranks(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    core, factors = random_tucker(shape, ranks)
    EXACT(tucker.reconstruct(core, factors), dense(core, factors))


def test_reconstruct_takes_none_for_the_identity() -> None:
    core, (first, _, last) = random_tucker((6, 5, 3), (3, 5, 2))
    EXACT(tucker.reconstruct(core, [first, None, last]), dense(core, [first, torch.eye(5, dtype=torch.float64), last]))


@pytest.mark.parametrize("order", [2, 4])
def test_reconstruct_is_the_official_update(order: int) -> None:
    """`FLoRALayer.delta_weight`: modes in the order [in, out, kernel...], one tensordot each, then a swap."""
    shape, ranks = (6, 5, 3, 4)[:order], (4, 3, 2, 3)[:order]  # ours: out 6, in 5
    core, factors = random_tucker(shape, ranks)
    official, official_factors = core.transpose(0, 1), [factors[1], factors[0], *factors[2:]]
    update = official
    for factor in official_factors:
        update = torch.tensordot(update, factor, dims=([0], [1]))  # the front mode leaves, its full size joins at the end
    EXACT(tucker.reconstruct(core, factors), update.transpose(0, 1))


@pytest.mark.parametrize("mode", range(3))
def test_mode_product_and_unfolding(mode: int) -> None:
    tensor, matrix = random(4, 3, 5), random(7, (4, 3, 5)[mode])
    product = tucker.mode_product(tensor, matrix, mode)
    EXACT(tucker.unfold(product, mode), matrix @ tucker.unfold(tensor, mode))  # Kolda & Bader 2009, section 2.5
    EXACT(product, torch.einsum(("abc,xa->xbc", "abc,xb->axc", "abc,xc->abx")[mode], tensor, matrix))


@each_shape
def test_gradients_are_those_of_autograd(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    core, factors = random_tucker(shape, ranks)
    inputs = [tensor.requires_grad_() for tensor in (core, *factors)]
    grad = random(*shape)
    expected = torch.autograd.grad(dense(core, factors), inputs, grad)
    for found, wanted in zip(tucker.gradients(core, factors, grad), expected, strict=True):
        EXACT(found, wanted)
    assert tucker.gradients(core, [None] * len(shape), random(*ranks))[1:] == [None] * len(shape)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 5, 3)])
def test_spectrum_and_directions_are_those_of_the_svd(shape: tuple[int, ...]) -> None:
    tensor = random(*shape)
    for mode in range(len(shape)):
        left, values, _ = torch.linalg.svd(tucker.unfold(tensor, mode), full_matrices=False)
        EXACT(tucker.mode_spectrum(tensor, mode), values, rtol=1e-8, atol=1e-8)  # square root of an eigenvalue
        found = tucker.leading_directions(tensor, mode, 2)
        EXACT(found @ found.T, left[:, :2] @ left[:, :2].T, atol=1e-8)
        largest = found.gather(0, found.abs().argmax(0, keepdim=True))
        assert (largest > 0).all(), "the sign is fixed"


def test_directions_complete_the_basis_when_there_are_too_few() -> None:
    found = tucker.leading_directions(torch.zeros(4, 3, dtype=torch.float64), 0, 4)
    EXACT(found.T @ found, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(8, 6), (6, 5, 3, 3)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_hosvd_keeps_the_energy_with_the_fewest_ranks(shape: tuple[int, ...], energy: float) -> None:
    """De Lathauwer et al. 2000, property 10: the squared error is at most the sum of what every mode discards."""
    tensor = random(*shape) * torch.logspace(0, -2, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    ranks = tucker.ranks_for_energy(tensor, energy)
    factors = [tucker.leading_directions(tensor, mode, rank) for mode, rank in enumerate(ranks)]
    core = tucker.reconstruct(tensor, [factor.T for factor in factors])
    error = (tensor - tucker.reconstruct(core, factors)).square().sum() / tensor.square().sum()
    assert error <= 1 - energy
    allowed = (1 - energy) / len(shape)
    for mode, rank in enumerate(ranks):
        share = torch.linalg.svdvals(tucker.unfold(tensor, mode)).square() / tensor.square().sum()
        assert share[rank:].sum() <= allowed + 1e-10
        assert rank == 1 or share[rank - 1 :].sum() > allowed, "one rank less would discard too much"


def test_ranks_for_energy_of_special_tensors() -> None:
    core, factors = random_tucker((9, 8, 7), (3, 2, 4))
    assert tucker.ranks_for_energy(dense(core, factors), 1.0) == [3, 2, 4]
    assert tucker.ranks_for_energy(torch.zeros(4, 3), 0.9) == [1, 1]


@pytest.mark.parametrize(
    ("ranks", "useful"), [([8, 2, 1], [2, 2, 1]), ([4, 4], [4, 4]), ([2, 3, 9], [2, 3, 6]), ([5, 1], [1, 1]), ([3], [1])]
)
def test_useful_ranks_are_those_that_a_core_can_use(ranks: list[int], useful: list[int]) -> None:
    assert tucker.useful_ranks(ranks) == useful
    core = random(*ranks)
    reached = [int(torch.linalg.matrix_rank(tucker.unfold(core, mode))) for mode in range(core.ndim)]
    assert all(rank <= most for rank, most in zip(reached, useful, strict=True))


@each_shape
def test_orthogonalize_is_exact(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    wide = tuple(rank + size for rank, size in zip(ranks, shape, strict=True))  # more columns than rows
    for chosen in (ranks, wide):
        core, factors = random_tucker(shape, chosen)
        found = tucker.orthogonalize(core.float(), [factor.float() for factor in factors])
        EXACT(found.core.new_tensor(0.0), torch.tensor(0.0, dtype=torch.float64))  # float64 out of float32
        EXACT(tucker.reconstruct(*found), dense(core.float().double(), [f.float().double() for f in factors]), rtol=1e-11)
        for size, factor in zip(shape, found.factors, strict=True):
            assert factor.shape[1] <= size
            EXACT(factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64))


@each_shape
@pytest.mark.parametrize("ranks_or_error", [0.3, 0.05, "smaller"])
def test_compress_reports_the_error_that_it_makes(
    shape: tuple[int, ...], ranks: tuple[int, ...], ranks_or_error: float | str
) -> None:
    core, factors = random_tucker(shape, ranks)
    wanted = [max(1, rank - 1) for rank in ranks] if isinstance(ranks_or_error, str) else ranks_or_error
    small, reported = tucker.compress(core, factors, wanted)
    whole = dense(core, factors)
    measured = float((whole - tucker.reconstruct(*small)).norm() / whole.norm())
    assert reported == pytest.approx(measured, abs=1e-10)
    if isinstance(wanted, float):
        assert measured <= wanted
    else:
        assert list(small.core.shape) == tucker.useful_ranks(wanted)
    for factor in small.factors:
        EXACT(factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64))


def test_compress_finds_hidden_low_rank_and_leaves_full_rank_alone() -> None:
    core, factors = random_tucker((9, 8, 7), (3, 2, 3))
    padded = [torch.cat([factor, factor], 1) / 2 for factor in factors]  # twice the ranks, the same tensor
    small, error = tucker.compress(core.repeat(2, 2, 2), padded, 1e-6)
    assert list(small.core.shape) == [3, 2, 3]
    assert error < 1e-6
    EXACT(tucker.reconstruct(*small), dense(core, factors), rtol=1e-6, atol=1e-6)
    whole, error = tucker.compress(core, factors, [3, 2, 3])
    assert error == 0.0
    EXACT(tucker.reconstruct(*whole), dense(core, factors), rtol=1e-11)
    nothing, error = tucker.compress(torch.zeros_like(core), factors, 0.1)
    assert error == 0.0
    assert not tucker.reconstruct(*nothing).any()


def test_block_diagonal_cores_add_up() -> None:
    parts = [random_tucker((6, 5, 3), ranks) for ranks in ((2, 3, 1), (1, 2, 2), (4, 5, 3))]
    core = tucker.block_diagonal([core for core, _ in parts])
    assert core.shape == (7, 10, 6)
    assert core.count_nonzero() == sum(math.prod(core.shape) for core, _ in parts)
    factors = [torch.cat(columns, 1) for columns in zip(*(factors for _, factors in parts), strict=True)]
    EXACT(tucker.reconstruct(core, factors), sum(dense(core, factors) for core, factors in parts))
