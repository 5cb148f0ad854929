"""Products with thin matrices that keep little for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, down: Tensor, core: Tensor, up: Tensor) -> Tensor:
        z = x @ down
        ctx.save_for_backward(x, z, down, core, up)
        return torch.addmm(out, z @ core.t(), up.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, down, core, up = ctx.saved_tensors
        need_out, need_x, need_down, need_core, need_up = ctx.needs_input_grad
        inner = grad @ up  # [n, r_out]
        grad_z = inner @ core  # [n, r_in]
        return (
            grad if need_out else None,
            grad_z @ down.t() if need_x else None,
            x.t() @ grad_z if need_down else None,
            inner.t() @ z if need_core else None,
            grad.t() @ (z @ core.t()) if need_up else None,
        )


def add_low_rank(out: Tensor, x: Tensor, down: Tensor, core: Tensor, up: Tensor) -> Tensor:
    """out + up core down^T x, without forming the product of the three matrices.

    Args:
        out: `[..., out]`, what the result is added to.
        x: `[..., in]`, in the dtype of `out`.
        down: `[in, r_in]`.
        core: `[r_out, r_in]`.
        up: `[out, r_out]`.

    Returns:
        `[..., out]`, a new tensor.

    Cost: 2 n (in r_in + r_in r_out + r_out out) flops for n rows. Keeps x and `[n, r_in]` for backward; the `[n, r_out]`
    product is made again there, so that no more is kept than for LoRA. Not twice differentiable.
    """
    flat = _AddLowRank.apply(out.reshape(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), down, core, up)
    return flat.view(out.shape)
