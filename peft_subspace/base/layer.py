"""Wrapped layers: several adapters on one module, switched, mixed in a batch, merged and taken off again."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..functional.low_rank import without_autocast
from .config import SubspaceConfig
from .delta import Delta
from .geometry import Geometry, describe, quantization_backend, read_weight
from .packed import refuse_gradient, refuse_reading
from .sharding import refuse_shares
from .stand_in import own_tensor

_PREPARING = threading.RLock()  # one for all layers: an adapter of one may prepare what it shares with another's


class DeltaDict(nn.ModuleDict):
    """The adapters of one weight, by name.

    The hook never runs: a container is not called. Its presence keeps `nn.TransformerEncoderLayer` off its fused inference
    path, which reads the weights of its children and would pass by every adapter in silence.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(_never_called)


def _never_called(module: nn.Module, args: Any) -> None: ...


@dataclass
class _Original:
    """What a merge replaces: the layer and its Parameter objects themselves, so that putting them back is bit-exact.

    `weight` is the plain float weight; for a quantised layer, which also has a state and may be exchanged as a whole, it
    is a dequantised copy that a second merge starts from.
    """

    module: nn.Module
    parameters: dict[str, nn.Parameter | None]
    weight: Tensor
    # bitsandbytes keeps its state on the layer and on the Parameter, and PEFT's backend changes the latter while it reads it
    layer_state: dict[str, Any]
    parameter_state: dict[str, dict[str, Any]]
    follows_casts: bool  # of the model while merged; a quantised weight keeps its own dtype

    @classmethod
    def of(cls, layer: SubspaceLayer, container: str) -> _Original:
        owner, _ = layer._locate(container)
        parameters = dict(owner._parameters)
        states = _copied_states(vars(owner))
        inner = {
            name: {**vars(p), **_copied_states(vars(p)), "data": p.data} for name, p in parameters.items() if p is not None
        }
        return cls(owner, parameters, layer._base_weight(container), states, inner, layer.quantization_backend is None)

    def restore(self, layer: SubspaceLayer, container: str) -> None:
        owner, name = layer._locate(container)
        if owner is not self.module:  # HQQ makes a new layer for the merged weight
            layer.base_layer = self.module
        self._put_back(name, owner._parameters.get(name))
        if "bias" in self.parameters and owner._parameters.get("bias") is not self.parameters["bias"]:
            self._put_back("bias", owner._parameters.get("bias"))
        vars(self.module).update(self.layer_state)

    def _put_back(self, name: str, current: nn.Parameter | None) -> None:
        original = self.parameters.get(name)
        if original is not None:
            state = dict(self.parameter_state[name])
            original.data = state.pop("data")
            vars(original).clear()
            vars(original).update(state)
            if current is not None and (self.follows_casts or name == "bias"):
                original.data = original.data.to(current.device, current.dtype)
            elif current is not None:
                original.data = original.data.to(current.device)
        self.module._parameters[name] = original


def _copied_states(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.copy(value) for name, value in attributes.items() if name in ("state", "quant_state")}


