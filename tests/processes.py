"""Python in a process of its own. Importing PEFT costs seconds there, so a script should check several things."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def run_two(path: str, *arguments: object, timeout: float = 500, **environment: str) -> str:
    """Run a script of the repository in two processes that torchrun starts; see `run_python`."""
    starter = "-m torch.distributed.run"
    return run_python(
        starter, "--standalone", "--nproc-per-node", 2, REPOSITORY / path, *arguments, timeout=timeout, **environment
    )
