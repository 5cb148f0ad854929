"""Low-rank layers as standard torch modules: an `nn.Sequential` of two or three, as PELA's official checkpoints have them.

linear       Linear(in, k, no bias), Linear(k, out)                    keys <name>.0.weight, <name>.1.weight, <name>.1.bias
embedding    Embedding(rows, k), Linear(k, dim, no bias)
convolution  Conv 1x1, Conv with the kernel, Conv 1x1                  two of them where the kernel is 1x1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Geometry
from ..base.geometry import describe
from ..functional.factorize import compose

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class LowRank(nn.Sequential):
    """Two or three layers in the place of one, with the sizes that other code asks the layer for."""

    def __init__(self, *layers: nn.Module, geometry: Geometry) -> None:
        super().__init__(*layers)
        self.geometry = geometry
        self.in_features, self.out_features = geometry.in_features, geometry.out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight, made at every access, for code that looks at its dtype or its values."""
        first, last = (self[i].weight for i in (0, -1))
        if self.geometry.kind == "embedding":
            return first @ last.t()  # type: ignore[operator]
        if self.geometry.kind == "linear":
            return last @ first  # type: ignore[operator]
        stack = (self.geometry.groups,) if self.geometry.groups > 1 else ()
        core, wide = (self[1].weight, last) if len(self) > 2 else (None, self.geometry.native(last))  # type: ignore[arg-type]
        up, down = (factor.flatten(1).unflatten(0, (*stack, -1)) for factor in (wide, first))  # type: ignore[operator]
        if core is not None:
            core = self.geometry.native(core)  # type: ignore[arg-type]
            core = core.unflatten(0, (*stack, -1)) if stack else core
        return self.geometry.native(compose(up, core, down, len(self.geometry.kernel)).reshape(self.geometry.shape))

    @property
    def bias(self) -> Tensor | None:
        """The bias of the last layer."""
        return self[-1].bias  # type: ignore[return-value]


class Scaled(nn.Embedding):
    """An embedding whose rows are multiplied by a constant (Gemma's `embed_scale`)."""

    def __init__(self, *args: Any, multiplier: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.multiplier = multiplier

    def forward(self, ids: Tensor) -> Tensor:
        """Look up and scale."""
        return super().forward(ids) * self.multiplier


def low_rank_module(layer: Any, ranks: Sequence[int]) -> LowRank:
    """Standard modules of the given ranks that can stand in for a layer, with values yet to be set.

    Args:
        layer: linear (also Conv1D), convolution or embedding; may be on meta. Read for its sizes and settings only.
        ranks: `[k]`, or `[k_out, k_in]` for a convolution with a kernel.

    Raises:
        ValueError: a layer that reads its weight by itself, or one that is no layer.
    """
    geometry = describe(layer).get("weight")
    if geometry is None or geometry.reads_own_weight:
        raise ValueError(f"{type(layer).__name__} cannot be replaced by a sequence of layers: it reads its weight by itself.")
    options = {"device": layer.weight.device, "dtype": _float_dtype(layer)}
    if geometry.kind == "embedding":
        rows, dim, padding = geometry.shape[1], geometry.shape[0], geometry.padding_idx
        first: nn.Module = nn.Embedding(rows, ranks[0], padding, **options)
        if geometry.multiplier != 1.0:
            first = Scaled(rows, ranks[0], padding, multiplier=geometry.multiplier, **options)
        layers = [first, nn.Linear(ranks[0], dim, bias=False, **options)]
    elif geometry.kind == "linear":
        out, wide = geometry.shape
        layers = [nn.Linear(wide, ranks[0], bias=False, **options), nn.Linear(ranks[0], out, bias=geometry.bias, **options)]
    else:
        layers = _convolutions(layer, geometry, ranks, options)
    return LowRank(*layers, geometry=geometry)


def _float_dtype(layer: Any) -> torch.dtype:
    dtype = layer.weight.dtype
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def _convolutions(layer: Any, geometry: Geometry, ranks: Sequence[int], options: dict[str, Any]) -> list[nn.Module]:
    n, groups = len(geometry.kernel), geometry.groups
    conv = _CONV[n]
    wide_in, wide_out = geometry.in_features, geometry.out_features
    narrow_in, narrow_out = groups * ranks[-1], groups * ranks[0]
    thin = {"groups": groups, "bias": False, **options}
    wide = {"groups": groups, "bias": geometry.bias, **options}
    if geometry.pointwise:
        return [conv(wide_in, narrow_in, 1, stride=layer.stride, **thin), conv(narrow_in, wide_out, 1, **wide)]
    spatial: dict[str, Any] = {
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "padding_mode": layer.padding_mode,
    }
    if geometry.transposed:
        conv_of_kernel, spatial["output_padding"] = _CONV_TRANSPOSE[n], layer.output_padding
    else:
        conv_of_kernel = conv
    if len(ranks) == 1:
        last = conv_of_kernel(narrow_in, wide_out, layer.kernel_size, **spatial, **wide)
        return [conv(wide_in, narrow_in, 1, **thin), last]
    middle = conv_of_kernel(narrow_in, narrow_out, layer.kernel_size, **spatial, **thin)
    return [conv(wide_in, narrow_in, 1, **thin), middle, conv(narrow_out, wide_out, 1, **wide)]


@torch.no_grad()
def fill(module: LowRank, layer: Any, delta: Any) -> None:
    """Copy the factors of an adapter, and the bias of the layer with its shift, into standard modules."""
    geometry, n = delta.geometry, len(delta.geometry.kernel)

    def as_kernel(factor: Tensor) -> Tensor:
        return factor.reshape(-1, factor.shape[-1], *[1] * n)

    up, down = delta.up, delta.down
    if geometry.kind == "conv":
        up, down = as_kernel(up), as_kernel(down)
        if len(module) == 2 and geometry.transposed:
            up = geometry.native(up)
    module[0].weight.copy_(down)  # type: ignore[operator]
    module[-1].weight.copy_(up)  # type: ignore[operator]
    if delta.core is not None:
        core = delta.core.reshape(-1, *delta.core.shape[-n - 1 :])
        module[1].weight.copy_(geometry.native(core))  # type: ignore[operator]
    if module.bias is not None:
        shift = 0 if delta.bias is None else delta.bias
        module.bias.copy_(layer.bias.to(torch.promote_types(layer.bias.dtype, torch.float32)) + shift)


def replace_layers(model: nn.Module, ranks: Mapping[str, Sequence[int]]) -> None:
    """Put low-rank modules in the place of layers, in the structure only: their values are as a fresh module's.

    Args:
        model: any model, also on meta.
        ranks: layer name -> its ranks.

    Raises:
        ValueError: a layer that is not there or cannot be replaced, by name.
    """
    for name, found in ranks.items():
        parent, _, child = name.rpartition(".")
        try:
            layer = model.get_submodule(name)
            module = low_rank_module(layer, list(found))
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{name} of {type(model).__name__}: {error}") from error
        module.train(layer.training)
        setattr(model.get_submodule(parent), child, module)


def ranks_in(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, list[int]]:
    """Read off a state dict which layers of a model it has in low-rank form: `<name>.0.weight` where the model has `<name>`."""
    found = {}
    for name, module in model.named_modules():
        first, second, third = (state_dict.get(f"{name}.{i}.weight") for i in range(3))
        if first is None or second is None or "weight" not in describe(module):
            continue
        groups = describe(module)["weight"].groups
        embedding = isinstance(module, nn.Embedding)
        narrow = first.shape[1] if embedding else first.shape[0] // groups
        found[name] = [narrow] if third is None else [third.shape[1], narrow]
    return found
