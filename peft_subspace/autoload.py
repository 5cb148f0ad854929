"""Opt-in: make PEFT know our types in every process of an environment, without an import.

PEFT has no entry points, so a process that never imports `peft_subspace` answers `KeyError: 'FLORA'`. Command-line tools that
cannot be given an import (trl, axolotl, ...) can be helped by a `.pth` file in site-packages, which Python runs at start-up. It
adds a finder that imports this package right after `peft`; torch and peft are not imported any earlier than they would be.

    python -m peft_subspace autoload enable | disable | status

This changes every process of the environment, so it never happens by itself.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

PTH_NAME = "peft_subspace_autoload.pth"
MODULE_NAME = "_peft_subspace_autoload.py"


def _paths() -> tuple[Path, Path]:
    folder = Path(sysconfig.get_path("purelib"))
    return folder / MODULE_NAME, folder / PTH_NAME


def enable() -> None:
    """Install the start-up file into this environment's site-packages."""
    module, pth = _paths()
    source = Path(__file__).with_name("_autoload_hook.py").read_text()
    for path, text in ((module, source), (pth, f"import {module.stem}; {module.stem}.install()\n")):  # the .pth last
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, path)


def disable() -> None:
    """Remove it again; the .pth first, so that Python never looks for a module that is gone."""
    module, pth = _paths()
    pth.unlink(missing_ok=True)
    module.unlink(missing_ok=True)


def is_enabled() -> bool:
    """Whether this environment has the start-up file."""
    return all(path.exists() for path in _paths())
