"""What the layers get as input: second moments and means, for decompositions that weigh by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .geometry import Geometry
from .teacher import as_teacher

if TYPE_CHECKING:
    from .layer import SubspaceLayer
    from .model import SubspaceModel


class Moments(NamedTuple):
    """Of the inputs x of one layer, float64.

    Attributes:
        second: E[x x^T], `[in, in]`; a grouped convolution has one per group; an embedding the frequency of each id, `[rows]`.
        mean: E[x] `[in of all groups]`; None for an embedding.
    """

    second: Tensor
    mean: Tensor | None


def input_moments(
    tuner: SubspaceModel,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    adapter_name: str,
    layers_at_once: int | None,
) -> Iterator[tuple[str, SubspaceLayer, Moments]]:
    """Yield (layer name, layer, moments of its inputs to the base model) for every layer that is called with its input.

    The adapters are off and the model is in eval mode meanwhile. Positions that a 2-D `attention_mask` of the batch marks as
    padding do not count, where the input has that batch and length. A convolution's positions are taken one by one.

    Args:
        tuner: the model with wrapped layers.
        batches: gone through once for every group of layers.
        forward: `(model, batch) -> anything`; None calls `model(**batch)`.
        adapter_name: whose layers.
        layers_at_once: how many layers gather moments at a time (8 in^2 bytes each); None for all.

    Raises:
        ValueError: no batches, or a layer that none of them reached.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("No batches were given; a calibration needs at least one.")
    layers = [(key, layer) for key, layer in tuner.named_subspace_layers() if layer.has_adapter(adapter_name)]
    called = [(key, layer) for key, layer in layers if len(layer.geometries) == 1 and not _geometry(layer).reads_own_weight]
    step = layers_at_once or max(1, len(called))
    for start in range(0, len(called), step):
        group = called[start : start + step]
        found = _gather(tuner, [layer for _, layer in group], batches, forward)
        missed = [key for (key, _), moments in zip(group, found, strict=True) if moments is None]
        if missed:
            raise ValueError(f"{missed}: no batch reached these layers, so nothing is known of their inputs. Exclude them.")
        yield from ((key, layer, moments) for (key, layer), moments in zip(group, found, strict=True) if moments is not None)


def _geometry(layer: SubspaceLayer) -> Geometry:
    return next(iter(layer.geometries.values()))[1]


class _Sums:
    def __init__(self, geometry: Geometry) -> None:
        self.geometry, self.count = geometry, 0
        self.second: Any = 0
        self.first: Any = 0

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        geometry = self.geometry
        if geometry.kind == "embedding":
            ids = x[mask] if mask is not None and mask.shape == x.shape else x
            self.second = self.second + torch.bincount(ids.flatten(), minlength=geometry.shape[1]).double()
            self.count += ids.numel()
            return
        if geometry.kind == "conv":
            x = x if x.ndim == len(geometry.kernel) + 2 else x[None]
            rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        elif mask is not None and mask.shape == x.shape[:-1]:
            rows = x[mask]
        else:
            rows = x.reshape(-1, x.shape[-1])
        rows = rows.double()
        groups = rows.unflatten(1, (geometry.groups, -1)).movedim(1, 0)  # [groups, n, in / groups]
        second = groups.mT @ groups
        self.second = self.second + (second if geometry.groups > 1 else second[0])
        self.first = self.first + rows.sum(0)
        self.count += len(rows)

    def moments(self) -> Moments | None:
        if not self.count:
            return None
        return Moments(self.second / self.count, None if self.geometry.kind == "embedding" else self.first / self.count)


def _gather(tuner: Any, layers: list[SubspaceLayer], batches: list[Any], forward: Any) -> list[Moments | None]:
    sums = [_Sums(_geometry(layer)) for layer in layers]
    mask: list[Tensor | None] = [None]

    def watch(total: _Sums) -> Any:
        return lambda module, args, kwargs: total.add(args[0] if args else next(iter(kwargs.values())), mask[0])

    handles = [
        layer.register_forward_pre_hook(watch(total), with_kwargs=True) for layer, total in zip(layers, sums, strict=True)
    ]
    try:
        with as_teacher(tuner.model):
            for batch in batches:
                given = batch.get("attention_mask") if hasattr(batch, "get") else None
                mask[0] = given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None
                tuner.model(**batch) if forward is None else forward(tuner.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [total.moments() for total in sums]
