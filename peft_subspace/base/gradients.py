"""Gradients of the base's weights, for initialisations that look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layer import SubspaceLayer
    from .model import SubspaceModel


def mean_gradients(
    tuner: SubspaceModel,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    adapter_name: str,
    layers_at_once: int | None,
) -> Iterator[tuple[str, SubspaceLayer, str, Tensor]]:
    """Yield (layer name, layer, container, mean gradient in the module's layout, float32) for every adapted weight.

    The adapters are off meanwhile, and every flag is put back. A group of weights is checked whole before any of it is
    yielded; with `layers_at_once`, earlier groups may have been used when a later one is refused.

    Args:
        tuner: the model with wrapped layers.
        batches: gone through once for every group.
        loss_fn: `(model, batch) -> loss`; None calls `model(**batch).loss`.
        adapter_name: whose weights.
        layers_at_once: how many weights make a group; None for all.
    """
    if any(layer.merged_adapters for _, layer in tuner.named_subspace_layers()):
        raise ValueError("Adapters are merged into the base, whose gradient is asked for. Call `unmerge_adapter` first.")
    batches = list(batches)
    if not batches:
        raise ValueError("No batches were given; a gradient needs at least one.")
    weights = [
        (key, layer, container, _trainable_weight(key, layer, container))
        for key, layer in tuner.named_subspace_layers()
        for container in layer.deltas(adapter_name)
    ]
    step = layers_at_once or len(weights)
    for start in range(0, len(weights), step):
        chunk = weights[start : start + step]
        gradients = _accumulate(tuner, [weight for *_, weight in chunk], batches, loss_fn)
        found = [(*place[:3], gradient) for place, gradient in zip(chunk, gradients, strict=True) if _is_usable(gradient)]
        if len(found) < len(chunk):
            useless = [place[0] for place, gradient in zip(chunk, gradients, strict=True) if not _is_usable(gradient)]
            raise ValueError(f"{useless}: the loss has no usable gradient with respect to these weights. Exclude the layers.")
        yield from found  # type: ignore[misc]


def _is_usable(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(torch.isfinite(gradient).all()) and bool(gradient.any())


def _trainable_weight(key: str, layer: SubspaceLayer, container: str) -> nn.Parameter:
    if layer.quantization_backend is not None:
        raise ValueError(f"{key} is quantised and has no gradient. Use init_weights=True or 'orthogonal' on a quantised base.")
    owner, name = layer._locate(container)
    return getattr(owner, name)


def _accumulate(tuner: Any, weights: list[nn.Parameter], batches: list[Any], loss_fn: Any) -> list[Tensor | None]:
    frozen = {parameter: parameter.requires_grad for parameter in tuner.parameters()}
    for parameter in frozen:
        parameter.requires_grad_(False)
    sums: list[Tensor | None] = [None] * len(weights)
    tuner.disable_adapter_layers()
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                loss = tuner.model(**batch).loss if loss_fn is None else loss_fn(tuner.model, batch)
            found = torch.autograd.grad(loss, weights, allow_unused=True)
            for i, gradient in enumerate(found):
                if gradient is not None:
                    part = gradient.float() / len(batches)
                    sums[i] = part if (total := sums[i]) is None else total + part
    finally:
        tuner.enable_adapter_layers()
        for parameter, flag in frozen.items():
            parameter.requires_grad_(flag)
    return sums
