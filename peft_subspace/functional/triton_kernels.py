"""The two passes of dense task vectors as Triton kernels, for CUDA devices.

    compose           total[e] += sum_t lambda[t] tau_t[e]            total is read and written once, every tau read once
    inner products    s[t] = sum_e G[e] tau_t[e]                      G is read once, every tau once

In chunks, as `functional.composition` does both, the total and G pass T times through a core's cache; on a GPU every chunk
would be T small kernels. Used where `PEFT_SUBSPACE_TRITON=1` is set, the tensors are on a CUDA device and Triton can be
imported: what is gained was not measured yet, so it has to be asked for. Tested by Triton's interpreter on a CPU
(`TRITON_INTERPRET=1`), and by compiling for two kinds of GPU.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch for CUDA, and not with torch for CPUs
    triton = None

SWITCH = "PEFT_SUBSPACE_TRITON"
BLOCK, ROUNDS = 1024, 16  # values at a time, and how many times in a row by one program
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def is_on(tensor: Tensor) -> bool:
    """Whether the kernels are used for a tensor: see the module's docstring."""
    return tensor.is_cuda and triton is not None and os.environ.get(SWITCH) == "1"


def fits(values: Sequence[Tensor], other: Tensor) -> bool:
    """Whether the kernels can read these vectors: all of one dtype, contiguous, on the device of `other`, and of its size."""
    kinds = {value.dtype for value in values}
    alike = all(value.device == other.device and value.is_contiguous() and value.numel() == other.numel() for value in values)
    return len(kinds) == 1 and {*kinds, other.dtype} <= TYPES.keys() and alike


if triton is not None:
    # Without annotations but Triton's own: it looks them up when it compiles.

    @triton.jit
    def _pointer(table, t, KIND: tl.constexpr):
        """The address of vector t, as a pointer to its dtype."""
        address = tl.load(table + t)
        if KIND == 0:
            return address.to(tl.pointer_type(tl.float32))
        elif KIND == 1:
            return address.to(tl.pointer_type(tl.bfloat16))
        else:
            return address.to(tl.pointer_type(tl.float16))

    @triton.jit
    def compose_kernel(total, table, numbers, n, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
        where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = where < n
        sums = tl.load(total + where, mask=mask, other=0.0)
        for t in range(count):
            tau = tl.load(_pointer(table, t, KIND) + where, mask=mask, other=0.0).to(tl.float32)
            sums += tl.load(numbers + t) * tau
        tl.store(total + where, sums, mask=mask)

    @triton.jit
    def products_kernel(
        grad, table, partial, n, count,
        PADDED: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        own = tl.arange(0, PADDED)
        sums = tl.zeros([PADDED], dtype=tl.float32)
        for i in range(ROUNDS):
            where = (program * ROUNDS + i) * BLOCK + tl.arange(0, BLOCK)
            mask = where < n
            g = tl.load(grad + where, mask=mask, other=0.0).to(tl.float32)
            for t in range(count):
                tau = tl.load(_pointer(table, t, KIND) + where, mask=mask, other=0.0).to(tl.float32)
                sums += tl.where(own == t, tl.sum(g * tau), 0.0)
        tl.store(partial + program * count + own, sums, mask=own < count)


@functools.lru_cache(maxsize=4096)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses on the device; they are sent once, not in every call."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def compose(total: Tensor, values: Sequence[Tensor], numbers: Tensor) -> None:
    """total += sum_t numbers[t] values[t], in place, in one pass.

    Args:
        total: `[n]`, float32, contiguous.
        values: T of them, `[n]` each, float32, bfloat16 or float16, one dtype for all.
        numbers: `[T]`, float32, on the same device.

    Cost: reads (4 + T b) n bytes and writes 4 n, b being the bytes of a value.
    """
    n, table = total.numel(), _table(tuple(value.data_ptr() for value in values), total.device)
    grid = (triton.cdiv(n, BLOCK),)
    compose_kernel[grid](total, table, numbers.contiguous(), n, len(values), KIND=TYPES[values[0].dtype], BLOCK=BLOCK)


def inner_products(grad: Tensor, values: Sequence[Tensor]) -> Tensor:
    """sum_e grad[e] values[t][e] for every t: `[T]`, float64.

    Summed in float32 over 16,384 entries by one program each, and those sums in float64, always in the same order: two calls
    give the same bits.

    Args:
        grad: `[n]`, float32, bfloat16 or float16, contiguous.
        values: T of them, `[n]` each, float32, bfloat16 or float16, one dtype for all.

    Cost: reads (a + T b) n bytes, a and b being the bytes of a value of either; writes T n / 4,096.
    """
    n, count = grad.numel(), len(values)
    table = _table(tuple(value.data_ptr() for value in values), grad.device)
    programs = triton.cdiv(n, BLOCK * ROUNDS)
    partial = torch.empty(programs, count, dtype=torch.float32, device=grad.device)
    products_kernel[(programs,)](
        grad, table, partial, n, count, PADDED=triton.next_power_of_2(count), KIND=TYPES[values[0].dtype], BLOCK=BLOCK,
        ROUNDS=ROUNDS,
    )  # fmt: skip
    return partial.sum(0, dtype=torch.float64)
