"""Tensors of which a process holds a share only: FSDP2's outside of their unit's forward, ZeRO-3's of their module's."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor


def is_share(tensor: Tensor) -> bool:
    """Whether a tensor is one process's share. DeepSpeed keeps the whole shape of a ZeRO-3 parameter beside its empty data."""
    return isinstance(tensor, DTensor) or tuple(getattr(tensor, "ds_shape", tensor.shape)) != tuple(tensor.shape)


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
