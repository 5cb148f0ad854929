"""The command `peft-subspace`.

Exit codes: 0 done, 2 recipe or arguments, 3 a model or adapter, 4 the output or the disk, 5 verify, 130 Ctrl-C, 1 a bug.
"""

from __future__ import annotations

from .app import run

__all__ = ["run"]