class SubspaceLayer(nn.Module, BaseTunerLayer):
    """A module of the base model with adapters on one or more of its weights.

    Attributes:
        base_layer: the wrapped module, unchanged.
        geometries: container attribute -> (dotted name of the weight below the module, its geometry). The containers are
            `<prefix>delta`, and `<prefix>delta_<weight>` where a module has several weights.
    """

    def __init__(self, base_layer: nn.Module, prefix: str, delta_cls: type[Delta], **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.method = prefix.rstrip("_")
        self.delta_cls = delta_cls
        self.geometries: dict[str, tuple[str, Geometry]] = {}
        found = self._describe()
        for weight, geometry in found.items():
            container = f"{prefix}delta" if len(found) == 1 else f"{prefix}delta_{weight.replace('.', '_')}"
            self.geometries[container] = (weight, geometry)
            self._modules[container] = DeltaDict()  # not add_module: it would find the container of a wrapper inside
        self.adapter_layer_names = tuple(self.geometries)
        self.merged_adapters = []
        self.quantization_backend = quantization_backend(self.get_base_layer(), **kwargs)
        self.key = ""  # the layer's name in the model
        self._originals: dict[str, _Original] = {}  # the base's own weights while adapters are merged
        shape = next(iter(self.geometries.values()))[1]
        self.in_features, self.out_features = shape.in_features, shape.out_features

    def _describe(self) -> dict[str, Geometry]:
        return describe(self.get_base_layer())

    # Adapters --------------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: SubspaceConfig, key: str, inference_mode: bool = False) -> None:
        """Add an adapter, or replace the one of that name.

        Args:
            adapter_name: name of the adapter.
            config: the adapter's config.
            key: name of this layer in the model, by which the config's patterns know it.
            inference_mode: the adapter is frozen.

        For an adapter that comes from a file nothing is computed from the weight: the file brings it, or `complete` does.
        """
        self.key = key
        is_new = config.was_loaded or not (inference_mode or config.is_from_file or config.awaits_weights is not None)
        for container, (weight, geometry) in self.geometries.items():
            resolved = config.for_layer(key, weight)
            if not self.delta_cls.applies(resolved):
                continue
            delta = self.delta_cls(geometry, resolved)
            if adapter_name in delta.state_dict():
                raise ValueError(
                    f"The adapter name {adapter_name!r} is the name of a tensor of the method. Choose another name."
                )
            delta.train(self.training)
            getattr(self, container)[adapter_name] = delta
            self._move_adapter_to_device_of_base_layer(adapter_name)
            reads_weight = self.delta_cls.prepare is not Delta.prepare  # else a quantised weight is not even dequantised
            if reads_weight and is_new:
                delta.awaits_weight = self._weight_device(container).type == "meta"
                if not delta.awaits_weight:
                    self._prepare(container, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def load_tensors(self, adapter_name: str, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Copy tensors into an adapter: container -> tensor name -> values."""
        for container, delta in self.deltas(adapter_name).items():
            delta.load_state_dict(tensors[container])

    def complete(self, adapter_name: str, saved: dict[str, dict[str, Tensor]] | None = None) -> None:
        """Make what a file leaves out of an adapter, from the weight.

        Args:
            adapter_name: the adapter.
            saved: container -> the tensors of a file that are about to be loaded.

        Raises:
            ValueError: the weight is not the one that the adapter was made for.
        """
        for container, delta in self.deltas(adapter_name).items():
            tensors = None if saved is None else saved[container]
            if not delta.is_incomplete(tensors):
                continue
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{self.key}: run the adapter {adapter_name!r} once before it is compiled: it was only loaded."
                )
            try:
                with _PREPARING:  # threads that use an adapter for the first time at once
                    if delta.is_incomplete(tensors):
                        self._prepare(container, adapter_name, delta.tensors() if tensors is None else tensors)
            except ValueError as error:
                raise ValueError(f"{self.key}.{self.geometries[container][0]}: {error}") from error

    def _prepare(self, container: str, adapter_name: str, saved: dict[str, Tensor] | None = None) -> None:
        adapters = getattr(self, container)
        siblings = [delta for name, delta in adapters.items() if name != adapter_name]
        # decompositions are no matter of autocast; and what an inference makes must be good for training later
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            without_autocast(_any_tensor(adapters[adapter_name], self.get_base_layer())),
        ):
            adapters[adapter_name].prepare(partial(self._canonical_weight, container), siblings, saved)
            adapters[adapter_name].awaits_weight = False

    def deltas(self, adapter_name: str) -> dict[str, Any]:
        """container -> Delta of one adapter; empty if the adapter does not act on this layer."""
        found = {container: getattr(self, container) for container in self.geometries}
        return {container: deltas[adapter_name] for container, deltas in found.items() if adapter_name in deltas}

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether the adapter acts on this layer."""
        return any(adapter_name in getattr(self, container) for container in self.geometries)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Devices only. PEFT also casts to the base's dtype here, which would leave frozen buffers in bf16 for good.
        for container, delta in self.deltas(adapter_name).items():
            target = device if device is not None else self._weight_device(container)
            if not any(p.is_meta for p in delta.parameters()) and target.type != "meta":
                delta.to(target)

    def _weight_device(self, container: str) -> torch.device:
        owner, name = self._locate(container)
        weight = own_tensor(owner, name)
        return weight.device if isinstance(weight, Tensor) else _any_tensor(self.get_base_layer()).device

    # Scale, as PEFT's LoRA layers have it -----------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set m of W + m dW for an adapter: its own scale times `scale`. Nothing happens where it is not on this layer.

        It holds until it is set anew, in forward, merging and exports, and is not saved. diffusers' `set_adapters` calls it.

        Raises:
            ValueError: not a finite number, or other than 1 for an adapter that stands in for the base.
        """
        self._multiply([adapter], lambda before: scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter, as diffusers' `fuse_lora(lora_scale=...)` does. See `set_scale`."""
        self._multiply(self.active_adapters, lambda before: before * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of every active adapter; None sets it back to the adapter's own. See `set_scale`."""
        if scale is not None and scale == 0:
            raise ValueError(f"{self.key}: unscale_layer(0) would divide by zero. None sets the scale back.")
        self._multiply(self.active_adapters, lambda before: 1.0 if scale is None else before / scale)

    def _multiply(self, names: Sequence[str], new: Callable[[float], float]) -> None:
        for name in names:
            for delta in self.deltas(name).values():
                multiplier = float(new(delta.multiplier))
                if not math.isfinite(multiplier):
                    raise ValueError(f"{self.key}: the scale of the adapter {name!r} would be {multiplier}; it must be finite.")
                if delta.replaces_base and multiplier != 1:
                    raise ValueError(
                        f"{self.key}: the adapter {name!r} ({self.method}) stands in for the base's weight and adds nothing to "
                        f"it that could be scaled by {multiplier}. Its scale is 1; disable it for the base's output."
                    )
                delta.multiplier = multiplier

    # Forward ---------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base layer's call with the active adapters; `adapter_names` gives one adapter per sample instead."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self.merged_adapters and adapter_names is not None:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.")
        if self.quantization_backend is not None:
            refuse_gradient(self.get_base_layer(), x, self.key)
        if self._disable_adapters or self.merged_adapters:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_forward(adapter_names, x, *args, **kwargs)
        return self._adapted_forward(self._here(self.active_adapters), x, *args, **kwargs)

    def _here(self, names: Sequence[str]) -> list[str]:
        found = [name for name in names if self.has_adapter(name)]
        for name in found:
            self.complete(name)
        return found

    def _adapted_forward(self, names: list[str], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _refuse_two(self, names: Sequence[str]) -> None:
        if self.delta_cls.replaces_base and len(names) > 1:
            raise ValueError(
                f"{list(names)} are active on one {self._get_name()} ({self.key}) and each of them stands in for the base "
                f"layer. Activate, or merge, one at a time."
            )

    def _refuse_other_kinds(self, names: Sequence[str]) -> None:
        """An adapter that only adds to the output may be active around one of another kind; what changes the weight may not."""
        adapters = [delta for name in names for delta in self.deltas(name).values()]
        inner: Any = self.base_layer
        if not isinstance(inner, BaseTunerLayer) or all(delta.only_adds for delta in adapters):
            return
        while isinstance(inner, BaseTunerLayer):
            here = set(inner.active_adapters) & inner._get_available_adapters()
            other = getattr(inner, "method", None) != self.method  # wrappers of several parameters of one module are nested too
            if other and here and not inner.disable_adapters:
                raise ValueError(
                    f"{list(names)} and {sorted(here)} are active on one {self._get_name()} ({self.key}) and are of different "
                    f"kinds, of which {self.method} changes the weight that the other one acts on. Activate one at a time."
                )
            inner = inner.base_layer  # type: ignore[attr-defined]

    def _mixed_forward(self, adapter_names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run each adapter's samples together and put the results back in order."""
        batch = len(x)
        if len(adapter_names) != batch:
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} and "
                f"{batch} respectively."
            )
        out: Tensor | None = None
        for name in dict.fromkeys(adapter_names):
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            picked = _pick_rows((x, *args), rows, batch), _pick_rows(kwargs, rows, batch)
            if isinstance(self.base_layer, BaseTunerLayer):  # statistics of a BatchNorm
                picked[1]["adapter_names"] = [name] * len(rows)
            part = self._adapted_forward(self._here([name]), *picked[0], **picked[1])
            out = part.new_empty(batch, *part.shape[1:]) if out is None else out
            out[rows] = part
        return out

    # Merging ---------------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W + sum dW in place of the base's weights: summed in float32 (or the base's wider dtype), rounded once.

        The original Parameter is set aside and comes back on `unmerge`, bit for bit; a module that shares it keeps it. A
        quantised weight is dequantised, summed and quantised again.

        Args:
            safe_merge: refuse a result with NaN or infinity and leave the layer as it was.
            adapter_names: which adapters; None for the active ones. Merging A, then B, equals merging both.
        """
        names = self._here(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        self._refuse_two([*self.merged_adapters, *names])
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise ValueError(
                f"A {self.quantization_backend.backend_name} layer cannot be merged: its weight cannot be read back. Keep the "
                f"adapter beside the base, or load the base unquantised to merge."
            )
        merging = [c for c in self.geometries if any(name in getattr(self, c) for name in [*self.merged_adapters, *names])]
        for container in merging:
            self._refuse_shares(container, names, "merged")
            path, (owner, parameter) = self.geometries[container][0], self._locate(container)
            if self.quantization_backend is None and parameter not in owner._parameters:
                raise ValueError(
                    f"{path} of {self._get_name()} is computed from other parameters (torch.nn.utils.parametrize): an "
                    f"adapter cannot be merged into it. Remove the parametrization first, or keep the adapter beside the base."
                )
        new = [container for container in merging if container not in self._originals]
        self._originals.update({container: _Original.of(self, container) for container in new})
        merged = {name: self._merged_weight(name, [*self.merged_adapters, *names]) for name in merging}
        biases = {name: self._merged_bias(name, [*self.merged_adapters, *names]) for name in merging}
        for container, weight in merged.items():
            bias = biases[container]
            if safe_merge and not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
                for changed in new:
                    self._originals.pop(changed).restore(self, changed)
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken "
                    f"({self.geometries[container][0]} of {self._get_name()})"
                )
        for container, weight in merged.items():
            self._set_weight(container, weight)
            if (bias := biases[container]) is not None:
                owner, _ = self._locate(container)
                trained = bool(owner.get_parameter("bias").requires_grad)
                owner._parameters["bias"] = nn.Parameter(bias, requires_grad=trained)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base's own weights back."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for container, original in self._originals.items():
            original.restore(self, container)
        self._originals.clear()
        self.merged_adapters.clear()

    @torch.no_grad()
    def _merged_weight(self, container: str, names: list[str]) -> Tensor:
        geometry = self.geometries[container][1]
        weight = self._base_weight(container)
        total = geometry.canonical(weight).to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for name in names:
            if name in getattr(self, container):
                total += self.dense_update(container, name).to(total.device, total.dtype)
        return geometry.native(total).to(weight.dtype).contiguous()

    @torch.no_grad()
    def _merged_bias(self, container: str, names: list[str]) -> Tensor | None:
        """The base's bias and its updates, summed as the weight is; None if no adapter has one."""
        adapters = getattr(self, container)
        found = [update for name in names if name in adapters and (update := adapters[name].delta_bias()) is not None]
        bias = self._originals[container].parameters.get("bias")
        if not found or bias is None:
            return None
        total = bias.detach().to(torch.promote_types(bias.dtype, torch.float32), copy=True)
        for update in found:
            total += update.to(total.device, total.dtype)
        return total.to(bias.dtype)

    def dense_update(self, container: str, adapter_name: str) -> Tensor:
        """m dW of one adapter and weight, canonical layout; the definition that everything else is tested against."""
        self.complete(adapter_name)
        delta = getattr(self, container)[adapter_name]
        with without_autocast(_any_tensor(delta, self.get_base_layer())):
            update: Tensor = delta.delta_weight(partial(self._canonical_weight, container))
            return update if delta.multiplier == 1 else update * delta.multiplier

    def _canonical_weight(self, container: str) -> Tensor:
        weight = self._base_weight(container)
        if weight.is_meta:
            raise ValueError(
                "the weight is not in memory (it is offloaded, or still on the meta device) and is needed. Put the adapter on "
                "the model before it is offloaded, or load an adapter whose file has all that it takes."
            )
        return self.geometries[container][1].canonical(weight)

    def lora_factors(self, adapter_name: str) -> dict[str, tuple[Tensor, Tensor] | None]:
        """container -> exact LoRA factors (A, B) of an adapter, None where there are none."""
        self.complete(adapter_name)
        for container in self.deltas(adapter_name):
            self._refuse_shares(container, [adapter_name], "exported")
        found = {}
        for container, delta in self.deltas(adapter_name).items():
            factors = delta.lora_factors(partial(self._canonical_weight, container))
            found[container] = None if factors is None else (factors[0], factors[1] * delta.multiplier)
        return found

    def _refuse_shares(self, container: str, names: Sequence[str], done: str) -> None:
        adapters = [getattr(self, container)[name] for name in names if name in getattr(self, container)]
        tensors = [own_tensor(*self._locate(container)), *(tensor for delta in adapters for tensor in delta.parameters())]
        way_out = f"Save the adapter and load it onto the base in one process; it can be {done} there."
        refuse_shares([t for t in tensors if isinstance(t, Tensor)], f"{self.key}.{self.geometries[container][0]}", way_out)

    def _set_weight(self, container: str, weight: Tensor) -> None:
        if self.quantization_backend is not None:
            self.quantization_backend.set_base_weight(self, weight)
            return
        owner, name = self._locate(container)
        requires_grad = getattr(owner, name).requires_grad
        owner._parameters[name] = nn.Parameter(weight, requires_grad=requires_grad)

    def _locate(self, container: str) -> tuple[nn.Module, str]:
        """The module that holds a weight and the weight's name on it."""
        path, _, name = self.geometries[container][0].rpartition(".")
        return self.get_base_layer().get_submodule(path), name

    def _base_weight(self, container: str) -> Tensor:
        """The base's own weight, as a plain float tensor in the module's layout, also while adapters are merged."""
        if container in self._originals:
            return self._originals[container].weight
        if self.quantization_backend is not None:
            refuse_reading(self.get_base_layer(), self.key)
            return read_weight(self.get_base_layer(), self.quantization_backend, self.key)
        return own_tensor(*self._locate(container)).data

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """dW of an adapter in the module's own layout, for a layer with one adapted weight."""
        if len(self.geometries) > 1:
            raise ValueError(f"{self._get_name()} has several adapted weights: {[w for w, _ in self.geometries.values()]}.")
        container, (_, geometry) = next(iter(self.geometries.items()))
        return geometry.native(self.dense_update(container, adapter_name))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` may be used: an additive update of one weight."""
        return len(self.geometries) == 1 and not self.delta_cls.replaces_base

    # Python ----------------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        # Code outside reads attributes of the layer that it knows (`embed_dim`, `num_experts`, `padding_idx`, ...).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "weight", "bias"):
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def _get_name(self) -> str:
        return f"{self.method}.{type(self.get_base_layer()).__name__}"

    def extra_repr(self) -> str:
        backend = self.quantization_backend
        return "" if backend is None else f"quantization_backend={backend.backend_name!r}"


def _any_tensor(*modules: nn.Module) -> Tensor:
    """A tensor on the device where a layer computes. A Delta that shares another's has none; GPTQ and AWQ have buffers only."""
    return next(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))


def _pick_rows(values: Any, rows: Tensor, batch: int) -> Any:
    """Rows of every tensor whose first axis is the batch; everything else as it is."""
    if isinstance(values, dict):
        return {key: _pick_rows(value, rows, batch) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_pick_rows(value, rows, batch) for value in values)
    if isinstance(values, Tensor) and values.ndim > 0 and len(values) == batch:
        return values[rows]
    return values
