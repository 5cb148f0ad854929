"""What holds in every process of DDP: one frozen basis, and adapters whose gradients come once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .delta import Delta


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
