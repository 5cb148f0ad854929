"""A convolution in three steps, its gradients, and the update made of them, which keeps little for backward.

    down       1x1            [batch, in, *space]           -> [batch * groups, r_in, *space]
    spatial    the kernel     [batch * groups, r_in, *]     -> [batch * groups, r_out, *]
    up         1x1, grouped   [batch * groups, r_out, *]    -> [batch, out, *]

The 1x1 steps are batched matrix products: `up` adds to the base's output in one pass, and their gradients are up to twice as
fast as those of a convolution. Padding commutes with `down`, so a border is added to r_in channels and not to `in` of them.
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


def down(geometry: Geometry, x: Tensor, factor: Tensor) -> Tensor:
    """Contract the input channels with `factor` `[in / groups, r_in]`; strided already when the conv is pointwise."""
    x = _strided(geometry, x)
    columns = _columns(geometry, x)
    return torch.bmm(factor.t().expand(len(columns), -1, -1), columns).unflatten(2, x.shape[2:])


def spatial(geometry: Geometry, z: Tensor, kernel: Tensor, size: Sequence[int]) -> Tensor:
    """The convolution proper with `kernel` `[r_out, r_in, *kernel]`, to the spatial `size` (a transposed one has a choice)."""
    native = kernel.transpose(0, 1) if geometry.transposed else kernel
    return torch.convolution(_padded(geometry, z), native, None, *_spatial_call(geometry, z.shape[2:], size))


def up(geometry: Geometry, y: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """`out` plus y expanded to the output channels with `factor` `[out, r_out]`, in the memory format of `out`."""
    matrices, last = _matrices(geometry, out)
    return _from_matrices(geometry, _expanded(geometry, y, factor, matrices, last), last, out.shape)


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
    matrices, last = _matrices(geometry, out)
    total = _AddConvolution.apply(geometry, scale, out.shape[2:], last, matrices, x, core, *factors)
    return _from_matrices(geometry, total, last, out.shape)


class _AddConvolution(torch.autograd.Function):
    """On matrices, and shaped outside: what a Function returns must be no view, or nobody may change it in place (a ReLU)."""

    @staticmethod
    def forward(
        ctx: Any,
        geometry: Geometry,
        scale: float,
        size: Sequence[int],
        last: bool,
        matrices: Tensor,
        x: Tensor,
        core: Tensor,
        wide: Tensor,
        thin: Tensor,
        *kernel: Any,
    ) -> Tensor:
        ctx.geometry, ctx.scale, ctx.size, ctx.last = geometry, scale, size, last
        middle = _middle(core, kernel, scale, x.dtype)
        z = down(geometry, x, thin.to(x.dtype))
        y = z if geometry.pointwise else spatial(geometry, z, middle, ctx.size)
        ctx.keeps_z = z.numel() <= y.numel()
        ctx.save_for_backward(x, z if ctx.keeps_z else y, core, wide, thin, *kernel)
        return _expanded(geometry, y, _expansion(geometry, wide.to(x.dtype), middle), matrices, last)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        geometry: Geometry = ctx.geometry
        x, kept, *parameters = ctx.saved_tensors
        core, wide, thin, *kernel = parameters
        _, _, _, _, need_out, need_x, *need_parameters = ctx.needs_input_grad
        columns = grad.mT if ctx.last else grad
        train = any(need_parameters)
        middle, wide, thin = _middle(core, kernel, ctx.scale, x.dtype), wide.to(x.dtype), thin.to(x.dtype)
        z = kept if ctx.keeps_z else down(geometry, x, thin)
        grad_middle: Any
        if geometry.pointwise:
            grad_z, grad_wide = _up_gradients(geometry, columns, z, _expansion(geometry, wide, middle), train)
            grad_middle = (wide.t() @ grad_wide).view(middle.shape) if train else None
            grad_wide = grad_wide @ middle.flatten(1).t() if train else None
        else:
            y = spatial(geometry, z, middle, ctx.size) if ctx.keeps_z else kept
            grad_y, grad_wide = _up_gradients(geometry, columns, y, wide, train)
            grad_z, grad_middle = _spatial_gradients(geometry, grad_y, z, middle, ctx.size, train)
        grad_x, grad_thin = _down_gradients(geometry, grad_z, x, thin, need_x, train)
        found: list[Any] = [None] * len(parameters)
        if train:
            grad_middle = grad_middle.to(core.dtype) * ctx.scale
            grad_core, _, _, *grad_kernel = tucker.gradients(core, [None, None, *kernel], grad_middle)
            found = [grad_core, grad_wide, grad_thin, *grad_kernel]
        found = [g if g is None else g.to(p.dtype) for g, p in zip(found, parameters, strict=True)]
        return None, None, None, None, grad if need_out else None, grad_x, *found


def _middle(core: Tensor, kernel: Sequence[Tensor | None], scale: float, dtype: torch.dtype) -> Tensor:
    """The core with the kernel's factors multiplied in, `[r_out, r_in, *kernel]`."""
    return tucker.reconstruct(core, [None, None, *kernel]).mul(scale).to(dtype)


