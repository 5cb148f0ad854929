"""Products with thin matrices that keep little for backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off on the tensor's device, where there is such a thing: products stay in the dtype that they were given."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else nullcontext()


def plain_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Once differentiable, and without autocast, under which a user may call `loss.backward()`."""

    def without(ctx: Any, grad: Tensor) -> Any:
        with without_autocast(grad):
            return backward(ctx, grad)

    return once_differentiable(without)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: float, out: Tensor, x: Tensor, down: Tensor, core: Tensor, up: Tensor) -> Tensor:
        z = x @ down.to(x.dtype)
        ctx.save_for_backward(x, z, down, core, up)
        ctx.scale = scale
        return torch.addmm(out, z @ (core * scale).to(x.dtype).t(), up.to(x.dtype).t())

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, *parameters = ctx.saved_tensors
        down, core, up = (parameters[0].to(x.dtype), (parameters[1] * ctx.scale).to(x.dtype), parameters[2].to(x.dtype))
        _, need_out, need_x, need_down, need_core, need_up = ctx.needs_input_grad
        inner = grad @ up  # [n, r_out]
        grad_z = inner @ core  # [n, r_in]
        found = (
            x.t() @ grad_z if need_down else None,
            inner.t() @ z * ctx.scale if need_core else None,
            grad.t() @ (z @ core.t()) if need_up else None,
        )
        of_parameters = (g if g is None else g.to(p.dtype) for g, p in zip(found, parameters, strict=True))
        return None, grad if need_out else None, grad_z @ down.t() if need_x else None, *of_parameters


def add_low_rank(out: Tensor, x: Tensor, down: Tensor, core: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """out + scale up core down^T x, without forming the product of the three matrices.

    Args:
        out: `[..., out]`, what the result is added to.
        x: `[..., in]`, in the dtype of `out`, in which all products are computed, also under autocast.
        down: `[in, r_in]`.
        core: `[r_out, r_in]`.
        up: `[out, r_out]`; all three in any dtype, which their gradients have too.
        scale: a factor.

    Returns:
        `[..., out]`, a new tensor.

    Cost: 2 n (in r_in + r_in r_out + r_out out) flops for n rows. Keeps x and `[n, r_in]` for backward; the `[n, r_out]`
    product and the factors in another dtype are made again there, so that no more is kept than for LoRA. Not twice
    differentiable.
    """
    with without_autocast(out):
        flat = _AddLowRank.apply(scale, out.reshape(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), down, core, up)
    return flat.view(out.shape)
