"""The weight-perturbation penalty of PELA: how far a low-rank product has moved from the weight that it stands in for.

    D = R L - W          D: [out, in]

    official   (max_ij |D_ij| - eps)^2            two-sided: below eps it pushes the deviation up to eps
    hinge      relu(max_ij |D_ij| - eps)^2
    topk       relu(mean of the k largest |D_ij| - eps)^2
    pnorm      relu((mean_ij |D_ij|^p)^(1/p) - eps)^2
    frobenius  ||D||_F^2 / ||W||_F^2              eps is not used

Source: PELA's official code, `torch.norm(rebuild - param, float("inf"))` and an MSE with eps (DeiT/engine.py, lines 14 to 38);
without a dimension that norm is the largest entry. The other forms are ours: the official one is sparse (one entry a matrix),
two-sided, and was computed in float16 under autocast, where rounding is as large as its eps.

All of them scan D in blocks of rows, in float32 and outside autocast: no tensor of the weight's size is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..functional.low_rank import without_autocast

Mode = Literal["official", "hinge", "topk", "pnorm", "frobenius"]
MODES: tuple[str, ...] = get_args(Mode)
BLOCK = 1 << 20  # entries of D that are made at a time


def perturbation_penalty(
    up: Tensor, down: Tensor, weight: Tensor, mode: Mode = "official", eps: float = 1e-3, top: int = 64, p: float = 8.0
) -> Tensor:
    """The penalty of one weight.

    Args:
        up: R `[*, out, k]`, trained.
        down: L `[*, k, in]`, trained.
        weight: W `[*, out, in]`, any float dtype; gets no gradient.
        mode: see above.
        eps: the deviation that is allowed (official: aimed at).
        top: number of entries of "topk".
        p: of "pnorm"; the larger, the nearer to the largest entry.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: a mode that is not known, or shapes that do not fit.

    Cost: 2 k out in flops, and as much again in backward for "pnorm" and "frobenius". For backward "official" and "hinge" keep
    k numbers, "topk" top * k, "pnorm" and "frobenius" gradients of the size of the factors.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known. Accepted: {', '.join(map(repr, MODES))}.")
    if (*up.shape[:-1], down.shape[-1]) != tuple(weight.shape) or up.shape[-1] != down.shape[-2]:
        raise ValueError(f"R {list(up.shape)} times L {list(down.shape)} is not a weight {list(weight.shape)}.")
    with without_autocast(up):
        dtype = torch.promote_types(up.dtype, torch.float32)
        up, down, weight = up.to(dtype), down.to(dtype), weight.detach()
        if mode == "frobenius":
            squared: Tensor = _PowerMean.apply(up, down, weight, 2.0)
            norm = weight.to(dtype).square().mean()
            return squared**2 / norm.clamp_min(torch.finfo(dtype).tiny)
        if mode == "pnorm":
            size: Tensor = _PowerMean.apply(up, down, weight, p)
        else:
            size = _largest(up, down, weight, min(top, weight.numel()) if mode == "topk" else 1).mean()
        excess = size - eps
        return excess**2 if mode == "official" else excess.clamp_min(0) ** 2


def max_perturbation(up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """max_ij |(R L - W)_ij|, without a gradient; a scalar."""
    with torch.no_grad(), without_autocast(up):
        dtype = torch.promote_types(up.dtype, torch.float32)
        return _largest(up.to(dtype), down.to(dtype), weight, 1).squeeze()


def _blocks(up: Tensor, down: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of D, flattened over a stack one matrix after the other: (which rows of the flat R, D's block)."""
    rows, columns = weight.shape[-2:]
    step = max(1, BLOCK // columns)
    flat_up, flat_down, flat = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (up, down, weight))
    for index in range(len(flat)):
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            block = flat_up[index, start:stop] @ flat_down[index] - flat[index, start:stop].to(up.dtype)
            yield slice(index * rows + start, index * rows + stop), block


def _largest(up: Tensor, down: Tensor, weight: Tensor, count: int) -> Tensor:
    """The `count` largest |D_ij| `[count]`: found without a graph, then computed again with one."""
    columns, rows = weight.shape[-1], weight.shape[-2]
    with torch.no_grad():
        values = torch.empty(0, dtype=up.dtype, device=up.device)
        places = torch.empty(0, dtype=torch.long, device=up.device)
        for lines, block in _blocks(up, down, weight):
            found, where = block.abs().flatten().topk(min(count, block.numel()))
            values, places = torch.cat([values, found]), torch.cat([places, where + lines.start * columns])
            values, best = values.topk(min(count, len(values)))
            places = places[best]
        lines_of, columns_of = places // columns, places % columns
        targets = weight.reshape(-1, columns)[lines_of, columns_of].to(up.dtype)
        matrices = lines_of // rows
    left = up.reshape(-1, up.shape[-1])[lines_of]  # [count, k]
    right = down.reshape(-1, *down.shape[-2:])[matrices, :, columns_of]  # [count, k]
    return ((left * right).sum(-1) - targets).abs()


class _PowerMean(torch.autograd.Function):
    """(mean |D|^p)^(1/p) and its gradient, R's and L's sized, in one scan; scaled by max |D| so that no power overflows."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, weight: Tensor, p: float) -> Tensor:
        largest = max(float(block.abs().max()) for _, block in _blocks(up, down, weight)) or 1.0
        total = torch.zeros((), dtype=up.dtype, device=up.device)
        of_up, of_down = torch.zeros_like(up).reshape(-1, up.shape[-1]), torch.zeros_like(down)
        flat_down, flat_of_down = (t.reshape(-1, *down.shape[-2:]) for t in (down, of_down))
        rows, flat_up = weight.shape[-2], up.reshape(-1, up.shape[-1])
        for lines, block in _blocks(up, down, weight):
            block = block / largest
            power = block.abs() ** (p - 1)
            total += (power * block.abs()).sum()
            slope = power * block.sign()
            of_up[lines] = slope @ flat_down[lines.start // rows].t()
            flat_of_down[lines.start // rows] += flat_up[lines].t() @ slope
        mean = total / weight.numel()
        # d size / dD = |D|^(p-1) sign(D) / (n size^(p-1)); with D and size in units of `largest` the unit cancels
        factor = mean ** (1 / p - 1) / weight.numel() if bool(mean > 0) else torch.zeros_like(mean)
        ctx.save_for_backward(of_up.view_as(up) * factor, of_down * factor)
        return mean ** (1 / p) * largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_up, of_down = ctx.saved_tensors
        return of_up * grad, of_down * grad, None, None
