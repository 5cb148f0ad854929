"""Drop at random, large entries more rarely: DELLA, added or by elected signs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_subspace.merging.methods import masks
from peft_subspace.merging.methods.checks import span
from peft_subspace.merging.methods.consensus import add, elect
from peft_subspace.merging.methods.draws import random_bits, uniform
from peft_subspace.merging.methods.registry import Inputs, Pass, Semantics


def keep_mask(x: Tensor, low: float, high: float, bits: np.ndarray) -> np.ndarray:
    """Draw which entries of each row are kept: with chance low + (high - low) rank / (columns - 1), rank by |x| from 0.

    Ranks are never formed. u < low + delta rank holds iff more than q = floor((u - low) / delta) entries of the row are
    smaller, that is iff the row's sorted magnitudes have a smaller one at index q; so each row is sorted once, without
    indices. Among equal magnitudes a coin decides, which gives each of them the mean of their chances.

    Args:
        x: `[rows, columns]`, float32 or float64.
        low: In [0, 1].
        high: In [low, 1].
        bits: As many uniform int32: the upper 24 bits give u, the lowest the coin.

    Returns:
        Booleans, `[rows * columns]`.
    """
    rows, columns = x.shape
    if columns == 1 or high <= low:
        return uniform(bits) < (low + high) / 2
    kind = np.uint32 if x.dtype == torch.float32 else np.uint64
    size = x.abs().cpu().numpy().view(kind)  # the bits of positive floats, ordered as they are and sorted faster
    ordered = np.sort(size, axis=1).reshape(-1)
    q = uniform(bits)
    q -= np.float32(low)
    q *= np.float32((columns - 1) / (high - low))
    np.floor(q, out=q)
    at = np.clip(q, 0, columns - 1).astype(np.intp).reshape(rows, columns)
    at += np.arange(rows)[:, None] * columns
    at, size = at.reshape(-1), size.reshape(-1)
    drawn = np.take(ordered, at, mode="clip")
    kept = drawn < size
    inside = q < columns - 1
    (tied,) = np.nonzero((drawn == size) & inside)
    kept[tied] = (ordered[at[tied] + 1] == size[tied]) & (bits[tied] & 1 == 0)
    return (kept & inside) | (q < 0)


def draw(inputs: Inputs, k: int) -> np.ndarray | None:
    """m_k for this part, one bit an entry; None for density 1."""
    given = inputs.per_model[k]
    if given["density"] >= 1:
        return None
    if given["density"] <= 0:
        return np.zeros(-(-inputs.tensors[k].numel() // 8), np.uint8)
    x, bits = inputs.tensors[k], random_bits(inputs, k)
    if len(inputs.shape) > 2:  # mergekit ranks along the second axis: slices of the first, turned on their side
        slices = (-1, inputs.shape[1], math.prod(inputs.shape[2:]))
        x = x.reshape(slices).transpose(1, 2)
        bits = np.ascontiguousarray(bits.reshape(slices).swapaxes(1, 2)).reshape(-1)
        kept = keep_mask(x.reshape(-1, slices[1]), *span(given, inputs.semantics), bits)
        kept = np.ascontiguousarray(kept.reshape(x.shape).swapaxes(1, 2)).reshape(-1)
    else:
        kept = keep_mask(x, *span(given, inputs.semantics), bits)
    return np.packbits(kept, bitorder="little")


def _by_the_paper(inputs: Inputs, k: int) -> Tensor:
    """m_k * tau_k, each entry over its chance to be kept if `rescale`: needs the ranks, so two sorts with indices."""
    tensor, given = inputs.tensors[k], inputs.per_model[k]
    if not 0 < given["density"] < 1:
        return tensor if given["density"] >= 1 else torch.zeros_like(tensor)
    low, high = span(given, inputs.semantics)
    ranks = tensor.abs().argsort(dim=1, stable=True).argsort(dim=1)
    chance = low + ranks.to(tensor.dtype) * ((high - low) / max(1, tensor.shape[1] - 1))
    u = torch.from_numpy(uniform(random_bits(inputs, k))).to(tensor.device).view(tensor.shape)
    kept = tensor * (u < chance)
    return kept / chance if inputs.options["rescale"] else kept


def passes(options: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]], semantics: Semantics) -> list[Pass]:
    """mergekit rescales to the L1 norm of the whole delta, which takes a pass; the paper rescales each entry."""
    needed = options["rescale"] and semantics == "mergekit" and any(given["density"] < 1 for given in per_model)
    return [masks.Masks(draw)] if needed else []


def _dropped(inputs: Inputs) -> tuple[list[Tensor], Sequence[float]]:
    models = range(len(inputs.tensors))
    if inputs.semantics == "mergekit":
        return [masks.masked(inputs, k, draw) for k in models], masks.scales(inputs)
    return [_by_the_paper(inputs, k) for k in models], [1.0] * len(models)


def della_linear(inputs: Inputs) -> Tensor:
    """lambda Sigma_k w_k s_k m_k * tau_k, m_k ~ Bernoulli(p), p growing with the rank of |tau_k| in its row.

    p goes from density - epsilon (smallest) to density + epsilon (largest); rows are vectors along the second axis, a vector
    is one row. s_k = |tau_k|_1 / |m_k * tau_k|_1 over the tensor. In the paper's semantics rows lie along the last axis, p
    goes over half that span and each entry is divided by its p. PEFT's semantics are the paper's.
    Cost: one sort of each row without indices, about 12 ns for each entry of each model; 2 reads. Masks are held between
    the two, one bit an entry, up to 64 MB in all; above that rows are sorted twice.
    Of a tensor with three axes or more, mergekit's semantics need a whole slice of the first axis at a time.
    Source: DELLA-Merging (arXiv:2406.11617), MagPrune.
    """
    return add(inputs, *_dropped(inputs))


def della(inputs: Inputs) -> Tensor:
    """As `della_linear`, but the deltas are merged by elected signs (`consensus.elect`)."""
    return elect(inputs, *_dropped(inputs))
