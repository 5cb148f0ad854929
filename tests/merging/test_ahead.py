"""The bytes of the next tensors are asked for ahead of the work: all of them, each once, and never too many."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from peft_subspace.merging import ahead
from peft_subspace.merging.ahead import Ahead, in_memory
from peft_subspace.merging.planner import make_plan
from peft_subspace.merging.recipe import make_recipe
from tests.merging.tiny import recipe, trio

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")


def until(condition: object, seconds: float = 20.0) -> bool:
    """Wait for another thread."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(condition())


@pytest.mark.parametrize("room", [0, 3000, 10**9])
def test_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    trio(tmp_path)
    tensors = make_plan(make_recipe(recipe(tmp_path))).tensors
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(ahead, "in_memory", lambda file, offset, length: False)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, length, advice: asked.append((offset, length)))
    monkeypatch.setattr(ahead, "PIECE", 1000)

    def volume() -> int:
        return sum(length for _, length in asked)

    with Ahead(tensors, room) as reading:
        begun = 0
        for number, tensor in enumerate(tensors):
            assert until(lambda need=begun + tensor.bytes_read: volume() >= need)  # the next one is always asked for
            time.sleep(0.01)
            assert volume() <= begun + max(room, tensor.bytes_read)
            begun += tensor.bytes_read
            reading.taken(number)
    assert volume() == sum(tensor.bytes_read for tensor in tensors)
    assert max(length for _, length in asked) <= 1000


def test_it_ends_with_the_work(tmp_path: Path) -> None:
    trio(tmp_path)
    tensors = make_plan(make_recipe(recipe(tmp_path))).tensors
    with pytest.raises(KeyError), Ahead(tensors, room=0) as reading:
        raise KeyError
    assert not reading._thread.is_alive()


def test_what_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(10**6))  # and so it is in the page cache
    file = os.open(path, os.O_RDONLY)
    try:
        assert in_memory(file, 0, 10**6) or not hasattr(os, "RWF_NOWAIT")
        for error in (BlockingIOError(), OSError(errno.EOPNOTSUPP, "no such flag here"), AttributeError()):
            with monkeypatch.context() as patch:
                patch.setattr(os, "preadv", Mock(side_effect=error))
                assert not in_memory(file, 0, 10**6)
    finally:
        os.close(file)
