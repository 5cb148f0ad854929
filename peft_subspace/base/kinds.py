"""The kinds of wrapped layer: called and added to, or given an effective weight to read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..functional.low_rank import without_autocast
from .config import SubspaceConfig
from .ddp import refuse_reentrant
from .delta import Delta
from .effective import EffectiveWeights
from .geometry import FLOAT_DTYPES, Geometry, describe, describe_all
from .layer import SubspaceLayer
from .stand_in import Turn, exchanged, own_tensor, shadowed


class CalledLayer(SubspaceLayer):
    """Calls the base layer and adds the updates to its output. For linear, convolution and embedding layers."""

    def _adapted_forward(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._refuse_two(names)
        self._refuse_other_kinds(names)
        deltas = [getattr(self, self.adapter_layer_names[0])[name] for name in names]
        if any(delta.takes_over or delta.replaces_base for delta in deltas):
            return self._taken_over(names, deltas, x, *args, **kwargs)
        y0 = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            y0 = self.quantization_backend.maybe_clone_base_result(y0)
        return self._add(deltas, x, y0)

    def _add(self, deltas: list[Delta], x: Tensor, y0: Tensor) -> Tensor:
        kernel = self.geometries[self.adapter_layer_names[0]][1].kernel
        if kernel and x.ndim == len(kernel) + 1:  # a convolution also takes one sample without a batch axis
            return self._add(deltas, x[None], y0[None])[0]
        return add_updates(deltas, x, y0)

    def _taken_over(self, names: list[str], deltas: list[Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One adapter calls the base layer; the dense updates of further ones are added, which is exact and not fast."""
        container, (_, geometry) = next(iter(self.geometries.items()))
        if len(names) > 1 and geometry.kernel and x.ndim == len(geometry.kernel) + 1:  # see `_add`
            return self._taken_over(names, deltas, x[None], *args, **kwargs)[0]
        out = deltas[0](self.base_layer, x, *args, **kwargs)
        for name in names[1:]:
            dense = self.dense_update(container, name).to(out.dtype)
            with without_autocast(out):
                out = geometry.dense(x if geometry.kind == "embedding" else x.to(out.dtype), dense, out)
        return out


def add_updates(deltas: list[Delta], x: Tensor, y0: Tensor) -> Tensor:
    """The base's output plus the updates of several adapters, one after the other."""
    out = y0
    with without_autocast(out):  # an update is in the dtype of the output: autocast would turn that of an embedding
        for delta in deltas:
            given = x if delta.geometry.kind == "embedding" else delta.dropped(x, out)
            if delta.multiplier == 1:
                out = delta(given, y0, out)
            else:
                out = torch.add(out, delta(given, y0, torch.zeros_like(out)), alpha=delta.multiplier)
    return out


