"""Methods that neither mergekit nor PEFT has, against float64 references written from the papers, and their properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_subspace.merging.methods.emr import modulators, unify
from peft_subspace.merging.methods.knots import align, align_factors, merge_factors
from peft_subspace.merging.methods.memory import merge_tensors
from peft_subspace.merging.methods.registry import Inputs, get
from peft_subspace.merging.methods.singular import orthogonal
from peft_subspace.merging.methods.spherical import karcher_coefficients

CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64 decompositions of small matrices
SHAPES = [(12, 20), (20, 12), (12, 12), (7, 5), (5, 2)]


def deltas(count: int, shape: tuple[int, ...], rank: int | None = None) -> list[Tensor]:
    if rank is None:
        return [torch.randn(shape, dtype=torch.float64) for _ in range(count)]
    return [torch.randn(shape[0], rank).double() @ torch.randn(rank, shape[1]).double() for _ in range(count)]


def merge(method: str, given: list[Tensor], weights: list[float] | None = None, **options: Any) -> Tensor:
    base = torch.zeros_like(given[0])
    return merge_tensors(method, base, given, weights, options, are_deltas=True, dtype=torch.float64)


def polar(x: np.ndarray) -> np.ndarray:
    """x (x^T x)^(-1/2), by eigenvalues: the nearest matrix with orthonormal columns, of full column rank."""
    values, vectors = np.linalg.eigh(x.T @ x)
    return x @ vectors @ np.diag(values**-0.5) @ vectors.T


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_tsv_m(shape: tuple[int, int]) -> None:
    """Algorithm 1 of the paper with numpy, its orthogonalisation by eigenvalues instead of an SVD."""
    given, weights = deltas(3, shape), [1.0, 0.7, 1.3]
    rank = min(shape) // 3
    parts = [np.linalg.svd(w * d.numpy(), full_matrices=False) for d, w in zip(given, weights, strict=True)]
    u = np.concatenate([u[:, :rank] for u, _, _ in parts], 1)
    v = np.concatenate([v[:rank] for _, _, v in parts], 0)
    s = np.concatenate([s[:rank] for _, s, _ in parts])
    wanted = 0.8 * polar(u) @ np.diag(s) @ polar(v.T).T
    torch.testing.assert_close(merge("tsv_m", given, weights, **{"lambda": 0.8}), torch.from_numpy(wanted), **CLOSE)


def test_tsv_m_keeps_tasks_that_do_not_meet() -> None:
    """Deltas of low rank in orthogonal subspaces are only added."""
    q, _ = torch.linalg.qr(torch.randn(12, 6, dtype=torch.float64))
    p, _ = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64))
    given = [q[:, at] @ torch.diag(torch.tensor([3.0, 2.0]).double()) @ p[:, at].T for at in ([0, 1], [2, 3], [4, 5])]
    torch.testing.assert_close(merge("tsv_m", given), sum(given), **CLOSE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iso_c(shape: tuple[int, int]) -> None:
    given, weights = deltas(3, shape), [1.0, -0.7, 1.3]
    total = sum(w * d for d, w in zip(given, weights, strict=True))
    found = merge("iso_c", given, weights)
    singular = torch.linalg.svdvals(total)
    torch.testing.assert_close(torch.linalg.svdvals(found), singular.mean().expand(min(shape)), **CLOSE)
    # U V^T is the orthogonal matrix that is nearest to the sum: <U V^T, sum> is the nuclear norm
    torch.testing.assert_close((found * total).sum(), singular.mean() * singular.sum(), **CLOSE)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_directions_without_strength_have_no_part(method: str) -> None:
    """LoRA deltas: nothing outside the span of their columns and rows, where an SVD gives arbitrary vectors."""
    left, right = torch.randn(12, 4, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    found = merge(method, [left[:, [k, k + 1]] @ right[[k, k + 1]] for k in range(3)])
    q, _ = torch.linalg.qr(left)
    p, _ = torch.linalg.qr(right.T)
    torch.testing.assert_close(q @ (q.T @ found), found, **CLOSE)
    torch.testing.assert_close((found @ p) @ p.T, found, **CLOSE)
    assert found.norm() > 1


def iso_cts(given: list[np.ndarray], fraction: float) -> np.ndarray:
    """Algorithm 1 of the paper, task by task, as the reference implementation rounds the sizes."""
    size, tasks = min(given[0].shape), len(given)
    common = size - round((size - int(size * fraction)) / tasks) * tasks
    own = (size - common) // tasks
    u, s, v = np.linalg.svd(sum(given), full_matrices=False)
    us, ss, vs = [], [], []
    for delta in given:
        rest = delta - u[:, :common] @ u[:, :common].T @ delta
        a, b, c = np.linalg.svd(rest, full_matrices=False)
        us, ss, vs = [*us, a[:, :own]], [*ss, b[:own]], [*vs, c[:own]]
    u, v = np.concatenate([*us, u[:, :common]], 1), np.concatenate([*vs, v[:common]], 0)
    return np.concatenate([*ss, s[:common]]).mean() * polar(u) @ polar(v.T).T


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("fraction", [0.8, 0.5, 0.0, 1.0])
def test_iso_cts(shape: tuple[int, int], fraction: float) -> None:
    given = deltas(3, shape)
    found = merge("iso_cts", given, common_space_fraction=fraction)
    wanted = iso_cts([d.numpy() for d in given], fraction)
    torch.testing.assert_close(found, torch.from_numpy(wanted), **CLOSE)
    if fraction == 1.0:
        torch.testing.assert_close(found, merge("iso_c", given), **CLOSE)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_vectors_are_averaged(method: str) -> None:
    given = deltas(3, (9,))
    found = merge(method, given, [1.0, 2.0, 1.0], **{"lambda": 0.5})
    torch.testing.assert_close(found, 0.5 * (given[0] + 2 * given[1] + given[2]) / 4, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonal_is_the_nearest(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    found = orthogonal(x)
    thin = found if shape[0] >= shape[1] else found.T
    torch.testing.assert_close(thin.T @ thin, torch.eye(thin.shape[1], dtype=torch.float64), **CLOSE)
    for _ in range(5):  # no other is nearer
        other, _ = torch.linalg.qr(thin + 0.1 * torch.randn_like(thin))
        other = other if shape[0] >= shape[1] else other.T
        assert (x - found).norm() <= (x - other).norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_knots_without_pruning_is_the_sum(shape: tuple[int, int]) -> None:
    """The basis is common, so a weighted sum of the coefficients is the weighted sum of the deltas."""
    given, weights = deltas(3, shape), [1.0, 0.5, -0.3]
    found = merge("knots", given, weights, inner="task_arithmetic", normalize=False)
    torch.testing.assert_close(found, sum(w * d for d, w in zip(given, weights, strict=True)), **CLOSE)


def test_knots_ties() -> None:
    """TIES on the blocks V_k, between U diag(s) and nothing."""
    given, weights = deltas(3, (8, 6), rank=2), [1.0, 0.5, 0.7]
    u, s, v = np.linalg.svd(np.concatenate([d.numpy() for d in given], 1), full_matrices=False)
    blocks = [torch.from_numpy(v[:6, 6 * k : 6 * k + 6].copy()) for k in range(3)]  # rank 3 x 2
    inner = merge("ties", blocks, weights, density=0.4)
    wanted = torch.from_numpy(u[:, :6] * s[:6]) @ inner
    torch.testing.assert_close(merge("knots", given, weights, density=0.4), wanted, **CLOSE)


@pytest.mark.parametrize("ranks", [[2, 3, 1], [4, 4, 4]], ids=str)
def test_knots_of_factors_is_knots(ranks: list[int]) -> None:
    pairs = [(torch.randn(10, r).double(), torch.randn(r, 7).double()) for r in ranks]
    given = [b @ a for b, a in pairs]
    for basis in (align(given), align_factors(pairs)):
        u, s, blocks = basis
        assert u.shape[1] == min(10, sum(ranks)), "no direction that carries only rounding errors"
        for block, delta in zip(blocks, given, strict=True):
            torch.testing.assert_close((u * s) @ block, delta, **CLOSE)
    method = get("knots")
    per_model = [method.resolve("model", {"density": 0.5})] * 3
    inputs = Inputs(None, (), [1.0, 0.5, 0.7], method.resolve("global", {}), per_model)
    b, a = merge_factors(pairs, inputs)
    torch.testing.assert_close(b @ a, merge("knots", given, [1.0, 0.5, 0.7], density=0.5), **CLOSE)


@pytest.mark.parametrize("reduction", [0.9, 1.0, 0.0])
def test_regmean(reduction: float) -> None:
    """The weights at which the gradient of the regression vanishes; checked through its normal equations."""
    weights = [1.0, 0.5, 2.0]
    tensors = deltas(3, (4, 6))
    inputs = [torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) for _ in range(3)]
    grams = [x.T @ x for x in inputs]
    options = {"reduction": reduction}
    found = merge_tensors("regmean", None, tensors, weights, options, statistics=grams, dtype=torch.float64)
    scaled = [reduction * g + (1 - reduction) * torch.diag(g.diagonal()) for g in grams]
    gradient = sum(w * (found - t) @ g for w, t, g in zip(weights, tensors, scaled, strict=True))
    assert gradient.abs().max() < 1e-6 * max(g.abs().max() for g in grams)  # the ridge is 1e-8 of the diagonal
    if reduction == 1.0:  # by least squares on the rows themselves
        rows = torch.cat([w**0.5 * x for w, x in zip(weights, inputs, strict=True)])
        targets = torch.cat([w**0.5 * x @ t.T for w, x, t in zip(weights, inputs, tensors, strict=True)])
        wanted = torch.linalg.lstsq(rows, targets).solution.T
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_regmean_of_unused_inputs_is_the_mean() -> None:
    tensors = deltas(2, (3, 4))
    gram = torch.diag(torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64))
    found = merge_tensors("regmean", None, tensors, None, statistics=[gram, gram], dtype=torch.float64)
    torch.testing.assert_close(found, (tensors[0] + tensors[1]) / 2, **CLOSE)


def test_regmean_of_a_square_matrix_and_a_wrong_one() -> None:
    tensors, grams = deltas(2, (5, 5)), [torch.eye(5).double(), 3 * torch.eye(5).double()]
    found = merge_tensors("regmean", None, tensors, None, statistics=grams, dtype=torch.float64)
    torch.testing.assert_close(found, (tensors[0] + 3 * tensors[1]) / 4, rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match=r"Gram matrix of layer has shape \(4, 4\), expected \(5, 5\)"):
        merge_tensors("regmean", None, tensors, None, statistics=[torch.eye(4)] * 2, name="layer")


def test_fisher() -> None:
    tensors, weights = deltas(3, (4, 6)), [1.0, 0.5, 2.0]
    fisher = [torch.rand(4, 6, dtype=torch.float64) for _ in range(3)]
    fisher[0][0, 0] = 0.0
    found = merge_tensors("fisher", None, tensors, weights, {"floor": 0.01}, statistics=fisher, dtype=torch.float64)
    shares = [w * f.clamp(min=0.01) for w, f in zip(weights, fisher, strict=True)]
    wanted = sum(s * t for s, t in zip(shares, tensors, strict=True)) / sum(shares)
    torch.testing.assert_close(found, wanted, **CLOSE)
    same = merge_tensors("fisher", None, tensors, weights, statistics=[torch.ones(4, 6)] * 3, dtype=torch.float64)
    torch.testing.assert_close(same, merge_tensors("linear", None, tensors, weights, dtype=torch.float64), **CLOSE)


def test_emr() -> None:
    """Entry by entry, as the paper says it."""
    given = [torch.randn(6, 7, dtype=torch.float64).round(decimals=1) for _ in range(3)]
    wanted = torch.zeros(6, 7, dtype=torch.float64)
    for place in np.ndindex(6, 7):
        values = [float(d[place]) for d in given]
        sign = 1.0 if sum(values) > 0 else -1.0
        wanted[place] = sign * max([abs(v) for v in values if v * sign > 0], default=0.0)
    assert torch.equal(merge("emr", given), wanted)
    torch.testing.assert_close(merge("emr", given, **{"lambda": 0.5}), 0.5 * wanted, **CLOSE)


def test_emr_gives_each_task_its_own_back() -> None:
    states = [{"a": torch.randn(5, 4), "b": torch.randn(3)} for _ in range(3)]
    unified = {name: unify([state[name] for state in states]) for name in ("a", "b")}
    masks, scales = modulators(unified, states)
    for state, mask, scale in zip(states, masks, scales, strict=True):
        parts = {name: scale * mask[name] * unified[name] for name in state}
        size = sum(float(state[name].abs().mean()) for name in state)
        assert sum(float(part.abs().mean()) for part in parts.values()) == pytest.approx(size, rel=1e-5)
        assert all((part * state[name] >= 0).all() for name, part in parts.items()), "no sign is turned"
    (mask,), (scale,) = modulators(states[0], states[:1])
    assert scale == pytest.approx(1.0)
    assert all(torch.equal(mask[name] * states[0][name], states[0][name]) for name in states[0])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_karcher_is_where_the_pull_vanishes(count: int) -> None:
    """First-order condition of the Riemannian mean: Sigma_k w_k log_m(x_k) = 0."""
    common = torch.randn(40, dtype=torch.float64)
    tensors = torch.stack([common + torch.randn(40, dtype=torch.float64) for _ in range(count)])
    weights = torch.rand(count, dtype=torch.float64)
    weights /= weights.sum()
    coefficients = karcher_coefficients(tensors @ tensors.T, weights.tolist(), 100, 1e-12)
    found = torch.tensor(coefficients, dtype=torch.float64) @ tensors
    assert float(found.norm()) == pytest.approx(float((weights * tensors.norm(dim=1)).sum()))
    mean, units = found / found.norm(), tensors / tensors.norm(dim=1, keepdim=True)
    dots = units @ mean
    angles = dots.clamp(-1, 1).acos()
    pull = (weights * angles / angles.sin()) @ (units - dots[:, None] * mean)
    assert float(pull.norm()) < 1e-9


def test_karcher_of_two_is_halfway_on_the_arc() -> None:
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    found = merge_tensors("karcher", None, [first, second], [1.0, 1.0])
    torch.testing.assert_close(found, torch.tensor([0.5**0.5, 0.5**0.5]))
    found = merge_tensors("karcher", None, [first, second], [1.0, 2.0])
    torch.testing.assert_close(found, torch.tensor([0.5, 0.75**0.5]), rtol=1e-4, atol=1e-4)


def test_the_papers_della_divides_by_each_chance() -> None:
    """Its expectation is the delta: mean over many seeds, within 5 standard errors of each entry."""
    delta = torch.randn(3, 40)
    runs = 600
    options = {"density": 0.5, "epsilon": 0.6}
    total, squares = torch.zeros(3, 40), torch.zeros(3, 40)
    for seed in range(runs):
        found = merge_tensors("della_linear", torch.zeros(3, 40), [delta], [1.0], options, semantics="paper", seed=seed)
        total += found
        squares += found.square()
    mean = total / runs
    error = ((squares / runs - mean.square()) / runs).sqrt()
    assert ((mean - delta).abs() <= 5 * error + 1e-6).all()
