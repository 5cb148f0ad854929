"""Which of several coefficients belongs to an entry of a weight: by row, column, or at random and yet everywhere the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_PARTS = 256  # a part's number is kept in one byte
CHUNK = 2**18


class Groups:
    """pi: which of K coefficients belongs to an entry of a flat weight of n values. Made when it is first asked for."""

    def __init__(self, count: int, make: Callable[[], Tensor]) -> None:
        self.count, self._make = count, make
        self._numbers: Tensor | None = None

    def part(self, start: int, stop: int, device: torch.device) -> Tensor:
        """`[stop - start]` int64, each in [0, K)."""
        if self._numbers is None or self._numbers.device != device:
            self._numbers = self._make().to(device)
        return self._numbers[start:stop].long()

    def __deepcopy__(self, memo: Any) -> Groups:
        return self

    def __reduce__(self) -> Any:
        return Groups, (self.count, self._make)


def along(geometry: Any, axis: int, length: int) -> Tensor:
    """The index along one axis of the canonical layout, in steps of `length`, for every entry of the flat module layout."""
    sizes = [-1 if a == axis else 1 for a in range(len(geometry.shape))]
    index = torch.arange(geometry.shape[axis], dtype=torch.int32) // length
    found: Tensor = geometry.native(index.view(sizes).expand(geometry.shape)).reshape(-1)
    return found


def partition(size: int, parts: int, seed: int, name: str) -> Tensor:
    """A fixed, evenly random part for every entry of a weight, `[size]` uint8.

    h(e) = mix(mix(low word of e ^ key_0) ^ high word of e ^ key_1), part(e) = floor(K h / 2^32), with the finaliser of
    MurmurHash3 as `mix` and both keys from SHA-256 of the seed and the name. Integer arithmetic on the position alone: the same
    on every machine, device, thread count and in every process, so a file needs the seed and no map.

    Args:
        size: n, entries.
        parts: K, 1 to 256.
        seed: of the adapter.
        name: of the block, so that blocks of one shape have different maps.

    Cost: 25 integer operations an entry, once; n bytes.
    """
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    keys = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
    found = torch.empty(size, dtype=torch.uint8)
    for start in range(0, size, CHUNK):
        position = torch.arange(start, min(start + CHUNK, size))
        mixed = _mix(_mix((position & 0xFFFFFFFF) ^ keys[0]) ^ (position >> 32) ^ keys[1])
        found[start : start + CHUNK] = (mixed * parts) >> 32
    return found


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = _multiply(x ^ (x >> shift), factor)
    return x ^ (x >> 16)


def _multiply(x: Tensor, factor: int) -> Tensor:
    """x * factor modulo 2^32 in int64, by halves: no product may overflow, which is undefined for signed integers."""
    high = (x * (factor >> 16)) & 0xFFFF
    return ((high << 16) + x * (factor & 0xFFFF)) & 0xFFFFFFFF