class OwnWeightLayer(SubspaceLayer):
    """For modules that read their own weights: W + dW stands in for the attribute during the call, see `stand_in`.

    Cost: one dense dW and one dense gradient per call and weight.
    """

    def __init__(self, base_layer: nn.Module, prefix: str, delta_cls: type[Delta], **kwargs: Any) -> None:
        super().__init__(base_layer, prefix, delta_cls, **kwargs)
        self._effective = EffectiveWeights()
        self._turn: Turn = base_layer._turn if isinstance(base_layer, OwnWeightLayer) else Turn()
        for weight, geometry in self.geometries.values():
            if geometry.quantized:
                continue  # it can be called; whether it needs to be read is the method's matter
            dtype = self.get_base_layer().get_parameter(weight).dtype
            if dtype not in FLOAT_DTYPES:
                raise ValueError(
                    f"{weight} of {type(base_layer).__name__} is {dtype}; its effective weight cannot be composed."
                )

    def update_layer(self, adapter_name: str, config: SubspaceConfig, key: str, inference_mode: bool = False) -> None:
        """Add an adapter; there is no input of an update here that could be dropped."""
        if config.dropout and not inference_mode:
            name = type(self.get_base_layer()).__name__
            warnings.warn(f"dropout={config.dropout} has no effect on {name}: it reads its weights by itself.", stacklevel=2)
        super().update_layer(adapter_name, config, key, inference_mode)

    def _adapted_forward(self, names: list[str], *args: Any, **kwargs: Any) -> Any:
        self._refuse_two(names)
        self._refuse_other_kinds(names)
        if torch.compiler.is_compiling():
            with shadowed(self.base_layer, self._effective_weights(names)):
                return self.base_layer(*args, **kwargs)
        with exchanged(self.base_layer, partial(self._effective_weights, names), self._turn) as layer:
            return layer(*args, **kwargs)

    def _effective_weights(self, names: list[str]) -> dict[str, Tensor]:
        """Name below `base_layer` -> effective weight, where one is composed."""
        found, path = {}, ""
        inner = self.base_layer
        while isinstance(inner, BaseTunerLayer):
            wrapper: Any = inner
            inner, path = wrapper.base_layer, f"{path}base_layer."
        for container, (weight, _) in self.geometries.items():
            if active := [name for name in names if self._is_composed(container, name)]:
                found[path + weight] = self._effective_weight(container, active)
        return found

    def train(self, mode: bool = True) -> OwnWeightLayer:
        """Set the mode; weights that were composed before are forgotten."""
        self.forget_weights()
        return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and what was composed with it."""
        super().delete_adapter(adapter_name)
        self.forget_weights()

    def forget_weights(self) -> None:
        """Compose anew at the next call; for what changes an update without changing a tensor that it depends on."""
        self._effective.clear(own_tensor(*self._locate(container)) for container in self.geometries)

    def _is_composed(self, container: str, adapter_name: str) -> bool:
        deltas = getattr(self, container)
        return adapter_name in deltas and not deltas[adapter_name].adds

    def _effective_weight(self, container: str, names: list[str]) -> Tensor:
        if self.delta_cls.composes_weight and not torch.compiler.is_compiling():  # a compiled graph composes by itself
            return self._effective.get(self, container, names)
        weight = own_tensor(*self._locate(container))
        geometry = self.geometries[container][1]
        with without_autocast(weight):  # composed as `merge` does
            total: Any = sum(self.dense_update(container, adapter) for adapter in names)
            return (weight + geometry.native(total)).to(weight.dtype)

    def _mixed_forward(self, adapter_names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.get_base_layer(), nn.MultiheadAttention):
            return self._mixed_attention(adapter_names, x, *args, **kwargs)
        return super()._mixed_forward(adapter_names, x, *args, **kwargs)

    def _mixed_attention(
        self, adapter_names: list[str], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Attention returns (output, weights) and may have its batch second; masks have one row per sample or head."""
        axis = 0 if self.get_base_layer().batch_first else 1
        batch = query.shape[axis]
        outputs: list[Any] = [None] * batch
        weights: list[Any] = [None] * batch
        names = ["key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in dict.fromkeys(adapter_names):
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=query.device)
            masks = dict(kwargs)
            if masks.get("key_padding_mask") is not None:
                masks["key_padding_mask"] = masks["key_padding_mask"][rows]
            if masks.get("attn_mask") is not None and masks["attn_mask"].ndim == 3:
                masks["attn_mask"] = masks["attn_mask"].unflatten(0, (batch, -1))[rows].flatten(0, 1)
            parts = [tensor.index_select(axis, rows) for tensor in (query, key, value)]
            output, attention = self._adapted_forward(self._here([name]), *parts, **masks)
            for position, row in enumerate(rows.tolist()):
                outputs[row] = output.select(axis, position)
                weights[row] = None if attention is None else attention[position]
        return torch.stack(outputs, axis), None if weights[0] is None else torch.stack(weights)


class ComposedLayer(OwnWeightLayer):
    """A module of any type whose effective parameters are composed, norms, biases and embeddings too.

    An update that is cheaper to add than to compose (`Delta.adds`) is added to the output, as in `CalledLayer`; it needs no
    weight of the base, which may then be quantised.
    """

    def _describe(self) -> dict[str, Geometry]:
        return describe_all(self.get_base_layer())

    def _adapted_forward(self, names: list[str], *args: Any, **kwargs: Any) -> Any:
        if self.training:
            refuse_reentrant((delta for name in names for delta in self.deltas(name).values()), self.key)
        added = [delta for name in names for delta in self.deltas(name).values() if delta.adds]
        out = super()._adapted_forward(names, *args, **kwargs)
        if not added:
            return out
        if self.quantization_backend is not None:
            out = self.quantization_backend.maybe_clone_base_result(out)
        return add_updates(added, args[0], out)


class ParamWrapper(OwnWeightLayer):
    """Adapts one bare parameter of a module (`target_parameters`), such as a fused stack of experts.

    PEFT finds this class by its name and nests one wrapper per parameter of the same module.
    """

    def __init__(self, base_layer: nn.Module, prefix: str, delta_cls: type[Delta], parameter_name: str, **kwargs: Any) -> None:
        self.parameter_name = parameter_name  # first, because `_describe` needs it
        super().__init__(base_layer, prefix, delta_cls, **kwargs)

    def _describe(self) -> dict[str, Geometry]:
        return describe(self.get_base_layer(), self.parameter_name)

    def _mixed_forward(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"`adapter_names` does not work with target_parameters ({self.parameter_name}): experts see tokens of all samples "
            f"at once. Run each adapter's samples by themselves with `set_adapter`."
        )

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """Take all nested wrappers off, merging each first if asked."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer


def _innermost(target: nn.Module) -> nn.Module:
    return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target


def make_layer(
    target: nn.Module, prefix: str, delta_cls: type[Delta], parameter_name: str | None = None, **kwargs: Any
) -> SubspaceLayer:
    """Wrap a module in the kind of layer that it needs. The module's type is known to be supported."""
    if parameter_name is not None:
        return ParamWrapper(target, prefix, delta_cls, parameter_name, **kwargs)
    layers: Callable[..., SubspaceLayer] = CalledLayer
    if delta_cls.composes_weight:
        layers = ComposedLayer
    elif any(geometry.reads_own_weight for geometry in describe(_innermost(target)).values()):
        layers = OwnWeightLayer
    return layers(target, prefix, delta_cls, **kwargs)
