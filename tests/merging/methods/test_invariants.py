"""What every method must do: the same bytes for any cut and thread count, identity, weights, order, zeros, one model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from peft_subspace.merging.methods import loop, masks
from peft_subspace.merging.methods.memory import merge_state_dicts, merge_tensors, spread
from peft_subspace.merging.methods.registry import BLOCK, SEMANTICS, get, names
from tests.merging.methods.cases import CASES, count_for, learned, merge, models, name, statistics

every = pytest.mark.parametrize("case", CASES, ids=name)
# how a merge of one model, or of one with weight 1 and others with 0, must give that model back
EXACT = ["linear", "task_arithmetic", "ties", "magnitude_prune", "dare_linear", "dare_ties", "della", "della_linear"]
EXACT += ["breadcrumbs", "breadcrumbs_ties"]


def test_every_method_has_a_case() -> None:
    assert {method for method, _ in CASES} == set(names())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every
@pytest.mark.parametrize("shape", [(193, 701), (150_001,), (3, 50, 97)], ids=str)
def test_the_same_bytes_for_any_cut_and_thread_count(
    case: tuple[str, dict[str, Any]], shape: tuple[int, ...], threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, options = case
    base, tensors = models(count_for(method), shape)
    # deltas of few different values tie at every threshold
    tensors[0] = base + ((tensors[0] - base) * 20).round() / 64
    given = {"statistics": statistics(method, len(tensors), shape), "seed": 5}
    given["chunk"] = 10**9
    monkeypatch.setattr(loop, "TILE", 4 * BLOCK)
    wanted = merge(method, options, base, tensors, **given)
    assert wanted.isfinite().all()
    for chunk, tile, count, held in ((1, 4, 1, True), (50_000, 1, 1, True), (10**9, 64, 1, False), (10**9, 4, 2, True)):
        # LAPACK and BLAS sum in another order on two threads: matrix methods promise their bytes per thread count
        if count == 2 and get(method).kind_for(get(method).resolve("global", {})) == "matrix":
            continue
        torch.set_num_threads(count)
        monkeypatch.setattr(loop, "TILE", tile * BLOCK)
        monkeypatch.setattr(masks, "HELD", masks.HELD if held else 0)
        found = merge(method, options, base, tensors, **{**given, "chunk": chunk})
        assert torch.equal(found, wanted), f"chunk={chunk} tile={tile} threads={count} held={held}"


@every
@pytest.mark.parametrize("shape", [(0,), (1,), (), (3, 0), (1, 1), (7, 1), (1, 7)], ids=str)
def test_small_and_empty_tensors(case: tuple[str, dict[str, Any]], shape: tuple[int, ...]) -> None:
    method, options = case
    base, tensors = models(count_for(method), shape)
    found = merge(method, options, base, tensors, statistics=statistics(method, len(tensors), shape))
    assert found.shape == shape
    assert found.isfinite().all()


@every
def test_inputs_are_not_written_to(case: tuple[str, dict[str, Any]]) -> None:
    method, options = case
    base, tensors = models(count_for(method), (20, 30))
    copies = [tensor.clone() for tensor in tensors]
    given = statistics(method, len(tensors), (20, 30))
    merge(method, options, base, tensors, statistics=given)
    if get(method).acts_on == "delta":  # deltas are used as they are: nothing may be computed in them
        merge(method, options, base, tensors, are_deltas=True)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


@every
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_zero_deltas_give_the_base(case: tuple[str, dict[str, Any]], semantics: Any) -> None:
    method, options = case
    base = torch.randn(20, 30)
    count = count_for(method)
    found = merge(method, options, base, [base] * count, statistics=statistics(method, count, (20, 30)), semantics=semantics)
    torch.testing.assert_close(found, base, rtol=1e-5, atol=1e-5)  # regmean solves in float64; the others are near exact


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0, 0.0]], ids=str)
def test_identity(method: str, semantics: Any, weights: list[float]) -> None:
    """One model of weight 1, or several of which only one has a weight, at density 1: that model."""
    base, tensors = models(len(weights), (20, 30))
    if semantics != "mergekit" and len(weights) > 1 and (method.endswith("ties") or method == "della"):
        pytest.skip("PEFT and the paper elect signs and count heads without weights, so a weight of 0 still takes part")
    found = merge(method, {}, base, tensors, weights, semantics=semantics)
    torch.testing.assert_close(found, tensors[0], rtol=1e-6, atol=1e-6)  # theta_0 + (theta - theta_0) rounds


SPARSITY = ("density", "gamma", "epsilon", "lambda", "select_topk")


@every
def test_one_model(case: tuple[str, dict[str, Any]]) -> None:
    """One model alone, without sparsity, is itself, whatever the method; where several are needed, the same one twice."""
    method, options = case
    if method == "concrete":
        pytest.skip("a mask gives another model, of one model too: tests/merging/test_learned_masks.py")
    options = {
        key: value for key, value in options.items() if key not in ("density", "gamma", "epsilon", "lambda", "select_topk")
    }
    if method in ("slerp", "iso_c", "iso_cts"):
        pytest.skip("slerp is between two models; iso methods level the singular values also of one delta")
    base, (tensor,) = models(1, (20, 30))
    tensors = [tensor] * get(method).minimum
    found = merge(method, options, base, tensors, statistics=statistics(method, len(tensors), (20, 30)))
    if method == "model_stock":  # of two equal deltas the cosine is 1, so t is 1
        assert get(method).minimum == 2
    torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-5)


ORDERED = ("slerp", "dare_linear", "dare_ties", "della", "della_linear", "iso_cts")
SYMMETRIC = [case for case in CASES if case[0] not in ORDERED and not get(case[0]).learned]  # what is learned is for the k-th


@pytest.mark.parametrize("case", SYMMETRIC, ids=name)
def test_the_order_of_the_models_does_not_matter(case: tuple[str, dict[str, Any]]) -> None:
    """Up to rounding; random methods draw for the k-th model, and iso_cts fills its basis task by task."""
    method, options = case
    base, tensors = models(count_for(method), (20, 30))
    given = statistics(method, len(tensors), (20, 30))
    has_weights = any(parameter.name == "weight" for parameter in get(method).parameters)
    weights = [0.3, 0.5, 0.9][: len(tensors)] if has_weights else None
    order = list(reversed(range(len(tensors))))
    first = merge(method, options, base, tensors, weights, statistics=given)
    second = merge(
        method,
        options,
        base,
        [tensors[k] for k in order],
        None if weights is None else [weights[k] for k in order],
        statistics=None if given is None else [given[k] for k in order],
    )
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_methods_depend_on_seed_and_name_alone(method: str) -> None:
    base, tensors = models(3, (60, 70))
    options = {"density": 0.5}

    def run(**settings: Any) -> torch.Tensor:
        return merge(method, options, base, tensors, [0.4, 0.3, 0.3], **settings)

    torch.manual_seed(1)
    first = run(seed=0, name="a")
    torch.manual_seed(2)
    assert torch.equal(run(seed=0, name="a"), first), "torch's own generator has no part in it"
    assert not torch.equal(run(seed=1, name="a"), first)
    assert not torch.equal(run(seed=0, name="b"), first)


@pytest.mark.parametrize("case", [case for case in CASES if get(case[0]).acts_on == "delta"], ids=name)
def test_deltas_are_as_good_as_models(case: tuple[str, dict[str, Any]]) -> None:
    method, options = case
    base, tensors = models(count_for(method), (20, 30))
    deltas = [tensor - base for tensor in tensors]
    wanted = merge(method, options, base, tensors)
    assert torch.equal(merge(method, options, base, deltas, are_deltas=True), wanted)
    delta = merge(method, options, base, tensors, as_delta=True)
    torch.testing.assert_close(base + delta, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every
def test_half_precision_is_merged_in_float32(case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    method, options = case
    base, tensors = models(count_for(method), (20, 30))
    base, tensors = base.to(dtype), [tensor.to(dtype) for tensor in tensors]
    given = {"statistics": statistics(method, len(tensors), (20, 30))}
    found = merge(method, options, base, tensors, **given)
    assert found.dtype == torch.float32
    assert torch.equal(found, merge(method, options, base.float(), [tensor.float() for tensor in tensors], **given))


@every
def test_float64(case: tuple[str, dict[str, Any]]) -> None:
    """The same to float32's precision; the choice of entries is the same because float32 keeps the order."""
    method, options = case
    base, tensors = models(count_for(method), (20, 30))
    given = {"statistics": statistics(method, len(tensors), (20, 30))}
    deltas = [tensor - base for tensor in tensors] if get(method).acts_on == "delta" else tensors
    flags = {"are_deltas": get(method).acts_on == "delta"}
    single = merge(method, options, base, deltas, **given, **flags)
    double = merge(method, options, base.double(), [d.double() for d in deltas], dtype=torch.float64, **given, **flags)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)


