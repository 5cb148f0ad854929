"""Asking the system for bytes before they are needed. Needs no torch: the disk works while torch is imported."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from functools import partial
from types import TracebackType

from ..task_vectors.headers import TensorHeader
from .plan import TensorPlan

ROOM = 2**28  # bytes that may lie ready for tensors that nobody works on yet; in the page cache, not in private memory
PIECE = 2**23


class Ahead:
    """A thread that has the bytes of the next tensors read into the page cache; ends with the `with` block.

    Args:
        tensors: what will be read, in order.
        room: how many bytes to be ahead by; the next tensor's, if they are more.
    """

    def __init__(self, tensors: Sequence[TensorPlan], room: int = ROOM) -> None:
        self._tensors, self._room = tensors, room
        self._taken, self._stopped = 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> Ahead:
        if hasattr(os, "posix_fadvise"):
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def taken(self, number: int) -> None:
        """Somebody works on the tensor of this number now."""
        with self._changed:
            self._taken = max(self._taken, number + 1)
            self._changed.notify()

    def _run(self) -> None:
        starts = [0]
        for tensor in self._tensors:
            starts.append(starts[-1] + tensor.bytes_read)
        for number, tensor in enumerate(self._tensors):
            with self._changed:
                self._changed.wait_for(partial(self._may, starts, number))
            if number < self._taken:  # it is being read already
                continue
            for header in tensor.headers:
                if self._stopped:
                    return
                with contextlib.suppress(OSError):  # the reader will say it better
                    self._ask(header)

    def _may(self, starts: list[int], number: int) -> bool:
        return self._stopped or number <= self._taken or starts[number + 1] - starts[self._taken] <= self._room

    def _ask(self, header: TensorHeader) -> None:
        file = os.open(header.path, os.O_RDONLY)
        try:
            for start in range(0, header.nbytes, PIECE):
                length = min(PIECE, header.nbytes - start)
                if not self._stopped and not in_memory(file, header.offset + start, length):
                    os.posix_fadvise(file, header.offset + start, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def in_memory(file: int, offset: int, length: int) -> bool:
    """Whether the first, the last and three more bytes of a range can be had without the disk.

    Asking for a range that is there takes the system about as long as copying a tenth of it.
    """
    try:
        return all(os.preadv(file, [bytearray(1)], offset + (length - 1) * part // 4, os.RWF_NOWAIT) for part in range(5))
    except (OSError, AttributeError):  # they cannot, or this system or this disk does not say
        return False
