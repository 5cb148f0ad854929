"""Which task vectors matter for a task, before anything is trained; and coefficients for losses that have no gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def coefficient_gradients(
    model: nn.Module, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
) -> dict[str, Tensor]:
    """Mean gradient of a loss with respect to all coefficients, at their present values: block -> `[T]` or `[T, K]`, float64.

    One pass over the data for any number of vectors: each is an inner product with the same gradient of a weight, so with
    `placement="disk"` a pool of any size is scored in the memory of one. Grows with the norm of a vector.

    Args:
        model: a PeftModel whose active adapter has coefficients.
        batches: gone through once.
        loss_fn: `(model, batch) -> loss`; None calls `model(**batch).loss`.

    Raises:
        ValueError: no batches.
    """
    tensors = _coefficients(model)
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tensors.items()}
    count = 0
    for batch in batches:
        loss = model(**batch).loss if loss_fn is None else loss_fn(model, batch)
        found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        for total, gradient in zip(sums.values(), found, strict=True):
            if gradient is not None:
                total += gradient.double()
        count += 1
    if not count:
        raise ValueError("No batches were given; a gradient needs at least one.")
    return {name: total / count for name, total in sums.items()}


def rank_vectors(gradients: dict[str, Tensor], names: list[str]) -> list[tuple[str, float]]:
    """Vectors by the mean over blocks of |gradient|, largest first: (name, mean).

    The rest can be left out by `AtlasConfig(exclude_pool=...)`.

    Args:
        gradients: of `coefficient_gradients`.
        names: of the vectors, `config.vector_names`.
    """
    means = torch.stack([value.abs().flatten(1).mean(1) if value.ndim > 1 else value.abs() for value in gradients.values()])
    pairs = zip(names, means.mean(0).tolist(), strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])


def select_vectors(gradients: dict[str, Tensor], names: list[str], budget: int) -> dict[str, list[str]]:
    """For every block the vectors with the largest |gradient|: what `AtlasConfig(selected=...)` takes.

    The memory of the pool falls to `budget / T`, and each block is composed of what promises most for it, wherever that comes
    from. |gradient| grows with the norm of a vector.

    Args:
        gradients: of `coefficient_gradients`, at coefficients of zero; with several groups in a block their sum counts.
        names: of the vectors, `config.vector_names`.
        budget: vectors for each block.

    Raises:
        ValueError: a budget that is not from 1 to the number of vectors.

    Source: the block-wise selection of the official code, which makes as many synthetic vectors of the chosen blocks.
    """
    if not 1 <= budget <= len(names):
        raise ValueError(f"budget={budget!r}: a number of vectors for each block is expected, from 1 to {len(names)}.")
    found = {}
    for block, gradient in gradients.items():
        size = gradient.abs().reshape(len(names), -1).sum(1)
        kept = size.argsort(descending=True, stable=True)[:budget].tolist()
        found[block] = [names[t] for t in sorted(kept)]
    return found


@torch.no_grad()
def search(
    model: nn.Module,
    loss_fn: Callable[[nn.Module], float],
    *,
    budget: int = 50,
    step: float = 0.3,
    box: float = 1.5,
    seed: int = 0,
) -> float:
    """Lower a loss that has no gradient (an accuracy, a judge) by changing the coefficients; the best are left in the model.

    A (1+1) evolution strategy with the one-fifth rule: a normal step from the best point so far, kept if it is not worse; the
    step grows by 1.5 when it is and shrinks by 1.5^(-1/4) when not.

    Args:
        model: a PeftModel whose active adapter has coefficients.
        loss_fn: `model -> number`; evaluated `budget` times.
        budget: evaluations, the first of them at the present values.
        step: standard deviation of the first step.
        box: coefficients stay in [-box, box].
        seed: of the steps.

    Returns:
        The lowest loss.

    Cost: `budget` evaluations; each composes the weights once.
    Source: the official code uses nevergrad's NGOpt for this; the strategy here has no dependency, and no claim to be as good.
    """
    tensors, live = list(_coefficients(model).values()), _live(model)
    generator = torch.Generator().manual_seed(seed)
    best, lowest = [tensor.clone() for tensor in tensors], _loss(loss_fn, model)
    try:
        for _ in range(budget - 1):
            for tensor, value in zip(tensors, best, strict=True):
                noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
                moved = live[id(tensor)].to(value.device).view(-1, *[1] * (value.ndim - 1))
                tensor.copy_(torch.where(moved, (value + step * noise).clamp(-box, box), value))
            found = _loss(loss_fn, model)
            if found <= lowest:
                best, lowest, step = [tensor.clone() for tensor in tensors], found, step * 1.5
            else:
                step *= 1.5**-0.25
    finally:
        for tensor, value in zip(tensors, best, strict=True):
            tensor.copy_(value)
    return lowest


def _live(model: Any) -> dict[int, Tensor]:
    """Which vectors a trained tensor has to do with, `[T]`: not those that its blocks leave out, or that have nothing there."""
    found: dict[int, Tensor] = {}
    for _, delta, tensor in _active(model):
        there = torch.tensor([vector is not None for vector in delta.vectors])
        found[id(tensor)] = there | found.get(id(tensor), there)
    return found


def _loss(loss_fn: Callable[[Any], Any], model: Any) -> float:
    """A loss that is not a number is the worst of all."""
    found = float(loss_fn(model))
    return math.inf if math.isnan(found) else found


def _coefficients(model: Any) -> dict[str, Tensor]:
    """Block -> the trained tensor of the active adapters, each once."""
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, _, tensor in _active(model):
        if id(tensor) not in known:
            known.add(id(tensor))
            found[name] = tensor
    return found


def _active(model: Any) -> Iterator[tuple[str, Any, Tensor]]:
    """Of the active adapters: name of the block (with the adapter's, if there are several), Delta, and what it trains."""
    for _, layer in model.base_model.named_subspace_layers():
        for name in layer.active_adapters:
            for delta in layer.deltas(name).values():
                (tensor,) = delta.trained
                yield (delta.block if len(layer.active_adapters) == 1 else f"{name}.{delta.block}"), delta, tensor