def test_state_dicts_are_merged_tensor_by_tensor() -> None:
    base, model = ({"a": torch.randn(6, 5), "b": torch.randn(7), "n": torch.tensor(3)} for _ in range(2))
    found = merge_state_dicts("ties", base, [model, model], [0.5, 0.5], {"density": 0.5})
    assert set(found) == {"a", "b"}, "whole numbers are left out"
    for key in found:
        assert torch.equal(
            found[key], merge_tensors("ties", base[key], [model[key]] * 2, [0.5, 0.5], {"density": 0.5}, name=key)
        )
    with pytest.raises(ValueError, match=r"model 1 has no tensor 'b' \(of 1 missing ones\)"):
        merge_state_dicts("linear", None, [model, {"a": model["a"]}])


def test_ties_of_the_paper_trims_over_the_whole_model() -> None:
    """One threshold for all tensors: of a large and a small one, all that is kept is in the large one."""
    base = {"large": torch.zeros(10), "small": torch.zeros(10)}
    model = {"large": torch.arange(1.0, 11), "small": torch.arange(1.0, 11) / 100}
    paper = merge_state_dicts("ties", base, [model], [1.0], {"density": 0.5}, semantics="paper")
    assert torch.equal(paper["large"], model["large"])
    assert not paper["small"].any()
    mergekit = merge_state_dicts("ties", base, [model], [1.0], {"density": 0.5})
    assert [int(x.count_nonzero()) for x in mergekit.values()] == [5, 5]


