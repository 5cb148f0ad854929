"""Merging on a sphere: slerp, nuslerp, multislerp, karcher.

All of them move within the span of the K tensors, so each is a weighted sum whose coefficients follow from the K x K matrix
of dot products, G: one pass finds G, the rest is arithmetic with K numbers in float64, and the map is a weighted sum. No
tensor is normalised, and Karcher's iterations touch no tensor at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_subspace.merging.methods.registry import Inputs, Pass, Semantics
from peft_subspace.merging.methods.sums import Gram, weighted_sum

Options = Mapping[str, Any]


def passes(options: Options, per_model: Sequence[Options], semantics: Semantics) -> list[Pass]:
    """Dot products of the models' tensors."""
    return [Gram(lambda inputs: inputs.tensors)]


def slerp_passes(options: Options, per_model: Sequence[Options], semantics: Semantics) -> list[Pass]:
    """Dot products of the base and the model."""
    return [Gram(_ends)]


def nuslerp_passes(options: Options, per_model: Sequence[Options], semantics: Semantics) -> list[Pass]:
    """Dot products of the two tensors, whole or vector by vector."""
    return [Gram(lambda inputs: [_vectors(inputs, each) for each in inputs.tensors], by_row=not options["nuslerp_flatten"])]


def _ends(inputs: Inputs) -> list[Tensor]:
    return [inputs.base, *inputs.tensors]  # type: ignore[list-item]  # the method requires a base


def _vectors(inputs: Inputs, tensor: Tensor) -> Tensor:
    """The tensor as it is, or `[columns, rows]`, so that vectors along the first axis are rows."""
    if inputs.options["nuslerp_flatten"] or not inputs.options["nuslerp_row_wise"]:
        return tensor
    return tensor.transpose(0, -1).reshape(-1, tensor.shape[0]) if tensor.dim() > 1 else tensor.view(1, -1)


def slerp_coefficients(gram: Tensor, t: float) -> tuple[float, float]:
    """sin((1-t) a) / sin a and sin(t a) / sin a, a the angle; 1-t and t if |cos a| > 0.9995. A zero vector has length 1."""
    lengths = [math.sqrt(float(gram[i, i])) for i in range(2)]
    first, second = (length if length > 1e-8 else 1.0 for length in lengths)
    cosine = max(-1.0, min(1.0, float(gram[0, 1]) / (first * second)))
    if abs(cosine) > 0.9995:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp(inputs: Inputs) -> Tensor:
    """sin((1-t) a) / sin a theta_0 + sin(t a) / sin a theta_1, where a is the angle between the two whole tensors.

    Linear where they are nearly parallel or antiparallel. `base_model` is the end t = 0, as in mergekit.
    Cost: 2 reads, about 2 ns for each entry of both.
    Source: Shoemake 1985; the thresholds are mergekit's.
    """
    return weighted_sum(_ends(inputs), slerp_coefficients(inputs.reduced["gram"], inputs.options["t"]))


def nuslerp_coefficients(gram: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """As `slerp_coefficients`, for one matrix or many `[..., 2, 2]`; linear only where sin^2 a <= 1e-7.

    mergekit is linear only where cos a rounds to 1; below this bound the two differ by less than float32 rounds if the
    tensors are parallel, and if they are antiparallel the sphere gives no answer.
    """
    first, second = (gram[..., i, i].sqrt().clamp_min(1e-7) for i in range(2))
    cosine = (gram[..., 0, 1] / (first * second)).clamp(-1, 1)
    straight = 1 - cosine.square() <= 1e-7
    angle = torch.where(straight, math.pi / 2, cosine.acos())
    one = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    other = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle))
    return one, other


def nuslerp(inputs: Inputs) -> Tensor:
    """As `slerp` with t = w_2 / (w_1 + w_2), on deltas if there is a base; of whole tensors, or vector by vector.

    Vectors lie along the last axis, with `nuslerp_row_wise` along the first one. t = 1/2 if the weights cancel.
    Cost: 2 reads; by columns it needs the whole tensor at once.
    Source: mergekit's `nuslerp`.
    """
    total = sum(inputs.weights)
    t = 0.5 if abs(total) < 1e-6 else inputs.weights[1] / total
    gram = inputs.reduced["gram"]
    if inputs.options["nuslerp_flatten"]:
        return weighted_sum(inputs.tensors, [float(c) for c in nuslerp_coefficients(gram, t)])
    if inputs.options["nuslerp_row_wise"]:
        first, second = (_vectors(inputs, tensor) for tensor in inputs.tensors)
    else:
        first, second = inputs.tensors
        row = inputs.start // max(1, first.shape[1])
        gram = gram[row : row + first.shape[0]]
    one, other = (c.to(first.device, first.dtype).unsqueeze(1) for c in nuslerp_coefficients(gram, t))
    merged = one * first + other * second
    shape = inputs.tensors[0].shape
    if inputs.options["nuslerp_row_wise"] and len(shape) > 1:
        return merged.view(shape[-1], *shape[1:-1], shape[0]).transpose(0, -1)
    return merged.view(shape)


