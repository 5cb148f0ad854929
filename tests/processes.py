"""Python in a process of its own. Importing PEFT costs seconds there, so a script should check several things."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

REPOSITORY = Path(__file__).parents[1]


def run_python(script: str, *arguments: object, timeout: float = 300, **environment: str) -> str:
    """Run a script, or `-m module`, with this repository importable; returns what it printed.

    Raises:
        AssertionError: the process failed; the message has its stderr.
    """
    command = ["-m", script.removeprefix("-m ")] if script.startswith("-m ") else ["-c", script]
    result = subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def peak_growth(script: str, *arguments: object) -> int:
    """The bytes that a script prints as its growth, or a skip where the system does not tell the peak ("None").

    The allocator gives everything back at once: else a peak is that of its own holes, which differ by tens of megabytes
    from one run to the next.
    """
    printed = run_python(script, *arguments, MALLOC_MMAP_THRESHOLD_="65536").strip()
    if printed == "None":
        pytest.skip("this system does not tell the peak of a process")
    return int(printed)


def report_of_two(
    script: str, factory: pytest.TempPathFactory, where: str = "distributed", **environment: str
) -> tuple[Path, dict[str, Any]]:
    """A folder, and the report that a script of `tests/{where}` wrote there from two processes that torchrun starts.

    To start them costs seconds and both cores, so it is done once for all tests, also if pytest-xdist deals these out to
    several workers: the others wait.
    """
    folder = factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / script
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.json").exists():
            folder.mkdir()
            path = REPOSITORY / "tests" / where / f"{script}.py"
            starter = ["--standalone", "--nproc-per-node", 2, path, folder]
            run_python("-m torch.distributed.run", *starter, timeout=500, POOLS=str(folder / "pools"), **environment)
    return folder, json.loads((folder / "report.json").read_text())


def leave() -> None:
    """End a process of several together with the others: the threads of one that is gone may abort those that are left."""
    import torch.distributed as dist  # most who import this module start processes and have no use for it

    dist.barrier()
    dist.destroy_process_group()
