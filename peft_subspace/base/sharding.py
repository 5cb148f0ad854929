"""Tensors of which a process holds a share only: FSDP2's outside of their unit's forward, ZeRO-3's of their module's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_share(tensor: Tensor) -> bool:
    """Whether a tensor is one process's share. DeepSpeed keeps the whole shape of a ZeRO-3 parameter beside its empty data."""
    return isinstance(tensor, DTensor) or tuple(getattr(tensor, "ds_shape", tensor.shape)) != tuple(tensor.shape)


def is_empty_share(tensor: Tensor, parameter: Tensor | None) -> bool:
    """Whether what a state has of a parameter is ZeRO-3's empty data of it."""
    whole = getattr(parameter, "ds_shape", None)
    return whole is not None and tuple(tensor.shape) != tuple(whole)


def refuse_shares(tensors: Iterable[Tensor], where: str, way_out: str) -> None:
    """Raise ValueError if one of the tensors is a share.

    Args:
        tensors: a weight, and the tensors of the adapters that act on it.
        where: the weight's name in the model.
        way_out: what the caller of this function can do instead.
    """
    if any(is_share(tensor) for tensor in tensors):
        raise ValueError(
            f"{where} is sharded over several processes (FSDP, ZeRO-3), this one has its share only, and whole tensors are "
            f"needed here. {way_out}"
        )


def refuse_sharded_targets(model: nn.Module, targets: Mapping[str, Iterable[str]], method: str) -> None:
    """Raise ValueError if a layer that is to be adapted is sharded by tensor parallelism or FSDP2 already.

    An adapter made on a share has the share's shape, or reads a weight that is not the one the layer computes with. ZeRO-3 is
    fine: its parameters know their whole shapes.

    Args:
        model: the base.
        targets: name of a layer, or of a bare parameter, -> names of its weights.
        method: the method's name, for the message.
    """
    parallel = getattr(model, "_tp_size", None) or 1
    for name, weights in targets.items():
        for weight in weights:
            module: Any = model.get_submodule(name.removesuffix(f".{weight}") if name != weight else "")
            while hasattr(module, "base_layer"):
                module = module.base_layer
            owner = module.get_submodule(weight.rpartition(".")[0])
            plan = getattr(owner, "_hf_tp_plan", None)
            if not (isinstance(owner._parameters.get(weight.rpartition(".")[2]), DTensor) or plan):
                continue
            if plan or parallel > 1:
                how = f"tensor parallelism (tp_plan, {parallel} processes)"
                way_out = (
                    "Load the base without tp_plan, and train with DDP, FSDP or ZeRO. To serve with tensor parallelism, merge "
                    "the adapter into the base first (`merge_and_unload`, `save_pretrained`), or export it to LoRA where it "
                    "has that form (`to_lora`)."
                )
            else:
                how, way_out = (
                    "FSDP2 (`fully_shard`)",
                    "Call `get_peft_model` or `load_adapter` first and `fully_shard` afterwards.",
                )
            raise ValueError(f"{name}: its {weight} is sharded by {how}, and {method} needs the whole layer. {way_out}")