def multislerp(inputs: Inputs) -> Tensor:
    """(Sigma_k w_k |x_k|) m / |m|, m = Sigma_k w_k x_k / |x_k|; of deltas if there is a base. w sums to 1 if it is to.

    mergekit adds an exponential map at m of the mean of the tangent vectors to the units; that mean is zero by the choice
    of m, so this is the same. Two tensors whose m is zero are merged linearly; more are an error.
    Cost: 2 reads.
    Source: mergekit's `multislerp`.
    """
    weights = list(inputs.weights)
    if inputs.options["normalize_weights"]:
        weights = [weight / sum(inputs.weights) for weight in weights]
    if len(weights) == 1:
        return inputs.tensors[0].clone()
    gram, eps = inputs.reduced["gram"], inputs.options["eps"]
    lengths = gram.diagonal().sqrt()
    units = torch.tensor(weights, dtype=torch.float64) / (lengths + eps)
    length = float((units @ gram @ units).clamp_min(0).sqrt())
    radius = sum(weight * float(each) for weight, each in zip(weights, lengths, strict=True))
    if length < eps and len(weights) > 2 and lengths.any():
        raise ValueError(
            f"multislerp of {inputs.name}: the weighted unit vectors cancel and leave no direction; change the weights"
        )
    coefficients = weights if length < eps else (units * (radius / length)).tolist()
    return weighted_sum(inputs.tensors, coefficients)


def karcher_coefficients(gram: Tensor, weights: Sequence[float], max_iter: int, tol: float) -> list[float]:
    """Coefficients of the tensors in their Karcher mean: iterations in the basis of the K tensors.

    Args:
        gram: `[K, K]` float64.
        weights: K numbers that sum to 1.
        max_iter: Greatest number of iterations.
        tol: Lengths and angles below it count as zero.
    """
    lengths = gram.diagonal().sqrt()
    weight = torch.tensor(weights, dtype=torch.float64)
    valid = lengths > tol
    if not valid.any():
        return [0.0] * len(weights)
    scale = float((weight * lengths).sum())
    safe = torch.where(valid, lengths, 1.0)
    cosines = gram / (safe[:, None] * safe)  # of the units
    alpha = torch.where(valid, weight, 0.0)
    alpha = alpha / alpha.sum()

    def norm(c: Tensor) -> float:
        return float((c @ cosines @ c).clamp_min(0).sqrt())

    mean = alpha / norm(alpha) if norm(alpha) >= tol else valid.to(torch.float64).cumsum(0).eq(1).mul(valid).to(torch.float64)
    for _ in range(max_iter):
        dots = (cosines @ mean).clamp(-1, 1)
        angles = dots.acos()
        pull = torch.where(valid & (angles >= tol), alpha * angles / torch.sin(angles).clamp_min(1e-300), 0.0)
        tangent = pull - (pull * dots).sum() * mean
        step = norm(tangent)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / norm(mean)
    return (scale * mean / safe).tolist()


def karcher(inputs: Inputs) -> Tensor:
    """(Sigma_k w_k |theta_k|) m, m the point of the unit sphere with the least Sigma_k w_k angle(m, theta_k)^2.

    w sums to 1; mergekit has no weights, so they are equal there.
    Cost: 2 reads, whatever the number of iterations.
    Source: Karcher mean (arXiv:2603.04972), mergekit's `karcher`.
    """
    if len(inputs.tensors) == 1:
        return inputs.tensors[0].clone()
    weights = [weight / sum(inputs.weights) for weight in inputs.weights]
    options = inputs.options
    return weighted_sum(
        inputs.tensors, karcher_coefficients(inputs.reduced["gram"], weights, options["max_iter"], options["tol"])
    )