def _expansion(geometry: Geometry, wide: Tensor, middle: Tensor) -> Tensor:
    """What takes the narrow channels to the output; a pointwise conv has no middle step of its own."""
    return wide @ middle.flatten(1) if geometry.pointwise else wide


# Gradients of the three steps: (of the input, of the factor), None where not needed ----------------------------------------


def _down_gradients(geometry: Geometry, grad: Tensor, x: Tensor, factor: Tensor, need_x: bool, train: bool) -> tuple[Any, Any]:
    strided, of_x, of_factor = _strided(geometry, x), None, None
    if need_x:
        columns = torch.bmm(factor.expand(len(grad), -1, -1), grad.flatten(2))
        of_x = _from_columns(geometry, columns, strided.shape)
        if strided.shape != x.shape:
            _strided(geometry, whole := torch.zeros_like(x)).copy_(of_x)
            of_x = whole
    if train:
        of_factor = torch.bmm(_columns(geometry, strided), grad.flatten(2).mT).sum(0)
    return of_x, of_factor


def _spatial_gradients(
    geometry: Geometry, grad: Tensor, z: Tensor, kernel: Tensor, size: Sequence[int], train: bool
) -> tuple[Any, Any]:
    native = kernel.transpose(0, 1) if geometry.transposed else kernel
    call = _spatial_call(geometry, z.shape[2:], size)
    of_z, of_kernel, _ = torch.ops.aten.convolution_backward(
        grad, _padded(geometry, z), native, None, *call, [True, train, False]
    )
    of_kernel = None if not train else of_kernel.transpose(0, 1) if geometry.transposed else of_kernel
    return _border_gradient(geometry, of_z, z), of_kernel


def _up_gradients(geometry: Geometry, columns: Tensor, y: Tensor, factor: Tensor, train: bool) -> tuple[Any, Any]:
    weight, of_factor = _grouped(geometry, factor, len(columns) // geometry.groups), None
    of_y = torch.bmm(weight.mT, columns).unflatten(2, y.shape[2:])
    if train:
        product = torch.bmm(columns, y.flatten(2).mT)  # [batch * groups, out / groups, r_out]
        of_factor = product.unflatten(0, (-1, geometry.groups)).sum(0).flatten(0, 1)
    return of_y, of_factor


# What the steps share ----------------------------------------------------------------------------------------------------


def _spatial_call(geometry: Geometry, before: Sequence[int], after: Sequence[int]) -> tuple[Any, ...]:
    """What `torch.convolution` and its gradient take after the weight and the bias."""
    zeros, ones = (0,) * len(geometry.kernel), (1,) * len(geometry.kernel)
    if geometry.transposed:
        extra = geometry.output_padding(before, after)
        return geometry.stride, geometry.padding, geometry.dilation, True, extra, 1
    stride = ones if geometry.pointwise else geometry.stride
    return stride, zeros if geometry.border else geometry.padding, geometry.dilation, False, zeros, 1


def _strided(geometry: Geometry, x: Tensor) -> Tensor:
    """What a pointwise convolution sees of its input, a view."""
    if not geometry.pointwise or all(step == 1 for step in geometry.stride):
        return x
    index: Any = (..., *(slice(None, None, step) for step in geometry.stride))
    return x[index]


def _columns(geometry: Geometry, x: Tensor) -> Tensor:
    """Each group as a sample of its own, space as one axis: `[batch, groups * c, *space] -> [batch * groups, c, space]`."""
    x = x.flatten(2)
    return x if geometry.groups == 1 else x.unflatten(1, (geometry.groups, -1)).flatten(0, 1)


def _from_columns(geometry: Geometry, columns: Tensor, shape: Sequence[int]) -> Tensor:
    if geometry.groups > 1:
        columns = columns.unflatten(0, (-1, geometry.groups)).flatten(1, 2)
    return columns.unflatten(2, shape[2:])


def _matrices(geometry: Geometry, out: Tensor) -> tuple[Tensor, bool]:
    """The columns of an output, transposed where the channels come last in memory: products the other way round keep it so."""
    columns = _columns(geometry, out)
    last = columns.stride(1) == 1
    return columns.mT if last else columns, last


def _from_matrices(geometry: Geometry, matrices: Tensor, last: bool, shape: Sequence[int]) -> Tensor:
    return _from_columns(geometry, matrices.mT if last else matrices, shape)


def _expanded(geometry: Geometry, y: Tensor, factor: Tensor, matrices: Tensor, last: bool) -> Tensor:
    """A new tensor, `matrices` plus y expanded to the output channels with `factor` `[out, r_out]`."""
    weight, y = _grouped(geometry, factor, len(y) // geometry.groups), y.flatten(2)
    return torch.baddbmm(matrices, y.mT, weight.mT) if last else torch.baddbmm(matrices, weight, y)


def _grouped(geometry: Geometry, factor: Tensor, batch: int) -> Tensor:
    """`[out, r] -> [batch * groups, out / groups, r]`; a view if there is one group."""
    if geometry.groups == 1:
        return factor.expand(batch, -1, -1)
    return factor.unflatten(0, (geometry.groups, -1)).expand(batch, -1, -1, -1).flatten(0, 1)


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
