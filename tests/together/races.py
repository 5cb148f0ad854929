"""Several processes do the same at once. They are forked from one that has torch imported already, so they cost nothing."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 30.0  # seconds


def race(folder: Path, count: int, action: Callable[[Callable[[], None]], Any]) -> list[dict[str, Any]]:
    """Do something in several processes that start at one time.

    Whoever begins to work waits there until all others have ended, so they overlap however fast they are. Reading values of
    a tensor is work.

    Args:
        folder: an empty one, for what the processes have to say.
        count: how many.
        action: called with a function that it may call when it begins to work.

    Returns:
        Of each process: `worked`, whether it began to; `found`, what the action returned; `error`, its exception, or "".
    """
    gate, opener = os.pipe()
    children = []
    for number in range(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a process with threads is forked: torch's are idle
            child = os.fork()
        if child == 0:
            os.close(opener)
            os.read(gate, 1)  # returns when the parent closes the other end
            end = os._exit
            try:
                (folder / f".{number}").write_text(json.dumps(_outcome(folder, count, action)))
                os.rename(folder / f".{number}", folder / f"{number}.json")
            finally:
                end(0)
        children.append(child)
    os.close(gate)
    os.close(opener)
    for child in children:
        os.waitpid(child, 0)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _outcome(folder: Path, count: int, action: Callable[[Callable[[], None]], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"worked": False, "found": None, "error": ""}

    def working() -> None:
        late = time.monotonic() + PATIENCE
        while not found["worked"] and len(list(folder.glob("*.json"))) < count - 1 and time.monotonic() < late:
            time.sleep(0.01)
        found["worked"] = True

    read = os.preadv

    def preadv(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if not flags:  # the read-ahead asks with flags
            working()
        return read(file, buffers, offset, flags)

    os.preadv = preadv
    try:
        found["found"] = action(working)
    except BaseException as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found
