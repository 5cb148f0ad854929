"""Small llamas on quantised weights, and what a merge into such a weight must give, by the formulas of each format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

KINDS = ["bnb4", "bnb8", "torchao", "torchao4"]
GROUP = 32  # columns of one scale of torchao's int4


def write_llama(folder: Path) -> Path:
    """An unquantised llama of two blocks."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=4, **sizes)).save_pretrained(folder)
    return folder


def torchao_config(kind: str) -> Any:
    """torchao's own: `Int4WeightOnlyConfig` has no packing for CPUs in 0.18."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    four = {"weight_dtype": torch.int4, "granularity": PerGroup(GROUP)}
    return IntxWeightOnlyConfig(**four) if kind == "torchao4" else Int8WeightOnlyConfig()


def load(folder: Path, kind: str) -> Any:
    """That llama with its linear layers quantised; the test is skipped where the library is not installed."""
    if kind.startswith("bnb"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (`make quantised` installs it)")
        from transformers import BitsAndBytesConfig

        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        config: Any = BitsAndBytesConfig(**(four if kind == "bnb4" else {"load_in_8bit": True}))
    else:
        pytest.importorskip("torchao", reason="torchao is not installed (`make quantised` installs it)")
        from transformers import TorchAoConfig

        config = TorchAoConfig(torchao_config(kind))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map="cpu")


# What is stored ----------------------------------------------------------------------------------------------------------


def stored(kind: str, weight: Any) -> tuple[Tensor, Tensor]:
    """The codes of a quantised weight, one integer for each entry, and its scales, one for each row or block."""
    if kind == "bnb4":  # two codes in a byte, the first in its upper half
        packed = weight.data.reshape(-1)
        return torch.stack([packed >> 4, packed & 15], 1).view(weight.quant_state.shape), weight.quant_state.absmax
    if kind == "bnb8":
        return weight.data, weight.SCB
    return weight.qdata, weight.scale


def scales(kind: str, weight: Any) -> Tensor:
    """The distance of two codes for every entry; of nf4 the factor of its table of sixteen values."""
    codes, scale = stored(kind, weight)
    scale = scale / 127 if kind == "bnb8" else scale
    return scale.reshape(-1, 1).expand(-1, codes.numel() // scale.numel()).reshape(codes.shape)


def values(kind: str, weight: Any) -> Tensor:
    """The float32 weight that the codes stand for."""
    codes = stored(kind, weight)[0]
    return scales(kind, weight) * (weight.quant_state.code[codes.long()] if kind == "bnb4" else codes.float())


def half_step(kind: str, weight: Any) -> Tensor:
    """How far the nearest code may be from an entry in the range of the codes."""
    if kind == "bnb4":
        return scales(kind, weight) * weight.quant_state.code.diff().max() / 2
    return scales(kind, weight) / 2


def quantised(kind: str, weight: Tensor) -> Any:
    """A float weight, quantised by the library's own function."""
    if kind.startswith("bnb"):
        import bitsandbytes as bnb

        four = {"quant_type": "nf4", "compress_statistics": False}
        made = bnb.nn.Params4bit(weight, requires_grad=False, **four) if kind == "bnb4" else bnb.nn.Int8Params(weight, False)
        return made.to("cpu")
    from torchao import quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, torchao_config(kind))
    return layer.weight
