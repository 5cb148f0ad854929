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

    The adapters are off meanwhile, and every flag is put back. See `FloraModel.initialize_from_gradients` for the arguments.
    """
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
        for (key, layer, container, _), gradient in zip(chunk, gradients, strict=True):
            if gradient is None or not torch.isfinite(gradient).all() or not gradient.any():
                raise ValueError(f"{key}: the loss has no usable gradient with respect to this weight. Exclude the layer.")
            yield key, layer, container, gradient


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
