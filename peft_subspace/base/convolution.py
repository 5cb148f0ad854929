"""A convolution in three steps, its gradients, and the update made of them, which keeps little for backward.

    down       1x1            [batch, in, *space]           -> [batch * groups, r_in, *space]
    spatial    the kernel     [batch * groups, r_in, *]     -> [batch * groups, r_out, *]
    up         1x1, grouped   [batch * groups, r_out, *]    -> [batch, out, *]

Padding commutes with the pointwise `down`, so a border is added to r_in channels and not to `in` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import tucker
from ..functional.low_rank import plain_backward

if TYPE_CHECKING:
    from .geometry import Geometry

# What `torch.convolution` and its gradient take after the weight and the bias:
# stride, padding, dilation, transposed, output_padding, groups
Call = tuple[Any, Any, Any, bool, Any, int]


def down(geometry: Geometry, x: Tensor, factor: Tensor) -> Tensor:
    """Contract the input channels with `factor` `[in / groups, r_in]`; strided already when the conv is pointwise."""
    return torch.convolution(_to_batch(geometry, x), _pointwise(geometry, factor.t()), None, *_down_call(geometry))


def spatial(geometry: Geometry, z: Tensor, kernel: Tensor, size: Sequence[int]) -> Tensor:
    """The convolution proper with `kernel` `[r_out, r_in, *kernel]`, to the spatial `size` (a transposed one has a choice)."""
    native = kernel.transpose(0, 1) if geometry.transposed else kernel
    return torch.convolution(_padded(geometry, z), native, None, *_spatial_call(geometry, z.shape[2:], size))


def up(geometry: Geometry, y: Tensor, factor: Tensor) -> Tensor:
    """Expand to the output channels with `factor` `[out, r_out]`."""
    return torch.convolution(_to_channels(geometry, y), _pointwise(geometry, factor), None, *_up_call(geometry))


def add_low_rank_convolution(
    geometry: Geometry, out: Tensor, x: Tensor, core: Tensor, factors: Sequence[Tensor | None], scale: float = 1.0
) -> Tensor:
    """out + (scale core x_n factor_n) * x, the weight in Tucker format `[out, in / groups, *kernel]` and never formed.

    Args:
        geometry: of the convolution.
        out: `[batch, out, *space]`, what the result is added to.
        x: `[batch, in, *space]`, in the dtype of `out`, in which everything but the kernel is computed.
        core: `[r_out, r_in, *r_kernel]`.
        factors: `[out, r_out]`, `[in / groups, r_in]` and `[k, r]` of the kernel's modes (None where k is 1).
        scale: a factor.

    Cost per position: r_in in + prod(r_out, r_in, kernel) + r_out out multiply-adds. Keeps x and the smaller of the two narrow
    tensors for backward, no more than a LoRA of rank r_out (in each group) keeps; the other is made again there. Not twice
    differentiable.
    """
    return _AddConvolution.apply(geometry, scale, out, x, core, *factors)


class _AddConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        geometry: Geometry,
        scale: float,
        out: Tensor,
        x: Tensor,
        core: Tensor,
        wide: Tensor,
        thin: Tensor,
        *kernel: Any,
    ) -> Tensor:
        ctx.geometry, ctx.scale, ctx.size = geometry, scale, out.shape[2:]
        middle = _middle(core, kernel, scale, x.dtype)
        z = down(geometry, x, thin.to(x.dtype))
        y = z if geometry.pointwise else spatial(geometry, z, middle, ctx.size)
        ctx.keeps_z = z.numel() <= y.numel()
        ctx.save_for_backward(x, z if ctx.keeps_z else y, core, wide, thin, *kernel)
        return out + up(geometry, y, _expansion(geometry, wide.to(x.dtype), middle))

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        geometry: Geometry = ctx.geometry
        x, kept, *parameters = ctx.saved_tensors
        core, wide, thin, *kernel = parameters
        _, _, need_out, need_x, *need_parameters = ctx.needs_input_grad
        train = any(need_parameters)
        middle, wide, thin = _middle(core, kernel, ctx.scale, x.dtype), wide.to(x.dtype), thin.to(x.dtype)
        z = kept if ctx.keeps_z else down(geometry, x, thin)
        grad_middle: Any
        if geometry.pointwise:
            grad_z, grad_wide = _up_gradients(geometry, grad, z, _expansion(geometry, wide, middle), train)
            grad_middle = (wide.t() @ grad_wide).view(middle.shape) if train else None
            grad_wide = grad_wide @ middle.flatten(1).t() if train else None
        else:
            y = spatial(geometry, z, middle, ctx.size) if ctx.keeps_z else kept
            grad_y, grad_wide = _up_gradients(geometry, grad, y, wide, train)
            grad_z, grad_middle = _spatial_gradients(geometry, grad_y, z, middle, ctx.size, train)
        grad_x, grad_thin = _down_gradients(geometry, grad_z, x, thin, need_x, train)
        found: list[Any] = [None] * len(parameters)
        if train:
            grad_middle = grad_middle.to(core.dtype) * ctx.scale
            grad_core, _, _, *grad_kernel = tucker.gradients(core, [None, None, *kernel], grad_middle)
            found = [grad_core, grad_wide, grad_thin, *grad_kernel]
        found = [g if g is None else g.to(p.dtype) for g, p in zip(found, parameters, strict=True)]
        return None, None, grad if need_out else None, grad_x, *found


def _middle(core: Tensor, kernel: Sequence[Tensor | None], scale: float, dtype: torch.dtype) -> Tensor:
    """The core with the kernel's factors multiplied in, `[r_out, r_in, *kernel]`."""
    return tucker.reconstruct(core, [None, None, *kernel]).mul(scale).to(dtype)


