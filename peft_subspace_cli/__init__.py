"""Entry of the command `peft-subspace`.

Importing `peft_subspace` registers its types with PEFT, which takes seconds; a dry run needs neither PEFT nor torch. So the
command is entered here, outside of that package, and puts a stand-in in its place: submodules import as ever, and the package
itself is executed at the first use of one of its names (`peft_subspace.save_as_lora`), in the same module object. A program
that says `import peft_subspace` never meets the stand-in.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
from types import ModuleType
from typing import Any

PACKAGE = "peft_subspace"


class _Package(ModuleType):
    """The package before it is executed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by the import system and by inspection
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]  # from here on it is the package
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def install() -> None:
    """Put the stand-in in place, unless the package is imported already."""
    if PACKAGE in sys.modules:
        return
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    package = importlib.util.module_from_spec(spec)
    package.__class__ = _Package
    sys.modules[PACKAGE] = package


def main() -> None:
    """Run the command line and end the process.

    Importing torch makes some hundred thousand objects that stay: looking through them for garbage as they come, and
    taking them apart one by one at the end, would be a third of what the import costs.
    """
    gc.set_threshold(500_000)
    install()
    from peft_subspace.cli import run

    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads any more, as in `| head`
        code = code or 1
    logging.shutdown()
    os._exit(code)
