"""The mask of Concrete: its distribution, rescaling, gradients by parts, and the noise that is made again."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from peft_subspace.functional import concrete_mask
from peft_subspace.functional.bits import pack_bits, unpack_bits
from peft_subspace.functional.composition import Dense, LowRank, combination
from peft_subspace.functional.concrete_mask import Mask, Masked, concrete_sample, masked_sum
from peft_subspace.functional.groups import Groups, groups_from
from peft_subspace.functional.noise import fingerprint, hashed_bits, uniform

SHAPE = (6, 10)
CPU = torch.device("cpu")
KINDS = ("sample", "mean", "hard")


def vectors() -> list[Any]:
    left, right = torch.randn(6, 2), torch.randn(2, 10)
    return [Dense(torch.randn(60)), None, LowRank(left, right), Dense(torch.randn(60), 0.25)]


def rows() -> Groups:
    return groups_from({"count": 6, "axis": 0, "length": 1, "swapped": 0}, SHAPE)


@pytest.fixture(params=[2**17, 8], ids=["one chunk", "chunks of 8"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concrete_mask, "CHUNK", request.param)


# Noise -------------------------------------------------------------------------------------------------------------------


def test_noise_belongs_to_positions() -> None:
    whole = uniform((0, "w", 1), 0, 1001, CPU)
    for start, stop in ((0, 1), (12, 13), (500, 1001), (4, 999)):
        assert torch.equal(uniform((0, "w", 1), start, stop, CPU), whole[start:stop])
    for stream in ((1, "w", 1), (0, "v", 1), (0, "w", 2)):
        assert not torch.equal(uniform(stream, 0, 1001, CPU), whole)


def test_noise_is_the_same_everywhere() -> None:
    """Stored: numpy keeps the stream of PCG64DXSM, and the key is a SHA-256."""
    u = uniform((0, "layer.weight", 3), 0, 4, CPU).double()
    stored = [0.2114791902, 0.6197433493, 0.9150619427, 0.2991256735]
    torch.testing.assert_close(u, torch.tensor(stored, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("salt", [None, torch.tensor(-5)])
@pytest.mark.parametrize("of_accelerators", [False, True])
def test_noise_is_uniform(of_accelerators: bool, salt: Any) -> None:
    if of_accelerators:
        u = ((hashed_bits((0, "w", 1), 0, 100_000, CPU, salt) + 0.5) / 2**16).sort().values
    else:
        u = uniform((0, "w", 1), 0, 100_000, CPU, salt).sort().values
    distance = (u - torch.linspace(0, 1, 100_000)).abs().max()
    assert distance < 1.63 / math.sqrt(100_000), "Kolmogorov and Smirnov's test at 1 %"
    assert bool((u > 0).all() and (u < 1).all())


def test_hashed_noise_belongs_to_positions_and_salts() -> None:
    """What accelerators compute, whose hosts do not wait for the salt."""
    whole = hashed_bits((0, "w"), 0, 1001, CPU, torch.tensor(7))
    assert torch.equal(hashed_bits((0, "w"), 10, 400, CPU, torch.tensor(7)), whole[10:400])
    others = [hashed_bits((0, "w"), 0, 1001, CPU, salt) for salt in (None, torch.tensor(8), torch.tensor(7 + 2**33))]
    assert all(not torch.equal(other, whole) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_is_another_one_after_the_smallest_change(dtype: torch.dtype) -> None:
    values = torch.randn(1000, dtype=dtype)
    before = int(fingerprint(values))
    values[3] = torch.nextafter(values[3].float(), torch.tensor(9.0)).to(dtype) if dtype != torch.bfloat16 else values[3] * 1.01
    assert int(fingerprint(values)) != before


# The mask ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0])
def test_a_sample_is_the_binary_concrete_variable(temperature: float) -> None:
    logits = torch.randn(1000, dtype=torch.float64)
    u = uniform((7, "w", 0), 0, 1000, CPU).double()
    found = Mask(logits, "sample", temperature, (7, "w", 0)).values()
    torch.testing.assert_close(found, concrete_sample(logits, u, temperature), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("logit", "spread"), [(0.0, 0.76), (0.2, 0.69), (2.0, 0.31)])
def test_a_sample_has_the_spread_of_its_density(logit: float, spread: float) -> None:
    """Standard deviation over mean at T = 0.5, by the numeric integral of the density."""
    m = Mask(torch.full((400_000,), logit), "sample", 0.5, (0, "w", 0)).values()
    assert float(m.std() / m.mean()) == pytest.approx(spread, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_are_saturated_and_finite(kind: Any) -> None:
    logits = torch.tensor([-1e30, -200.0, 200.0, 1e30, -math.inf, math.inf])
    m = Mask(logits, kind, 0.5, (0, "w", 0)).values()
    torch.testing.assert_close(m, torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0]))


def test_a_sample_without_a_stream_is_new_each_time() -> None:
    mask = Mask(torch.zeros(100), "sample")
    torch.manual_seed(0)
    first, second = mask.values(), mask.values()
    torch.manual_seed(0)
    assert torch.equal(mask.values(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        concrete_sample(torch.zeros(2), torch.tensor([0.5, 0.5]), temperature)


# The weight and its gradients ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("kind", "grouped", "rescale"), list(itertools.product(KINDS, [False, True], [True, False])))
def test_values_and_gradients_are_those_of_the_definition(kind: Any, grouped: bool, rescale: bool) -> None:
    tau, groups = vectors(), rows() if grouped else None
    logits = torch.randn(6 if grouped else 60, dtype=torch.float64, requires_grad=True)
    numbers = torch.tensor([0.3, 5.0, -0.7, 1.0], dtype=torch.float64, requires_grad=True)
    mask = Mask(logits.detach(), kind, 0.5, (0, "w", 2))

    if kind == "sample":
        u = uniform((0, "w", 2), 0, logits.numel(), CPU).double()
        m = concrete_sample(logits, u, 0.5)
    else:
        m = torch.sigmoid(logits) if kind == "mean" else (logits >= 0).double()
    m = m.repeat_interleave(10) if grouped else m
    expected = masked_sum(combination(tau, numbers, (60,)), m, rescale).view(SHAPE)

    masked = Masked(mask, tau, numbers.detach(), groups, rescale)
    total = torch.ones(SHAPE, dtype=torch.float64)
    masked.accumulate(total)
    torch.testing.assert_close(total, 1 + expected.detach(), rtol=1e-6, atol=1e-7)

    grad = torch.randn(SHAPE, dtype=torch.float64)
    found_logits, found_numbers = masked.pull_back(grad)
    wanted = torch.autograd.grad(expected, [logits, numbers], grad, allow_unused=True)
    assert found_logits is not None
    assert found_numbers is not None
    zero = torch.zeros_like(logits)
    torch.testing.assert_close(found_logits, zero if wanted[0] is None else wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_numbers, wanted[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_what_is_wanted_is_computed(wanted: tuple[bool, bool]) -> None:
    masked = Masked(Mask(torch.randn(60)), vectors(), torch.ones(4))
    both, some = masked.pull_back(torch.ones(SHAPE)), masked.pull_back(torch.ones(SHAPE), *wanted)
    for whole, part, asked in zip(both, some, wanted, strict=True):
        assert (part is not None) == asked
        assert not asked or torch.equal(part, whole)  # type: ignore[arg-type]


def test_equal_logits_change_nothing() -> None:
    """The rescaled mean mask is 1: Concrete starts as task arithmetic."""
    tau, numbers = vectors(), torch.tensor([0.3, 0.3, 0.3, 0.3])
    total = torch.zeros(SHAPE)
    Masked(Mask(torch.full((60,), 1.7)), tau, numbers).accumulate(total)
    torch.testing.assert_close(total, combination(tau, numbers, SHAPE))


def test_the_mean_is_over_each_tensor_and_a_part_does_not_change_it() -> None:
    tau, logits = [Dense(torch.ones(60))], torch.randn(60)
    total = torch.zeros(SHAPE)
    Masked(Mask(logits), tau, torch.ones(1)).accumulate(total)
    assert float(total.mean()) == pytest.approx(1.0, abs=1e-6)


def test_a_mask_that_lets_nothing_through_gives_the_base() -> None:
    total = torch.ones(SHAPE)
    masked = Masked(Mask(torch.full((60,), -1.0), "hard"), vectors(), torch.ones(4))
    masked.accumulate(total)
    assert torch.equal(total, torch.ones(SHAPE))
    assert all(bool(torch.isfinite(g).all()) for g in masked.pull_back(torch.ones(SHAPE)) if g is not None)


def test_bfloat16_gradients_and_sparse_ones() -> None:
    masked = Masked(Mask(torch.randn(60)), vectors(), torch.ones(4))
    dense = torch.zeros(SHAPE)
    dense[2] = torch.arange(10).float()
    expected = masked.pull_back(dense)
    for grad in (dense.bfloat16(), dense.to_sparse()):
        for found, wanted in zip(masked.pull_back(grad), expected, strict=True):
            torch.testing.assert_close(found, wanted)


# Bits --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_bits_are_packed_and_unpacked(count: int) -> None:
    mask = torch.rand(count) > 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-count // 8),)
    assert torch.equal(unpack_bits(packed, count), mask)


def test_the_order_of_bits_is_the_documented_one() -> None:
    mask = torch.tensor([True, False, False, False, False, False, False, False, False, True])
    assert pack_bits(mask).tolist() == [1, 2]


@pytest.mark.parametrize("count", [8, 17])
def test_bits_of_another_mask_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="2 bytes hold masks of 9 to 16 bits"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), count)


def test_room_that_stays_belongs_to_no_mode_or_device() -> None:
    """A call under a default device or with stand-ins of tensors leaves nothing behind that breaks the next one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def composed() -> torch.Tensor:
        total = torch.zeros(64, device="cpu")
        tau = Dense(torch.ones(64, device="cpu"))
        Masked(Mask(torch.zeros(64, device="cpu")), [tau]).accumulate(total)
        return total

    expected = composed()
    concrete_mask._LOCAL.__dict__.clear()
    with torch.device("meta"):
        composed()
    assert torch.equal(composed(), expected)
    concrete_mask._LOCAL.__dict__.clear()
    with FakeTensorMode():
        composed()
    assert torch.equal(composed(), expected)
    with torch.inference_mode():
        composed()
    total = composed()
    grad = Masked(Mask(torch.zeros(64)), [Dense(torch.ones(64))]).pull_back(torch.ones(64))[0]
    assert grad is not None
    assert not grad.is_inference()
    assert torch.equal(total, expected), "a later call does not write into an earlier result"