def _expansion(geometry: Geometry, wide: Tensor, middle: Tensor) -> Tensor:
    """What takes the narrow channels to the output; a pointwise conv has no middle step of its own."""
    return wide @ middle.flatten(1) if geometry.pointwise else wide


# Gradients of the three steps: (of the input, of the factor), None where not needed ------------------------------------------


def _down_gradients(geometry: Geometry, grad: Tensor, x: Tensor, factor: Tensor, need_x: bool, train: bool) -> tuple[Any, Any]:
    of_x, of_weight = _gradients(
        grad, _to_batch(geometry, x), _pointwise(geometry, factor.t()), _down_call(geometry), need_x, train
    )
    return of_x if of_x is None else _to_channels(geometry, of_x), of_weight if of_weight is None else of_weight.flatten(1).t()


def _spatial_gradients(
    geometry: Geometry, grad: Tensor, z: Tensor, kernel: Tensor, size: Sequence[int], train: bool
) -> tuple[Any, Any]:
    native = kernel.transpose(0, 1) if geometry.transposed else kernel
    call = _spatial_call(geometry, z.shape[2:], size)
    of_z, of_kernel = _gradients(grad, _padded(geometry, z), native, call, True, train)
    return _border_gradient(geometry, of_z, z), of_kernel.transpose(0, 1) if train and geometry.transposed else of_kernel


def _up_gradients(geometry: Geometry, grad: Tensor, y: Tensor, factor: Tensor, train: bool) -> tuple[Any, Any]:
    call = _up_call(geometry)
    of_y, of_weight = _gradients(grad, _to_channels(geometry, y), _pointwise(geometry, factor), call, True, train)
    return _to_batch(geometry, of_y), of_weight.flatten(1) if train else None


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, call: Call, need_x: bool, need_weight: bool) -> tuple[Any, Any]:
    mask = [need_x, need_weight, False]
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *call, mask)
    return of_x if need_x else None, of_weight if need_weight else None


# What the steps share ----------------------------------------------------------------------------------------------------


def _down_call(geometry: Geometry) -> Call:
    ones, zeros = (1,) * len(geometry.kernel), (0,) * len(geometry.kernel)
    return geometry.stride if geometry.pointwise else ones, zeros, ones, False, zeros, 1


def _spatial_call(geometry: Geometry, before: Sequence[int], after: Sequence[int]) -> Call:
    zeros = (0,) * len(geometry.kernel)
    if not geometry.transposed:
        padding = zeros if geometry.border else geometry.padding
        return (1,) * len(zeros) if geometry.pointwise else geometry.stride, padding, geometry.dilation, False, zeros, 1
    extra = geometry.output_padding(before, after)
    return geometry.stride, geometry.padding, geometry.dilation, True, extra, 1


def _up_call(geometry: Geometry) -> Call:
    ones, zeros = (1,) * len(geometry.kernel), (0,) * len(geometry.kernel)
    return ones, zeros, ones, False, zeros, geometry.groups


def _pointwise(geometry: Geometry, matrix: Tensor) -> Tensor:
    return matrix.reshape(*matrix.shape, *[1] * len(geometry.kernel))


def _to_batch(geometry: Geometry, x: Tensor) -> Tensor:
    """Each group's channels as a sample of its own: `[batch, groups * c, ...] -> [batch * groups, c, ...]`."""
    return x if geometry.groups == 1 else x.unflatten(1, (geometry.groups, -1)).flatten(0, 1)


def _to_channels(geometry: Geometry, x: Tensor) -> Tensor:
    return x if geometry.groups == 1 else x.unflatten(0, (-1, geometry.groups)).flatten(1, 2)


def _padded(geometry: Geometry, z: Tensor) -> Tensor:
    return F.pad(z, geometry.border, mode=geometry.border_mode) if geometry.border else z


def _border_gradient(geometry: Geometry, grad: Tensor, like: Tensor) -> Tensor:
    """The transpose of `_padded`: every added value goes back to where it was copied from."""
    if not geometry.border:
        return grad
    if geometry.border_mode == "constant":
        return F.pad(grad, [-width for width in geometry.border])
    for axis in range(2, like.ndim):
        last = 2 * (like.ndim - 1 - axis)  # F.pad counts the axes from the last
        positions = torch.arange(like.shape[axis], device=grad.device, dtype=torch.float32)[None, None]
        origin = F.pad(positions, geometry.border[last : last + 2], mode=geometry.border_mode)[0, 0].long()
        shape = [*grad.shape[:axis], like.shape[axis], *grad.shape[axis + 1 :]]
        grad = grad.new_zeros(shape).index_add(axis, origin, grad)
    return grad
