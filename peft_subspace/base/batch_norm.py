"""Running statistics of BatchNorm belong to the adapter that was trained with them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .stand_in import Turn, exchanged, shadowed

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Statistics(nn.Module):
    """One adapter's copy of a layer's running statistics."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        for name in STATISTICS:
            self.register_buffer(name, getattr(base_layer, name).detach().clone())


class BatchNormLayer(nn.Module, BaseTunerLayer):
    """A BatchNorm whose running statistics are those of the active adapter (the first one, if several are active).

    Training moves the adapter's statistics and never the base's; with adapters disabled the base's are used and, in train
    mode, left as they are. They are saved with the adapter as `<prefix>batch_norm.<adapter>.running_mean` and so on; adapters
    of several kinds (through transformers) have a container each.
    Nothing is trained here: the affine weights stay the base's.
    """

    def __init__(self, base_layer: nn.Module, prefix: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.method = prefix.rstrip("_")
        self.container = f"{prefix}batch_norm"
        self.adapter_layer_names = ()
        self.merged_adapters = []
        self._base_statistics: dict[str, Tensor] = {}  # while adapters are merged
        self._turn = Turn()

        self._add_container(self.container)

    def _add_container(self, container: str) -> None:
        self.add_module(container, nn.ModuleDict())
        self.adapter_layer_names = (*self.adapter_layer_names, container)

    def update_layer(self, adapter_name: str, prefix: str | None = None) -> None:
        """Start an adapter, of the kind with a prefix, from the base's statistics."""
        container = self.container if prefix is None else f"{prefix}batch_norm"
        if container not in self.adapter_layer_names:
            self._add_container(container)
        getattr(self, container)[adapter_name] = Statistics(self.get_base_layer())

    def statistics(self) -> dict[str, Any]:
        """adapter -> its statistics, of all kinds."""
        return {name: found for container in self.adapter_layer_names for name, found in getattr(self, container).items()}

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether the adapter has statistics here."""
        return adapter_name in self.statistics()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Statistics have no scale: nothing happens. Code that scales all adapted layers calls it."""

    def scale_layer(self, scale: float) -> None:
        """See `set_scale`."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """See `set_scale`."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if self.has_adapter(adapter_name):
            self.statistics()[adapter_name].to(device or self.base_layer.running_mean.device)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Normalise with the active adapter's statistics, or each sample with those of its own adapter."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self.merged_adapters:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None and not self._disable_adapters:
            parts = [self._normalize([name], x[i : i + 1], *args, **kwargs) for i, name in enumerate(adapter_names)]
            return torch.cat(parts)
        return self._normalize([] if self._disable_adapters else self.active_adapters, x, *args, **kwargs)

    def _normalize(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        statistics = self.statistics()
        chosen = next((statistics[name] for name in names if name in statistics), None)
        if chosen is None and not self.training:
            return self.base_layer(x, *args, **kwargs)
        shadows = {name: getattr(self.base_layer if chosen is None else chosen, name) for name in STATISTICS}
        if chosen is None:  # train mode without an adapter: normalise by the batch, keep the base's statistics
            shadows = {name: value.clone() for name, value in shadows.items()}
        if torch.compiler.is_compiling():
            with shadowed(self.base_layer, shadows):
                return self.base_layer(x, *args, **kwargs)
        with exchanged(self.base_layer, lambda: shadows, self._turn) as layer:
            return layer(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Give the base the adapter's statistics. They cannot be summed: the last of several adapters wins, with a warning."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if not names:
            return
        if len(names) + len(self.merged_adapters) > 1:
            warnings.warn(
                f"Merging {[*self.merged_adapters, *names]} into one model: BatchNorm statistics cannot be summed, those of "
                f"{names[-1]!r} are used.",
                stacklevel=2,
            )
        if not self._base_statistics:
            self._base_statistics = {name: getattr(self.base_layer, name) for name in STATISTICS}
        merged = self.statistics()[names[-1]]
        for name in STATISTICS:
            self.base_layer._buffers[name] = getattr(merged, name).clone()
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base's own statistics back."""
        self.base_layer._buffers.update(self._base_statistics)
        self._base_statistics = {}
        self.merged_adapters.clear()

    @torch.no_grad()
    def average(self, weights: dict[str, float], adapter_name: str) -> None:
        """Start an adapter from the mean of others' statistics, weighted by the positive weights (base's if none is)."""
        self.update_layer(adapter_name)
        statistics = self.statistics()
        weights = {name: weight for name, weight in weights.items() if weight > 0 and name in statistics}
        total = sum(weights.values())
        for name in STATISTICS if weights else ():
            mean = sum(weight / total * getattr(statistics[other], name).double() for other, weight in weights.items())
            getattr(statistics[adapter_name], name).copy_(mean)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def _get_name(self) -> str:
        return f"{self.method}.{type(self.base_layer).__name__}"


def _is_wrapped(names: dict[str, nn.Module], name: str) -> bool:
    return isinstance(names.get(name.rpartition(".")[0]), BatchNormLayer)


def wrap_batch_norms(model: nn.Module, prefix: str, adapter_name: str) -> list[BatchNormLayer]:
    """Give every BatchNorm with running statistics a copy of them for this adapter. Names of modules do not change.

    One whose weights are adapted, too, is wrapped inside of the layer that adapts them.
    """
    names = dict(model.named_modules())
    adapted = {f"{name}.base_layer" for name, module in names.items() if isinstance(module, BaseTunerLayer)}
    closed = tuple(f"{n}." for n, m in names.items() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)))
    layers = [module for module in names.values() if isinstance(module, BatchNormLayer)]
    for name, module in names.items():
        tracked = isinstance(module, _NormBase) and module.running_mean is not None
        if not tracked or not name or (name.startswith(closed) and name not in adapted) or _is_wrapped(names, name):
            continue
        layer = BatchNormLayer(module, prefix)
        layer.train(module.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layers.append(layer)
    for layer in layers:
        layer.update_layer(adapter_name, prefix)
    return layers
