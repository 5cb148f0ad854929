"""The kernels for dense task vectors, by Triton's interpreter on the CPU, and compiled for GPUs that need not be there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_subspace.functional import composition, triton_kernels
from peft_subspace.functional.composition import Dense, LowRank, accumulate, inner_products
from peft_subspace.functional.groups import Groups
from tests.processes import run_python

needs_triton = pytest.mark.skipif(
    triton_kernels.triton is None, reason="Triton is not installed (`make kernels` installs it, and runs this file)"
)
SIZES = {"one value": (1, 1), "less than a block": (1000, 3), "a part of a block": (50_001, 5), "whole programs": (49_152, 2)}
EPS = 2.0**-23


@pytest.fixture
def interpreted() -> None:
    """Triton decides at import whether it interprets."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("set TRITON_INTERPRET=1 (as `make kernels` does)")


def vectors(size: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(size).to(dtype) for _ in range(count)]


@needs_triton
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", triton_kernels.TYPES, ids=str)
def test_sums_are_those_of_the_formula_in_float64(size: tuple[int, int], dtype: torch.dtype, interpreted: None) -> None:
    """float32 sums: a rounding for each vector, and for each halving of a block and each block of a program."""
    values, total, numbers = vectors(*size, dtype), torch.randn(size[0]), torch.randn(size[1])
    parts = [total.double(), *(number * tau.double() for number, tau in zip(numbers.double(), values, strict=True))]
    terms = torch.stack(parts)
    triton_kernels.compose(total, values, numbers)
    assert ((total.double() - terms.sum(0)).abs() <= (size[1] + 1) * EPS * terms.abs().sum(0)).all()
    for grad_dtype in triton_kernels.TYPES:
        grad = torch.randn(size[0]).to(grad_dtype)
        found = triton_kernels.inner_products(grad, values)
        assert found.dtype == torch.float64
        for product, tau in zip(found, values, strict=True):
            products = grad.double() * tau.double()
            assert (product - products.sum()).abs() <= (10 + 16 + 1) * EPS * products.abs().sum()
        assert torch.equal(triton_kernels.inner_products(grad, values), found), "the order of the sum is fixed"


@needs_triton
@pytest.mark.parametrize("kind", ["alike", "absent and of low rank", "scaled", "mixed dtypes", "groups"])
def test_composition_uses_the_kernels_where_they_fit(kind: str, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the chunks where they do not; the result is the same to a rounding."""
    calls = {"compose": 0, "inner_products": 0}

    def counted(name: str) -> Any:
        kernel = getattr(triton_kernels, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return kernel(*args)

        return call

    a, b = vectors(6000, 2, torch.float32)
    found: list[Any] = [Dense(a), Dense(b)]
    groups = None
    if kind == "absent and of low rank":
        found += [None, LowRank(torch.randn(60, 2), torch.randn(2, 100))]
    elif kind == "scaled":
        found = [Dense(a.half(), 0.25), Dense(b.half(), 3.0)]
    elif kind == "mixed dtypes":
        found = [Dense(a), Dense(b.bfloat16())]
    elif kind == "groups":
        groups = Groups(3, lambda start, stop, device: torch.arange(start, stop) % 3)
    numbers = torch.randn(len(found), *([] if groups is None else [3]))
    start, grad = torch.randn(60, 100), torch.randn(60, 100)
    monkeypatch.setattr(triton_kernels, "is_on", lambda tensor: False)
    expected, products = start.clone(), inner_products(grad, found, groups)
    accumulate(expected, found, numbers, groups)
    monkeypatch.setattr(triton_kernels, "is_on", lambda tensor: True)
    for name in calls:
        monkeypatch.setattr(triton_kernels, name, counted(name))
    total = start.clone()
    accumulate(total, found, numbers, groups)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(composition.inner_products(grad, found, groups), products, rtol=1e-4, atol=1e-4)
    assert set(calls.values()) == ({0} if kind in ("mixed dtypes", "groups") else {1})


def test_the_kernels_are_off_without_a_gpu_or_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(triton_kernels.SWITCH, "1")
    assert not triton_kernels.is_on(torch.ones(3))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_subspace.functional import triton_kernels as kernels

for capability in (80, 90):
    for kind in kernels.TYPES.values():
        for kernel, arguments, constants in (
            (kernels.compose_kernel, {"total": "*fp32", "table": "*i64", "numbers": "*fp32"}, {}),
            (kernels.products_kernel, {"grad": "*bf16", "table": "*i64", "partial": "*fp32"}, {"PADDED": 4, "ROUNDS": 16}),
        ):
            constants = {"KIND": kind, "BLOCK": kernels.BLOCK, **constants}
            signature = {**arguments, "n": "i64", "count": "i32", **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert len(made.asm["cubin"]) > 0
print("compiled")
"""


@needs_triton
def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """What the interpreter takes, the compiler may refuse. This needs no GPU; to run them does."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    assert "compiled" in run_python(COMPILE, **environment)
