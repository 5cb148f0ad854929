"""Values of tensors, any range of them, without mapping files into memory."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from .deltas import ByRows, Delta, LowRank, StoredDelta
from .errors import InputError
from .headers import ITEM_SIZES, TensorHeader, opened
from .models import Given

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip
ROW_BLOCK = 2**18  # values of a low-rank product that are computed at a time, whatever range is asked for


class Reader:
    """Reads for one thread, into buffers that it uses again: a tensor from `stored` is good until the same slot is read.

    Args:
        room: bytes of values that it may keep between `hold` and `forget`, so that they are read once.
    """

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self._buffers: dict[int, Tensor] = {}
        self._store: Tensor | None = None
        self._held: dict[tuple[TensorHeader, int, int], Tensor] = {}
        self._used: int | None = None  # bytes of the store that are taken; None while nothing is held

    def hold(self, nbytes: int) -> None:
        """Keep what is read from here on, if all of it has room: a tensor that is read several times."""
        if 0 < nbytes <= self.room:
            if self._store is None:
                self._store = torch.empty(self.room + 2**16, dtype=torch.uint8)  # and what aligning its parts takes
            self._used = 0

    def stored(self, header: TensorHeader, start: int, stop: int, slot: int) -> Tensor:
        """Values [start, stop) of a tensor in a file, flat, in its own dtype."""
        key = header, start, stop
        held = self._held.get(key)
        if held is not None:
            return held
        size = ITEM_SIZES[header.dtype]
        length = (stop - start) * size
        buffer = self._place(length)
        keep = buffer is not None
        if buffer is None:
            buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < length:
            buffer = self._buffers[slot] = torch.empty(length, dtype=torch.uint8)
        read_into(header, buffer.numpy().data[:length], header.offset + start * size)
        values = buffer[:length].view(DTYPES[header.dtype])
        if keep:
            self._held[key] = values
        return values

    def _place(self, length: int) -> Tensor | None:
        """Free bytes of the store; None if nothing is held, or it is full."""
        if self._used is None or self._store is None or self._used + length > self._store.numel():
            return None
        start = self._used
        self._used += -(-length // 64) * 64
        return self._store[start : start + length]

    def forget(self) -> None:
        """Let go of what is held, and give large buffers back."""
        self._held, self._used = {}, None
        self._buffers = {slot: buffer for slot, buffer in self._buffers.items() if buffer.numel() <= 2**25}


def read_into(header: TensorHeader, view: memoryview, offset: int) -> None:
    """Fill a buffer from a file.

    Raises:
        InputError: the file ends before its header says so, is another one than when its header was read, or cannot be read.
    """
    try:
        with opened(header) as file:
            done = 0
            while done < len(view):
                count = os.preadv(file, [view[done:]], offset + done)
                if count == 0:
                    raise InputError(f"{header.path}: became shorter while it was read, at tensor {header.name!r}.")
                done += count
    except OSError as error:
        raise InputError(f"{header.path}: tensor {header.name!r} cannot be read: {error.strerror or error}.") from error


def read_tensor(header: TensorHeader) -> Tensor:
    """A whole tensor, in its own dtype and shape, in memory of its own."""
    flat = torch.empty(header.nbytes, dtype=torch.uint8)
    if flat.numel():
        read_into(header, flat.numpy().data, header.offset)
    return flat.view(DTYPES[header.dtype]).reshape(header.shape)


class DeltaReader:
    """Values of one delta, by range.

    Rows of what is not stored are computed by blocks that begin at fixed rows, so that a value does not depend on the
    range that it was asked for in (a matrix product rounds by the sizes of its operands).
    """

    def __init__(self, delta: Delta, read: Callable[[TensorHeader], Tensor] = read_tensor) -> None:
        self.delta = delta
        self._block: tuple[int, Tensor] | None = None
        if isinstance(delta, LowRank):
            left, right = (factor.contiguous() for factor in delta.factors(read))
            self.columns = right.shape[1]
            self._compute: Callable[[int, int], Tensor] = lambda first, stop: left[first:stop] @ right
        elif isinstance(delta, ByRows):
            self.columns, self._compute = delta.columns, delta.row_reader(read)
        else:
            self.columns = 1
        self.rows = max(1, ROW_BLOCK // max(1, self.columns))

    def part(self, start: int, stop: int, reader: Reader, slot: int) -> Tensor:
        """Values [start, stop), flat, in float32 or the dtype of the file."""
        if isinstance(self.delta, StoredDelta):
            return reader.stored(self.delta.header, start, stop, slot)
        size = self.rows * self.columns
        out = torch.empty(stop - start)
        for number in range(start // size, -(-stop // size)):
            first = number * size
            block = self._rows(number)
            low, high = max(start, first), min(stop, first + block.numel())
            out[low - start : high - start] = block[low - first : high - first]
        return out

    def _rows(self, number: int) -> Tensor:
        if self._block is None or self._block[0] != number:
            self._block = number, self._compute(number * self.rows, (number + 1) * self.rows).reshape(-1)
        return self._block[1]


class GivenReader:
    """Values of what a model gives to one tensor, by range.

    Args:
        given: what is read.
        dtype: of the sum, where there is one.
        reader: of the thread.
        slot: the first of `slots` numbers of buffers that are for it alone.
    """

    def __init__(self, given: Given, dtype: torch.dtype, reader: Reader, slot: int) -> None:
        self.given, self.dtype, self.reader, self.slot = given, dtype, reader, slot
        self.deltas = [DeltaReader(delta) for delta in given.deltas]

    @property
    def is_delta(self) -> bool:
        """Whether it is something to be added to the base."""
        return self.given.values is None

    @property
    def slots(self) -> int:
        """How many buffers it uses."""
        return 1 + len(self.deltas)

    def part(self, start: int, stop: int, base: Tensor | None) -> Tensor:
        """Values [start, stop), flat. Rows that a shorter vocabulary lacks are the base's."""
        own = self._own(start, stop, base)
        for number, delta in enumerate(self.deltas):
            found = delta.part(start, stop, self.reader, self.slot + 1 + number)
            own = found if own is None else own.to(self.dtype) + found
        return torch.zeros(stop - start, dtype=self.dtype) if own is None else own

    def _own(self, start: int, stop: int, base: Tensor | None) -> Tensor | None:
        values = self.given.values
        if values is None:
            return None
        there = min(stop, values.count)
        if there == stop:
            return self.reader.stored(values, start, stop, self.slot)
        assert base is not None  # the plan asks for a base where rows are missing
        padded = base.to(self.dtype, copy=True)
        if there > start:
            padded[: there - start] = self.reader.stored(values, start, there, self.slot)
        return padded
