# mypy: disable-error-code="no-untyped-def"
"""Copied into site-packages by `python -m peft_subspace autoload enable`; see autoload.py. Imports nothing heavy."""

import importlib.abc
import sys


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Lets the usual finders find `peft`, and makes its loader import peft_subspace afterwards.

    It stays installed: transformers asks for the spec of `peft` to see whether it exists, without importing it.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)  # an editable peft has a finder of its own
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            try:
                import peft_subspace  # noqa: F401
            except Exception as error:  # uninstalled, or broken in any way: PEFT itself must go on working
                print(f"peft_subspace autoload: {type(error).__name__}: {error}", file=sys.stderr)

        spec.loader.exec_module = exec_module
        return spec


def install():
    """Put the finder first, once."""
    if not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())
