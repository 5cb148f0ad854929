"""Ends a merge by SIGKILL at random points, resumes it, and compares the bytes. `python -m tests.merging.crashes 50` does 50.

Every child is forked from a process that has torch imported already. The point is a system call: the child counts its writes,
cuts, syncs and renames, and kills itself before, after, or half-way through the one that was chosen. Some children are killed
by a timer as well, wherever they are.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peft_subspace.merging import merge, verify
from tests.merging.tiny import contents, recipe, trio

CALLS = ("pwrite", "write", "ftruncate", "fsync", "rename", "open", "close", "mkdir")


class _Killer:
    """Wraps system calls; the one with the number `point` is the process's last."""

    def __init__(self, point: int, where: str) -> None:
        self.point, self.where, self.count, self.lock = point, where, 0, threading.Lock()
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.lock:
                self.count += 1
                last = self.count == self.point
            if last and self.where == "half" and name in ("pwrite", "write"):
                file, data, *rest = args
                call(file, bytes(data)[: len(data) // 2], *rest)
            elif last and self.where == "after":
                call(*args, **kwargs)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper


def in_child(table: dict[str, Any], out: Path, point: int = 0, where: str = "before", **settings: Any) -> tuple[int, int]:
    """Run a merge in a forked process; its exit status, and the number of system calls it made if it ended by itself."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a process with threads is forked: torch's are idle
        child = os.fork()
    if child == 0:
        status = 1
        try:
            write, end = os.write, os._exit
            killer = _Killer(point, where)
            merge(table, out, **settings)
            write(writer, str(killer.count).encode())
            status = 0
        except Exception as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            end(status)
    os.close(writer)
    if where == "timer":
        time.sleep(point / 1e6)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        count = pipe.read()
    return status, int(count or 0)


def run(folder: Path, points: int, seed: int = 0, method: str = "dare_ties") -> dict[str, int]:
    """Kill a merge at random points, resume until it ends by itself, compare with an undisturbed one.

    Returns:
        How many merges were killed in all, how many found the journal of an earlier one, how many results were compared.
    """
    torch.set_num_threads(1)
    trio(folder, torch.bfloat16)
    table = recipe(folder, method, parameters={"density": 0.5}, subspace={"shard_size": 6000})
    started = time.monotonic()
    status, calls = in_child(table, folder / "whole", threads=2)
    took = time.monotonic() - started
    assert status == 0
    assert calls > 60
    expected = contents(folder / "whole")
    chance, found = random.Random(seed), {"killed": 0, "resumed": 0, "compared": 0}
    out = folder / "out"
    for number in range(points):
        for attempt in range(6):
            last = attempt == 5
            where = chance.choice(["before", "half", "after", "timer"])
            point = 0 if last else round(took * 1e6 * chance.random()) if where == "timer" else chance.randint(1, calls)
            journal = folder / "out.partial.journal"
            found["resumed"] += journal.exists() and journal.stat().st_size > 0
            status, _ = in_child(table, out, point, "before" if last else where, threads=1 + number % 3, resume=True)
            assert status in (0, signal.SIGKILL), status
            if status == 0:
                break
            found["killed"] += 1
        assert status == 0
        assert contents(out) == expected, f"point {number} of seed {seed}"
        verify(out)
        assert not list(folder.glob("out.*")), "nothing is left beside the result"
        found["compared"] += 1
        shutil.rmtree(out)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("dare_ties", "della", "linear"):
            print(name, run(Path(scratch) / name, int(sys.argv[1]), seed=int(time.time())))
