"""Which of several coefficients belongs to an entry of a weight: by row, column, or at random and yet everywhere the same."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**18


class Groups:
    """pi: which of K coefficients belongs to an entry of a flat weight of n values.

    Args:
        count: K.
        make: `(start, stop, device)` -> the numbers of these entries, integers in [0, K).
        size: n, to keep all numbers as one byte each once they are asked for; None to make them anew each time.
        run: length of the runs of entries with one number, where they come as 0, 0, ..., 1, 1, ..., K - 1, K - 1, ... and
            again from 0 on: rows and columns, whose values are spread by broadcasting instead of being looked up; else None.
    """

    def __init__(
        self,
        count: int,
        make: Callable[[int, int, torch.device], Tensor],
        size: int | None = None,
        run: int | None = None,
    ) -> None:
        self.count, self._make, self._size, self.run = count, make, size, run
        self._numbers: Tensor | None = None

    def step(self, most: int) -> int:
        """How many entries to take at a time, at most `most`, so that a `Stretch` needs no look-up."""
        if self.run is None or self.run > most:
            return most
        period = self.run * self.count
        unit = period if period <= most else self.run
        return most // unit * unit

    def _shape(self, start: int, count: int) -> tuple[int, int, int] | None:
        """(repetitions, numbers, run) of entries that begin and end with runs, and within or with periods; else None."""
        if self.run is None or start % self.run or count % self.run:
            return None
        period = self.run * self.count
        if start % period == 0 and count % period == 0:
            return count // period, self.count, self.run
        inside = start // period == (start + count - 1) // period
        return (1, count // self.run, self.run) if inside else None

    def at(self, start: int, stop: int, device: torch.device) -> Stretch:
        """pi on the entries [start, stop), for whatever is spread or collected there."""
        return Stretch(self, self._shape(start, stop - start), start, stop, device)

    def part(self, start: int, stop: int, device: torch.device) -> Tensor:
        """`[stop - start]` int64, each in [0, K)."""
        if self._size is None:
            return self._make(start, stop, device).long()
        if self._numbers is None or self._numbers.device != device:
            self._numbers = self._make(0, self._size, device).to(torch.uint8)
        return self._numbers[start:stop].long()

    def __deepcopy__(self, memo: Any) -> Groups:
        return self

    def __reduce__(self) -> Any:
        return Groups, (self.count, self._make, self._size, self.run)


class Stretch:
    """pi on a range of entries; looked up once for all tensors, if it has to be looked up at all."""

    def __init__(self, groups: Groups, shape: tuple[int, int, int] | None, start: int, stop: int, device: torch.device) -> None:
        self._shape = shape
        self._numbers = groups.part(start, stop, device) if shape is None else None
        first = 0 if shape is None or groups.run is None else start // groups.run % groups.count
        self._own = slice(first, first + (0 if shape is None else shape[1]))

    def spread(self, values: Tensor) -> Tensor:
        """values[pi(e)] of all entries, to be read only; `values` `[K]`."""
        if self._shape is None:
            return values[self._numbers]
        return values[self._own].view(1, -1, 1).expand(self._shape).reshape(-1)

    def collect(self, total: Tensor, part: Tensor) -> None:
        """total[k] += the sum of part[e] over the entries of group k, in place; `total` `[K]`."""
        if self._numbers is not None:
            total.index_add_(0, self._numbers, part.to(total.dtype))
        elif self._shape is not None:
            total[self._own] += part.view(self._shape).sum((0, 2), dtype=total.dtype)


def along_axis(geometry: Any, axis: int, length: int = 1) -> dict[str, Any]:
    """The description of groups along one axis of a weight's canonical layout, `length` indices each, for `groups_from`."""
    swapped = geometry.groups if geometry.swapped else 0
    return {"count": geometry.shape[axis] // length, "axis": axis, "length": length, "swapped": swapped}


def groups_from(spec: Mapping[str, Any], shape: Sequence[int], keep: bool = False) -> Groups:
    """The groups that a saved description means; it has numbers and names only, so that it can stand in a JSON file.

    Args:
        spec: `{"count": K, "axis": a, "length": l, "swapped": g}`, see `along`, or `{"count": K, "seed": s, "name": n}`, see
            `partition`.
        shape: of the weight, in the module's layout.
        keep: keep the numbers of a partition in memory, one byte an entry, instead of making them for every part.
    """
    count = spec["count"]
    if "axis" in spec:
        place = tuple(shape), spec["axis"], spec["length"], spec["swapped"]
        return Groups(count, partial(along, *place), run=_run(*place))
    return Groups(count, partial(partition, count, spec["seed"], spec["name"]), math.prod(shape) if keep else None)


def along(
    shape: tuple[int, ...], axis: int, length: int, swapped: int, start: int, stop: int, device: torch.device | None = None
) -> Tensor:
    """floor(i / length) for entries [start, stop), i: the index of an entry along one axis of the canonical layout.

    Args:
        shape: of the weight, in the module's layout.
        axis: of the canonical layout, `[out, in / groups, *kernel]`.
        length: how many indices share a number.
        swapped: 0 if both layouts are one; else g, the number of convolution groups within which the first two axes are
            swapped (1 for Conv1D and embeddings).
        start: first entry of the flat weight.
        stop: behind the last.
        device: where to compute.

    Returns:
        `[stop - start]` int64.
    """
    place = torch.arange(start, stop, device=device)
    if not swapped or axis > 1:
        return place // math.prod(shape[axis + 1 :]) % shape[axis] // length
    first = place // math.prod(shape[1:])
    if axis == 1:
        return first % (shape[0] // swapped) // length
    return (first // (shape[0] // swapped) * shape[1] + place // math.prod(shape[2:]) % shape[1]) // length


def _run(shape: tuple[int, ...], axis: int, length: int, swapped: int) -> int | None:
    """Length of the runs of entries with one number along an axis; None where a convolution's groups break their order."""
    if swapped > 1 and axis < 2:
        return None
    own = {0: 1, 1: 0}.get(axis, axis) if swapped else axis  # the axis of the module's layout
    return math.prod(shape[own + 1 :]) * length


def partition(parts: int, seed: int, name: str, start: int, stop: int, device: torch.device | None = None) -> Tensor:
    """A fixed, evenly random part for entries [start, stop) of a weight, `[stop - start]` uint8.

    h(e) = mix(mix(low word of e ^ key_0) ^ high word of e ^ key_1), part(e) = floor(K h / 2^32), with the finaliser of
    MurmurHash3 as `mix` and both keys from SHA-256 of the seed and the name. Integer arithmetic on the position alone: the same
    on every machine, device, thread count and in every process, so a file needs the seed and no map.

    Args:
        parts: K, 1 to 256.
        seed: of the adapter.
        name: of the block, so that blocks of one shape have different maps.
        start: first entry.
        stop: behind the last.
        device: of the result.

    Cost: 25 integer operations an entry.
    """
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    keys = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
    found = torch.empty(stop - start, dtype=torch.uint8, device=device)
    for first in range(start, stop, CHUNK):
        position = torch.arange(first, min(first + CHUNK, stop), device=device)
        mixed = mix(mix((position & 0xFFFFFFFF) ^ keys[0]) ^ (position >> 32) ^ keys[1])
        found[first - start : first - start + CHUNK] = (mixed * parts) >> 32
    return found


def mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on int64 tensors of values below 2^32."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = _multiply(x ^ (x >> shift), factor)
    return x ^ (x >> 16)


def _multiply(x: Tensor, factor: int) -> Tensor:
    """x * factor modulo 2^32 in int64, by halves: no product may overflow, which is undefined for signed integers."""
    high = (x * (factor >> 16)) & 0xFFFF
    return ((high << 16) + x * (factor & 0xFFFF)) & 0xFFFFFFFF