@every
@pytest.mark.parametrize("as_delta", [False, True])
def test_models_and_deltas_may_be_mixed(case: tuple[str, dict[str, Any]], as_delta: bool) -> None:
    """A LoRA's delta beside a whole model, as the engine reads them: also for methods that act on models."""
    method, options = case
    count, shape = count_for(method), (20, 30)
    base, tensors = models(count, shape)
    given = statistics(method, count, shape)
    flags = [k % 2 == 0 for k in range(count)]

    def read(start: int, stop: int) -> loop.Part:
        parts = [(x - base if flag else x).view(-1)[start:stop] for x, flag in zip(tensors, flags, strict=True)]
        cut = given if given is None or get(method).kind == "matrix" else [x.view(-1)[start:stop] for x in given]
        return loop.Part(base.view(-1)[start:stop], parts, flags, cut)

    own, per_model = spread(get(method), options, None, count)
    job = loop.Job(
        get(method), shape, read, own, per_model, chunk=50, as_delta=as_delta, learned=learned(method, count, math.prod(shape))
    )
    found = torch.cat([part for _, part in loop.reduce_and_map(job)]).view(shape)
    wanted = merge(method, options, base, tensors, statistics=given)
    torch.testing.assert_close(found, wanted - base if as_delta else wanted, rtol=1e-4, atol=1e-5)
