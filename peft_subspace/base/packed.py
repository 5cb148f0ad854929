"""4-bit weights that bitsandbytes has repacked, and what cannot be done with them.

On a CPU with AVX512-BF16, bitsandbytes 0.50 puts a 4-bit weight into another order at the first call in eval mode whose input
needs no gradient. It then dequantises the bytes as if they were in the old order (its own inverse leaves the block maxima
transposed), and the kernel for them has no backward: the gradient of the layer's input would be lost without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

UNPACKED = (
    "To prevent it, set `support_avx512bf16_for_cpu = False` on every Linear4bit of the base right after loading. Or use a "
    "GPU, or load the base unquantised."
)


def is_repacked(module: nn.Module) -> bool:
    """Whether the weight of a layer is in the order that is good for inference only."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def refuse_reading(module: nn.Module, where: str) -> None:
    """Raise ValueError if the weight cannot be read back; `where` is the layer's name."""
    if is_repacked(module):
        raise ValueError(
            f"{where}: bitsandbytes has repacked this 4-bit weight for inference on the CPU and cannot read it back. Merge, or "
            f"add an adapter that reads the weight, before the first forward in eval mode. {UNPACKED}"
        )


def refuse_gradient(module: nn.Module, x: Any, where: str) -> None:
    """Raise ValueError if a gradient would have to go through a repacked weight; `x` is the layer's input."""
    if is_repacked(module) and torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(
            f"{where}: bitsandbytes has repacked this 4-bit weight for inference on the CPU, at a forward in eval mode, and no "
            f"gradient goes through it any more: layers before it would not be trained. {UNPACKED}"
        )
