"""Running statistics of BatchNorm for a composed model, estimated from batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..base.batch_norm import BatchNormLayer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@torch.no_grad()
def estimate_statistics(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Give the active adapter the running statistics that its own weights have on some batches.

    The statistics of a model that is composed of others are no sum of theirs: a variance that is too small or too large in one
    layer shifts all that follow. The mean over the batches of each batch's mean and variance takes their place, as
    `torch.optim.swa_utils.update_bn` does it. They are saved with the adapter; the base keeps its own. All other layers are in
    evaluation mode meanwhile, and every mode is as it was afterwards.

    Args:
        model: a PeftModel with an active adapter.
        batches: of inputs; some hundred samples are enough.
        forward: `(model, batch)`; None calls `model(**batch)`, or `model(batch)` for a batch that is no table.

    Raises:
        ValueError: no BatchNorm that the active adapter has statistics of, or no batches.

    Source: REPAIR (arXiv:2211.08403), which resets the statistics of merged models.
    """
    layers = [m for m in model.modules() if isinstance(m, BatchNormLayer) and any(map(m.has_adapter, m.active_adapters))]
    if not layers:
        raise ValueError(
            "no BatchNorm of this model has running statistics of the active adapter: there are none, or the adapter was made "
            "with adapt_batch_norm=False."
        )
    with ExitStack() as stack:
        stack.enter_context(_modes_kept(model))
        model.eval()
        for layer in layers:
            stack.enter_context(_gathering(layer))
        count = 0
        for batch in batches:
            if forward is not None:
                forward(model, batch)
            elif isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch)
            count += 1
        if not count:
            raise ValueError("No batches were given; statistics need at least one.")


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.eval()  # composed weights are forgotten
        for module, training in modes:
            module.training = training


@contextmanager
def _gathering(layer: BatchNormLayer) -> Iterator[None]:
    """A layer in train mode whose statistics begin anew and are means of all batches; as they were, if no batch came."""
    name = next(name for name in layer.active_adapters if layer.has_adapter(name))
    norm: Any = layer.base_layer
    kept = getattr(layer, layer.container)[name]
    before, momentum = {key: value.clone() for key, value in kept.named_buffers()}, norm.momentum
    kept.running_mean.zero_()
    kept.running_var.fill_(1)
    kept.num_batches_tracked.zero_()
    norm.momentum = None
    layer.train()
    try:
        yield
    finally:
        norm.momentum = momentum
        if not int(kept.num_batches_tracked):
            for key, value in before.items():
                getattr(kept, key).copy_(value)
