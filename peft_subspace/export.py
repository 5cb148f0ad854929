"""From an adapter of this package to plain LoRA, which every serving engine reads."""

from __future__ import annotations

import functools
import json
import logging
import os
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .base import Geometry, SubspaceLayer
from .base.active import chosen_adapter
from .base.batch_norm import BatchNormLayer
from .base.targets import exact_targets
from .task_vectors.output_folder import new_folder
from .task_vectors.places import RECORD, check_place
from .whole_files import write_whole

logger = logging.getLogger(__name__)
PEFT_PREFIX = "base_model.model."


class _Lora(NamedTuple):
    config: LoraConfig
    tensors: dict[str, Tensor]


class LoraExport(_Lora):
    """A LoRA adapter as PEFT would save it, `(config, tensors)`; `adapter_name` says which adapter was exported."""

    adapter_name: str


def to_lora(model: nn.Module, adapter_name: str | None = None) -> LoraExport:
    """The same update as a LoRA adapter of plain PEFT: exact, no SVD.

    All layers get one rank, the largest; the others are padded with zeros, because serving engines do not read
    `rank_pattern`. The scale is inside the factors (`lora_alpha = r`). BatchNorm statistics and whole trained
    modules go along as `modules_to_save`.

    Args:
        model: a PeftModel, or a transformers model with adapters.
        adapter_name: which adapter; None for the active one.

    Returns:
        The config and the tensors, as PEFT would save them; its `adapter_name` is the adapter's.

    Raises:
        ValueError: an adapter that is not there, several active ones and none named, or a layer that PEFT's LoRA cannot
            express, by name.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    adapter_name = chosen_adapter(model, adapter_name)
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}  # layer -> (weight -> A, B)
    layers: dict[str, nn.Module] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    for name, module in base.named_modules():
        if isinstance(module, SubspaceLayer) and module.has_adapter(adapter_name):
            factors[name] = _layer_factors(name, module, adapter_name)
            layers[name] = module.get_base_layer()
        elif isinstance(module, BatchNormLayer) and module.has_adapter(adapter_name):
            statistics = module.statistics()[adapter_name].state_dict()
            saved[name] = {**module.base_layer.state_dict(), **statistics}
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            saved[name] = module.adapter_state_dict(adapter_name, module.state_dict())  # type: ignore[call-arg]
    rank = max(down.shape[0] for weights in factors.values() for down, _ in weights.values())
    state_dict = {}
    for name, weights in factors.items():
        for weight, (down, up) in weights.items():
            state_dict.update(_lora_tensors(name, weight, layers[name], *_padded(down, up, rank)))
    for name, tensors in saved.items():
        state_dict.update({f"{name}.{key}": tensor for key, tensor in tensors.items()})
    lora_config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=exact_targets(set(factors), base),
        modules_to_save=sorted(saved) or None,
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in layers.values()),
        base_model_name_or_path=config.base_model_name_or_path or getattr(base, "name_or_path", None),
        task_type=config.task_type,
        inference_mode=True,
    )
    tensors = {PEFT_PREFIX + key: tensor.detach().clone().contiguous() for key, tensor in state_dict.items()}
    exported = LoraExport(lora_config, tensors)
    exported.adapter_name = adapter_name
    return exported


def save_as_lora(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None, *, overwrite: bool = False
) -> str:
    """Write `to_lora(model)` as a folder that `PeftModel.from_pretrained` loads without this package.

    Args:
        model: a PeftModel, or a transformers model with adapters.
        directory: the folder to make; it appears when it is whole.
        adapter_name: which adapter; the active one by default.
        overwrite: replace an earlier result of this package. Nothing else is ever replaced.

    Returns:
        The name of the adapter, which the log says too.

    Raises:
        ValueError: as `to_lora` says.
        OutputError: the folder already exists with files that this package did not write, or it cannot be written.
    """
    place = check_place(directory, overwrite=overwrite)
    exported = to_lora(model, adapter_name)
    lora_config, state_dict = exported
    names = (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, RECORD)
    with new_folder(place, "export", names, overwrite=overwrite) as folder:
        write_whole(folder / SAFETENSORS_WEIGHTS_NAME, save(state_dict, metadata={"format": "pt"}))
        lora_config.save_pretrained(os.fspath(folder))
        saved = json.loads((folder / CONFIG_NAME).read_bytes())
        for name in ("target_modules", "modules_to_save"):  # sets have no order: the same adapter must give the same bytes
            saved[name] = sorted(saved[name]) if isinstance(saved[name], list) else saved[name]
        write_whole(folder / CONFIG_NAME, json.dumps(saved, indent=2, sort_keys=True))
    logger.info(f"The adapter {exported.adapter_name!r} was saved as LoRA in {os.fspath(directory)}.")
    return exported.adapter_name


def _layer_factors(name: str, layer: SubspaceLayer, adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
    factors = {}
    for container, found in layer.lora_factors(adapter_name).items():
        weight, geometry = layer.geometries[container]
        reason = _no_lora(geometry, layer.get_base_layer()) if found is not None else "its update has no exact LoRA form"
        if found is None or reason:
            raise ValueError(
                f"{name}.{weight}: cannot be exported to LoRA: {reason}. Merge the adapter into the model instead "
                f"(`merge_and_unload`), or train without this layer (exclude_modules)."
            )
        factors[weight] = found
    return factors


def _no_lora(geometry: Geometry, base_layer: nn.Module) -> str | None:
    """Why PEFT's own LoRA layer would compute something else, or None."""
    if geometry.kind == "conv" and geometry.padding_mode != "zeros":
        return f"PEFT's conv LoRA ignores padding_mode={geometry.padding_mode!r}"
    if geometry.kind == "conv" and any(d != 1 for d in geometry.dilation):
        return f"PEFT's conv LoRA ignores dilation={geometry.dilation}"
    if isinstance(base_layer, nn.MultiheadAttention) and not base_layer._qkv_same_embed_dim:
        return "PEFT's LoRA needs query, key and value of one size"
    if isinstance(base_layer, nn.MultiheadAttention) and _peft_adds_out_proj_twice():
        return f"PEFT {peft.__version__} adds the LoRA of a MultiheadAttention's out_proj twice (huggingface/peft#3774)"
    if geometry.reads_own_weight and not isinstance(base_layer, nn.MultiheadAttention):
        return f"{type(base_layer).__name__} has a forward of its own"
    return None


@functools.cache
def _peft_adds_out_proj_twice() -> bool:
    """Ask the installed PEFT: 0.21.2 does, in every forward, and a file made for that would be wrong once it is mended."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        config = LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)
        model: Any = get_peft_model(nn.Sequential(nn.MultiheadAttention(1, 1)), config)
        layer = model.get_base_model()[0]
        projection = layer.base_layer.out_proj
        expected = projection.weight + projection.get_delta_weight("default")
        layer.merge()
        return not torch.allclose(projection.weight, expected)


def _padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - down.shape[0]
    return torch.cat([down, down.new_zeros(missing, *down.shape[1:])]), F.pad(up, (0, missing))


def _lora_tensors(name: str, weight: str, layer: nn.Module, down: Tensor, up: Tensor) -> dict[str, Any]:
    if isinstance(layer, nn.Embedding):
        return {f"{name}.lora_embedding_A": down, f"{name}.lora_embedding_B": up}
    if weight == "out_proj.weight":  # PEFT wraps the projection inside the attention
        name = f"{name}.base_layer.out_proj"
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up.reshape(*up.shape, *[1] * (down.ndim - 2))}
