"""Scaling a weight along a few of its singular directions, W' = (I + U z U^T) W = W (I + V z V^T), in four equal forms.

    two-sided     W' x = W x + U (delta * V^T x)            delta = s z: the definition
    one-sided     W' x = y0 + U (z * U^T y0), y0 = W x       or  W (x + V (z * V^T x))
    built         W' = W + U (z * U^T W) once, then W' x
    factored      W' x = U ((1 + z) * (U^T W) x), for a full basis: W itself is not used

A basis is kept as rows `[r, d]`. The equalities hold because U^T W = diag(s) V^T; one basis, on the smaller side, is enough.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .low_rank import plain_backward, without_autocast

Form = Literal["one-sided", "built", "factored"]
FORMS = ("one-sided", "built", "factored")


def flops(form: str, tokens: int, out: int, in_: int, r: int, train: bool) -> int:
    """Flops of a linear layer `[out, in]` with r scaled directions, forward and (with `train`) backward to x and z.

    With k = min(out, in) and n tokens, forward: base 2 n out in; one-sided + 4 n r k; two-sided + 2 n r (out + in); built
    + 4 r out in (and 2 n r in to keep what the gradient of z needs); factored 2 n r (out + in), r = k, without the base.
    """
    base, k = 2 * tokens * out * in_, min(out, in_)
    thin = 2 * tokens * r
    forward = {
        "one-sided": base + 2 * thin * k,
        "two-sided": base + thin * (out + in_),
        "built": base + 4 * r * out * in_,
        "factored": thin * (out + in_),
    }[form]
    if not train:
        return forward
    return 2 * forward if form != "built" else 2 * base + 4 * r * out * in_ + thin * (out + in_)


def choose_form(tokens: int, out: int, in_: int, r: int, train: bool, may_build: bool = True, may_factor: bool = True) -> Form:
    """The cheapest form of a linear layer: by flops, and by bytes where flops are near.

    One-sided keeps r min(out, in) numbers beside W and `[n, r]` for backward. Built must save a tenth of the flops; it makes a
    weight, and keeps it for backward, so there must be as many tokens as the weight has rows or columns, and in training four
    times as many: then a weight is at most a quarter of the layer's own input, which LoRA keeps. Factored keeps a second
    basis, as large as W, so it must save a fifth.
    Two-sided needs both bases and is never cheaper than one-sided: it is the definition, not a choice.

    Args:
        tokens: n, rows of the input.
        out: output features.
        in_: input features.
        r: number of directions; factored needs r = min(out, in).
        train: whether there will be a backward.
        may_build: the weight can be read as it is (not quantised) and nothing is dropped.
        may_factor: a full basis in float32 with its counterpart is there.
    """
    plain = flops("one-sided", tokens, out, in_, r, train)
    if may_factor and r == min(out, in_) and flops("factored", tokens, out, in_, r, train) <= 0.8 * plain:
        return "factored"
    if (
        may_build
        and tokens >= (4 if train else 1) * max(out, in_)
        and flops("built", tokens, out, in_, r, train) <= 0.9 * plain
    ):
        return "built"
    return "one-sided"


# One-sided -----------------------------------------------------------------------------------------------------------


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, basis: Tensor, z: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        rows = basis.to(y.dtype)
        inner = y @ rows.t()
        if offset is not None:
            inner -= offset.to(inner.dtype)
        scaled = inner * (z if mask is None else z * mask)
        ctx.save_for_backward(inner, basis, z, mask)
        return torch.addmm(y, scaled.to(y.dtype), rows)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inner, basis, z, mask = ctx.saved_tensors
        rows = basis.to(grad.dtype)
        through = grad @ rows.t()  # [n, r]
        if mask is not None:
            through = through * mask
        of_offset = -(through * z).sum(0).to(z.dtype) if ctx.needs_input_grad[3] else None
        of_z = (inner.to(z.dtype) * through).sum(0) if ctx.needs_input_grad[2] else None
        of_y = torch.addmm(grad, (through * z).to(grad.dtype), rows) if ctx.needs_input_grad[0] else None
        return of_y, None, of_z, of_offset, None


def scale_rows(y: Tensor, basis: Tensor, z: Tensor, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """y + B^T (z * B (y - bias)) for every row y of a tensor.

    Args:
        y: `[..., d]`.
        basis: B `[r, d]`, rows orthonormal, any float dtype; frozen.
        z: `[r]`, relative change of each singular value.
        bias: `[d]`, what of y did not come through the weight; None for 0.
        dropout: probability of dropping a direction's share of one row.

    Returns:
        `[..., d]`, a new tensor; equal to y to the bit where z is zero.

    Cost: 4 n r d flops forward and as many backward. Keeps `[n, r]` for backward, not y.
    """
    with without_autocast(y):
        flat = y.reshape(-1, y.shape[-1])
        offset = None if bias is None else basis.to(bias.dtype) @ bias
        scaled = _ScaleRows.apply(flat, basis, z, offset, _mask(flat.shape[0], z, dropout))
    return scaled.view(y.shape)


def _mask(rows: int, z: Tensor, dropout: float) -> Tensor | None:
    return F.dropout(torch.ones(rows, *z.shape, dtype=z.dtype, device=z.device), dropout) if dropout else None


class _ScaleColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, basis: Tensor, z: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        rows = basis.to(y.dtype)
        inner = rows @ y  # [batch, groups, r, n]
        if offset is not None:
            inner -= offset.to(inner.dtype)[..., None]
        z = z[..., None]
        scaled = inner * (z if mask is None else z * mask)
        ctx.save_for_backward(inner, basis, z, mask)
        return y + rows.mT @ scaled.to(y.dtype)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inner, basis, z, mask = ctx.saved_tensors
        rows = basis.to(grad.dtype)
        through = rows @ grad
        if mask is not None:
            through = through * mask
        of_offset = -(through * z).sum((0, -1)).to(z.dtype) if ctx.needs_input_grad[3] else None
        of_z = (inner.to(z.dtype) * through).sum((0, -1)) if ctx.needs_input_grad[2] else None
        of_y = grad + rows.mT @ (through * z).to(grad.dtype) if ctx.needs_input_grad[0] else None
        return of_y, None, of_z, of_offset, None


def scale_channels(y: Tensor, basis: Tensor, z: Tensor, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """`scale_rows` along the channels of a convolution's output, within each group; two pointwise products.

    Args:
        y: `[batch, groups * d, *space]`; its memory format is kept.
        basis: `[groups, r, d]`.
        z: `[groups, r]`.
        bias: `[groups * d]`.
        dropout: see `scale_rows`.
    """
    groups, r, d = basis.shape
    if groups == 1 and y.stride(1) == 1:  # channels last: rows as they lie
        return scale_rows(y.movedim(1, -1), basis[0], z[0], bias, dropout).movedim(-1, 1)
    with without_autocast(y):
        columns = y.flatten(2).unflatten(1, (groups, d))
        offset = None if bias is None else (basis.to(bias.dtype) @ bias.view(groups, d, 1))[..., 0]
        mask = None
        if dropout:
            mask = F.dropout(torch.ones(len(y), groups, r, columns.shape[-1], dtype=z.dtype, device=z.device), dropout)
        scaled = _ScaleColumns.apply(columns, basis, z, offset, mask)
    return scaled.view(y.shape)


# Dense -----------------------------------------------------------------------------------------------------------------


def scale_matrix(weight: Tensor, basis: Tensor, z: Tensor, left: bool) -> Tensor:
    """dW = U (z * U^T W) or (W V * z) V^T, dense, `[*, m, n]` from `basis` `[*, r, m]` or `[*, r, n]`.

    Cost: 4 r m n flops. Differentiable in z.
    """
    basis = basis.to(weight.dtype)
    if left:
        return basis.mT @ (z.to(weight.dtype)[..., None] * (basis @ weight))
    return (weight @ basis.mT * z.to(weight.dtype)[..., None, :]) @ basis


class _Built(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, basis: Tensor, z: Tensor, left: bool) -> Tensor:
        rows = basis.to(x.dtype)
        inner = rows @ weight if left else weight @ rows.t()  # U^T W `[r, in]`, or W V `[out, r]`
        scale = z.to(x.dtype)
        built = torch.addmm(weight, rows.t() * scale, inner) if left else torch.addmm(weight, inner * scale, rows)
        if any(ctx.needs_input_grad):
            kept = x @ (inner.t() if left else rows.t())  # U^T W x, or V^T x
            ctx.save_for_backward(kept, built, rows if left else inner.t())
            ctx.dtype = z.dtype
        return F.linear(x, built, bias)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, built, outer = ctx.saved_tensors
        of_z = (kept.to(ctx.dtype) * (grad @ outer.t())).sum(0)
        of_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad @ built if ctx.needs_input_grad[0] else None, None, of_bias, None, of_z, None


def built_linear(x: Tensor, weight: Tensor, bias: Tensor | None, basis: Tensor, z: Tensor, left: bool) -> Tensor:
    """A linear layer with W' built once: for many tokens and many directions.

    Args:
        x: `[..., in]`.
        weight: W `[out, in]`, in the dtype of x; frozen.
        bias: `[out]` or None.
        basis: `[r, out]` if `left`, else `[r, in]`.
        z: `[r]`.
        left: which basis it is.

    Cost: 2 n out in + 4 r out in + 2 n r in flops forward. Keeps W' and `[n, r]` for backward, not x.
    """
    with without_autocast(x):
        out = _Built.apply(x.reshape(-1, x.shape[-1]), weight, bias, basis, z, left)
    return out.view(*x.shape[:-1], weight.shape[0])


class _Factored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, z: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        inner = x @ down.t()
        scaled = inner * (1 + (z if mask is None else z * mask))
        ctx.save_for_backward(inner, down, up, z, mask)
        return scaled @ up if bias is None else torch.addmm(bias, scaled, up)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inner, down, up, z, mask = ctx.saved_tensors
        through = grad @ up.t()
        kept = inner * through
        of_z = (kept if mask is None else kept * mask).sum(0)
        of_x = (through * (1 + (z if mask is None else z * mask))) @ down if ctx.needs_input_grad[0] else None
        of_bias = grad.sum(0) if ctx.needs_input_grad[5] else None
        return of_x, None, None, of_z, None, of_bias


def factored_linear(x: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, z: Tensor, dropout: float = 0.0) -> Tensor:
    """A linear layer out of its two full factors, W = up^T down, with the r = min(out, in) directions between scaled.

    Args:
        x: `[..., in]`, float32.
        bias: `[out]` or None.
        down: `[r, in]`.
        up: `[r, out]`.
        z: `[r]`.
        dropout: see `scale_rows`.

    Cost: 2 n r (in + out) flops forward and as many backward. Keeps `[n, r]`. W is what float32 leaves of its factors (1e-6).
    """
    flat = x.reshape(-1, x.shape[-1])
    out = _Factored.apply(flat, down, up, z, _mask(flat.shape[0], z, dropout), bias)
    return out.view(*x.shape[:-1], up.shape[-1])
