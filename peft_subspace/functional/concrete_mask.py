"""A mask with learned logits on a sum of task vectors, and its gradients.

    sample   m[e] = sigmoid((ln(u / (1 - u)) + x[e]) / T),    u uniform: the binary Concrete (Gumbel-sigmoid) relaxation
    mean     m[e] = sigmoid(x[e])
    hard     m[e] = 1 where x[e] >= 0, else 0
    weight   W = W_0 + m / mean(m) * delta,     delta = sum_t lambda_t tau_t,     without rescaling W_0 + m * delta

With rows or columns as groups, x has one entry for each of them: m[e] = m[pi(e)]. The mean is over the entries of the tensor.
Gradients, with G = dL/dW, mu = mean(m) over n entries, s = sum_e G[e] m[e] delta[e]:

    dL/dm[e]       = G[e] delta[e] / mu - s / (n mu^2)
    dL/dx[e]       = dL/dm[e] * dm/dx,    dm/dx = m (1 - m) / T for a sample, m (1 - m) for the mean
    dL/dlambda[t]  = sum_e G[e] m[e] tau_t[e] / mu

Source: Tang et al., "Concrete Subspace Learning based Interference Elimination" (arXiv:2312.06173), as its official code
computes it; the rescaling by the mean of the sample, over each tensor, is in that code. Noise is never kept: backward makes it
again from the position, so that nothing of a weight's size lives from forward to backward but what is trained.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .composition import Vector
from .groups import Groups
from .noise import uniform

CHUNK = 2**18  # values at a time: few calls, and what is made of them stays near the core
KEPT = 2**24  # values of the scratch room that stays: 64 MB
TINY = 2.0**-24
_LOCAL = threading.local()

Kind = Literal["sample", "mean", "hard"]


@dataclass(frozen=True)
class Mask:
    """m of one tensor, for one composition.

    Args:
        logits: x, flat; one for each entry of the tensor, or for each group.
        kind: "sample", "mean" or "hard".
        temperature: T of a sample.
        stream: of a sample, what its noise belongs to; see `noise.uniform`. Empty: torch's own generator, new each time.
        portable: noise of the CPU and float64 in between, so that the values are the same on every device and for every cut.
        salt: of a sample, a number that its noise belongs to besides, on the device of the logits.
    """

    logits: Tensor = field(repr=False)
    kind: Kind = "mean"
    temperature: float = 0.5
    stream: tuple[Any, ...] = ()
    portable: bool = False
    salt: Tensor | None = field(default=None, repr=False)

    def part(self, start: int, stop: int) -> Tensor:
        """m of the logits [start, stop), float32 or their wider dtype, a tensor of its own."""
        logits = self.logits[start:stop]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if self.kind == "hard":
            return (logits >= 0).to(dtype)
        # an exp in float32 differs in its last bit between machines, and between the middle and the end of a loop
        logits = logits.to(torch.float64 if self.portable and logits.device.type != "mps" else dtype)  # which has none
        if self.kind == "mean":
            return torch.sigmoid(logits).to(dtype)
        if self.stream:
            device = torch.device("cpu") if self.portable else logits.device
            u = uniform(self.stream, start, stop, device, self.salt).to(logits.device, logits.dtype)
        else:
            u = torch.rand_like(logits).clamp_(TINY, 1 - TINY)
        # (1-u)/u exp(-x) to the power 1/T, plus 1, inverted: the sigmoid without a logarithm of the noise, in few passes
        odds = u.reciprocal_().sub_(1)
        value = torch.addcdiv(odds, odds, torch.sigmoid(logits), value=-1, out=odds)  # minus odds exp(-x); an exp costs more
        power = 1 / self.temperature
        if power == 2:
            value = torch.addcmul(value.new_ones(()), value, value, out=value)
        else:
            value = value.neg_().pow_(power).add_(1)
        return value.reciprocal_().to(dtype)

    def sum(self, m: Tensor) -> Tensor:
        """The sum of values of this mask."""
        return m.sum(dtype=torch.float64) if self.portable else m.sum()

    def values(self) -> Tensor:
        """m of all logits."""
        size = self.logits.numel()
        return torch.cat([self.part(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)])

    @property
    def steepness(self) -> float:
        """c in dm/dx = c m (1 - m): 1 / T of a sample, 1 of the mean, 0 of a hard mask."""
        return {"sample": 1 / self.temperature, "mean": 1.0, "hard": 0.0}[self.kind]

    def slope(self, m: Tensor) -> Tensor:
        """dm/dx, of the values m."""
        return bell(m).mul_(self.steepness)


def bell(m: Tensor, out: Tensor | None = None) -> Tensor:
    """m (1 - m)."""
    return torch.addcmul(m, m, m, value=-1, out=out)


@dataclass(frozen=True)
class Masked:
    """m / mean(m) * sum_t lambda_t tau_t, at the values that the tensors had when it was made.

    Args:
        mask: m.
        vectors: tau, None for zero.
        coefficients: lambda `[T]`, float64 or float32; None for a single vector that has it multiplied in.
        groups: pi, where the mask has fewer logits than the tensor has entries.
        rescale: divide by the mean of the mask.
    """

    mask: Mask
    vectors: Sequence[Vector | None]
    coefficients: Tensor | None = None
    groups: Groups | None = None
    rescale: bool = True

    def _parts(self, start: int, stop: int, like: Tensor) -> list[Tensor | None]:
        """Every tau [start, stop), not to be written to."""
        return [None if vector is None else vector.part(start, stop, like) for vector in self.vectors]

    def _numbers(self, like: Tensor) -> list[Tensor] | None:
        return None if self.coefficients is None else list(self.coefficients.to(like.device, like.dtype))

    @torch.no_grad()
    def accumulate(self, total: Tensor) -> None:
        """total += m / mean(m) * delta, in place.

        Args:
            total: the weight, contiguous, float32 or float64.

        Cost: about 20 elementwise operations an entry and one pass over each tau; memory for one more weight while it runs.
        """
        flat, numbers = total.view(-1), self._numbers(total)
        masked = _scratch(flat.numel(), flat)
        per_group = None if self.groups is None else self.mask.values().to(flat.dtype)
        found = flat.new_zeros((), dtype=torch.float64)
        for start, stop in self._cuts(flat.numel()):
            part = masked[start:stop]
            m = self._entries(start, stop, per_group, flat)
            if per_group is None:
                found += self.mask.sum(m)
            torch.mul(m, _delta(self._parts(start, stop, part), part, numbers), out=part)
        scale = self._scale(found / flat.numel() if per_group is None else _mean(per_group)).to(flat.dtype)
        for start, stop in _cuts(flat.numel()):
            flat[start:stop].add_(masked[start:stop].mul_(scale))

    def _entries(self, start: int, stop: int, per_group: Tensor | None, like: Tensor) -> Tensor:
        if per_group is None or self.groups is None:
            return self.mask.part(start, stop).to(like.dtype)
        return self.groups.at(start, stop, per_group.device).spread(per_group)

    def _cuts(self, size: int) -> list[tuple[int, int]]:
        return _cuts(size, CHUNK if self.groups is None else self.groups.step(CHUNK))

    def _scale(self, mean: Tensor) -> Tensor:
        return _inverse(mean) if self.rescale else torch.ones_like(mean)

    @torch.no_grad()
    def pull_back(self, grad: Tensor, logits: bool = True, coefficients: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """Gradients for the logits (flat) and the coefficients `[T]` from dL/dW; None for what is not wanted.

        Args:
            grad: G, of the tensor's shape, any float dtype.
            logits: whether theirs is wanted.
            coefficients: whether theirs is wanted.

        Cost: as `accumulate`, and 2 n flops for each tau with `coefficients`. While it runs, memory for one more weight beside
        the result.
        """
        flat = (grad.to_dense() if grad.is_sparse else grad).reshape(-1)
        like = flat.new_empty(0, dtype=torch.promote_types(grad.dtype, torch.float32))
        numbers = self._numbers(like)
        values = None if self.groups is None else self.mask.values().to(like.dtype)
        # of each logit: the sum of G delta over its entries times m (1 - m), and m (1 - m) itself, which the gradient of the
        # mean takes; 1 / T comes in with the last factor
        size = self.mask.logits.numel() if logits else 0
        pulled = like.new_empty(size) if values is None else like.new_zeros(size)
        bells = _scratch(size, like) if values is None else bell(values)
        mass = flat.new_zeros((), dtype=torch.float64)  # the sum of m
        s = flat.new_zeros((), dtype=torch.float64)  # of G m delta
        products = flat.new_zeros(len(self.vectors), dtype=torch.float64)
        for start, stop in self._cuts(flat.numel()):
            g, m = flat[start:stop].to(like.dtype), self._entries(start, stop, values, like)
            if values is None:
                mass += self.mask.sum(m)
            parts = self._parts(start, stop, g)
            if coefficients:
                products += _products(g * m, parts)
            if not logits:
                continue
            out = pulled[start:stop] if self.groups is None else torch.empty_like(g)
            torch.mul(g, _delta(parts, g, numbers), out=out)
            s += torch.dot(out, m)
            if self.groups is None:
                out.mul_(bell(m, out=bells[start:stop]))
            else:
                self.groups.at(start, stop, out.device).collect(pulled, out)
        scale = self._scale(mass / flat.numel() if values is None else _mean(values))
        if logits and values is not None:
            pulled.mul_(bells)
        found = self._with_mean(pulled, bells, s, scale) if logits else None
        return found, (products * scale) if coefficients else None

    def _with_mean(self, pulled: Tensor, bells: Tensor, s: Tensor, scale: Tensor) -> Tensor:
        """(G delta / mu - s / (n mu^2)) dm/dx, in place of G delta m (1 - m); a group stands for n / groups entries."""
        if not self.rescale:
            return pulled if self.mask.steepness == 1 else pulled.mul_(self.mask.steepness)
        steep = scale * self.mask.steepness
        factor, shift = steep.to(pulled.dtype), (-s * scale * steep / bells.numel()).to(pulled.dtype)
        for start, stop in _cuts(bells.numel()):
            pulled[start:stop].mul_(factor).addcmul_(bells[start:stop], shift)
        return pulled


def _delta(parts: Sequence[Tensor | None], like: Tensor, numbers: Sequence[Tensor] | None) -> Tensor:
    """delta of these parts, not to be written to; without numbers the one part itself."""
    if numbers is None:
        (part,) = parts
        return torch.zeros_like(like) if part is None else part
    pairs = [(number, part) for number, part in zip(numbers, parts, strict=True) if part is not None]
    return weighted_sum([number for number, _ in pairs], [part for _, part in pairs], like)


def _products(masked: Tensor, parts: Sequence[Tensor | None]) -> Tensor:
    """<masked, tau_t> over these parts, `[T]`, 0 for a vector that is not there."""
    return torch.stack([masked.new_zeros(()) if part is None else torch.dot(masked, part) for part in parts])


def _scratch(size: int, like: Tensor) -> Tensor:
    """Room for values that nobody keeps, flat.

    On a CPU up to `KEPT` values stay for the next call: fresh pages, which the system clears one by one, cost as much there as
    half of the mask.
    """
    if not _is_plain(like) or size > KEPT:
        return like.new_empty(size)
    kept: Tensor | None = getattr(_LOCAL, "scratch", None)
    if kept is None or kept.dtype != like.dtype or kept.numel() < size:
        with torch.inference_mode(False):  # it must be good for training later
            kept = torch.empty(size, dtype=like.dtype, device="cpu")
        if _is_plain(kept):  # and no stand-in of a mode that is active now
            _LOCAL.scratch = kept
    return kept[:size]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def _cuts(size: int, step: int = CHUNK) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _inverse(mean: Tensor) -> Tensor:
    """1 / mean(m); 0 for a mask that lets nothing through, whose sum is 0 as it is."""
    return torch.where(mean == 0, 0.0, 1 / mean)


def mean_scale(mask: Mask) -> Tensor:
    """1 / mean(m), float64, of a mask that may lie in a file; a pass over it, with the roundings of `Masked`."""
    size, found = mask.logits.numel(), torch.zeros((), dtype=torch.float64)
    for start, stop in _cuts(size):
        found += mask.sum(mask.part(start, stop))
    return _inverse(found / size)


def _mean(values: Tensor) -> Tensor:
    """Of m of all groups, which have as many entries each; with the roundings of `mean_scale`."""
    found = values.new_zeros((), dtype=torch.float64)
    for start, stop in _cuts(values.numel()):
        found += values[start:stop].sum(dtype=torch.float64)
    return found / values.numel()


def weighted_sum(numbers: Sequence[Any], parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """sum_t lambda_t tau_t of one part, a tensor of its own: the one order of roundings, in training and in files.

    Args:
        numbers: lambda, tensors of no dimension.
        parts: of each tau.
        like: of the shape and dtype of the sum, if there is none.
    """
    if not parts:
        return torch.zeros_like(like)
    total = parts[0] * numbers[0]
    for number, part in zip(numbers[1:], parts[1:], strict=True):
        total.addcmul_(part, number)
    return total


def add_weighted(total: Tensor, vector: Vector, number: float) -> None:
    """total += lambda tau, flat, in place and by parts, with the roundings of `weighted_sum`."""
    factor = torch.tensor(number, dtype=total.dtype, device=total.device)
    for start, stop in _cuts(total.numel()):
        part = total[start:stop]
        part.addcmul_(vector.part(start, stop, part), factor)


def masked_sum(delta: Tensor, mask: Tensor, rescale: bool = True) -> Tensor:
    """m / mean(m) * delta with an ordinary graph: the definition that the rest is tested against.

    Args:
        delta: sum of the task vectors.
        mask: m, of the same shape or one that broadcasts to it.
        rescale: divide by the mean over the entries.
    """
    mask = mask.expand(delta.shape)
    return delta * mask / mask.mean() if rescale else delta * mask


def concrete_sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """sigmoid((ln(u / (1 - u)) + x) / T) with an ordinary graph, of given u in (0, 1).

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature!r} must be positive: near 0 a sample is near 0 or 1, at 1 it is spread.")
    return torch.sigmoid((torch.logit(uniform) + logits) / temperature)
