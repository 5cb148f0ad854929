"""What a layer's weight looks like and how it acts, said once for every method.

`describe(module)` is the only place of the package that knows layer types. A method works in the canonical layout
`[out, in / groups, *kernel]` and with four thin operators; it has no `isinstance` of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import convolution

Kind = Literal["linear", "conv", "embedding", "weight"]
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CONV_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE_CLASSES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Layers that we call and then add to. A subclass with a forward of its own (a router that returns a tuple, a conv that pads
# or standardises its weight) is adapted through its weight instead, see `Geometry.reads_own_weight`.
_CALLED = (nn.Linear, Conv1D, nn.Embedding, *_CONV_CLASSES, *_CONV_TRANSPOSE_CLASSES)


@dataclass(frozen=True)
class Geometry:
    """One adapted weight: its canonical shape and how the layer applies it.

    Attributes:
        kind: "linear", "conv" and "embedding" have operators; "weight" is a bare tensor of any order.
        shape: canonical shape: linear `[out, in]`, conv `[out, in / groups, *kernel]`, embedding `[dim, rows]`, a bare
            weight as it is.
        swapped: whether the module stores the first two modes the other way round (Conv1D, Embedding, transposed conv).
        reads_own_weight: the module's forward is not the standard one, or it has none to call (MultiheadAttention,
            expert stacks): the effective weight is put in place of the attribute during the call.
        multiplier: factor that an embedding applies to its rows (Gemma's `embed_scale`).
    """

    kind: Kind
    shape: tuple[int, ...]
    swapped: bool = False
    reads_own_weight: bool = False
    multiplier: float = 1.0
    padding_idx: int | None = None
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False
    padding_mode: str = "zeros"
    quantized: bool = False  # the weight is packed: it can be called and dequantised, not multiplied with
    bias: bool = False  # the layer adds a bias to its output
    border: tuple[int, ...] = ()  # what F.pad takes, instead of `padding`, for other modes or two different sides

    @property
    def out_features(self) -> int:
        """Output channels, or features."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Input channels of all groups, or features."""
        return self.shape[1] * self.groups if len(self.shape) > 1 else 1  # a bare vector has one mode

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size of a convolution, `()` otherwise."""
        return self.shape[2:] if self.kind == "conv" else ()

    @property
    def pointwise(self) -> bool:
        """Whether a convolution mixes channels only (every kernel side is 1 and nothing is padded)."""
        return math.prod(self.kernel) == 1 and not self.transposed and not any(self.padding)

    @property
    def border_mode(self) -> str:
        """`padding_mode` as F.pad calls it."""
        return "constant" if self.padding_mode == "zeros" else self.padding_mode

    def output_padding(self, before: Sequence[int], after: Sequence[int]) -> list[int]:
        """What a transposed convolution adds at its end to get from one size to the other; its stride leaves that open."""
        return [
            size_out - ((size_in - 1) * stride - 2 * padding + dilation * (k - 1) + 1)
            for size_in, size_out, stride, padding, dilation, k in zip(
                before, after, self.stride, self.padding, self.dilation, self.kernel, strict=True
            )
        ]

    # Layout ----------------------------------------------------------------------------------------------------------

    def canonical(self, weight: Tensor) -> Tensor:
        """From the module's layout to `[out, in / groups, *kernel]`, or back: the swap is its own inverse.

        A grouped transposed convolution stores `[in, out / groups, *kernel]`, so the swap happens within each group.
        """
        if not self.swapped:
            return weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    native = canonical

    # Operators -------------------------------------------------------------------------------------------------------

    def down(self, x: Tensor, factor: Tensor) -> Tensor:
        """Contract the input channels with `factor` `[in / groups, r]`.

        Linear: `[..., in] -> [..., r]`. Conv: `[batch, in, *space] -> [batch * groups, r, *space]`, already strided when the
        conv is pointwise. Embedding: ids `[...] -> [..., r]`, a look-up of rows.
        """
        if self.kind == "linear":
            return x @ factor
        if self.kind == "embedding":
            rows = F.embedding(x, factor, self.padding_idx)
            return rows if self.multiplier == 1.0 else rows * self.multiplier
        return convolution.down(self, x, factor)

    def spatial(self, z: Tensor, kernel: Tensor, like: Tensor) -> Tensor:
        """The convolution proper, on the few channels that `down` left.

        Args:
            z: `[n, r_in, *space]`.
            kernel: `[r_out, r_in, *kernel]`.
            like: the base's output; a transposed conv takes its size (stride leaves it open).
        """
        return convolution.spatial(self, z, kernel, like.shape[2:])

    def up(self, z: Tensor, factor: Tensor, out: Tensor) -> Tensor:
        """Expand to the output channels with `factor` `[out, r]` and add: `out + z factor^T`, in one pass over `out`."""
        if self.kind in ("linear", "embedding"):
            return torch.addmm(out.reshape(-1, out.shape[-1]), z.reshape(-1, z.shape[-1]), factor.t()).view(out.shape)
        return convolution.up(self, z, factor, out)

    def dense(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """`out` plus the layer's own operation with a full canonical weight, without bias."""
        if self.kind == "linear":
            return out + F.linear(x, weight)
        if self.kind == "embedding":
            return out + self.multiplier * F.embedding(x, weight.t(), self.padding_idx)
        native, padding, n = self.native(weight), self.padding, len(self.kernel)
        if self.border:
            x, padding = F.pad(x, self.border, mode=self.border_mode), (0,) * n
        extra = self.output_padding(x.shape[2:], out.shape[2:]) if self.transposed else (0,) * n
        return out + torch.convolution(
            x, native, None, self.stride, padding, self.dilation, self.transposed, extra, self.groups
        )


def describe(module: nn.Module, parameter: str | None = None) -> dict[str, Geometry]:
    """Say which weights of a module an adapter acts on, and how.

    Args:
        module: a layer; a quantised one is described by its features, its packed weight is never read.
        parameter: the name of one parameter of the module (`target_parameters`); None for the whole layer.

    Returns:
        parameter name (dotted below the module) -> geometry; one entry but for MultiheadAttention, empty when the type of
        the module is not supported.
    """
    if parameter is not None:
        weight = getattr(module, parameter)
        return {parameter: _own_weight(tuple(getattr(weight, "ds_shape", weight.shape)))}
    if isinstance(module, nn.MultiheadAttention):
        names = ["in_proj_weight"] if module._qkv_same_embed_dim else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        shapes = {name: tuple(getattr(module, name).shape) for name in names}
        shapes["out_proj.weight"] = tuple(module.out_proj.weight.shape)
        return {name: replace(_own_weight(shape), kind="linear") for name, shape in shapes.items()}
    geometry = _describe_layer(module)
    if geometry is None:
        return {}
    if has_own_forward(module) and not is_quantized(module) and geometry.multiplier == 1.0:
        geometry = replace(geometry, reads_own_weight=True)
    return {"weight": geometry}


def describe_all(module: nn.Module) -> dict[str, Geometry]:
    """Every parameter of a module, for methods that compose weights: a layer's weight by its operators, others as they are.

    Returns:
        parameter name (dotted below the module) -> geometry; empty for a module with children (its own parameters are
        `target_parameters`).
    """
    if not isinstance(module, nn.MultiheadAttention) and any(True for _ in module.children()):
        return {}
    found = describe(module)
    for name, parameter in module.named_parameters():
        found.setdefault(name, _own_weight(tuple(getattr(parameter, "ds_shape", parameter.shape))))
    return found


def _own_weight(shape: tuple[int, ...]) -> Geometry:
    return Geometry("weight", shape, reads_own_weight=True)


def _describe_layer(module: nn.Module) -> Geometry | None:
    if isinstance(module, nn.Embedding):
        return Geometry(
            "embedding",
            (module.embedding_dim, module.num_embeddings),
            swapped=True,
            padding_idx=module.padding_idx,
            multiplier=float(getattr(module, "embed_scale", 1.0)),
        )
    if isinstance(module, (*_CONV_CLASSES, *_CONV_TRANSPOSE_CLASSES)):
        transposed = isinstance(module, _CONV_TRANSPOSE_CLASSES)
        padding, border = _zero_padding(module), tuple[int, ...]()
        if padding is None or module.padding_mode != "zeros":
            padding, border = (0,) * len(module.kernel_size), tuple(module._reversed_padding_repeated_twice)
        return Geometry(
            "conv",
            (module.out_channels, module.in_channels // module.groups, *module.kernel_size),
            swapped=transposed,
            groups=module.groups,
            stride=module.stride,
            padding=padding,
            dilation=module.dilation,
            transposed=transposed,
            padding_mode=module.padding_mode,
            border=border,
            bias=module.bias is not None,
        )
    if isinstance(module, (nn.Linear, Conv1D)) or is_quantized(module):
        in_features, out_features = _get_in_out_features(module)
        if in_features and out_features:
            swapped, quantized = isinstance(module, Conv1D), is_quantized(module)
            bias = getattr(module, "bias", None) is not None
            return Geometry("linear", (out_features, in_features), swapped=swapped, quantized=quantized, bias=bias)
    return None


def _zero_padding(module: Any) -> tuple[int, ...] | None:
    """The padding of a convolution in numbers; None if the two sides differ ("same" with an even kernel)."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(width % 2 for width in total) else tuple(width // 2 for width in total)
    return module.padding


def bias_of(layer: Any) -> Tensor | None:
    """The bias of a layer, fetched from where accelerate keeps it if the layer is offloaded."""
    bias = getattr(layer, "bias", None)
    if bias is None or not bias.is_meta:
        return bias
    hook: Any = layer._hf_hook
    return hook.weights_map["bias"].to(hook.execution_device)


def has_own_forward(module: nn.Module) -> bool:
    """Whether the module's class overrides the forward of the standard layer that it derives from."""
    return all(type(module).forward is not cls.forward for cls in _CALLED)


def is_quantized(module: nn.Module) -> bool:
    """Whether PEFT knows a quantisation backend for the layer (bitsandbytes, torchao, HQQ, GPTQ, ...)."""
    return quantization_backend(module, get_apply_tensor_subclass=lambda: None) is not None


def quantization_backend(module: nn.Module, **kwargs: Any) -> Any:
    """PEFT's backend for a quantised layer, None for a plain one."""
    if type(module) in _CALLED and type(getattr(module, "weight", None)) is nn.Parameter:
        return None  # the usual case, without asking for eight libraries
    return resolve_quantization_backend(module, **kwargs)


def read_weight(module: nn.Module, backend: Any, where: str) -> Tensor:
    """The float weight of a quantised layer, in the module's layout; `where` is the layer's name.

    Raises:
        ValueError: PEFT can call this kind of layer and cannot dequantise it (GPTQ, AWQ, AQLM, EETQ, ...).
    """
    try:
        weight: Tensor = backend.get_base_weight(module)
    except TypeError as error:
        raise ValueError(
            f"{where}: a {backend.backend_name} layer can be called, but PEFT cannot dequantise it, and its weight is needed "
            f"here. Load the base unquantised, or with bitsandbytes or torchao; a method that reads no weight needs none."
        ) from error
    return weight
