"""Hard masks with one bit for each entry."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Booleans of any shape as uint8 `[ceil(n / 8)]`; bit j of byte i is entry 8 i + j of the flat mask, the rest is 0."""
    flat = mask.reshape(-1).to(torch.uint8)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits as booleans `[count]`.

    Raises:
        ValueError: there are fewer bits, or more than a byte more.
    """
    if -(-count // 8) != packed.numel():
        most = 8 * packed.numel()
        raise ValueError(f"{packed.numel()} bytes hold masks of {most - 7} to {most} bits, not {count}.")
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.reshape(-1)[:count].bool()
