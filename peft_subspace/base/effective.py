"""Effective weights, W_0 + sum over the active adapters of dW: composed once per change, and kept while nothing changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import composition
from ..functional.low_rank import without_autocast
from .sharding import is_share, refuse_shares
from .stand_in import own_tensor

if TYPE_CHECKING:
    from .layer import SubspaceLayer

SMALL = 2**16  # values of a tensor that are compared, where its version says that it is as it was


@dataclass
class _Kept:
    weight: Tensor
    made_of: tuple[Any, ...]
    values: list[Tensor]


class EffectiveWeights:
    """The composed weights of one wrapped module.

    With a graph, that is in training, a weight is composed for every call and lives as long as the graph: a later change of the
    coefficients cannot reach it. Without one it is kept until something that it was made of changes: the active adapters, the
    device or dtype, the version of a tensor, its address, or (for up to 65,536 values) the values themselves, because a write
    through `.data` leaves the version as it is. A frozen tensor on an accelerator is not compared: that would make the host
    wait for the device in every layer. A write through `.data` into the base's own weight is seen at the next `train()` or
    `eval()`. Of a base that FSDP2 has sharded nothing is kept once `train()` or `eval()` was called: a copy of every whole
    weight on every device is what sharding is there to avoid.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._keeps = True

    def get(self, layer: SubspaceLayer, container: str, names: Sequence[str]) -> Tensor:
        """The effective weight of one container, in the module's layout and the base's dtype.

        Raises:
            ValueError: the weight is not in memory, or it is one rank's share of a sharded weight.
        """
        owner, name = layer._locate(container)
        deltas = [getattr(layer, container)[adapter] for adapter in names]
        trained = [tensor for delta in deltas for tensor in delta.trained if tensor.requires_grad]
        if trained and torch.is_grad_enabled():
            self._kept.pop(container, None)
            pulls = [
                (delta.pull_back(), [tensor.requires_grad for tensor in delta.trained], delta.multiplier)
                for delta in deltas
                if any(tensor.requires_grad for tensor in delta.trained)
            ]
            weight = compose(layer, container, names)
            return composition.composed(weight, lambda grad: _pulled(grad, pulls), trained)
        if not self._keeps:
            return compose(layer, container, names)
        tensors = [own_tensor(owner, name), *(tensor for delta in deltas for tensor in delta.trained)]
        multipliers = tuple(delta.multiplier for delta in deltas)
        state = ((tensor.data_ptr(), _version(tensor), tensor.dtype, tensor.device) for tensor in tensors)
        made_of = (tuple(names), multipliers, *state)
        kept = self._kept.get(container)
        if kept is None or kept.made_of != made_of or not _same_values(tensors[1:], kept.values):
            # what is not compared is held, so that its address cannot become that of another tensor
            values = [tensor.detach().clone() if _is_compared(tensor) else tensor.detach() for tensor in tensors[1:]]
            kept = self._kept[container] = _Kept(compose(layer, container, names), made_of, values)
        return kept.weight

    def clear(self, weights: Iterable[Tensor] = ()) -> None:
        """Forget what is kept. `weights` are the base's between two calls: of shares nothing is kept from now on."""
        self._kept.clear()
        self._keeps = not any(is_share(weight) for weight in weights)

    def __deepcopy__(self, memo: Any) -> EffectiveWeights:
        return EffectiveWeights()  # a copy has other tensors, and composes for itself

    def __reduce__(self) -> Any:
        return EffectiveWeights, ()


def _pulled(grad: Tensor, pulls: Any) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for pull, needed, multiplier in pulls:
        of_update = grad if multiplier == 1 else grad * multiplier
        found += [gradient for gradient, wanted in zip(pull(of_update), needed, strict=True) if wanted]
    return found


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which inference tensors do not have


def _is_compared(tensor: Tensor) -> bool:
    return tensor.numel() <= SMALL and (tensor.device.type == "cpu" or tensor.requires_grad)


def _same_values(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    return all(not _is_compared(now) or torch.equal(now, kept) for now, kept in zip(tensors, values, strict=True))


def compose(layer: SubspaceLayer, container: str, names: Sequence[str]) -> Tensor:
    """W_0 + sum of m dW of these adapters: summed in float32 (or the base's wider dtype), rounded once, without a graph."""
    weight = own_tensor(*layer._locate(container))
    deltas = [getattr(layer, container)[adapter] for adapter in names]
    where = f"{layer.key}.{layer.geometries[container][0]}"
    way_out = (
        "FSDP2 makes the tensors of a unit whole in its forward: let one unit hold this layer and all that shares its "
        "coefficients, or give every block its own (aTLAS: granularity='block' without `tie_blocks`; Concrete: "
        "learn_coefficients='layer')."
    )
    refuse_shares([weight, *(tensor for delta in deltas for tensor in delta.trained)], where, way_out)
    if weight.is_meta:
        raise ValueError(
            f"{where} is not in memory (offloaded, or on meta), and its effective weight is composed of whole tensors. Keep "
            f"the base on the device, or merge the adapter before the model is offloaded."
        )
    # what an inference makes must be good for training later
    with torch.inference_mode(False), torch.no_grad(), without_autocast(weight):
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = weight.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
        for delta in deltas:
            if delta.multiplier == 1:
                delta.accumulate(total)
            else:
                delta.accumulate(update := torch.zeros_like(total))
                total.add_(update, alpha=delta.multiplier)
        return total.to(weight.dtype)
