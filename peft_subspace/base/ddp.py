"""What holds in every process of DDP: one frozen basis, and adapters whose gradients come once."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .delta import Delta

_LOCAL = threading.local()


def running_ddp() -> Any:
    """The DDP module whose forward this process is in; None if there is none, and in a graph that is being compiled."""
    if torch.compiler.is_compiling() or not dist.is_available() or not dist.is_initialized():
        return None
    return DistributedDataParallel._get_active_ddp_module()


@torch.no_grad()
def send_frozen(model: nn.Module, ddp: Any) -> None:
    """Give all processes the frozen buffers of the first one, whose weights DDP has given them when it was made.

    They are not among what DDP sends (see `ddp_names`), and were prepared from weights that may have differed before.

    Cost: one broadcast of all of them.
    """
    source = dist.get_global_rank(ddp.process_group, 0)
    for module in model.modules():
        if isinstance(module, Delta):
            for buffer in module.buffers(recurse=False):
                whole = buffer.detach().contiguous()
                dist.broadcast(whole, source, group=ddp.process_group)
                buffer.copy_(whole)  # a basis that looks along with another's is no contiguous one


def note_graph() -> None:
    """A forward begins: note whether it is to have a graph."""
    _LOCAL.has_graph = torch.is_grad_enabled()


def refuse_reentrant(deltas: Iterable[Any], where: str) -> None:
    """Raise ValueError if the gradient of a tensor that several layers share would come in parts.

    Reentrant checkpointing runs the forward of a segment without a graph, and a backward of its own later. Each one brings its
    part of such a gradient, and DDP averages over the processes at the first: the rest of it would differ between them.

    Args:
        deltas: the adapters of the layer that is called.
        where: its name.
    """
    if torch.is_grad_enabled() or (ddp := running_ddp()) is None or ddp.static_graph or not getattr(_LOCAL, "has_graph", False):
        return
    for delta in deltas:
        own = set(map(id, delta.parameters(recurse=False)))
        if delta.training and any(tensor.requires_grad and id(tensor) not in own for tensor in delta.trained):
            raise ValueError(
                f"{where}: the adapter shares trained coefficients with other layers, and reentrant activation checkpointing "
                f"under DDP would leave each process with other ones. Use the other kind: use_reentrant=False "
                f"(`model.gradient_checkpointing_enable({{'use_reentrant': False}})`, or `gradient_checkpointing_kwargs` of "
                f"the Trainer); or give every layer coefficients of its own (aTLAS: granularity='block' without `tie_blocks`; "
                f"Concrete: learn_coefficients='layer')."
            )
